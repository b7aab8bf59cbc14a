"""A solver that is an MPI program, called like a function: heat in a plate, by conjugate gradients on four ranks, or on `--ranks`,
of which `--ranks-per-node` are on each host of a cluster.

What to look at: `solve` is written as for `mpirun -n 4`, on the communicator of its gang, and each rank knows its own rows only. But
the driver calls it like any remote function: it hands over an array, gets the parts back, and could send them on to other tasks. Several
plates are solved by several calls, one after the other or, where there are enough CPUs, side by side.
"""

import argparse

import hpc_ray as ray
import numpy as np

SIZE = 32  # the plate has SIZE rows of SIZE inner points; its rim is at 0 degrees


@ray.remote(mpi_ranks=4, num_cpus=0.25)
def solve(heat, tolerance=1e-10):
    """This rank's rows of the temperatures for which the heat that comes in, `heat`, flows off over the rim; and the steps taken."""
    comm = ray.mpi_comm()
    first, last = comm.rank * len(heat) // comm.size, (comm.rank + 1) * len(heat) // comm.size
    above = comm.rank - 1 if comm.rank > 0 else -1
    below = comm.rank + 1 if comm.rank < comm.size - 1 else -1

    def flow(temperature):
        """What leaves each point for its four neighbours. The rows next to ours are those of other ranks."""
        padded = np.pad(temperature, 1)
        requests = [comm.isend(temperature[0], above)] if above >= 0 else []
        requests += [comm.isend(temperature[-1], below)] if below >= 0 else []
        if above >= 0:
            padded[0, 1:-1] = comm.recv(source=above)
        if below >= 0:
            padded[-1, 1:-1] = comm.recv(source=below)
        for request in requests:
            request.wait()
        return 4 * temperature - padded[:-2, 1:-1] - padded[2:, 1:-1] - padded[1:-1, :-2] - padded[1:-1, 2:]

    def product(a, b):
        return comm.allreduce(float(np.vdot(a, b)))

    temperature = np.zeros_like(heat[first:last])
    residual = heat[first:last].copy()
    direction = residual
    size = product(residual, residual)
    goal = tolerance**2 * size
    steps = 0
    while size > goal:
        image = flow(direction)
        step = size / product(direction, image)
        temperature = temperature + step * direction
        residual = residual - step * image
        size, before = product(residual, residual), size
        direction = residual + size / before * direction
        steps += 1
    return temperature, steps


def serial(heat):
    """The same by numpy, in one piece: SIZE⁴ numbers."""
    line = 2 * np.eye(SIZE) - np.eye(SIZE, k=1) - np.eye(SIZE, k=-1)
    matrix = np.kron(line, np.eye(SIZE)) + np.kron(np.eye(SIZE), line)
    return np.linalg.solve(matrix, heat.ravel()).reshape(heat.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, help="default: as many as there is room for")
    given = parser.parse_args()
    ray.init()
    on_ranks = solve.options(mpi_ranks=given.ranks, mpi_ranks_per_node=given.ranks_per_node)
    plates = {}
    plates["a flame below the middle"] = np.zeros((SIZE, SIZE))
    plates["a flame below the middle"][SIZE // 2, SIZE // 2] = 100.0
    plates["warmth from everywhere"] = np.full((SIZE, SIZE), 0.5)
    parts = {name: on_ranks.remote(heat) for name, heat in plates.items()}
    for name, heat in plates.items():
        found = ray.get(parts[name])
        temperature = np.vstack([rows for rows, _ in found])
        print(f"{name}: up to {temperature.max():.2f} degrees, after {found[0][1]} steps on {len(found)} ranks")
        print("  the same as in one piece:", bool(np.allclose(temperature, serial(heat), atol=1e-6)))


if __name__ == "__main__":
    main()

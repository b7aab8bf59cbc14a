"""hpc_ray beside what the machine does without it, a part at a time: ``floor.py compute``. Run by ``bench.bare`` as a script.

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

STEPS = 1_500_000  # of a task that computes: about 50 ms


def work(steps: int) -> int:
    total = 0
    for number in range(steps):
        total += number & 7
    return total


def took_s(what: Callable[[], object]) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin


def told(ours: list[float], bare: list[float], units: int) -> dict:
    """Seconds of each round; the first ones only show what is new to everybody then."""
    return {"ours": ours[1:], "bare": bare[1:], "first": ours[0], "units": units}


Parts = tuple[tuple[list[float], Callable[[], object]], ...]  # of each side: seconds found, and what takes them


def in_turn(parts: Parts, rounds: int) -> None:
    for number in range(rounds + 1):
        for found, part in parts if number % 2 else reversed(parts):
            found.append(took_s(part))


def compute(rounds: int, size: int) -> dict:
    """Tasks that compute, on all cores: seconds of each round, in turn by us and by a pool of processes."""
    import hpc_ray as ray

    cores = len(os.sched_getaffinity(0))
    steps = [STEPS] * (12 * cores)
    ours, pools = [], []
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        ray.init(address="local", num_cpus=cores, include_dashboard=False)
        task = ray.remote(work)
        parts = (
            (ours, lambda: ray.get([task.remote(some) for some in steps])),
            (pools, lambda: pool.map(work, steps, chunksize=1)),
        )
        in_turn(parts, rounds)
        ray.shutdown()
    return told(ours, pools, len(steps))


def rollouts(rounds: int, size: int) -> dict:
    """The talks' rollouts, each with a policy that is larger than the caches, by tasks and by a pool of processes that have it already."""
    import programs

    import hpc_ray as ray

    cores, policy = len(os.sched_getaffinity(0)), programs.Policy(programs.WIDTH)
    todo = list(enumerate(programs.lengths(programs.ROLLOUTS)))
    ours, pools = [], []
    run = functools.partial(programs.rollout, policy)
    with multiprocessing.get_context("fork").Pool(cores, _have, (run,)) as pool:
        ray.init(address="local", num_cpus=cores, include_dashboard=False)
        task, reference = ray.remote(programs.rollout), ray.put(policy)
        parts = (
            (ours, lambda: ray.get([task.remote(reference, *one) for one in todo])),
            (pools, lambda: pool.starmap(_rollout, todo, chunksize=1)),
        )
        in_turn(parts, rounds)
        ray.shutdown()
    return told(ours, pools, sum(steps for _, steps in todo))


def _have(run: Callable[..., int]) -> None:
    globals()["run"] = run


def _rollout(*arguments: int) -> int:
    found: int = globals()["run"](*arguments)
    return found


def evolution(rounds: int, size: int) -> dict:
    """The talks' evolution strategies with one worker, and the same without any, in one process."""
    import programs

    import hpc_ray as ray

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    worker, alone = programs.actor(ray, programs.Evaluator), programs.Evaluator()

    def by_worker(weights: np.ndarray, seeds: range) -> list[int]:
        policy = ray.put(weights)
        return ray.get([worker.evaluate.remote(policy, seed) for seed in seeds])

    ours, bare = [], []
    for _ in range(rounds + 1):
        ours.append(1 / programs.evolve(by_worker, 1, 0.3))
        bare.append(1 / programs.evolve(lambda weights, seeds: [alone.evaluate(weights, seed) for seed in seeds], 1, 0.3))
    ray.shutdown()
    return told(ours, bare, 1)


def put(rounds: int, size: int) -> dict:
    """A large array into the store, and its copy."""
    import hpc_ray as ray

    ray.init(address="local", num_cpus=1, object_store_memory=3 * size, include_dashboard=False)
    source = np.ones(size, np.uint8)
    target = np.ones(size, np.uint8)
    ours, copies = [], []
    for _ in range(rounds + 1):
        kept = []
        ours.append(took_s(lambda kept=kept: kept.append(ray.put(source))))
        del kept
        copies.append(took_s(lambda: np.copyto(target, source)))
    ray.shutdown()
    return told(ours, copies, size)


def send(rounds: int, size: int) -> dict:
    """A large object that a task on another virtual node wants, over MPI: from the call to its answer."""
    import hpc_ray as ray
    from hpc_ray.cluster_utils import Cluster
    from hpc_ray.launcher import world

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 3 * size})
    cluster.add_node(num_cpus=1, resources={"there": 1}, object_store_memory=3 * size)
    ray.init(address=cluster.address)

    @ray.remote(resources={"there": 1}, num_cpus=0)
    class Reader:
        def first(self, value: np.ndarray) -> int:
            return int(value[0])

    reader = Reader.remote()
    source = np.ones(size, np.uint8)
    assert ray.get(reader.first.remote(source[:10])) == 1
    ours = []
    for _ in range(rounds + 1):
        value = ray.put(source)
        ours.append(took_s(lambda value=value: ray.get(reader.first.remote(value))))
        del value
        time.sleep(0.1)  # both copies are freed
    ray.shutdown()
    cluster.shutdown()
    mpirun = [world.find_mpirun().path, "-n", "2", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
    program = [sys.executable, __file__, "ranks", "--rounds", str(rounds), "--mib", str(size >> 20)]
    done = subprocess.run([*mpirun, *program], capture_output=True, text=True, timeout=120, check=True)
    return told(ours, json.loads(done.stdout.splitlines()[-1]), size)


def ranks(rounds: int, size: int) -> list[float]:
    """The same bytes by Send and Recv of two ranks, into memory that is there, and an answer."""
    from mpi4py import MPI

    both = MPI.COMM_WORLD
    memory, answer = np.ones(size, np.uint8), np.ones(1, np.uint8)
    found = []
    for _ in range(rounds + 1):
        both.Barrier()
        begin = time.perf_counter()
        if both.rank == 0:
            both.Send(memory, 1)
            both.Recv(answer, 1)
        else:
            both.Recv(memory, 0)
            both.Send(answer, 0)
        found.append(time.perf_counter() - begin)
    if both.rank:
        sys.exit()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("compute", "rollouts", "evolution", "put", "send", "ranks"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--mib", type=int, default=256)
    arguments = parser.parse_args()
    print(json.dumps(globals()[arguments.part](arguments.rounds, arguments.mib << 20)), flush=True)


if __name__ == "__main__":
    main()

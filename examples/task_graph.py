"""Tasks that wait for each other's results: a graph that is built while it runs.

From "Introduction to Ray" (the pages "Task API"). What to look at: `add` is handed references, so it starts when both arrays
are there, wherever they are; the driver never sees them. No line before `ray.get` waits for anything. The second part
builds a larger graph in the same way, a tree that adds up eight files.
"""

import tempfile
from pathlib import Path

import hpc_ray as ray
import numpy as np


@ray.remote
def read_array(file):
    return np.load(file)


@ray.remote
def add(a, b):
    return np.add(a, b)


def write_files(folder, count):
    """Files with the harmonics of a square wave, which only all together look like one."""
    time = np.linspace(0, 1, 100_001)
    files = [Path(folder, f"harmonic-{2 * i + 1}.npy").absolute() for i in range(count)]
    for i, file in enumerate(files):
        np.save(file, 4 / np.pi * np.sin(2 * np.pi * (2 * i + 1) * time) / (2 * i + 1))
    return files


def main():
    # In the current folder, since on a cluster that is more likely than /tmp to be there on all nodes.
    with tempfile.TemporaryDirectory(dir=".", prefix="task_graph-") as folder:
        files = write_files(folder, 8)

        id1 = read_array.remote(files[0])
        id2 = read_array.remote(files[1])
        id = add.remote(id1, id2)
        sum = ray.get(id)
        print(f"two files:   {len(sum):,} numbers, {sum[25_000]:.6f} at time 0.25 (a square wave: 1)")

        level = [read_array.remote(file) for file in files]
        tasks = len(level)
        while len(level) > 1:  # Add neighbours until one is left.
            level = [add.remote(a, b) for a, b in zip(level[::2], level[1::2])]
            tasks += len(level)
        wave = ray.get(level[0])
        print(f"eight files: {len(wave):,} numbers, {wave[25_000]:.6f} at time 0.25, by {tasks} tasks")

        expected = np.sum([np.load(file) for file in files], axis=0)
        print("the same as without tasks:", bool(np.allclose(wave, expected)))


if __name__ == "__main__":
    ray.init()
    main()

"""What an idle session costs, and that a long one does not grow. The numbers are printed; see ``soak.py`` for long runs."""

from __future__ import annotations

import os
import time

import workloads

import hpc_ray as ray


def test_idle():
    """At rest nobody runs, and each worker has three threads at most."""
    ray.init(num_cpus=8)
    workloads.eventually(lambda: len(workloads.workers()), 8)
    workloads.eventually(lambda: {row["state"] for row in workloads.workers()}, {"IDLE"})
    pids = [row["pid"] for row in workloads.workers()]
    before = workloads.cpu_seconds(pids)
    time.sleep(3)
    print(f"8 idle workers use {(workloads.cpu_seconds(pids) - before) / 3:.2%} of a core")
    assert max(len(os.listdir(f"/proc/{pid}/task")) for pid in pids) <= 3


def test_nothing_grows(cluster):
    """Tables, memory and descriptors of all processes after many tasks, actors and objects as after a few."""

    @ray.remote
    def increment(x):
        return x + 1

    @ray.remote(num_cpus=0)
    class Actor:
        def ping(self):
            return 1

    def some():
        for _ in range(10):
            assert ray.get([increment.remote(i) for i in range(2000)])[-1] == 2000
            actors = [Actor.remote() for _ in range(4)]
            assert ray.get([actor.ping.remote() for actor in actors]) == [1] * 4
            del actors
            ray.get([ray.put(bytes(200_000)) for _ in range(20)])
        workloads.assert_all_released()

    some()
    first = workloads.sizes()
    for _ in workloads.rounds(3):
        some()
    last = workloads.sizes()
    for name, (memory, descriptors) in first.items():
        assert last[name][0] - memory < 30_000_000, (name, first, last)
        assert last[name][1] <= descriptors + 8, (name, first, last)

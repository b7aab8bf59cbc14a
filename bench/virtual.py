"""What ``bench.scale`` predicts, measured on virtual nodes of this machine: ``virtual.py --nodes 4``. Run by the runner as a script.

Prints one line of JSON: the rows, the processor time of each kind of process in each phase, and how much of the machine other
programs left to them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

import hpc_ray as ray
from hpc_ray import api
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def cpu_s(pid: int) -> float:
    """Processor time of all threads of a process, in seconds; finer than the clock's ticks."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for path in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, ValueError):
                total += int((path / "schedstat").read_text().split()[0])
    return total / 1e9


def kind_of(process: psutil.Process) -> str:
    name = process.name()
    if name.startswith("hpc_ray::"):
        name = name.removeprefix("hpc_ray::")
        return name if name in ("gcs", "raylet") else "worker"
    line = " ".join(process.cmdline())
    return "link" if "launcher.rank" in line else "fork_server" if "launcher.node" in line else "launcher"


class Phase:
    """Seconds, and processor time by kind of process, between ``with`` and its end."""

    def __enter__(self) -> Phase:
        self.before = self._look()
        self.busy = self._machine()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.begin
        after, busy = self._look(), self._machine()
        self.cpu: dict[str, float] = defaultdict(float)
        for pid, (kind, spent) in after.items():
            self.cpu[kind] += spent - self.before.get(pid, (kind, 0.0))[1]
        cores = os.cpu_count() or 1
        others = max(0.0, busy - self.busy - sum(self.cpu.values()))
        self.free = max(0.1, 1 - others / (cores * self.seconds))  # of the machine, to whoever measures

    def _look(self) -> dict[int, tuple[str, float]]:
        own = psutil.Process()
        found = {own.pid: ("driver", cpu_s(own.pid))}
        for process in own.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[process.pid] = (kind_of(process), cpu_s(process.pid))
        return found

    @staticmethod
    def _machine() -> float:
        """Processor time that all programs have had, and what a hypervisor has kept."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def nothing() -> None:
    return None


@ray.remote(num_cpus=0)
class Submitter:
    """A program on a node: submits tasks to its own node."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.task = ray.remote(num_cpus=1)(nothing).options(scheduling_strategy=here)

    def submit(self, count: int, seconds: float) -> tuple[int, float]:
        """Again and again so many, for so long: how many, and in what time."""
        done, begin, passed = 0, time.perf_counter(), 0.0
        while passed <= seconds:
            ray.get([self.task.remote() for _ in range(count)])
            done += count
            passed = time.perf_counter() - begin
        return done, passed

    def size_of(self, value: object) -> int:
        return len(value)  # type: ignore[arg-type]

    def fork_server(self) -> int:
        return os.getppid()


@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
class Nothing:
    def ready(self) -> None:
        return None


def events() -> dict[str, int]:
    return api.ensure_connected().query(GCS_ADDRESS, "statistics")["events"]


def settle() -> None:
    """Until workers that were just started or ended use no more processor time."""
    for _ in range(40):
        with Phase() as phase:
            time.sleep(0.25)
        if phase.cpu["worker"] + phase.cpu["fork_server"] < 0.02:
            return


def repeat(once: Callable[[], int], seconds: float) -> dict:
    """Again and again; the median of the rates, and processor time for one."""
    rates, done = [], 0
    with Phase() as phase:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            count = once()
            rates.append(count / (time.perf_counter() - begin))
            done += count
    cpu = {kind: spent / done for kind, spent in phase.cpu.items()}
    return {"value": statistics.median(rates), "cpu": cpu, "done": done, "free": phase.free}


def local_tasks(rows: dict, submitters: list, tasks: int, seconds: float) -> None:
    each = max(20, tasks // len(submitters))
    ray.get([one.submit.remote(each, 0.0) for one in submitters])  # how long it runs is known then
    before = sum(events().values())
    with Phase() as phase:
        found = ray.get([one.submit.remote(each, seconds) for one in submitters])
    gained = sum(events().values()) - before - 1
    done = sum(count for count, _ in found)
    cpu = {kind: spent / done for kind, spent in phase.cpu.items()}
    rate = sum(count / passed for count, passed in found)
    rows["local"] = {"each": each, "value": rate, "cpu": cpu, "gcs_messages_per_task": gained / done, "free": phase.free}


def spread_tasks(rows: dict, tasks: int, seconds: float) -> None:
    task = ray.remote(num_cpus=1)(nothing).options(scheduling_strategy="SPREAD")
    ray.get([task.remote() for _ in range(tasks)])

    def once() -> int:
        ray.get([task.remote() for _ in range(tasks)])
        return tasks

    rows["spread"] = {"tasks": tasks, **repeat(once, seconds)}


def create_actors(rows: dict, count: int, rounds: int) -> None:
    found = []
    for _ in range(rounds):
        settle()
        before = events()
        with Phase() as phase:
            actors = [Nothing.remote() for _ in range(count)]
            ray.get([actor.ready.remote() for actor in actors])
        after = events()
        gained = sum(after.values()) - sum(before.values())
        found.append((count / phase.seconds, gained / count, gained / phase.seconds, phase))
        for actor in actors:
            ray.kill(actor)
    found.sort(key=lambda one: one[0])
    rate, each, per_s, phase = found[len(found) // 2]
    rows["actors"] = {
        "value": rate,
        "count": count,
        "gcs_messages_per_actor": each,
        "gcs_messages_per_s": per_s,
        "gcs_core": phase.cpu["gcs"] / phase.seconds,
        "cpu": {kind: spent / count for kind, spent in phase.cpu.items()},
        "free": phase.free,
    }


def broadcast(rows: dict, submitters: list, size: int, rounds: int) -> None:
    found = []
    ray.get([one.size_of.remote(np.zeros(1)) for one in submitters])  # who has imported numpy
    for number in range(rounds):
        value = ray.put(np.full(size, number, dtype=np.uint8))
        with Phase() as phase:
            assert set(ray.get([one.size_of.remote(value) for one in submitters])) == {size}
        found.append((phase.seconds, phase))
        del value
        time.sleep(0.3)
    found.sort(key=lambda one: one[0])
    seconds, phase = found[len(found) // 2]
    rows["broadcast"] = {"value": seconds, "size": size, "cpu": dict(phase.cpu), "free": phase.free}


def unused(rows: dict, submitters: list, gap_s: float = 0.5, rounds: int = 15) -> None:
    """How much longer a call takes when nobody has done anything for so long."""
    actor = submitters[-1]

    def call_s(gap_s: float) -> float:
        found = []
        for _ in range(rounds):
            time.sleep(gap_s)
            begin = time.perf_counter()
            ray.get(actor.fork_server.remote())
            found.append(time.perf_counter() - begin)
        return statistics.median(found)

    lately = call_s(1e-3)
    rows["unused"] = {"value": lately, "gap_s": gap_s, "more": call_s(gap_s) - lately}


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Survivor:
    def where(self) -> int:
        return os.getppid()


def recover(rows: dict, submitters: list, nodes: list) -> None:
    """A node dies that has an actor: until the actor answers from another one."""
    there = NodeAffinitySchedulingStrategy(nodes[-1], soft=True)
    survivor = Survivor.options(scheduling_strategy=there).remote()
    victim = ray.get(submitters[-1].fork_server.remote())
    assert ray.get(survivor.where.remote()) == victim
    settle()
    ended = select.poll()
    ended.register(os.pidfd_open(victim), select.POLLIN)
    with Phase() as phase:
        os.kill(victim, signal.SIGKILL)
        ended.poll()
        while ray.get(survivor.where.remote()) == victim:  # it answered before it knew that it was dead
            pass
    rows["recovery"] = {"value": phase.seconds, "cpu": dict(phase.cpu), "free": phase.free}


def die(rows: dict, submitters: list) -> None:
    """The node is killed: until its fork server has ended, which is what its link waits for, and until the others have, which end with
    it. The session is over then."""
    victim = ray.get(submitters[0].fork_server.remote())
    settle()
    first, *others = [os.pidfd_open(pid) for pid in (victim, *(child.pid for child in psutil.Process(victim).children()))]
    ended, left, seen_s = select.epoll(), {first, *others}, 0.0
    for file in left:
        ended.register(file, select.EPOLLIN | select.EPOLLONESHOT)
    with Phase() as phase:
        os.kill(victim, signal.SIGKILL)
        while left:
            left -= {file for file, _ in ended.poll()}
            if not seen_s and first not in left:
                seen_s = time.perf_counter() - phase.begin
    rows["death"] = {"value": seen_s, "all_s": phase.seconds, "others": len(others), "cpu": dict(phase.cpu), "free": phase.free}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--actors", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=0, help="of what is no rate; default: two for each second, at least three")
    parser.add_argument("--size", type=int, default=64 << 20)
    parser.add_argument("--only", default="local,spread,actors,broadcast,recovery", help="rows besides the start")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or max(3, round(2 * arguments.seconds))
    rows: dict = {}
    options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 6 * arguments.size}
    with Phase() as phase:
        if arguments.nodes == 1:
            ray.init(address="local", **options)
        else:
            ray.init(address="local", num_nodes=arguments.nodes, **options)
        ray.get(ray.remote(nothing).remote())
    rows["start"] = {"value": phase.seconds, "cpu": dict(phase.cpu), "free": phase.free}
    nodes = [node["NodeID"] for node in ray.nodes()]
    at = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    submitters = [Submitter.options(scheduling_strategy=one).remote() for one in at]
    servers = ray.get([one.fork_server.remote() for one in submitters])
    assert len(set(servers)) == arguments.nodes
    settle()
    wanted = arguments.only.split(",")
    if "local" in wanted:
        local_tasks(rows, submitters, arguments.tasks, arguments.seconds)
    if "spread" in wanted:
        spread_tasks(rows, arguments.tasks, arguments.seconds)
    if "actors" in wanted:
        create_actors(rows, arguments.actors, arguments.rounds)
    if "broadcast" in wanted and arguments.nodes > 1:
        broadcast(rows, submitters, arguments.size, arguments.rounds)
    if "recovery" in wanted and arguments.nodes > 1:
        settle()
        recover(rows, submitters, nodes)
    if "recovery" in rows:  # which is too short for the system's clock ticks
        rows["recovery"]["free"] = rows["start"]["free"]
    if "unused" in wanted:
        unused(rows, submitters)
    if "death" in wanted:
        die(rows, submitters)
    print(json.dumps({"nodes": arguments.nodes, "rows": rows}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())

"""kill -9 of workers, actors, owners and of the node's own processes: retried, reported or ended, never a hang."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
import workloads
from workloads import PATIENCE_S, Killer

import hpc_ray as ray
from hpc_ray.exceptions import ActorDiedError, LocalRayletDiedError, OwnerDiedError, WorkerCrashedError
from hpc_ray.launcher import session, world


def test_tasks_are_retried(cluster):
    @ray.remote(max_retries=-1)
    def work(x):
        time.sleep(0.002)
        return x

    with Killer() as killer:
        for _ in workloads.rounds(5):
            assert ray.get([work.remote(i) for i in range(1000)], timeout=PATIENCE_S) == list(range(1000))
    assert killer.kills


def test_objects_of_killed_workers(cluster):
    """A result whose maker died before its reply is made again, and the first one is freed (OrphanedObject)."""

    @ray.remote(max_retries=-1)
    def make(x):
        return np.full(200_000, x % 256, dtype=np.uint8)

    @ray.remote(max_retries=-1)
    def total(array):
        return int(array.sum())

    with Killer():
        for _ in workloads.rounds(5):
            totals = ray.get([total.remote(make.remote(i)) for i in range(200)], timeout=PATIENCE_S)
            assert totals == [200_000 * (i % 256) for i in range(200)]


def test_nested_submitters_die(cluster):
    @ray.remote(max_retries=-1)
    def inner(x):
        time.sleep(0.002)
        return x

    @ray.remote(max_retries=-1)
    def outer():
        return sum(ray.get([inner.remote(i) for i in range(20)]))

    with Killer(every_s=0.1):
        for _ in workloads.rounds(5):
            assert ray.get([outer.remote() for _ in range(20)], timeout=PATIENCE_S) == [190] * 20


def test_without_retries(cluster):
    """Each task has its value or WorkerCrashedError."""

    @ray.remote(max_retries=0)
    def work(x):
        time.sleep(0.005)
        return x

    crashes = 0
    with Killer(every_s=0.03):
        for _ in workloads.rounds(5):
            for i, reference in enumerate([work.remote(i) for i in range(200)]):
                try:
                    assert ray.get(reference, timeout=PATIENCE_S) == i
                except WorkerCrashedError:
                    crashes += 1
    assert crashes


def test_actors_restart(cluster):
    @ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)
    class Echo:
        def echo(self, x):
            time.sleep(0.001)
            return x

    actors = [Echo.remote() for _ in range(4)]
    with Killer("ACTOR", every_s=0.1):
        for _ in workloads.rounds(5):
            references = [actor.echo.remote(i) for i in range(200) for actor in actors]
            assert ray.get(references, timeout=PATIENCE_S) == [i for i in range(200) for _ in actors]


def test_calls_before_a_death_are_answered(cluster):
    """The calls that an actor has answered are values, the later ones ActorDiedError, without a gap."""

    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self, x):
            time.sleep(0.01)
            return x

        def pid(self):
            return os.getpid()

    for seed in workloads.rounds(20):
        actor = Echo.remote()
        pid = ray.get(actor.pid.remote())
        references = [actor.echo.remote(i) for i in range(50)]
        time.sleep(random.Random(seed).random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        dead = False
        for i, reference in enumerate(references):
            try:
                assert ray.get(reference, timeout=PATIENCE_S) == i
                assert not dead
            except ActorDiedError:
                dead = True
        with pytest.raises(ActorDiedError):
            ray.get(actor.echo.remote(1), timeout=PATIENCE_S)


def test_owner_dies(cluster):
    """Whoever holds references of a dead owner is told, also who waits for one; its children are ended (OBJ-4)."""

    @ray.remote(max_retries=0)
    def child():
        time.sleep(1000)

    @ray.remote
    class Owner:
        def make(self):
            return [ray.put(bytes(300_000)), ray.put(5), child.remote()]

        def pid(self):
            return os.getpid()

    @ray.remote
    def peek(boxed):
        try:
            return ray.get(boxed[0])
        except OwnerDiedError:
            return "told"

    owner = Owner.remote()
    references = ray.get(owner.make.remote())
    pid = ray.get(owner.pid.remote())
    peeking = peek.remote([references[2]])
    workloads.eventually(lambda: [row["state"] for row in workloads.workers()].count("LEASED"), 2)
    os.kill(pid, signal.SIGKILL)
    assert ray.get(peeking, timeout=PATIENCE_S) == "told"
    for reference in references:
        with pytest.raises(OwnerDiedError):
            ray.get(reference, timeout=PATIENCE_S)
    workloads.eventually(lambda: [row["pid"] for row in workloads.workers() if row["state"] == "LEASED"], [])


@pytest.mark.parametrize("name", ["raylet", "gcs", ""], ids=["raylet", "gcs", "node process"])
def test_the_node_dies(name):
    """What waits and what is asked later raises an error that says who died (CLIENT-3)."""

    @ray.remote
    def hang():
        time.sleep(1000)

    @ray.remote(num_cpus=0)
    class Hang:
        def hang(self):
            time.sleep(1000)

    for _ in workloads.rounds(3):
        ray.init(num_cpus=2)
        actor = Hang.remote()
        references = [hang.remote(), actor.hang.remote()]
        ray.wait(references, timeout=0.2)
        os.kill(workloads.role(name), signal.SIGKILL)
        with pytest.raises(LocalRayletDiedError, match=name or "node process"):
            ray.get(references, timeout=PATIENCE_S)
        for ask in (lambda: ray.get(references[0]), lambda: ray.wait(references), ray.nodes, Hang.remote):  # noqa: B023
            with pytest.raises(LocalRayletDiedError):
                ask()
        ray.kill(actor)
        ray.shutdown()


@pytest.mark.links
@pytest.mark.stress
def test_a_node_of_three_dies():
    """Open MPI with ULFM: its tasks and actors go on elsewhere, its objects are made again."""
    if world.find_mpirun().family != "openmpi":
        pytest.skip("only Open MPI survives the death of a rank")
    for turn in workloads.rounds(3):
        ray.init(num_nodes=3, num_cpus=2)

        @ray.remote(max_retries=-1, scheduling_strategy="SPREAD")
        def make(x):
            time.sleep(0.005)
            return np.full(200_000, x % 256, np.uint8)

        @ray.remote(max_retries=-1, scheduling_strategy="SPREAD")
        def total(array):
            return int(array.sum())

        @ray.remote(max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")
        class Echo:
            def echo(self, x):
                time.sleep(0.01)
                return x

        actors = [Echo.remote() for _ in range(3)]
        arrays = [make.remote(i) for i in range(300)]
        totals = [total.remote(array) for array in arrays]
        calls = [actor.echo.remote(i) for i in range(100) for actor in actors]
        ray.wait(totals, num_returns=20 + 50 * (turn % 3), timeout=PATIENCE_S)
        here = workloads.role("")
        links = [pid for pid in workloads.Traces.now().processes if _is_link(pid)]
        os.kill(next(pid for pid in links if here not in session.children(pid)), signal.SIGKILL)
        assert ray.get(totals, timeout=PATIENCE_S) == [200_000 * (i % 256) for i in range(300)]
        assert ray.get(calls, timeout=PATIENCE_S) == [i for i in range(100) for _ in actors]
        assert [int(array[0]) for array in ray.get(arrays, timeout=PATIENCE_S)] == [i % 256 for i in range(300)]
        assert [node["Alive"] for node in ray.nodes()].count(True) == 2
        del actors, arrays, totals, calls
        workloads.assert_all_released()
        ray.shutdown()


def _is_link(pid: int) -> bool:
    with open(f"/proc/{pid}/cmdline") as file:
        words = file.read().split("\0")
    return "hpc_ray.launcher.rank" in words and "python" in os.path.basename(words[0])

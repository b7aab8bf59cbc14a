"""util.collective: groups of actors, tasks and the driver on one node."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from hpc_ray.exceptions import ActorDiedError, GetTimeoutError
from hpc_ray.util import collective
from hpc_ray.util.collective.types import Backend, ReduceOp


class Worker:
    def __init__(self, rank):
        self.rank = rank

    def join(self, size, name="default", timeout=30_000):
        collective.init_collective_group(size, self.rank, "gloo", name, timeout)
        return collective.get_rank(name), collective.get_collective_group_size(name)

    def leave(self, name="default"):
        collective.destroy_collective_group(name)
        return collective.is_group_initialized(name)

    def allreduce(self, length, name="default", op=ReduceOp.SUM):
        array = np.arange(length, dtype=np.float64) + self.rank
        collective.allreduce(array, name, op)
        return array

    def all_calls(self, size):
        """One of each; what they gave."""
        rank = self.rank
        source = np.full((2, 2), rank)
        collective.broadcast(source, 1)
        total = np.full(3, rank + 1)
        collective.reduce(total, 0, op=ReduceOp.PRODUCT)
        gathered = [np.zeros(2) for _ in range(size)]
        collective.allgather(gathered, np.full(2, float(rank)))
        part = np.zeros(2)
        collective.reducescatter(part, [np.full(2, float(10 * rank + place)) for place in range(size)])
        collective.barrier()
        around = np.zeros(1)
        collective.send(np.array([float(rank)]), (rank + 1) % size)
        collective.recv(around, (rank - 1) % size)
        return source.tolist(), total.tolist(), [one.tolist() for one in gathered], part.tolist(), around.tolist()

    def send_large(self, size, rounds):
        """Much, in both directions; the objects left in the store by it."""
        from hpc_ray.client import context

        before = context.client.store.statistics()["objects"]
        for i in range(rounds):
            array = np.full(200_000, float(self.rank + i))
            collective.allreduce(array)
            assert (array == sum(rank + i for rank in range(size))).all()
        collective.barrier()
        return before

    def wait_alone(self, name="default"):
        collective.barrier(name)

    def pid(self):
        return os.getpid()


@pytest.fixture
def make(ray):
    """Actors with ranks; they end with the test."""
    made = []

    def make(count):
        actors = [ray.remote(Worker).remote(rank) for rank in range(count)]
        made.extend(actors)
        return actors

    yield make
    for actor in made:
        ray.kill(actor)


@pytest.fixture
def group(ray, make):
    def group(size, **options):
        actors = make(size)
        assert ray.get([actor.join.remote(size, **options) for actor in actors]) == [(rank, size) for rank in range(size)]
        return actors

    return group


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("length", [4, 100_000])
def test_allreduce(ray, group, size, length):
    for array in ray.get([actor.allreduce.remote(length) for actor in group(size)]):
        np.testing.assert_array_equal(array, sum(np.arange(length) + rank for rank in range(size)))


def test_each_call(ray, group):
    found = ray.get([actor.all_calls.remote(3) for actor in group(3)])
    for rank, (source, total, gathered, part, around) in enumerate(found):
        assert source == [[1, 1], [1, 1]]
        assert total == ([6] * 3 if rank == 0 else [rank + 1] * 3)
        assert gathered == [[0.0] * 2, [1.0] * 2, [2.0] * 2]
        assert part == [30.0 + 3 * rank] * 2
        assert around == [float((rank - 1) % 3)]


def test_nothing_stays_in_the_store(ray, group, store, eventually):
    actors = group(3)
    before = store()["objects"]
    ray.get([actor.send_large.remote(3, 5) for actor in actors])
    eventually(lambda: store()["objects"] <= before, "all that was sent has been read and freed")


def test_a_group_made_by_the_driver(ray, make):
    actors = make(2)
    collective.create_collective_group(actors, 2, [0, 1], backend="gloo", group_name="made")
    one, two = ray.get([actor.allreduce.remote(2, "made", ReduceOp.MAX) for actor in actors])
    assert one.tolist() == two.tolist() == [1.0, 2.0]
    for arguments, text in [((actors, 2, [0]), "one rank"), ((actors, 2, [0, 2]), "permutation"), ((actors, 3, [0, 1]), "world_size")]:
        with pytest.raises(RuntimeError, match=text):
            collective.create_collective_group(*arguments, backend="gloo")


def test_tasks_and_the_driver_are_members(ray):
    @ray.remote
    def member(rank):
        collective.init_collective_group(3, rank, "mpi", "mixed")
        array = np.ones(2)
        collective.allreduce(array, "mixed")
        collective.destroy_collective_group("mixed")
        return array.tolist()

    references = [member.remote(rank) for rank in (1, 2)]
    collective.init_collective_group(3, 0, "mpi", "mixed")
    array = np.ones(2)
    collective.allreduce(array, "mixed")
    collective.destroy_collective_group("mixed")
    assert ray.get(references) == [[3.0, 3.0]] * 2 == [array.tolist()] * 2


def test_a_group_again(ray, group):
    actors = group(2)
    for _ in range(3):
        assert ray.get([actor.leave.remote() for actor in actors]) == [False, False]
        ray.get([actor.join.remote(2) for actor in actors])
        for array in ray.get([actor.allreduce.remote(1) for actor in actors]):
            assert array.tolist() == [1.0]


def test_a_dead_member_is_named(ray, group):
    actors = group(3)
    pid = ray.get(actors[1].pid.remote())
    waiting = [actors[rank].wait_alone.remote() for rank in (0, 2)]
    os.kill(pid, signal.SIGKILL)
    for reference in waiting:
        with pytest.raises(ActorDiedError, match=rf"rank 1 .*{actors[1]._actor_id.hex()}.*pid {pid}"):
            ray.get(reference)


def test_a_member_that_left_or_stays_away_is_named(ray, group):
    actors = group(2, timeout=200)
    with pytest.raises(GetTimeoutError, match=r"rank 1 .* did not come within 0.2 s"):
        ray.get(actors[0].wait_alone.remote())
    ray.get(actors[1].leave.remote())
    with pytest.raises(RuntimeError, match=r"rank 1 .* has left"):
        ray.get(actors[0].wait_alone.remote())


def test_members_that_do_not_agree(ray, make):
    a, b = make(2)
    with pytest.raises(GetTimeoutError, match=r"ranks \[1\] did not come"):
        ray.get(a.join.remote(2, timeout=100))
    found = [a.join.remote(2, timeout=500), b.join.remote(3, timeout=500)]
    with pytest.raises(ValueError, match="others say"):
        ray.get(found)


def test_misuse(ray, group):
    (actor,) = group(1)
    with pytest.raises(RuntimeError, match="second time"):
        ray.get(actor.join.remote(1))
    for ask in (collective.get_rank, collective.get_collective_group_size):
        with pytest.raises(RuntimeError, match="the driver is not in the collective group"):
            ask()
    with pytest.raises(RuntimeError, match="not initialized"):
        collective.allreduce(np.zeros(1))
    with pytest.raises(RuntimeError, match=r"NCCL is not available: .*gloo"):
        collective.init_collective_group(1, 0)
    with pytest.raises(ValueError, match="Unrecognized"):
        Backend("smoke")
    with pytest.raises(ValueError, match="string"):
        collective.init_collective_group(1, 0, "gloo", "")
    with pytest.raises(AssertionError, match="rank is 2"):
        collective.init_collective_group(2, 2, "gloo")
    assert Backend("torch_gloo") == "GLOO"
    assert collective.gloo_available() and not collective.nccl_available()
    assert collective.is_backend_available("mpi") and not collective.is_backend_available("nccl")
    with pytest.raises(AttributeError, match="use allreduce"):
        collective.allreduce_multigpu  # noqa: B018
    collective.init_collective_group(1, 0, "gloo", "alone")
    for call in (lambda: collective.broadcast(np.zeros(1), 3, "alone"), lambda: collective.send(np.zeros(1), -1, "alone")):
        with pytest.raises(ValueError, match="not from 0 to 0"):
            call()
    with pytest.raises(RuntimeError, match="self"):
        collective.recv(np.zeros(1), 0, "alone")
    with pytest.raises(RuntimeError, match="list of 1"):
        collective.allgather([], np.zeros(1), "alone")
    collective.destroy_collective_group("alone")
    collective.destroy_collective_group("alone")

"""The algorithms of collective calls, in threads that hand arrays to one another."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest

from hpc_ray.collectives import Group, ReduceOp, flat_array
from hpc_ray.collectives.group import SMALL_BYTES

SIZES = [1, 2, 3, 4, 5, 7, 8]
LENGTHS = [0, 1, 5, SMALL_BYTES // 8, SMALL_BYTES // 8 + 1, 10_007]
FUNCTIONS = {ReduceOp.SUM: np.add, ReduceOp.PRODUCT: np.multiply, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}


class Threads:
    """The wires of all ranks. When one fails, those that wait fail too."""

    def __init__(self, size):
        self.queues = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.sent = [0] * size

    def wire(self, rank):
        everything = self

        class Wire:
            def send(self, to, tag, array):
                assert to != rank
                everything.sent[rank] += array.nbytes
                everything.queues[rank, to].put((tag, array.copy()))

            def receive(self, source, tag, use):
                got, array = everything.queues[source, rank].get(timeout=30)
                if array is None:
                    raise ConnectionError(f"rank {source} failed")
                assert got == tag
                array.flags.writeable = False
                use(array)

            def settle(self):
                pass

        return Wire()

    def fail(self, rank):
        for (source, _), waiting in self.queues.items():
            if source == rank:
                waiting.put((0, None))


def run(size, operation):
    """``operation(group)`` at each rank; what each returned, and the bytes that each sent."""
    threads_wires = Threads(size)
    found = [None] * size

    def one(rank):
        try:
            found[rank] = operation(Group(rank, size, threads_wires.wire(rank)))
        except BaseException as error:
            found[rank] = error
            threads_wires.fail(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    errors = [value for value in found if isinstance(value, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, ConnectionError)):
        raise error
    assert all(waiting.empty() for waiting in threads_wires.queues.values()), "everything sent was received"
    return found, threads_wires.sent


def values(rank, length):
    return np.random.default_rng(rank).standard_normal(length)


def joined(size, length, op=ReduceOp.SUM):
    return FUNCTIONS[op].reduce([values(rank, length) for rank in range(size)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_allreduce(size, length):
    def call(group):
        array = values(group.rank, length)
        group.allreduce(array, ReduceOp.SUM)
        return array

    found, sent = run(size, call)
    np.testing.assert_allclose(found[0], joined(size, length))
    assert all(one.tobytes() == found[0].tobytes() for one in found), "COLL-2"
    if length * 8 > SMALL_BYTES:
        assert max(sent) <= 2 * (size - 1) * (length // size + 1) * 8, "the ring's share"


@pytest.mark.parametrize("op", list(ReduceOp))
def test_the_ways_to_join(op):
    def call(group):
        array = values(group.rank, 11)
        group.allreduce(array, op)
        return array

    found, _ = run(3, call)
    np.testing.assert_allclose(found[2], joined(3, 11, op))


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_and_reduce(size):
    for root in range(size):

        def call(group, root=root):
            array = values(group.rank, 9)
            group.broadcast(array, root)
            total = values(group.rank, 9)
            group.reduce(total, root, ReduceOp.SUM)
            return array, total

        found, _ = run(size, call)
        for rank, (array, total) in enumerate(found):
            np.testing.assert_array_equal(array, values(root, 9))
            np.testing.assert_allclose(total, joined(size, 9) if rank == root else values(rank, 9))


@pytest.mark.parametrize("size", SIZES)
def test_gather_and_scatter_of_all_kinds(size):
    def call(group):
        rank = group.rank
        everything = [np.zeros(4) for _ in range(size)]
        group.allgather(everything, values(rank, 4))
        mine = np.zeros(4)
        group.reduce_scatter(mine, [values(rank * 100 + place, 4) for place in range(size)], ReduceOp.SUM)
        gathered = [np.zeros(4) for _ in range(size)] if rank == size - 1 else None
        group.gather(gathered, values(rank, 4), size - 1)
        given = np.zeros(4)
        group.scatter(given, [values(place, 4) for place in range(size)] if rank == 0 else None, 0)
        exchanged = [np.zeros(4) for _ in range(size)]
        group.all_to_all(exchanged, [values(rank * 100 + to, 4) for to in range(size)])
        return everything, mine, gathered, given, exchanged

    found, _ = run(size, call)
    for rank, (everything, mine, gathered, given, exchanged) in enumerate(found):
        for place in range(size):
            np.testing.assert_array_equal(everything[place], values(place, 4))
            np.testing.assert_array_equal(exchanged[place], values(place * 100 + rank, 4))
            if gathered is not None:
                np.testing.assert_array_equal(gathered[place], values(place, 4))
        np.testing.assert_allclose(mine, sum(values(other * 100 + rank, 4) for other in range(size)))
        np.testing.assert_array_equal(given, values(rank, 4))
    assert [gathered is not None for _, _, gathered, _, _ in found] == [rank == size - 1 for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_barrier(size):
    arrived = []

    def call(group):
        arrived.append(group.rank)
        group.barrier()
        return len(arrived)

    found, _ = run(size, call)
    assert found == [size] * size


def test_send_and_receive():
    def call(group):
        other = 1 - group.rank
        got = np.zeros(3)
        seen = []
        for i in range(3):
            group.send(np.full(3, 10.0 * group.rank + i), other)
            group.receive(got, other)
            seen.append(got[0])
        group.barrier()
        return seen

    found, _ = run(2, call)
    assert found == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]


@pytest.mark.parametrize("length", [3, 100_000])
def test_ranks_that_differ(length):
    def call(group):
        group.allreduce(np.zeros(length + group.rank), ReduceOp.SUM)

    with pytest.raises(ValueError, match="same length and type"):
        run(2, call)

    def mixed(group):
        group.allreduce(np.zeros(length, np.float32 if group.rank else np.int32), ReduceOp.SUM)

    with pytest.raises(ValueError, match="same length and type"):
        run(2, mixed)


def test_what_is_an_array():
    array = np.zeros((2, 3))
    flat = flat_array(array, writable=True)
    flat[4] = 1
    assert array[1, 1] == 1
    for wrong, error in [([1, 2], TypeError), (np.array([object()]), TypeError), (np.zeros((4, 4))[:, ::2], ValueError)]:
        with pytest.raises(error):
            flat_array(wrong)
    array.flags.writeable = False
    assert flat_array(array).size == 6
    with pytest.raises(ValueError, match="read-only"):
        flat_array(array, writable=True)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(2, 2)
    flat_array(tensor, writable=True)[3] = 5
    assert tensor[1, 1] == 5

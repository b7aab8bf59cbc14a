"""A rank's view of its group, and the algorithms.

Relied on by ``hpc_ray.util.collective``, which brings a ``Wire``. All arrays are flat; results are written in place.

COLL-1 (same order): all ranks of a group call the same operations in the same order with arrays of the same length and type.
Messages carry the number of the operation and their step in it, so a rank that differs gets an error or a timeout.
COLL-2 (same bits): every rank gets the same bits: each element of a sum is computed once and copied, or by all ranks in the same way.
COLL-3 (nothing piles up): when an operation returns, what this rank has sent is copied, and the large copies have been read.

With n bytes and p ranks: small arrays take log2(p) steps; large ones go round a ring in 2(p - 1) steps of n / p bytes, which is the least
that each rank has to send.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

SMALL_BYTES = 32 << 10  # up to here steps cost more than bytes
_STEPS = 1 << 20


class ReduceOp(enum.Enum):
    """How elements are joined."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3


class Wire(Protocol):
    """Arrays between the ranks of a group."""

    def send(self, rank: int, tag: int, array: np.ndarray) -> None:
        """Send a copy; does not wait for the receiver."""

    def receive(self, rank: int, tag: int, use: Callable[[np.ndarray], Any]) -> None:
        """Wait for an array and call ``use`` with it; it is read-only, and gone when ``use`` returns. Blocks."""

    def settle(self) -> None:
        """Wait until the large copies have been read. Blocks."""


class Group:
    """Rank ``rank`` of ``size``. One operation at a time."""

    def __init__(self, rank: int, size: int, wire: Wire):
        self.rank = rank
        self.size = size
        self._wire = wire
        self._operations = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}

    # -------------------------------------------------------------- between two

    def send(self, array: np.ndarray, rank: int) -> None:
        """To another rank, which calls ``receive``. Blocks until it has been read, if it is large."""
        count = self._sent[rank] = self._sent.get(rank, 0) + 1
        self._wire.send(rank, -count, array)
        self._wire.settle()

    def receive(self, array: np.ndarray, rank: int) -> None:
        """What another rank sends. Blocks."""
        count = self._received[rank] = self._received.get(rank, 0) + 1
        self._take(rank, -count, array)

    # -------------------------------------------------------------- among all

    def barrier(self) -> None:
        """Returns when all ranks have come. Blocks."""
        import numpy as np

        tag = self._next()
        nothing = np.empty(0, np.uint8)
        distance, step = 1, 0
        while distance < self.size:  # each round doubles the number of ranks that one knows to be here
            self._wire.send((self.rank + distance) % self.size, tag + step, nothing)
            self._take((self.rank - distance) % self.size, tag + step, nothing)
            distance, step = distance * 2, step + 1

    def broadcast(self, array: np.ndarray, root: int) -> None:
        """The root's elements to all. Blocks."""
        tag = self._next()
        place = (self.rank - root) % self.size
        distance = 1
        while distance < self.size:  # a binomial tree, from the root outwards
            if place < distance and place + distance < self.size:
                self._wire.send((self.rank + distance) % self.size, tag, array)
            elif distance <= place < 2 * distance:
                self._take((self.rank - distance) % self.size, tag, array)
            distance *= 2
        self._wire.settle()

    def reduce(self, array: np.ndarray, root: int, op: ReduceOp) -> None:
        """All elements joined, at the root; the others' arrays stay as they are. Blocks."""
        tag = self._next()
        place = (self.rank - root) % self.size
        total = array if place == 0 else array.copy()
        distance = 1
        while distance < self.size:
            if place & distance:
                self._wire.send((self.rank - distance) % self.size, tag, total)
                break
            if place + distance < self.size:
                self._join((self.rank + distance) % self.size, tag, total, op)
            distance *= 2
        self._wire.settle()

    def allreduce(self, array: np.ndarray, op: ReduceOp) -> None:
        """All elements joined, at every rank. Blocks."""
        if array.nbytes <= SMALL_BYTES:
            self._allreduce_small(array, op)
            return
        tag = self._next()
        parts = _parts(array, self.size)
        self._reduce_ring(parts, tag, op)
        self._gather_ring(parts, tag + self.size)
        self._wire.settle()

    def _allreduce_small(self, array: np.ndarray, op: ReduceOp) -> None:
        """Recursive doubling among the largest power of two of ranks; each of the rest joins one of them before and copies after."""
        tag = self._next()
        full = 1 << (self.size.bit_length() - 1)
        rest = self.size - full
        rank = self.rank
        if rank >= full:
            self._wire.send(rank - full, tag, array)
            self._take(rank - full, tag + 1, array)
            self._wire.settle()
            return
        if rank < rest:
            self._join(rank + full, tag, array, op)
        distance, step = 1, 2
        while distance < full:
            other = rank ^ distance
            self._wire.send(other, tag + step, array)
            self._join(other, tag + step, array, op)
            distance, step = distance * 2, step + 1
        if rank < rest:
            self._wire.send(rank + full, tag + 1, array)
        self._wire.settle()

    def allgather(self, arrays: list[np.ndarray], array: np.ndarray) -> None:
        """Each rank's elements, by rank, at every rank. Blocks."""
        arrays[self.rank][:] = array
        self._gather_ring(arrays, self._next(), own=self.rank)
        self._wire.settle()

    def reduce_scatter(self, array: np.ndarray, arrays: list[np.ndarray], op: ReduceOp) -> None:
        """Of the ranks' lists the arrays at each place joined: place r at rank r. ``arrays`` stays as it is. Blocks."""
        parts = [part.copy() for part in arrays]
        self._reduce_ring(parts, self._next(), op, own=self.rank)
        array[:] = parts[self.rank]
        self._wire.settle()

    def gather(self, arrays: list[np.ndarray] | None, array: np.ndarray, root: int) -> None:
        """Each rank's elements, by rank, at the root, which alone gives ``arrays``. Blocks."""
        tag = self._next()
        if self.rank != root:
            self._wire.send(root, tag, array)
        else:
            assert arrays is not None, "the root of a gather needs arrays"
            for rank in range(self.size):
                if rank == root:
                    arrays[rank][:] = array
                else:
                    self._take(rank, tag, arrays[rank])
        self._wire.settle()

    def scatter(self, array: np.ndarray, arrays: list[np.ndarray] | None, root: int) -> None:
        """Array r of the root, which alone gives ``arrays``, at rank r. Blocks."""
        tag = self._next()
        if self.rank != root:
            self._take(root, tag, array)
            return
        assert arrays is not None, "the root of a scatter needs arrays"
        for rank in range(self.size):
            if rank == root:
                array[:] = arrays[rank]
            else:
                self._wire.send(rank, tag, arrays[rank])
        self._wire.settle()

    def all_to_all(self, received: list[np.ndarray], sent: list[np.ndarray]) -> None:
        """Array r of each rank to rank r, where it stands at the sender's place. Blocks."""
        tag = self._next()
        received[self.rank][:] = sent[self.rank]
        for distance in range(1, self.size):
            to = (self.rank + distance) % self.size
            self._wire.send(to, tag, sent[to])
        for distance in range(1, self.size):
            source = (self.rank - distance) % self.size
            self._take(source, tag, received[source])
        self._wire.settle()

    # -------------------------------------------------------------- steps

    def _next(self) -> int:
        self._operations += 1
        return self._operations * _STEPS

    def _reduce_ring(self, parts: list[np.ndarray], tag: int, op: ReduceOp, own: int | None = None) -> None:
        """Afterwards part ``own`` (default: the next after this rank's, as ``_gather_ring`` wants it) is joined."""
        shift = 1 if own is None else 0
        for step in range(self.size - 1):
            self._wire.send((self.rank + 1) % self.size, tag + step, parts[(self.rank - step - 1 + shift) % self.size])
            self._join((self.rank - 1) % self.size, tag + step, parts[(self.rank - step - 2 + shift) % self.size], op)

    def _gather_ring(self, parts: list[np.ndarray], tag: int, own: int | None = None) -> None:
        """Afterwards all parts are everywhere; this rank has ``own`` (default: the next after its own number)."""
        shift = 1 if own is None else 0
        for step in range(self.size - 1):
            self._wire.send((self.rank + 1) % self.size, tag + step, parts[(self.rank - step + shift) % self.size])
            self._take((self.rank - 1) % self.size, tag + step, parts[(self.rank - step - 1 + shift) % self.size])

    def _take(self, rank: int, tag: int, array: np.ndarray) -> None:
        def use(received: np.ndarray) -> None:
            self._check(rank, received, array)
            array[:] = received

        self._wire.receive(rank, tag, use)

    def _join(self, rank: int, tag: int, array: np.ndarray, op: ReduceOp) -> None:
        function = _function(op)

        def use(received: np.ndarray) -> None:
            self._check(rank, received, array)
            function(array, received, out=array)

        self._wire.receive(rank, tag, use)

    def _check(self, rank: int, received: np.ndarray, array: np.ndarray) -> None:
        if received.shape != array.shape or received.dtype != array.dtype:
            raise ValueError(
                f"rank {rank} sent {received.size} elements of {received.dtype} where rank {self.rank} has {array.size} of "
                f"{array.dtype}: all ranks must call the same operations with arrays of the same length and type"
            )


def _function(op: ReduceOp) -> Any:
    import numpy as np

    return {ReduceOp.SUM: np.add, ReduceOp.PRODUCT: np.multiply, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}[op]


def _parts(array: np.ndarray, count: int) -> list[np.ndarray]:
    """As equal as they can be; views."""
    bounds = [len(array) * i // count for i in range(count + 1)]
    return [array[start:end] for start, end in itertools.pairwise(bounds)]

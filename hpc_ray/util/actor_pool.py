"""A fixed set of actors that share work: each value goes to an actor that is free.

POOL-1 (one call each): an actor of the pool has at most one call of the pool at a time.
POOL-2 (returned): an actor is free again as soon as its result is taken, an error included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hpc_ray.actor import ActorHandle
from hpc_ray.api import get, wait
from hpc_ray.client.refs import ObjectRef

Call = Callable[[ActorHandle, Any], ObjectRef]


class ActorPool:
    """Actors that work off what is submitted. Not for use by several threads.

    The function given to ``submit`` and ``map`` gets an actor and a value, and returns the reference of a call of that actor.
    """

    def __init__(self, actors: Iterable[ActorHandle]):
        self._idle = list(actors)
        self._waiting: deque[tuple[Call, Any]] = deque()
        self._running: dict[ObjectRef, tuple[int, ActorHandle]] = {}  # reference → its number, who makes it
        self._by_number: dict[int, ObjectRef] = {}
        self._submitted = 0  # number of the next call to be started
        self._next = 0  # number of the next result in order

    def map(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """The results for all values, in their order. Submits all at once; results of earlier submissions are dropped.

        Blocks until earlier submissions are done; the iterator blocks for each result and raises its error.
        """
        self._drop_earlier()
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next)

    def map_unordered(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """The same in the order in which they are done."""
        self._drop_earlier()
        for value in values:
            self.submit(fn, value)
        return self._results(self.get_next_unordered)

    def _results(self, take: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield take()

    def _drop_earlier(self) -> None:
        while self._running:
            ready, _ = wait(list(self._running), num_returns=1, fetch_local=False)
            self._take(ready[0])

    def submit(self, fn: Call, value: Any) -> None:
        """Start ``fn(actor, value)`` on a free actor, or as soon as there is one. Does not wait."""
        if not self._idle:
            self._waiting.append((fn, value))
            return
        actor = self._idle.pop()
        try:
            reference = fn(actor, value)
        except BaseException:
            self._idle.append(actor)
            raise
        self._running[reference] = self._submitted, actor
        self._by_number[self._submitted] = reference
        self._submitted += 1

    def has_next(self) -> bool:
        """Whether a result is there or will be."""
        return bool(self._running)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission. Blocks.

        Raises:
            StopIteration: nothing is under way.
            TimeoutError: not done within ``timeout`` seconds; with ``ignore_if_timedout`` that result is given up.
            ValueError: ``get_next_unordered`` has gone past it.
            RayTaskError …: the call failed.
        """
        if not self._running:
            raise StopIteration("No more results to get")
        if self._next >= self._submitted:
            raise ValueError(
                "get_next() has nothing left in order: get_next_unordered() took later results. Go on with that one."
            )
        number = self._next
        while number not in self._by_number:  # taken out of order
            number += 1
        reference = self._by_number[number]
        if timeout is not None and not wait([reference], timeout=timeout)[0]:
            if not ignore_if_timedout:
                raise TimeoutError(f"the next result was not there within {timeout} s; it can be asked for again")
            self._next = number + 1
            self._take(reference)
            raise TimeoutError(f"the next result was not there within {timeout} s; it is given up")
        self._next = number + 1
        self._take(reference)
        return get(reference)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """A result that is done, the first to be. Blocks.

        Raises:
            StopIteration: nothing is under way.
            TimeoutError: none within ``timeout`` seconds; all can be asked for again.
            RayTaskError …: the call failed.
        """
        if not self._running:
            raise StopIteration("No more results to get")
        ready, _ = wait(list(self._running), num_returns=1, timeout=timeout)
        if not ready:
            raise TimeoutError(f"no result was there within {timeout} s")
        number = self._take(ready[0])
        self._next = max(self._next, number + 1)
        return get(ready[0])

    def _take(self, reference: ObjectRef) -> int:
        """Its actor is free again (POOL-2); the number of the call."""
        number, actor = self._running.pop(reference)
        del self._by_number[number]
        self._free(actor)
        return number

    def _free(self, actor: ActorHandle) -> None:
        self._idle.append(actor)
        if self._waiting:
            self.submit(*self._waiting.popleft())

    def has_free(self) -> bool:
        """Whether an actor is idle and nothing waits for one."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle | None:
        """Take an idle actor out of the pool; None if there is none."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle) -> None:
        """Add an actor; it starts on what waits.

        Raises:
            ValueError: it is in the pool.
        """
        if actor in self._idle or any(actor == busy for _, busy in self._running.values()):
            raise ValueError("Actor already belongs to current ActorPool")
        self._free(actor)

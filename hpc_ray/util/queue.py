"""A first-in-first-out queue that tasks, actors and the driver share. It lives in an actor of its own.

QUEUE-1 (its own): a queue lives as long as somebody refers to it; with its actor go the items.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable
from typing import Any

from hpc_ray.actor import ActorHandle
from hpc_ray.api import get, kill, remote, wait


class Empty(queue.Empty):
    """There is no item, or there are too few."""


class Full(queue.Full):
    """There is no room."""


class _QueueActor:
    """What the queue's actor runs; all methods in one event loop."""

    def __init__(self, maxsize: int):
        self.maxsize = maxsize
        self.queue: asyncio.Queue = asyncio.Queue(maxsize)

    def qsize(self) -> int:
        return self.queue.qsize()

    def empty(self) -> bool:
        return self.queue.empty()

    def full(self) -> bool:
        return self.queue.full()

    async def put(self, item: Any, timeout: float | None = None) -> None:
        if not self.queue.full():
            self.queue.put_nowait(item)
            return
        try:
            await asyncio.wait_for(self.queue.put(item), timeout)
        except asyncio.TimeoutError:  # of its own in Python 3.10
            raise Full(f"the queue of {self.maxsize} items was full for {timeout} s") from None

    async def get(self, timeout: float | None = None) -> Any:
        if not self.queue.empty():
            return self.queue.get_nowait()
        try:
            return await asyncio.wait_for(self.queue.get(), timeout)
        except asyncio.TimeoutError:  # of its own in Python 3.10
            raise Empty(f"the queue was empty for {timeout} s") from None

    def put_nowait(self, item: Any) -> None:
        self.queue.put_nowait(item)

    def get_nowait(self) -> Any:
        return self.queue.get_nowait()

    def put_nowait_batch(self, items: list[Any]) -> None:
        if self.maxsize > 0 and len(items) + self.queue.qsize() > self.maxsize:
            raise Full(f"{len(items)} items do not fit: the queue has {self.queue.qsize()} of at most {self.maxsize}")
        for item in items:
            self.queue.put_nowait(item)

    def get_nowait_batch(self, count: int) -> list[Any]:
        if count > self.queue.qsize():
            raise Empty(f"the queue has {self.queue.qsize()} items, fewer than {count}")
        return [self.queue.get_nowait() for _ in range(count)]


_actor_class = remote(_QueueActor)


class Queue:
    """The queue; can be passed to tasks and actors, which then use the same one.

    Args:
        maxsize: how many items fit; 0 or less: no limit.
        actor_options: options of the actor, such as ``name`` or ``num_cpus``.
    """

    def __init__(self, maxsize: int = 0, actor_options: dict[str, Any] | None = None) -> None:
        self.maxsize = maxsize
        self.actor: ActorHandle | None = _actor_class.options(**(actor_options or {})).remote(maxsize)

    def _live(self) -> ActorHandle:
        if self.actor is None:
            raise AttributeError("this queue was shut down")
        return self.actor

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """How many items there are."""
        return get(self._live().qsize.remote())

    def qsize(self) -> int:
        """How many items there are."""
        return self.size()

    def empty(self) -> bool:
        return get(self._live().empty.remote())

    def full(self) -> bool:
        """Never, for a queue without a limit."""
        return get(self._live().full.remote())

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an item. Blocks while the queue is full, at most ``timeout`` seconds.

        Raises:
            Full: still full then; at once without ``block``.
            ValueError: a negative timeout.
        """
        actor = self._live()
        if not block:
            try:
                get(actor.put_nowait.remote(item))
            except asyncio.QueueFull:
                raise Full from None
            return
        get(actor.put.remote(item, _checked(timeout)))

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """``put`` for asyncio programs."""
        actor = self._live()
        if not block:
            try:
                await actor.put_nowait.remote(item)
            except asyncio.QueueFull:
                raise Full from None
            return
        await actor.put.remote(item, _checked(timeout))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take an item. Blocks while the queue is empty, at most ``timeout`` seconds.

        Raises:
            Empty: still empty then; at once without ``block``.
            ValueError: a negative timeout.
        """
        actor = self._live()
        if not block:
            try:
                return get(actor.get_nowait.remote())
            except asyncio.QueueEmpty:
                raise Empty from None
        return get(actor.get.remote(_checked(timeout)))

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """``get`` for asyncio programs."""
        actor = self._live()
        if not block:
            try:
                return await actor.get_nowait.remote()
            except asyncio.QueueEmpty:
                raise Empty from None
        return await actor.get.remote(_checked(timeout))

    def put_nowait(self, item: Any) -> None:
        """``put(item, block=False)``."""
        self.put(item, block=False)

    def get_nowait(self) -> Any:
        """``get(block=False)``."""
        return self.get(block=False)

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Add all of the items or none.

        Raises:
            Full: they do not all fit.
            TypeError: not iterable.
        """
        if not isinstance(items, Iterable):
            raise TypeError(f"items must be iterable, not {type(items).__name__}")
        get(self._live().put_nowait_batch.remote(list(items)))

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Take exactly so many items.

        Raises:
            Empty: there are fewer; none is taken.
            TypeError, ValueError: not a count.
        """
        if not isinstance(num_items, int):
            raise TypeError(f"num_items must be an int, not {type(num_items).__name__}")
        if num_items < 0:
            raise ValueError(f"num_items must not be negative, it is {num_items}")
        return get(self._live().get_nowait_batch.remote(num_items))

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the queue's actor, for everybody: after the calls it has, at most ``grace_period_s`` later; with ``force``
        at once. Harmless if it was ended before."""
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if not force:
            ended = actor.__ray_terminate__.remote()
            if wait([ended], timeout=grace_period_s)[0]:
                return
        kill(actor, no_restart=True)


def _checked(timeout: float | None) -> float | None:
    if timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")
    return timeout

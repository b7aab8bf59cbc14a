"""Streams: the results of a generator that runs as a task, one reference after the other.

The owner's side. The worker sends a TaskItem for each item and a TaskReply at the end; both go through ``Stream``.

STREAM-1 (whole): items are handed out in order, each once, whatever is run again after a crash.
STREAM-2 (an end): after the last item, which is the error if there was one, every ``next`` raises StopIteration.
STREAM-3 (dropped): a stream nobody reads any more runs to its end; its items are freed as they come.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_ray.client.objects import READY, Entry, State
from hpc_ray.client.refs import ObjectRef, call_in_loop
from hpc_ray.ids import object_id_of
from hpc_ray.protocol import ItemsConsumed, Result, ResultKind
from hpc_ray.serialize import serialize

if TYPE_CHECKING:
    from hpc_ray.client.calls import Task
    from hpc_ray.client.client import Client

STREAMING, DYNAMIC = -1, -2  # PushTask.num_returns
_LIFE = 0xFFFF_FFFF  # object index of what the generator's own life hangs on
_DONE = 0xFFFF_FFFE  # and of the reference that is ready when the task is done


class Stream:
    """The items of one task. Under the client's lock."""

    def __init__(self, client: Client, task: Task):
        self.client = client
        self.task = task
        self.first = 1 if task.template.num_returns == DYNAMIC else 0  # object index of the first item
        self.entries: dict[int, Entry] = {}  # items not handed out, and those that somebody waits for
        self.position = 0  # of the next item to hand out
        self.arrived = 0
        self.total: int | None = None  # known at the end
        self.dropped = False
        self.done = client.objects.own(object_id_of(task.id, _DONE))
        self.done.count = 1
        task.stream = self

    def entry(self, index: int) -> Entry:
        entry = self.entries.get(index)
        if entry is None:
            entry = self.client.objects.own(object_id_of(self.task.id, self.first + index))
            entry.count = 1
            self.entries[index] = entry
            if self.total is not None and index >= self.total:
                self.client.objects.set_result(entry, Result(ResultKind.INLINE))
        return entry

    def add(self, index: int, result: Result) -> None:
        """An item has come (STREAM-1: once)."""
        client = self.client
        entry = self.entries.get(index)
        if index < self.arrived and (entry is None or entry.state >= READY):
            client.objects.discard(result)
            return
        entry = self.entry(index)
        self.arrived = max(self.arrived, index + 1)
        client.objects.receive_result(entry, result)
        if self.dropped:
            self.forget(index)

    def end(self, error: Result | None, broken: bool) -> None:
        """The task is done; ``error`` is the last item (STREAM-2). ``broken``: its own code has not come to an end."""
        if self.total is not None:
            return
        if error is not None:
            self.add(self.arrived, error)
        self.total = self.arrived
        objects = self.client.objects
        done = Result(error.kind, error.payload) if broken and error is not None else Result(ResultKind.INLINE, serialize(None).to_bytes())
        objects.set_result(self.done, done)
        if self.dropped:
            objects.release(self.done)
        for index, entry in list(self.entries.items()):
            if index >= self.total:
                objects.set_result(entry, Result(ResultKind.INLINE))

    def drop(self) -> None:
        """Nobody reads it any more (STREAM-3)."""
        self.dropped = True
        for index in list(self.entries):
            self.forget(index)
        if self.total is None:
            self.consumed(-1)
        else:
            self.client.objects.release(self.done)

    def forget(self, index: int) -> None:
        self.client.objects.release(self.entries.pop(index))

    def consumed(self, count: int) -> None:
        """Let a worker that holds back go on."""
        task = self.task
        if task.template.limited and task.lane is not None:
            self.client.send(task.worker, ItemsConsumed(task.id, count))

    def take(self) -> ObjectRef | None:
        """The next reference, if it is there; None at the end."""
        index = self.position
        if self.total is not None and index >= self.total:
            return None
        entry = self.entries.pop(index)
        self.position += 1
        self.consumed(self.position)
        return ObjectRef(entry)  # the stream's hold is now the reference's

    def collect(self) -> Result:
        """The value of a dynamic task: all its references (client's lock held; small)."""
        references = []
        while (reference := self.take()) is not None:
            references.append(reference)
        serialized = serialize(DynamicObjectRefGenerator(references))
        self.drop()
        return Result(ResultKind.INLINE, serialized.to_bytes(), contained=[r.binary() for r in references])


class ObjectRefGenerator:
    """The references to the items of a generator task, as they come; also an asynchronous iterator. Cannot be passed on."""

    def __init__(self, client: Client, stream: Stream):
        self._client = client
        self._stream = stream
        entry = client.objects.own(object_id_of(stream.task.id, _LIFE))
        entry.on_free = stream.drop
        entry.count = 1
        client.objects.set_result(entry, Result(ResultKind.INLINE))
        self._life: ObjectRef = ObjectRef(entry)

    def __iter__(self) -> ObjectRefGenerator:
        return self

    def __next__(self) -> ObjectRef:
        reference = self._next(None)
        if reference is None:
            raise StopIteration
        return reference

    def _next(self, timeout_s: float | None) -> ObjectRef | None:
        """The next reference, None at the end. Blocks until its item is there.

        Raises:
            GetTimeoutError: not in time.
        """
        while True:
            with self._client.lock:
                head = self._head()
            self._client.values.make_ready([head], timeout_s)
            with self._client.lock:
                if self._head() is head:  # else another thread was faster
                    return self._stream.take()

    def _head(self) -> Entry:
        """READY when ``next`` would not block. Under the lock."""
        return self._stream.entry(self._stream.position)

    def __aiter__(self) -> ObjectRefGenerator:
        return self

    async def __anext__(self) -> ObjectRef:
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            waiting = loop.create_future()
            with self._client.lock:
                head = self._head()
            self._client.values.add_done_callback(head, partial(call_in_loop, loop, _settle, waiting))
            await waiting
            with self._client.lock:
                if self._head() is head:  # else another thread or coroutine was faster
                    reference = self._stream.take()
                    break
        if reference is None:
            raise StopAsyncIteration
        return reference

    def completed(self) -> ObjectRef:
        """A reference that is ready when the task is done: None, or the error that broke it off (not one that its code has raised)."""
        with self._client.lock:
            return self._client.objects.reference(self._stream.done)

    def next_ready(self) -> bool:
        """Whether ``next`` would return a reference at once."""
        with self._client.lock:
            return not self.is_finished() and self._head().state == State.READY

    def is_finished(self) -> bool:
        """Whether all items have been handed out and the task is done."""
        stream = self._stream
        return stream.total is not None and stream.position >= stream.total

    def task_id(self) -> Any:
        return self._life.task_id()

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._life.task_id().hex()})"

    def __reduce__(self) -> Any:
        raise TypeError("Serialization of ObjectRefGenerator is not supported: iterate over it here and pass on its references")


def _settle(waiting: Any) -> None:
    if not waiting.done():
        waiting.set_result(None)


class DynamicObjectRefGenerator:
    """The value of a task with ``num_returns="dynamic"``: its references."""

    def __init__(self, refs: list[ObjectRef]):
        self._references = refs

    def __iter__(self) -> Iterator[ObjectRef]:
        while self._references:
            yield self._references.pop(0)

    def __len__(self) -> int:
        return len(self._references)


def code_of(num_returns: int | str | None, generator: bool) -> int:
    """``num_returns`` as it travels; a generator streams unless told otherwise."""
    if num_returns is None:
        return STREAMING if generator else 1
    if num_returns == "dynamic":
        warnings.warn('num_returns="dynamic" is deprecated: use num_returns="streaming"', DeprecationWarning, stacklevel=3)
        return DYNAMIC
    return STREAMING if num_returns == "streaming" else int(num_returns)



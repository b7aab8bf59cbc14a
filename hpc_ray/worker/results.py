"""What a task gave, on its way to the caller: values, items of a stream, errors.

Used by ``executor`` and ``hosting``.
"""

from __future__ import annotations

import asyncio
import traceback
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from hpc_ray import serialize
from hpc_ray.client.context import LeaveProcess
from hpc_ray.client.objects import ERROR, INLINE, Entry
from hpc_ray.client.streams import DYNAMIC, STREAMING
from hpc_ray.client.waiting import Waiter
from hpc_ray.exceptions import AsyncioActorExit, RayError, RayTaskError, TaskCancelledError, UnserializableException
from hpc_ray.ids import TaskID, object_id_of
from hpc_ray.protocol import ItemsConsumed, PushTask, Result, TaskItem
from hpc_ray.worker.gangs import GangFailed

if TYPE_CHECKING:
    from hpc_ray.worker.executor import Executor


class Flow:
    """How far a stream may run ahead of its consumer."""

    __slots__ = ("consumed", "limit", "waiter")

    def __init__(self, limit: int):
        self.limit = limit
        self.consumed = 0
        self.waiter: Waiter | None = None

    def wait_after(self, sent: int) -> Waiter | None:
        """A waiter if that many items sent is enough for now."""
        if self.consumed < 0 or sent - self.consumed < self.limit:
            return None
        self.waiter = Waiter()
        if self.consumed < 0 or sent - self.consumed < self.limit:
            return None
        return self.waiter

    def consume(self, count: int) -> None:
        self.consumed = count if count < 0 or self.consumed < 0 else max(self.consumed, count)
        if self.waiter is not None:
            self.waiter.finish()


class Results:
    """Packs what the tasks of one worker give."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.client = executor.client
        self.flows: dict[bytes, Flow] = {}  # streams that wait for their consumer
        self.client.handlers[ItemsConsumed] = self.on_items_consumed

    def pack_results(self, source: int, task: PushTask, value: Any) -> list[Result]:
        count = task.num_returns
        if type(value) is GeneratorType and count > 0:
            return self.pack_generated(source, task, value)
        if count == 1:
            return [self.pack(source, task, 0, value)]
        if count == 0:
            return []
        try:
            values = list(value)
        except TypeError:
            raise TypeError(
                f"{task.name} has num_returns={count}, so it must return that many values; it returned a {type(value).__name__}"
            ) from None
        if len(values) != count:
            more = "more" if len(values) > count else "fewer"
            raise ValueError(
                f"Task {task.name} returned {more} than num_returns={count} objects ({len(values)}): "
                "the number of values and num_returns must agree"
            )
        pack, plain_value, most = self.pack, serialize.plain_value, self.client.settings.inline_bytes  # as ``pack``, in short
        results = []
        for i, item in enumerate(values):
            plain = plain_value(item)
            if plain is not None and len(plain) <= most:
                results.append(Result(INLINE, plain, 0, 0, len(plain)))
            else:
                results.append(pack(source, task, i, item))
        return results

    def pack_generated(self, source: int, task: PushTask, generator: Any) -> list[Result]:
        """The items of a generator as a fixed number of results; the error that ended it stands for those that are missing."""
        results: list[Result] = []
        try:
            for item in generator:
                results.append(self.pack(source, task, len(results), item))
                if len(results) == task.num_returns:
                    break
            else:
                raise ValueError(f"{task.name} yielded {len(results)} items, but num_returns={task.num_returns}")
        except (LeaveProcess, SystemExit):
            raise
        except BaseException as error:
            results += self.pack_error(source, task, error, task.num_returns - len(results))[0]
        return results

    def send_items(self, source: int, task: PushTask, generator: Any) -> list[Result]:
        """Run a generator, sending each item; what the reply holds: nothing, or the one error that ended it. Blocks while the
        consumer is behind."""
        flow = self.flow_of(task)
        first = 1 if task.num_returns == DYNAMIC else 0
        index = 0
        try:
            try:
                for item in generator:
                    self.client.send(
                        source, TaskItem(task.task_id, task.attempt, index, self.pack(source, task, first + index, item))
                    )
                    index += 1
                    item = None
                    if flow is not None:
                        while (waiter := flow.wait_after(index)) is not None:
                            self.client.block(waiter)
                    if self.executor.cancelled and task.actor_id and task.task_id in self.executor.cancelled:
                        return self.executor.cancelled_results(task)  # a method is not interrupted, but nobody wants more of it
                return []
            finally:
                self.executor.running.pop(task.task_id, None)
                self.flows.pop(task.task_id, None)
        except (LeaveProcess, SystemExit):
            raise
        except BaseException as error:
            if self.wants_retry(task, error):
                raise
            return self.pack_error(source, task, error, 1)[0]

    def flow_of(self, task: PushTask) -> Flow | None:
        limit = self.executor.extras(task.extras).get("backpressure", 0) if task.extras else 0
        if not limit:
            return None
        flow = self.flows[task.task_id] = Flow(limit)
        return flow

    def check_async_generator(self, task: PushTask) -> None:
        """Raises TypeError or ValueError, as Ray does, if its items are wanted in another way than as a stream."""
        if task.num_returns == DYNAMIC:
            raise ValueError(f'num_returns="dynamic" needs a generator; {task.name} is an asynchronous one: use "streaming"')
        if task.num_returns != STREAMING:
            raise TypeError(f"'async_generator' object is not iterable: {task.name} yields a stream, not num_returns={task.num_returns}")

    async def send_items_async(self, source: int, task: PushTask, generator: Any) -> list[Result]:
        """``send_items`` for an asynchronous generator."""
        flow = self.flow_of(task)
        index = 0
        loop = asyncio.get_running_loop()
        try:
            async for item in generator:
                self.raise_if_cancelled(task)
                result = self.pack(source, task, index, item)
                self.client.send(source, TaskItem(task.task_id, task.attempt, index, result))
                index += 1
                if flow is not None:
                    while (waiter := flow.wait_after(index)) is not None:
                        await loop.run_in_executor(None, self.client.block, waiter)
            self.raise_if_cancelled(task)
            return []
        except BaseException as error:
            if isinstance(error, (LeaveProcess, AsyncioActorExit, SystemExit)) or self.wants_retry(task, error):
                raise
            return self.pack_error(source, task, error, 1)[0]
        finally:
            self.flows.pop(task.task_id, None)

    def raise_if_cancelled(self, task: PushTask) -> None:
        """Raises CancelledError for a call of an asyncio actor that was cancelled; its coroutine may have caught that one."""
        if self.executor.cancelled and task.task_id in self.executor.cancelled:
            raise asyncio.CancelledError

    def on_items_consumed(self, source: int, message: ItemsConsumed) -> None:
        self.consumed(message.task_id, message.count)

    def consumed(self, task_id: bytes, count: int) -> None:
        """So many items of a stream are used; -1: it need not wait for that any more."""
        flow = self.flows.get(task_id)
        if flow is not None:
            flow.consume(count)

    def pack(self, source: int, task: PushTask, index: int, value: Any) -> Result:
        client = self.client
        plain = serialize.plain_value(value)
        if plain is not None and len(plain) <= client.settings.inline_bytes:
            return Result(INLINE, plain, 0, 0, len(plain))
        try:
            serialized = serialize.serialize(value)
        except TypeError as error:
            where = serialize.explain(value, "result")
            raise TypeError(
                f"Could not serialize the return value of {task.name}: {error}. The part at fault: {where}"
            ) from error
        result = client.values.store_value(object_id_of(task.task_id, index), serialized, source)
        if serialized.contained:
            entries = [reference._entry for reference in serialized.contained]
            with client.lock:
                client.objects.introduce(entries, source)
            result = Result(result.kind, result.payload, result.node, result.handle, result.size, [entry.id for entry in entries])
        return result

    def pack_error(self, source: int, task: PushTask, error: BaseException, count: int | None = None) -> tuple[list[Result], bool]:
        """What stands for so many results (None: for all), and whether the caller may try again."""
        cancelled = task.task_id in self.executor.cancelled
        self.executor.cancelled.discard(task.task_id)
        if self.executor.host.loop is not None:
            interrupted = cancelled or isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))
        else:  # what user code makes of the interruption is the outcome
            interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            found = TaskCancelledError(TaskID(task.task_id)).with_traceback(error.__traceback__)
            failure: BaseException = self.describe(task.name, found)
            retryable = False
        else:
            failure = self.describe(task.name, error)
            retryable = not cancelled and self.wants_retry(task, error)
        traceback.clear_frames(error.__traceback__)
        data, entries = _serialized(failure)
        if count is None:
            count = abs(task.num_returns)
        if entries:
            with self.client.lock:
                for _ in range(count):
                    self.client.objects.introduce(entries, source)
        return [Result(ERROR, data, contained=[entry.id for entry in entries])] * count, retryable

    def wants_retry(self, task: PushTask, error: BaseException) -> bool:
        if not task.extras:
            return False
        wish = self.executor.extras(task.extras).get("retry_exceptions", False)
        if isinstance(error, GangFailed):
            error = getattr(error.failure, "cause", error.failure)
        return wish if isinstance(wish, bool) else isinstance(error, tuple(wish))

    def describe(self, name: str, error: BaseException) -> BaseException:
        """The error as the caller shall see it."""
        if isinstance(error, GangFailed):
            return error.failure
        client = self.client
        assert client.welcome is not None
        ip = client.welcome.ip
        actor = self.executor.actor
        title, identity, shown = f"hpc_ray::{name}", None, None
        who = f"pid={client.pid}, ip={ip}"
        if actor is not None:
            title, identity = f"hpc_ray::{actor.spec.short_name}.{name}", actor.spec.actor_id.hex()
            if actor.instance is not None:
                shown = _shown(actor.instance)
                who += f", actor_id={identity}, repr={shown}"
        text = _user_traceback(error, f"{title}() ({who})")
        return RayTaskError(name, text, error, title, client.pid, ip, actor_repr=shown, actor_id=identity)


def _shown(instance: Any) -> str:
    """An actor as it shows itself, on one line."""
    try:
        return repr(instance).replace("\n", " ")
    except Exception:
        return object.__repr__(instance)


_PACKAGE = __file__.rpartition("/worker/")[0]
_OWN_FILES = (f"{_PACKAGE}/worker/", f"{_PACKAGE}/client/", f"{_PACKAGE}/api.py")
_HEADER = "Traceback (most recent call last):"


def _user_traceback(error: BaseException, where: str) -> str:
    """The traceback without the runtime's own frames; ``where`` is the head of each part of it."""
    found = traceback.TracebackException.from_exception(error, compact=True)
    todo: list[traceback.TracebackException | None] = [found]
    while todo:
        part = todo.pop()
        if part is not None:
            frames = [frame for frame in part.stack if not frame.filename.startswith(_OWN_FILES)]
            part.stack = traceback.StackSummary.from_list(frames)
            todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or [])]
    lines = "".join(found.format()).rstrip("\n").split("\n")
    if _HEADER not in lines:  # it has no traceback, or is a group
        lines.insert(0, _HEADER)
    return "\n".join(where if line == _HEADER else line for line in lines)


def dump_error(error: BaseException) -> bytes:
    """An error as bytes that can certainly be read: as text, where its class does not travel or cannot be made again."""
    return _serialized(error)[0]


def _serialized(error: BaseException) -> tuple[bytes, list[Entry]]:
    """``dump_error``, and the references inside."""
    text = str(error)
    try:
        serialized = serialize.serialize(error)
    except BaseException:  # of the class's own __reduce__: nothing that user code does keeps the caller waiting
        if isinstance(error, RayTaskError):
            reason = RayError(f"the exception itself cannot be pickled; its text:\n{text}")
            return serialize.dumps(RayTaskError(error.function_name, text, reason, error.proctitle, error.pid, error.ip)), []
        return serialize.dumps(UnserializableException(text)), []
    data = serialized.to_bytes()
    try:
        serialize.loads(data)
    except BaseException:
        return serialize.dumps(UnserializableException(text)), []
    return data, [reference._entry for reference in serialized.contained]

"""Actors in a worker: their making, and how their calls run when it is not one at a time.

Used by ``executor``, whose main thread runs plain actors itself.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_ray import serialize
from hpc_ray.client import context
from hpc_ray.client.context import LeaveProcess
from hpc_ray.client.logging_config import use_logging
from hpc_ray.client.objects import ARENA, Entry
from hpc_ray.client.records import now_ns
from hpc_ray.client.waiting import Waiter
from hpc_ray.exceptions import AsyncioActorExit
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import ActorInitFailed, ActorReady, DeathCause, InstallActor, PushTask, Result
from hpc_ray.worker.gangs import Crew
from hpc_ray.worker.graphs import Graph
from hpc_ray.worker.loop import ActorLoop
from hpc_ray.worker.output import set_job, set_task_name
from hpc_ray.worker.results import dump_error
from hpc_ray.worker.threads import Threads

if TYPE_CHECKING:
    from hpc_ray.client.client import Client
    from hpc_ray.worker.executor import Executor


class ActorHost:
    """The actor that a worker may become."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.client = executor.client
        self.results = executor.results
        self.pools: dict[str, Threads] = {}  # threaded actors, by concurrency group
        self.waiting: dict[bytes, tuple[int, PushTask]] = {}  # the calls that wait for a thread of their pool
        self.open: dict[int, Any] = {}  # calls and graphs of a threaded actor that came and are not over, in their order
        self.earlier: dict[int, Any] | None = None  # of those, once it is to leave: they are answered before
        self.methods: dict[str, Any] = {}
        self.coroutines: set[str] = set()  # names of those that are coroutine functions
        self.loop: asyncio.AbstractEventLoop | None = None  # asyncio actors
        self.groups: dict[str, _Group] = {}
        self.stopped = asyncio.Event()  # they shall end
        self.crew: Crew | None = None  # gang actors
        self.creating: tuple[context.TaskContext, int] | None = None  # the constructor runs, since when

    def method_of(self, task: PushTask) -> Callable:
        """The actor's method that a task calls.

        Raises:
            ValueError: it asks for a concurrency group that the actor does not have.
        """
        method = self.methods.get(task.name)
        if method is None:
            assert self.executor.actor is not None
            method = self.methods[task.name] = getattr(self.executor.actor.instance, task.name)
            if inspect.iscoroutinefunction(method):
                self.coroutines.add(task.name)
        if task.extras:
            assert self.executor.actor is not None
            group, known = self.executor.extras(task.extras).get("concurrency_group"), self.executor.actor.spec.concurrency_groups
            if group and group not in known:
                raise ValueError(
                    f"actor {self.executor.actor.spec.class_name} has no concurrency group {group!r}; it has {sorted(known)}"
                )
        return method

    def install_actor(self, message: InstallActor) -> None:
        """Become an actor: run its constructor, tell the GCS."""
        client = self.client
        spec = message.spec
        self.executor.actor = context.ActorContext(spec, message.attempt, client.address)
        context.set_actor(self.executor.actor)
        context.namespace = spec.program_namespace
        use_logging(spec.logging)
        client.use_job(spec.job_id)
        set_job(spec.job_id)
        self.executor.use_shape(spec.shape)
        self.executor.use_instances(message.instances)
        set_task_name(spec.short_name)
        name = f"{spec.short_name}.__init__"
        current = context.TaskContext(spec.creation_task_id, name, name, name, message.attempt, spec.shape)
        token = context.task.set(current)
        loans: list[Entry] = []
        started, called, failed = now_ns(), 0, True
        client.records.actor_id = spec.actor_id
        self.creating = current, started
        try:
            if spec.gang is not None:
                called = now_ns()
                self.crew = self.executor.actor.instance = Crew(self.executor, spec, message.attempt, message.instances)
            else:
                cls = self.executor.functions[spec.class_id] = serialize.loads(spec.class_blob)
                args, kwargs, loans = self.executor.arguments(spec)
                self.executor.actor.instance = cls.__new__(cls)
                current.full_name = self.executor.actor_function("__init__")
                if spec.is_async:
                    self.loop = ActorLoop(client)
                    asyncio.set_event_loop(self.loop)
                called = now_ns()
                if self.loop is None:
                    self.executor.actor.instance.__init__(*args, **kwargs)
                elif (error := self.loop.run_until_complete(self.construct(args, kwargs))) is not None:
                    raise error
                args = kwargs = None  # type: ignore[assignment]
                self._name_output()
            failed = False
        except LeaveProcess as error:
            self.executor.leave_by(error)
            return
        except BaseException as error:
            failure = self.results.describe("__init__", error)
            cause = DeathCause("INIT_FAILED", str(failure), dump_error(failure), pid=client.pid)
            client.send(GCS_ADDRESS, ActorInitFailed(spec.actor_id, message.attempt, cause))
            self.executor.leaving = "the constructor failed"
            return
        finally:
            context.task.reset(token)
            self.creating = None
            ended, name = now_ns(), current.function_name
            times = (started, called, 0 if failed else ended, ended)
            if spec.recorded:
                client.records.runs.append((current.task_id, message.attempt, name, name, *times, failed, "creation"))
        if not spec.is_async and (spec.max_concurrency > 1 or spec.concurrency_groups):
            self.pools[""] = Threads(spec.max_concurrency, spec.short_name)
            for name, size in spec.concurrency_groups.items():
                self.pools[name] = Threads(size, name)
        client.work_off_released()
        with client.lock:
            client.objects.register(loans)
            due = set(client.objects.unacknowledged)
            ready = ActorReady(spec.actor_id, message.attempt, client.address)
            client.objects.when_acknowledged(due, lambda: self.executor.post(GCS_ADDRESS, ready))

    def shut_down(self) -> None:
        """At the orderly end of an actor: its ``__ray_shutdown__``, if it has one, and ``__del__``."""
        actor = self.executor.actor
        if actor is None or actor.instance is None:
            return
        try:
            if hasattr(actor.instance, "__ray_shutdown__"):
                actor.instance.__ray_shutdown__()
        except Exception:
            print(f"__ray_shutdown__ of {actor.spec.class_name} has failed:", file=sys.stderr)
            traceback.print_exc()
        self.methods.clear()
        actor.instance = None

    async def construct(self, args: tuple, kwargs: dict) -> BaseException | None:
        """Run the constructor of an asyncio actor on its loop. What it raises is returned: raised here, SystemExit would strike the
        loop, and other errors show its frames."""
        assert self.executor.actor is not None
        try:
            made = self.executor.actor.instance.__init__(*args, **kwargs)
            if inspect.isawaitable(made):
                await made
        except BaseException as error:
            return error
        return None

    def _name_output(self) -> None:
        """What the actor prints goes by its own ``__repr__``, where its class has one."""
        assert self.executor.actor is not None
        instance = self.executor.actor.instance
        if getattr(type(instance), "__repr__") is not object.__repr__:  # noqa: B009 - a type checker holds them apart
            try:
                set_task_name(repr(instance))
            except Exception:
                return  # a name is no reason to fail: the class's stays

    def group_of(self, task: PushTask) -> str:
        if task.extras:
            group = self.executor.extras(task.extras).get("concurrency_group", "")
            if group:
                return group
        assert self.executor.actor is not None
        function = getattr(type(self.executor.actor.instance), task.name, None)
        return getattr(function, "__ray_concurrency_group__", "")

    def arrived(self, source: int, task: PushTask) -> None:
        """A call of a threaded actor has come. By the thread that drains."""
        self.open[id(task)] = task
        self.waiting[task.task_id] = source, task

    def run_threaded_actor(self) -> None:
        """Give the calls to their threads. When the actor leaves, others still begin until the ``earlier`` ones are answered: these may
        wait for them."""
        executor = self.executor
        while self.client.broken is None and not self.has_left():
            try:
                source, item = executor.queue.popleft()
            except IndexError:
                waiter = executor.arrival = Waiter()
                if not executor.queue and not self.has_left():
                    self.client._drain(waiter, None)
                continue
            if type(item) is Graph:
                work = partial(item.run)
                self.open[id(work)] = work
                self.pools[""].run(partial(self.run_graph_in_thread, work))
            elif type(item) is PushTask:
                pool = self.pools.get(self.group_of(item)) or self.pools[""]
                pool.run(partial(self.execute_in_thread, source, item))
            elif executor.leaving is None:
                executor.leaving = getattr(item, "reason", "") or "terminated"
                later = {id(other) for _, other in list(executor.queue)}
                self.earlier = {key: other for key, other in list(self.open.items()) if key not in later}
        executor.gone = True
        for pool in self.pools.values():
            pool.end()

    def execute_in_thread(self, source: int, task: PushTask) -> None:
        if self.waiting.pop(task.task_id, None) is not None:  # else it was cancelled meanwhile
            self.executor.execute(source, task)
        self.over(task)

    def run_graph_in_thread(self, work: partial) -> None:
        work()
        self.over(work)

    def over(self, item: Any) -> None:
        """A thread has come to the end of a call of a threaded actor, or of a turn of a graph."""
        executor = self.executor
        if executor.leaving is None:
            self.open.pop(id(item), None)
        else:
            if self.earlier is None:
                self.earlier = self.answered_before(item)
            self.open.pop(id(item), None)
            arrival = executor.arrival
            if arrival is not None:
                arrival.finish()
            self.client.lane.wake()
        if executor.cancelled and type(item) is PushTask:
            executor.cancelled.discard(item.task_id)  # too late

    def has_left(self) -> bool:
        """Whether a threaded actor is to leave, and all is answered that is answered before."""
        return self.earlier is not None and self.earlier.keys().isdisjoint(self.open)

    def answered_before(self, last: Any) -> dict[int, Any]:
        """What is still to be answered when one call has ended the actor: all that came before it, and what has begun."""
        found: dict[int, Any] = {}
        before = True
        for key, item in list(self.open.items()):
            before = before and item is not last
            if before or type(item) is not PushTask or item.task_id not in self.waiting:
                found[key] = item
        return found

    def run_async_actor(self) -> None:
        """The loop is the main thread's, and handles messages while it has nothing to do. Each concurrency group has a loop and a
        thread of its own; its calls are handed to it by the thread that drains, so that no group waits for another's loop."""
        loop = self.loop
        assert loop is not None and self.executor.actor is not None
        spec = self.executor.actor.spec
        default = self.groups[""] = _Group(loop, spec.max_concurrency)
        for name, size in spec.concurrency_groups.items():
            self.groups[name] = _Group.in_thread(name, size)
        grouped = len(self.groups) > 1
        sorting = threading.Lock()

        def start() -> None:
            queue = self.executor.queue
            self.executor.arrival = _Sorted(self.client, sort) if grouped else _Soon(loop, start)
            while queue:
                source, item = queue.popleft()
                if type(item) is Graph:
                    loop.call_soon_threadsafe(begin_graph, item)
                elif type(item) is PushTask:
                    if grouped:
                        group = self.group_for(item)
                        group.waiting.append((source, item))
                        group.loop.call_soon_threadsafe(begin_next, group)
                    else:
                        default.begin(self.execute_async(source, item, default), item)
                else:
                    self.executor.leaving = getattr(item, "reason", "") or "terminated"
                    self.stop()
                    return

        def sort() -> None:
            with sorting:
                start()

        def begin_graph(graph: Graph) -> None:
            default.begin(graph.run_async()).add_done_callback(default.alive.pop)

        def begin_next(group: _Group) -> None:
            try:
                source, item = group.waiting.popleft()
            except IndexError:
                return  # cancelled meanwhile
            group.begin(self.execute_async(source, item, group), item)

        async def live() -> None:
            sort()
            while self.executor.leaving is None:
                stopper = asyncio.ensure_future(self.stopped.wait())
                await asyncio.wait([stopper], return_when=asyncio.FIRST_COMPLETED)
            for group in self.groups.values():
                if group is default:
                    await group.wait_empty()
                else:
                    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(group.wait_empty(), group.loop))

        self.client.on_blocked = None
        loop.run_until_complete(live())

    def group_for(self, task: PushTask) -> _Group:
        """Where a call of an asyncio actor runs."""
        try:
            return self.groups.get(self.group_of(task)) or self.groups[""]
        except Exception:  # its options cannot be read: it fails again where that is the call's error
            return self.groups[""]

    def knows(self, task_id: bytes) -> bool:
        """Whether a thread, or a loop of an asyncio actor, has this call, be it that it has not come to it yet."""
        if self.pools:
            return any(type(item) is PushTask and item.task_id == task_id for item in list(self.open.values()))
        calls = [call for group in self.groups.values() for call in list(group.alive.values())]
        return any(call is not None and call.task_id == task_id for call in calls)

    def stop(self) -> None:
        """End the loop of an asyncio actor that is to leave. Any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.stopped.set)

    async def execute_async(self, source: int, task: PushTask, group: _Group) -> None:
        """Run a call of an asyncio actor to its end, and reply."""
        job = asyncio.current_task()
        assert job is not None
        current = self.executor.context_of(task)
        loans: list[Entry] = []
        started = now_ns()
        begun = failed = False
        self.executor.running[task.task_id] = (job, current, 0)
        try:
            if self.executor.cancelled:
                self.results.raise_if_cancelled(task)
            async with group.limit:
                begun, started = True, now_ns()
                self.executor.running[task.task_id] = (job, current, started)
                context.task.set(current)
                results = await self.call_async(source, task, loans)
            retryable = False
        except (LeaveProcess, AsyncioActorExit, SystemExit) as error:
            self.executor.leave_by(error)
            self.stop()
            return
        except BaseException as error:
            if begun:
                results, retryable = self.results.pack_error(source, task, error)
            else:
                results, retryable = self.executor.cancelled_results(task), False
            failed = True
        finally:
            self.executor.running.pop(task.task_id, None)
            group.alive.pop(job, None)
        if self.executor.cancelled:
            self.executor.cancelled.discard(task.task_id)  # too late
        ended = now_ns()
        if current.recorded:
            self.executor.runs.append(
                (task.task_id, task.attempt, current.name, current.function_name, started, started, ended, ended, failed)
            )
        self.executor.reply(source, task, results, loans, ended - started, retryable)

    async def call_async(self, source: int, task: PushTask, loans: list[Entry]) -> list[Result]:
        """What a call gives. ``loans`` gets the references that came with its arguments, also if it fails (EXEC-2)."""
        if any(d.result.kind == ARENA and d.result.node != self.client.node for d in task.dependencies):
            args, kwargs, found = await asyncio.get_running_loop().run_in_executor(None, self.executor.arguments, task)
        else:
            args, kwargs, found = self.executor.arguments(task)
        loans += found
        value = self.method_of(task)(*args, **kwargs)
        del args, kwargs
        if task.name in self.coroutines:  # a coroutine that another method returns is a value, which does not travel, as in Ray
            value = await value
        if self.executor.cancelled:
            self.results.raise_if_cancelled(task)
        if inspect.isasyncgen(value) and task.num_returns:
            self.results.check_async_generator(task)
            return await self.results.send_items_async(source, task, value)
        if task.num_returns < 0 and inspect.isgenerator(value):
            return self.results.send_items(source, task, value)
        return self.results.pack_results(source, task, value)


class _Group:
    """The calls of an asyncio actor that share a loop: those of a concurrency group, or of none. For the thread of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size: int):
        self.loop = loop
        self.limit = asyncio.Semaphore(size)
        self.waiting: deque[tuple[int, PushTask]] = deque()  # for the loop to begin them
        self.alive: dict[asyncio.Task, PushTask | None] = {}  # None for a graph

    @classmethod
    def in_thread(cls, name: str, size: int) -> _Group:
        """One with a loop in a thread of its own, which ends with the process."""
        loop = asyncio.new_event_loop()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_forever()

        threading.Thread(target=run, name=name, daemon=True).start()
        return cls(loop, size)

    def begin(self, work: Coroutine, call: PushTask | None = None) -> asyncio.Task:
        """Its end is to be told to ``alive``."""
        job = self.loop.create_task(work)
        self.alive[job] = call
        return job

    async def wait_empty(self) -> None:
        if self.alive:
            await asyncio.wait(list(self.alive))


class _Sorted(Waiter):
    """An arrival that has calls given to their groups, by the thread that drains: the main thread may be in one that blocks."""

    __slots__ = ("client", "then")

    def __init__(self, client: Client, then: Callable[[], None]):
        super().__init__()
        self.client = client
        self.then = then

    def finish(self) -> None:
        self.client.callbacks.append(self.then)


class _Soon(Waiter):
    """An arrival that wakes an asyncio loop."""

    __slots__ = ("loop", "then", "thread")

    def __init__(self, loop: asyncio.AbstractEventLoop, then: Callable[[], None]):
        super().__init__()
        self.loop = loop
        self.then = then
        self.thread = threading.get_ident()

    def finish(self) -> None:
        if threading.get_ident() == self.thread:
            self.loop.call_soon(self.then)
        else:
            self.loop.call_soon_threadsafe(self.then)

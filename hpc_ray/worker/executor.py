"""Runs tasks: takes PushTask messages, calls the user's function, sends TaskReply.

Relied on by ``process``. The main thread runs plain tasks and the methods of plain actors one at a time; threaded actors have
a pool of threads, asyncio actors a loop in the main thread, and one in a thread of its own for each concurrency group.

EXEC-1 (one answer): each PushTask that is started gets exactly one TaskReply, whatever the user's code does; or the process
ends, and its end is the answer.
EXEC-2 (loans end in order): the reply leaves only when every borrowed reference that stays here is registered with its owner.
EXEC-3 (nobody waits behind a wait): a plain worker whose task blocks gives back the tasks that it has not started.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
from collections import deque
from functools import partial
from types import GeneratorType
from typing import Any

from hpc_ray import serialize
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.client.context import LeaveProcess
from hpc_ray.client.logging_config import use_logging
from hpc_ray.client.objects import ARENA, ERROR, Entry
from hpc_ray.client.records import now_ns
from hpc_ray.client.waiting import Waiter
from hpc_ray.exceptions import TaskCancelledError
from hpc_ray.ids import TaskID
from hpc_ray.launcher import nearness
from hpc_ray.protocol import (
    ALL_ARGUMENTS,
    UNIT,
    CancelTask,
    ExportFunction,
    InstallActor,
    ProcessLeaving,
    PullObject,
    PushTask,
    Result,
    Shape,
    Shutdown,
    StayingOn,
    StealTasks,
    TaskReply,
    TasksStolen,
    TerminateActor,
    UseLease,
    WorkerBlocked,
    WorkerUnblocked,
)
from hpc_ray.serialize import NO_ARGUMENTS
from hpc_ray.worker.gangs import Gangs
from hpc_ray.worker.graphs import Graph, Graphs
from hpc_ray.worker.hosting import ActorHost
from hpc_ray.worker.output import set_job, set_task_name, show_unfinished
from hpc_ray.worker.results import Results

FETCH_AHEAD = 4  # of so many queued tasks the arguments are brought to this node before their turn

THREADS = "OMP_NUM_THREADS"  # as Ray: libraries that a task loads have as many threads as it has CPUs
OUR_THREADS = "HPC_RAY_OMP_NUM_THREADS"  # what we have set it to; also for processes that inherit it

Running = tuple[Any, context.TaskContext, int]  # thread id or asyncio.Task; who; since when (0: waits for its turn)


class Executor:
    """See the module's text."""

    def __init__(self, client: Client):
        self.client = client
        self.queue: deque[tuple[int, Any]] = deque()  # (sender, PushTask or InstallActor or TerminateActor or Shutdown)
        self.arrival: Waiter | None = None
        self.functions: dict[bytes, Any] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.running: dict[bytes, Running] = {}
        self.blocked = False  # the main thread waits for objects
        self.runs = client.records.runs
        self.cancelled = context.cancelled
        self.interruptible = b""  # the plain task that KeyboardInterrupt may end now
        self.actor: context.ActorContext | None = None
        self.results = Results(self)
        self.host = ActorHost(self)
        self.graphs = Graphs(self)
        self.gangs = Gangs(self)
        self.leaving: str | None = None
        self.gone = False  # it has left: what threads still do is not to be answered
        self.stays = False  # when it leaves: as long as others use what it owns
        self.names: dict[tuple[bytes, str, bytes], tuple[str, str, str]] = {}  # what tasks are called
        self.status = 0  # exit code of the process
        self.keep_history = True  # others may still ask what ran here
        self.calls: dict[bytes, int] = {}  # function id → runs, for max_calls
        self.lease = 0  # the lease whose tasks run now
        self.shape: Any = None
        self.leases: dict[int, UseLease] = {}
        self.visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")  # of the node
        self.bound_for: tuple[list[str], float] | None = None  # GPUs and number of CPUs for which the CPUs were chosen
        self.node_cpus: set[int] = set()  # before that
        client.handlers.update(
            {
                ExportFunction: self.on_export_function,
                PushTask: self.on_push_task,
                InstallActor: self.on_push_task,
                TerminateActor: self.on_push_task,
                StealTasks: self.on_steal_tasks,
                CancelTask: self.on_cancel_task,
                UseLease: self.on_use_lease,
            }
        )
        client.interrupts.wanted = lambda: self.interruptible in self.cancelled
        client.on_blocked = self.on_blocked
        client.on_unblocked = self.on_unblocked
        client.records.now_running = self.now_running

    # -------------------------------------------------------------- messages (under the client's lock)

    def on_export_function(self, source: int, message: ExportFunction) -> None:
        self.blobs[message.function_id] = message.blob

    def on_push_task(self, source: int, message: Any) -> None:
        queue = self.queue
        if self.host.pools and type(message) is PushTask:
            self.host.arrived(source, message)
        queue.append((source, message))
        if len(queue) <= FETCH_AHEAD:
            self.fetch_ahead(message)
        arrival = self.arrival
        if arrival is not None:
            self.arrival = None
            arrival.finish()

    def fetch_ahead(self, item: Any) -> None:
        """Its turn comes soon: have its arguments brought to this node. (A hint, on the caller's loan; who runs it asks again.)"""
        client = self.client
        if type(item) is PushTask:
            for dependency in item.dependencies:
                result = dependency.result
                elsewhere = result.kind == ARENA and all(place[0] != client.node for place in dependency.places)
                if elsewhere and dependency.object_id not in client.objects.brought:
                    with client.lock:
                        client.objects.remember_brought(dependency.object_id, 0)  # asked for
                    client.send(client.raylet, PullObject(dependency.object_id, result.size, dependency.places))

    def on_use_lease(self, source: int, message: UseLease) -> None:
        self.leases = {message.lease_id: message}  # a worker has one lease at a time
        if message.shape.job_id != self.client.job_id:
            self.client.use_job(message.shape.job_id)
            set_job(message.shape.job_id)
        context.namespace = message.namespace
        use_logging(message.logging)

    def use_lease(self, lease_id: int) -> None:
        """Tasks of another lease run from here on."""
        self.lease = lease_id
        lease = self.leases.get(lease_id)
        if lease is not None:
            self.use_shape(lease.shape)
            self.use_instances(lease.instances)

    def use_shape(self, shape: Shape) -> None:
        """What runs from here on runs in this."""
        self.shape = shape
        context.captured = shape.group_id if shape.capture_children else b""
        variables = os.environ
        if variables.get(THREADS) == variables.get(OUR_THREADS):  # else they are the user's
            threads = str(max(1, shape.resources.get("CPU", 0) // UNIT))
            if variables.get(THREADS) != threads:
                variables[THREADS] = variables[OUR_THREADS] = threads

    def use_instances(self, instances: dict[str, list[list[int]]]) -> None:
        if instances == context.instances and "GPU" not in instances:
            return
        context.instances = instances
        if "GPU" in instances:
            names = self.visible_gpus.split(",") if self.visible_gpus else []
            mine = [names[index] if index < len(names) else str(index) for index, _ in instances["GPU"]]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            if self.client.settings.bind_to_gpus:
                self.bind(mine, names)
        elif self.visible_gpus is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        if self.bound_for is not None and "GPU" not in instances:
            self.bind([], [])

    def bind(self, gpus: list[str], visible: list[str]) -> None:
        """The main thread, and threads that it starts from here on, run on the CPUs next to these GPUs; without any, on all of the node."""
        needed = self.shape.resources.get("CPU", 0) / UNIT if self.shape is not None else 0
        wanted = gpus, needed
        if wanted == self.bound_for:
            return
        if self.bound_for is None:
            self.node_cpus = os.sched_getaffinity(os.getpid())
        self.bound_for = wanted if gpus else None
        near = nearness.cpus_near(nearness.host_wide(gpus, visible, os.environ)) if gpus else set()
        try:
            os.sched_setaffinity(os.getpid(), nearness.cpus_for(near, self.node_cpus, needed))
        except OSError:
            pass  # the job's CPUs have changed meanwhile; where it runs is of speed only

    def on_steal_tasks(self, source: int, message: StealTasks) -> None:
        self.give_back(source, message.lease_id)

    def give_back(self, owner: int, lease_id: int) -> None:
        """Return the tasks of a lease that have not started (EXEC-3)."""
        kept: list[tuple[int, Any]] = []
        returned: list[bytes] = []
        while True:
            try:
                source, item = self.queue.popleft()
            except IndexError:
                break
            if type(item) is PushTask and source == owner and item.lease_id == lease_id and not item.actor_id:
                returned.append(item.task_id)
            else:
                kept.append((source, item))
        self.queue.extend(kept)
        self.client.send(owner, TasksStolen(lease_id, returned))

    def on_blocked(self) -> None:
        client = self.client
        self.blocked = True
        client.send(client.raylet, WorkerBlocked())
        if self.actor is None and self.queue:
            with client.lock:
                leases = {(source, item.lease_id) for source, item in self.queue if type(item) is PushTask}
                for owner, lease_id in leases:
                    self.give_back(owner, lease_id)

    def on_unblocked(self) -> None:
        self.blocked = False
        self.post(self.client.raylet, WorkerUnblocked())

    def on_cancel_task(self, source: int, message: CancelTask) -> None:
        if (waiting := self.host.waiting.pop(message.task_id, None)) is not None:
            self.client.callbacks.append(partial(self.reply_cancelled, *waiting))
            return
        for queue in (self.queue, *[group.waiting for group in self.host.groups.values()]):
            for item in [item for item in list(queue) if type(item[1]) is PushTask and item[1].task_id == message.task_id]:
                try:
                    queue.remove(item)
                except ValueError:
                    continue  # it begins now
                self.client.callbacks.append(partial(self.reply_cancelled, *item))
                return
        found = self.running.get(message.task_id)
        if found is None and (self.actor is None or self.host.knows(message.task_id)):
            self.cancelled.add(message.task_id)  # it begins now, or is over: see ``execute`` and ``execute_async``
            found = self.running.get(message.task_id) if self.actor is not None else None
        if found is None:
            return
        running = found[0]
        self.cancelled.add(message.task_id)
        if self.actor is not None:
            self.results.consumed(message.task_id, -1)  # a method is not interrupted while its stream waits
        if message.recursive:
            self.cancel_children(message)
        if isinstance(running, asyncio.Task):
            running.get_loop().call_soon_threadsafe(running.cancel)
        elif message.force:
            self.client.callbacks.append(lambda: _exit_now(1))
        elif self.actor is None and running == threading.main_thread().ident:
            _interrupt_main()  # an actor's method is told, by is_canceled(), and decides for itself

    def cancel_children(self, message: CancelTask) -> None:
        for submitter, calls in ((self.client.tasks, self.client.tasks.tasks), (self.client.actors, self.client.actors.calls)):
            for task in [task for task in calls.values() if task.parent == message.task_id]:
                submitter.cancel(task, message.force, True)

    def reply_cancelled(self, source: int, task: PushTask) -> None:
        self.client.send(source, TaskReply(task.task_id, task.attempt, self.cancelled_results(task), 0))

    def cancelled_results(self, task: PushTask) -> list[Result]:
        """Those of a task without an error of its own: it had not started, or did not heed the wish."""
        return [Result(ERROR, serialize.dumps(TaskCancelledError(TaskID(task.task_id))))] * abs(task.num_returns)

    # -------------------------------------------------------------- the main thread

    def run(self) -> None:
        """Run tasks until the process is to leave."""
        client = self.client
        queue = self.queue
        while self.leaving is None:
            if queue:
                source, item = queue.popleft()
                if len(queue) >= FETCH_AHEAD:
                    self.fetch_ahead(queue[FETCH_AHEAD - 1][1])
                if type(item) is PushTask:
                    self.execute(source, item)
                elif type(item) is Graph:
                    item.run()
                elif type(item) is InstallActor:
                    self.host.install_actor(item)
                    if self.host.pools or self.host.loop:
                        break
                elif type(item) is Shutdown:
                    self.retire(item.reason)
                else:
                    self.leaving = item.reason or "terminated"
                continue
            client.work_off_released()
            waiter = self.arrival = Waiter()
            if queue:
                self.arrival = None
                continue
            client._drain(waiter, None)
            if client.broken is not None:
                return
        if self.host.loop is not None:
            self.host.run_async_actor()
        elif self.host.pools:
            self.host.run_threaded_actor()

    # -------------------------------------------------------------- one task

    def function(self, function_id: bytes) -> Any:
        function = self.functions.get(function_id)
        if function is None:
            function = self.functions[function_id] = serialize.loads(self.blobs[function_id])
        return function

    def arguments(self, task: Any) -> tuple[tuple, dict, list[Entry]]:
        """Positional and keyword arguments of a task, and the references that came with them on loan. Blocks for
        dependencies that are on other nodes.

        Raises:
            RayError: a dependency cannot be had."""
        client = self.client
        loans: list[Entry] = []
        data = task.arguments
        if not task.dependencies:
            if data == NO_ARGUMENTS:
                return (), {}, loans
            (args, kwargs), loans = client.values.load_with_loans(data)
            return args, kwargs, loans
        values = [(dependency.slot, *self.client.values.value_of(dependency)) for dependency in task.dependencies]
        for _, _, more in values:
            loans += more
        if values[0][0] == ALL_ARGUMENTS:
            args, kwargs = values.pop(0)[1]
        else:
            (args, kwargs), more = client.values.load_with_loans(data)
            loans += more
        if values:
            args = list(args)
            for slot, value, _ in values:
                if isinstance(slot, int):
                    args[slot] = value
                else:
                    kwargs[slot] = value
        return args, kwargs, loans

    def execute(self, source: int, task: PushTask) -> None:
        """Run a task to its end in this thread, and reply."""
        started = now_ns()
        called = returned = 0
        failed = False
        if self.cancelled and not task.actor_id:
            self.cancelled.intersection_update((task.task_id,))  # others are over
        if task.lease_id != self.lease:
            self.use_lease(task.lease_id)
        current = self.context_of(task)
        token = context.task.set(current)
        running = self.running[task.task_id] = (threading.get_ident(), current, started)
        if not task.actor_id:
            set_task_name(task.name)
        loans: list[Entry] = []
        try:
            self.interruptible = b"" if task.actor_id else task.task_id
            try:
                if self.cancelled and self.interruptible in self.cancelled:  # before it could be interrupted
                    raise KeyboardInterrupt
                gang = self.extras(task.extras).get("gang") if task.extras and not task.actor_id else None
                if gang is not None:
                    called = now_ns()
                    value = self.gangs.run(task, gang)
                elif task.actor_id and self.host.crew is not None:
                    called = now_ns()
                    value = self.host.crew.run(task)
                else:
                    args, kwargs, loans = self.arguments(task)
                    called = now_ns()
                    value = self.call(task, args, kwargs)
                args = kwargs = None  # type: ignore[assignment]
                returned = now_ns()
            finally:
                self.running.pop(task.task_id, None)
            if task.num_returns < 0 and type(value) is GeneratorType:
                self.running[task.task_id] = running
                results = self.results.send_items(source, task, value)
            else:
                results = self.results.pack_results(source, task, value)
            retryable = False
            value = None
            if self.cancelled and task.actor_id and task.task_id in self.cancelled:
                results, failed = self.cancelled_results(task), True
            self.interruptible = b""
        except (LeaveProcess, SystemExit) as error:
            self.interruptible = b""
            args = kwargs = value = None  # type: ignore[assignment]
            self.leave_by(error)
            return
        except BaseException as error:
            self.interruptible = b""
            args = kwargs = value = None  # type: ignore[assignment]
            results, retryable = self.results.pack_error(source, task, error)
            failed = True
        finally:
            context.task.reset(token)
        if self.cancelled:
            self.cancelled.discard(task.task_id)  # too late
        ended = now_ns()
        if current.recorded:
            self.runs.append(
                (task.task_id, task.attempt, current.name, current.function_name, started, called, returned, ended, failed)
            )
        self.reply(source, task, results, loans, ended - started, retryable)

    def call(self, task: PushTask, args: tuple, kwargs: dict) -> Any:
        """The user's code."""
        if task.actor_id:
            value = self.host.method_of(task)(*args, **kwargs)
            if context.leaving:
                current = context.task.get()
                if current is not None and current.leaves:  # it has caught what exit_actor raises
                    raise LeaveProcess(context.leaving)
                self.leaving = self.leaving or context.leaving  # a thread of the user's has called it
            return value
        return self.function(task.function_id)(*args, **kwargs)

    def now_running(self) -> list[tuple]:
        """What runs, as ``Records.runs`` has it, and its state."""
        main = threading.main_thread().ident
        found: list[tuple] = []
        for task_id, (runner, current, started) in list(self.running.items()):
            if not current.recorded:
                continue
            state = "RUNNING" if started else "PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY"
            if runner == main and self.blocked:
                state = "RUNNING_IN_RAY_WAIT" if self.client.values.in_wait else "RUNNING_IN_RAY_GET"
            found.append((task_id, current.attempt, current.name, current.function_name, started, 0, 0, 0, False, state))
        if self.host.creating is not None:
            current, started = self.host.creating
            name = current.function_name
            found.append((current.task_id, current.attempt, name, name, started, 0, 0, 0, False, "creation"))
        return found

    def context_of(self, task: PushTask) -> context.TaskContext:
        """What user code can ask about the task it runs in."""
        names = self.names.get((task.function_id, task.name, task.extras))
        if names is None:
            extras = self.extras(task.extras) if task.extras else {}
            if self.actor is not None:
                function_name = f"{self.actor.spec.short_name}.{task.name}"
                names = extras.get("task_name") or function_name, function_name, self.actor_function(task.name)
            else:
                try:
                    function = self.function(task.function_id)
                    full_name = f"{_module_of(function)}.{function.__name__}"
                    names = task.name, f"{function.__module__}.{function.__qualname__}", full_name
                except Exception:  # it fails again where that is the task's error
                    names = task.name, task.name, task.name
            self.names[task.function_id, task.name, task.extras] = names
        current = context.TaskContext(task.task_id, *names, task.attempt, self.shape)
        current.recorded = not (task.extras and self.extras(task.extras).get("unrecorded"))
        return current

    def actor_function(self, method: str) -> str:
        """The full name of a method of the actor."""
        assert self.actor is not None
        cls = type(self.actor.instance)
        return f"{_module_of(getattr(cls, method, cls), cls)}.{cls.__qualname__}.{method}"

    def reply(
        self, source: int, task: PushTask, results: list[Result], loans: list[Entry], nanoseconds: int, retryable: bool
    ) -> None:
        client = self.client
        if self.gone:
            return
        show_unfinished()
        retiring = False
        if task.extras:
            limit = self.extras(task.extras).get("max_calls", 0)
            if limit:
                count = self.calls[task.function_id] = self.calls.get(task.function_id, 0) + 1
                retiring = count >= limit
                if retiring:
                    self.retire("max_calls")
        message = TaskReply(task.task_id, task.attempt, results, nanoseconds, retryable, retiring)
        if not loans and not client.objects.unacknowledged:
            client.send(source, message)
            return
        client.work_off_released()
        with client.lock:
            client.objects.register(loans)
            due = set(client.objects.unacknowledged)
            client.objects.when_acknowledged(due, lambda: self.post(source, message))

    def post(self, destination: int, message: Any) -> None:
        """Send; a dead destination needs no message."""
        self.client.send(destination, message)

    def extras(self, data: bytes) -> dict[str, Any]:
        found = self.functions.get(data)
        if found is None:
            found = self.functions[data] = serialize.loads(data)
        return found

    def leave_by(self, error: BaseException) -> None:
        """User code wants this process to end, by ``exit_actor`` or ``sys.exit``."""
        if isinstance(error, SystemExit):
            code = error.code
            self.status = code if isinstance(code, int) else int(code is not None)
            if isinstance(code, str):
                print(code, file=sys.stderr)
            self.leaving = f"sys.exit({code!r})"
        else:
            self.leaving = str(error) or "exit_actor"

    def retire(self, reason: str) -> None:
        """Run no more tasks."""
        self.leaving = reason
        self.stays = True

    def stay_while_used(self) -> None:
        """Objects live as long as somebody uses them, and no longer than their owner (OBJ-1): so does this process, where it has
        retired. Blocks until the last borrower is gone, or the raylet says that it must go."""
        client = self.client
        while self.stays and client.broken is None:
            waiter = Waiter()
            with client.lock:
                if not client.objects.lent:
                    return
                client.objects.on_none_lent = waiter.finish
            client.send(client.raylet, StayingOn())
            client._drain(waiter, None)

    def leave(self) -> None:
        """Say goodbye, so that the end of this process is no crash; unless user code wants it to be one."""
        if self.keep_history:
            self.client.records.leave()
        if not self.status:
            self.client.send(self.client.raylet, ProcessLeaving(self.leaving or ""))


def _module_of(function: Any, cls: Any = None) -> str:
    """Where a function is from: its module, or its class's; for the program itself the name of the script."""
    module = getattr(cls or function, "__module__", "")
    code = getattr(inspect.unwrap(function), "__code__", None)
    if module == "__main__" and code is not None and not code.co_filename.startswith("<"):
        return os.path.splitext(os.path.basename(code.co_filename))[0]
    return module


def _interrupt_main() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""The part of compiled graphs that an actor runs: which methods, in which order, with values from whom and to whom.

A program comes by an ordinary call (``open_graph``). From then on values come by ``Values`` straight from whoever made them, and a
step runs in the actor's thread as soon as it is its turn and its values are there; ordinary calls run in between.

GRAPH-1 (order): the steps of an actor run in the order of the program, execution after execution, so its state changes as if all
ran in one thread.
GRAPH-2 (each value arrives): a step that fails, or that has an input that failed, sends the error in the place of its value.
GRAPH-3 (kept until read): what does not fit into a message lies in the arena and is held for as many executions as may be in
flight; the driver starts no further one before it has read the results of the oldest.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.client import context
from hpc_ray.client.context import LeaveProcess
from hpc_ray.client.graphs import Program, Slot, install
from hpc_ray.client.objects import ERROR
from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import AsyncioActorExit
from hpc_ray.protocol import Dependency, Result, Values
from hpc_ray.worker.results import dump_error

if TYPE_CHECKING:
    from hpc_ray.worker.executor import Executor


class _Failed(Exception):
    """An input is an error."""

    def __init__(self, result: Result):
        self.result = result


class Graph:
    """A program that runs; also what the executor finds in its queue when a step is ready."""

    def __init__(self, program: Program, executor: Executor):
        self.program = program
        self.executor = executor
        self.client = executor.client
        self.steps = program.steps
        self.values: dict[int, dict[int, Any]] = {}  # execution → slot → Dependency as it came, or a list of the one value
        self.execution = 0
        self.next = 0  # the step whose turn it is
        self.queued = False  # in the executor's queue, or running
        self.closed = False
        self.held: deque[tuple[int, ObjectRef]] = deque()  # GRAPH-3
        actor = executor.actor
        assert actor is not None
        task_id = self.client.minter.task_id()
        self.contexts = [
            context.TaskContext(task_id, name, name, name, 0, executor.shape)
            for name in (f"{actor.spec.short_name}.{step.method}" for step in self.steps)
        ]
        self.methods = [getattr(actor.instance, step.method) for step in self.steps]

    # -------------------------------------------------------------- messages (under the client's lock)

    def on_values(self, message: Values) -> None:
        arrived = self.values.setdefault(message.number, {})
        for dependency in message.values:
            arrived[int(dependency.slot)] = dependency
        if not self.queued and self.ready():
            self.queued = True
            self.executor.on_push_task(0, self)

    def ready(self) -> bool:
        if self.closed:
            return False
        arrived = self.values.get(self.execution)
        return arrived is not None and all(slot in arrived for slot in self.steps[self.next].inputs)

    def close(self) -> None:
        self.closed = True
        self.values.clear()
        self.held.clear()

    # -------------------------------------------------------------- the actor's thread

    def run(self) -> None:
        """Run the steps that are ready, unless something else waits for the thread."""
        while self.take_turn():
            token = context.task.set(self.contexts[self.next])
            try:
                values = self.call()
                if inspect.iscoroutine(values):
                    values = asyncio.run(_await(values))
                self.finish(values)
            except (LeaveProcess, SystemExit) as error:
                self.executor.leave_by(error)
                return
            except BaseException as error:
                self.fail(error)
            finally:
                context.task.reset(token)
            values = None
            if self.yield_turn():
                return

    async def run_async(self) -> None:
        """The same in the loop of an asyncio actor."""
        while self.take_turn():
            context.task.set(self.contexts[self.next])
            try:
                values = self.call()
                if inspect.isawaitable(values):
                    values = await values
                self.finish(values)
            except (LeaveProcess, AsyncioActorExit, SystemExit) as error:
                self.executor.leave_by(error)
                self.executor.host.stop()
                return
            except BaseException as error:
                self.fail(error)
            values = None
            await asyncio.sleep(0)

    def take_turn(self) -> bool:
        with self.client.lock:
            self.queued = self.ready()
        return self.queued

    def yield_turn(self) -> bool:
        executor = self.executor
        if not executor.queue:
            return False
        with self.client.lock:
            self.queued = self.ready()
            if self.queued:
                executor.on_push_task(0, self)
        return True

    def call(self) -> Any:
        step = self.steps[self.next]
        arrived = self.values[self.execution]
        found: dict[int, Any] = {}
        for slot in step.inputs:
            value = arrived[slot]
            if type(value) is Dependency:
                if value.result.kind == ERROR:
                    raise _Failed(value.result)
                loaded, loans = self.client.values.value_of(value)
                if loans:
                    with self.client.lock:
                        self.client.objects.register(loans)
                value = arrived[slot] = [loaded]
            found[slot] = value[0]
        args = [found[arg.number] if type(arg) is Slot else arg for arg in step.args]
        if not step.kwargs:
            return self.methods[self.next](*args)
        kwargs = {name: found[arg.number] if type(arg) is Slot else arg for name, arg in step.kwargs.items()}
        return self.methods[self.next](*args, **kwargs)

    def finish(self, value: Any) -> None:
        """Send what a step gave."""
        step = self.steps[self.next]
        values = [value]
        if len(step.outputs) > 1:
            values = list(value)
            if len(values) != len(step.outputs):
                raise ValueError(f"{step.method} gave {len(values)} values, and num_returns is {len(step.outputs)}")
        packed: dict[int, Dependency] = {}
        for slot in {slot for receiver in step.receivers for slot in receiver.slots}:
            packed[slot], reference = self.client.values.pack_value(values[step.outputs.index(slot)], slot)
            if reference is not None:
                self.held.append((self.execution, reference))
        self.deliver(packed, {slot: [values[step.outputs.index(slot)]] for slot in step.local})

    def fail(self, error: BaseException) -> None:
        """Send an error instead (GRAPH-2)."""
        step = self.steps[self.next]
        if isinstance(error, _Failed):
            result = error.result
        else:
            result = Result(ERROR, dump_error(self.executor.results.describe(step.method, error)))
        packed = {slot: Dependency(b"", result, slot) for slot in step.outputs}
        self.deliver(packed, {slot: packed[slot] for slot in step.local})

    def deliver(self, packed: dict[int, Dependency], local: dict[int, Any]) -> None:
        client = self.client
        step = self.steps[self.next]
        execution = self.execution
        messages = [
            (receiver.address, Values(receiver.inbox, execution, [packed[slot] for slot in receiver.slots]))
            for receiver in step.receivers
        ]
        with client.lock:
            self.values.get(execution, {}).update(local)  # not there: closed meanwhile
            self.next += 1
            if self.next == len(self.steps):
                self.next = 0
                self.execution += 1
                self.values.pop(execution, None)
                while self.held and self.held[0][0] <= execution - self.program.inflight:
                    self.held.popleft()
            if client.objects.unacknowledged:
                client.objects.when_acknowledged(set(client.objects.unacknowledged), lambda: self.send(messages))
                return
        self.send(messages)

    def send(self, messages: list[tuple[int, Values]]) -> None:
        for address, message in messages:
            self.client.send(address, message)


class Graphs:
    """The graphs that this actor takes part in."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.graphs: dict[bytes, Graph] = {}
        executor.client.mourners.append(self.on_death)
        install(self)

    def open(self, program: Program) -> None:
        graph = Graph(program, self.executor)
        with self.executor.client.lock:
            self.graphs[program.inbox] = graph
            self.executor.client.inboxes[program.inbox] = graph.on_values

    def close(self, inbox: bytes) -> None:
        with self.executor.client.lock:
            graph = self.graphs.pop(inbox, None)
            self.executor.client.inboxes.pop(inbox, None)
            if graph is not None:
                graph.close()

    def on_death(self, is_dead: Callable[[int], bool]) -> None:
        for graph in [graph for graph in self.graphs.values() if is_dead(graph.program.driver)]:
            self.close(graph.program.inbox)


async def _await(value: Any) -> Any:
    return await value

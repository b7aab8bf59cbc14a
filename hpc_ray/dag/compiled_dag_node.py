"""Compiled graphs: calls of actors' methods that the actors run by themselves, once they have been told the graph.

``Plan`` is filled by the nodes and checks the graph; ``CompiledDAG`` tells each actor its part (``worker.graphs``), sends inputs,
and receives results. A value goes straight from the process that made it to those that need it: one message, no call, no reply.

CGRAPH-1 (in order): results are fetched in the order of the executions; fetching one fetches those before it.
CGRAPH-2 (bounded): there are never more executions under way than ``max_inflight_executions``, counted until they are fetched.
CGRAPH-3 (whoever waits is answered): the death of an actor of the graph, ``teardown`` and the end of the session end every wait.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_ray.client.client import Client
from hpc_ray.client.graphs import Program, Receiver, Slot, Step, close_graph, open_graph
from hpc_ray.client.refs import ObjectRef, call_in_loop
from hpc_ray.client.waiting import Waiter
from hpc_ray.dag.context import DAGContext
from hpc_ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayCgraphCapacityExceeded,
    RayChannelError,
    RayChannelTimeoutError,
    RayError,
    RayTaskError,
)
from hpc_ray.protocol import ActorState, Dependency, Values
from hpc_ray.session import ensure_connected

if TYPE_CHECKING:
    import asyncio

_RESTART = "its process ended; a compiled graph does not go on after that. Compile the graph again."


class _Call(NamedTuple):
    """A node that calls a method."""

    slot: int
    actor: Any
    method: str
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Plan:
    """What a graph consists of. Each node, and each value, has a slot: its place in the order."""

    def __init__(self) -> None:
        self.slots: dict[Any, int] = {}
        self.calls: dict[int, _Call] = {}
        self.items: dict[int, dict[int, int]] = {}  # call → which of its values → slot
        self.keys: dict[int, Any] = {}  # slot → part of the input; None: the input itself
        self.unused: list[str] = []
        self.outputs: list[int] = []
        self.single = True
        self.has_input = False

    def add(self, node: Any, needs: Iterable[Any], used: bool) -> None:
        """A node, after those that it needs."""
        self.slots[node] = len(self.slots)
        if not used and hasattr(node, "get_method_name") and node.is_class_method_call:
            self.unused.append(node.get_method_name())

    def add_input(self, node: Any, parts: list[Any]) -> None:
        assert not self.has_input, "More than one InputNode found"
        self.has_input = True
        self.keys[self.slots[node]] = None
        idle = [part.key for part in parts if not part._downstream_nodes]
        if idle:
            raise ValueError(
                "Compiled Graph expects input to be accessed using all of attributes "
                f"{', '.join(str(part.key) for part in parts)}, but {', '.join(map(str, idle))} {'is' if len(idle) == 1 else 'are'} "
                "unused. Use each of them in the graph, or do not name it."
            )

    def add_attribute(self, node: Any, key: Any) -> None:
        self.keys[self.slots[node]] = key

    def add_item(self, node: Any, call: Any, index: int) -> None:
        self.items.setdefault(self.slots[call], {})[index] = self.slots[node]

    def add_call(self, node: Any, actor: Any, method: str, args: tuple, kwargs: dict[str, Any], num_returns: int) -> None:
        slot = self.slots[node]
        places = [self._place(arg, node) for arg in args]
        named = {name: self._place(arg, node) for name, arg in kwargs.items()}
        inputs = tuple(dict.fromkeys(arg.number for arg in [*places, *named.values()] if isinstance(arg, Slot)))
        if not inputs:
            raise ValueError(
                "Compiled DAGs require each task to take a dag.InputNode or at least one other DAGNode as an input. "
                f"Invalid task node:\n{node}\nPlease bind the task to proper DAG nodes."
            )
        # of a call with several values each has a slot of its own; those that nobody uses get one beyond all nodes
        outputs = (slot,) if num_returns <= 1 else tuple(-1 - slot * 1024 - i for i in range(num_returns))
        self.calls[slot] = _Call(slot, actor, method, tuple(places), named, inputs, outputs)

    def _place(self, arg: Any, node: Any) -> Any:
        if arg in self.slots if _hashable(arg) else False:
            return Slot(self.slots[arg])
        if any(inner in node._upstream_nodes for inner in _contents(arg)):
            raise ValueError(
                f"Found a DAGNode inside the argument {arg} of {node}. A DAGNode must be an argument itself; it must not be placed "
                "inside any type of container."
            )
        return arg

    def finish(self, end: Any, outputs: list[Any] | None) -> None:
        """``outputs``: the nodes that a MultiOutputNode names; None: ``end`` itself is the only one."""
        if not self.has_input:
            raise ValueError("Compiled DAGs currently require exactly one InputNode")
        if self.unused:
            raise ValueError(
                "Compiled DAG doesn't support leaf nodes, i.e., nodes that don't have downstream nodes and are not output nodes. "
                f"There are {len(self.unused)} leaf nodes in the DAG. Please add the outputs of {self.unused} to the MultiOutputNode."
            )
        self.single = outputs is None
        self.outputs = [self.slots[node] for node in ([end] if outputs is None else outputs)]
        for slot, call in self.calls.items():
            if slot in self.items:
                outs = tuple(self.items[slot].get(i, out) for i, out in enumerate(call.outputs))
                self.calls[slot] = call._replace(outputs=outs)
        made = {out for call in self.calls.values() for out in call.outputs}
        if not made >= set(self.outputs):
            raise ValueError("Each output of a compiled graph must be the value of an actor's method.")
        read = {slot for call in self.calls.values() for slot in call.inputs}
        used = {self.keys[slot] for slot in read if slot in self.keys}
        self.direct = None in used
        if self.direct and len(used) > 1:
            raise ValueError("All tasks must either use InputNode() directly, or they must index to specific args or kwargs.")
        self.positional = 1 if self.direct else 1 + max((key for key in used if isinstance(key, int)), default=-1)
        self.names = sorted(key for key in used if isinstance(key, str))
        self.feeds = [slot for slot in self.keys if slot in read]


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _contents(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for item in [*value, *value.values()]:
            yield from _contents(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _contents(item)
    else:
        yield value


class _Member:
    """An actor of the graph."""

    def __init__(self, handle: Any):
        self.handle = handle
        self.inbox = os.urandom(8)
        self.calls: list[_Call] = []

    @property
    def address(self) -> int:
        return self.handle._link.address


class _Execution(Waiter):
    """One that is under way, or whose results nobody has taken yet; done when all values are here, or never will be."""

    __slots__ = ("arrived", "future", "taken", "values")

    def __init__(self, count: int):
        super().__init__(count)
        self.arrived: dict[int, Dependency] = {}
        self.values: list[Any] | None = None  # fetched: for each output a value or an error
        self.taken: set[int] = set()  # outputs whose references have been read or dropped
        self.future: Callable[[], None] | None = None

    def finish(self) -> None:
        super().finish()
        if self.future is not None:
            then, self.future = self.future, None
            then()


class _Submitted(NamedTuple):
    number: int
    execution: _Execution


class CompiledDAG:
    """A graph that is ready to run. ``experimental_compile`` makes it; ``teardown`` ends it, and so does the death of an actor in it.

    Its methods are for one thread at a time."""

    def __init__(
        self,
        plan: Plan,
        submit_timeout: float | None,
        enable_asyncio: bool,
        max_inflight_executions: int | None,
        max_buffered_results: int | None,
    ):
        defaults = DAGContext.get_current()
        self._plan = plan
        self._asyncio = enable_asyncio
        self._submit_timeout = defaults.submit_timeout if submit_timeout is None else submit_timeout
        self._get_timeout = defaults.get_timeout
        self._teardown_timeout = defaults.teardown_timeout
        self._max_inflight = defaults.max_inflight_executions if max_inflight_executions is None else max_inflight_executions
        self._max_buffered = defaults.max_buffered_results if max_buffered_results is None else max_buffered_results
        if self._max_inflight < 1:
            raise ValueError(f"_max_inflight_executions must be at least 1, it is {self._max_inflight}")
        self._id = os.urandom(16).hex()
        self._inbox = os.urandom(8)
        self._client: Client = ensure_connected()
        self._slots = list(dict.fromkeys(plan.outputs))
        self._last = -1  # the newest execution
        self._fetched = -1  # the newest whose results are here, and those of all before it
        self._executions: dict[int, _Execution] = {}
        self._held: list[tuple[int, ObjectRef]] = []  # large inputs, as in GRAPH-3
        self._error: BaseException | None = None
        self._torn_down = False
        members: dict[Any, _Member] = {}
        for call in plan.calls.values():
            members.setdefault(call.actor, _Member(call.actor)).calls.append(call)
        self._members = list(members.values())
        self._open()

    # -------------------------------------------------------------- life

    def _open(self) -> None:
        client = self._client
        client.values.get_many([member.handle.__ray_ready__.remote() for member in self._members])
        read_by: dict[int, list[_Member]] = {}
        for member in self._members:
            for slot in {slot for call in member.calls for slot in call.inputs}:
                read_by.setdefault(slot, []).append(member)
        this = weakref.ref(self)
        with client.lock:
            client.inboxes[self._inbox] = _receiver(this)
            for member in self._members:
                link = member.handle._link
                if link.state != ActorState.ALIVE:  # it was a moment ago
                    raise ActorDiedError(link.id.hex(), f"The actor {link.id.hex()} of a compiled graph: {_RESTART}")
                link.watchers.append(_watcher(this))
        opened = [member.handle.__ray_call__.remote(open_graph, self._program(member, read_by)) for member in self._members]
        client.values.get_many(opened)
        feeds: dict[_Member, list[int]] = {}
        for slot in self._plan.feeds:
            for member in read_by[slot]:
                feeds.setdefault(member, []).append(slot)
        self._feeds = [Receiver(member.address, member.inbox, tuple(slots)) for member, slots in feeds.items()]
        if self._error is not None:
            raise self._error

    def _program(self, member: _Member, read_by: dict[int, list[_Member]]) -> Program:
        steps = []
        for call in member.calls:
            receivers = []
            for other in self._members:
                wanted = tuple(slot for slot in call.outputs if other in read_by.get(slot, ()))
                if wanted and other is not member:
                    receivers.append(Receiver(other.address, other.inbox, wanted))
            results = tuple(slot for slot in call.outputs if slot in self._slots)
            if results:
                receivers.append(Receiver(self._client.address, self._inbox, results))
            local = frozenset(slot for slot in call.outputs if member in read_by.get(slot, ()))
            steps.append(Step(call.method, call.args, call.kwargs, call.inputs, call.outputs, local, receivers))
        return Program(member.inbox, self._client.address, self._max_inflight, steps)

    @property
    def is_teardown(self) -> bool:
        """Whether it has ended."""
        return self._torn_down

    def get_id(self) -> str:
        return self._id

    def __repr__(self) -> str:
        return f"CompiledDAG({self._id})"

    def teardown(self, kill_actors: bool = False) -> None:
        """End the graph; its actors live on and are free for other things, unless ``kill_actors``. Blocks until no step runs.
        Harmless when it has ended."""
        if self._torn_down:
            return
        self._end(RayChannelError("this compiled graph has been torn down"))
        client = self._client
        if client.closed or client.broken is not None:
            return
        for reference in _close(self._members):
            try:
                client.values.get_one(reference, self._teardown_timeout if self._teardown_timeout >= 0 else None)
            except RayError:
                pass  # dead, or busy for longer than that; it will find the graph closed
        if kill_actors:
            for member in self._members:
                with client.lock:
                    client.actors.kill(member.handle._actor_id.binary(), True)

    def _end(self, error: BaseException) -> None:
        self._torn_down = True
        with self._client.lock:
            self._client.inboxes.pop(self._inbox, None)
            self._fail(error)
        self._held.clear()

    def _fail(self, error: BaseException) -> None:
        """No further result will come (CGRAPH-3). Under the lock."""
        if self._error is None:
            self._error = error
        for execution in self._executions.values():
            if not execution.done:
                execution.finish()
        self._client.lane.wake()

    def __del__(self) -> None:
        if self.__dict__.get("_torn_down", True) or self._client.closed:
            return
        members, client, inbox = self._members, self._client, self._inbox
        client.inboxes.pop(inbox, None)
        client.callbacks.append(partial(_close_all, members))  # later, and not here: REF-1
        client.lane.wake_background()

    # -------------------------------------------------------------- running

    def execute(self, *args: Any, **kwargs: Any) -> CompiledDAGRef | list[CompiledDAGRef]:
        """Start one execution; a reference to its result, or a list of them for a MultiOutputNode. Does not wait for it.

        Raises:
            ValueError: not the arguments that the InputNode stands for, or the graph was compiled for asyncio.
            RayCgraphCapacityExceeded: ``_max_inflight_executions`` are under way; get a result first.
            ActorDiedError: an actor of the graph is dead.
            RayChannelError: the graph has been torn down.
        """
        if self._asyncio:
            raise ValueError("Use execute_async if enable_asyncio=True")
        self._release_dropped()
        index = self._submit(args, kwargs).number
        if self._plan.single:
            return CompiledDAGRef(self, index)
        return [CompiledDAGRef(self, index, i) for i in range(len(self._plan.outputs))]

    async def execute_async(self, *args: Any, **kwargs: Any) -> CompiledDAGFuture | list[CompiledDAGFuture]:
        """The same for asyncio: what it gives is awaited. Raises what ``execute`` raises."""
        if not self._asyncio:
            raise ValueError("Use execute if enable_asyncio=False")
        import asyncio

        loop = asyncio.get_running_loop()
        index, execution = self._submit(args, kwargs)
        arrived = loop.create_future()
        client = self._client

        def then() -> None:
            client.lane.eager -= 1
            call_in_loop(loop, _set, arrived)

        with client.lock:
            client.lane.eager += 1
            if execution.done:
                then()
            else:
                execution.future = then
        client.lane.wake_background()
        if self._plan.single:
            return CompiledDAGFuture(self, index, arrived)
        return [CompiledDAGFuture(self, index, arrived, i) for i in range(len(self._plan.outputs))]

    def _submit(self, args: tuple, kwargs: dict[str, Any]) -> _Submitted:
        client = self._client
        if self._error is not None:
            raise self._error
        if client.closed:
            raise RayChannelError("the session of this compiled graph is over")
        self._check_input(args, kwargs)
        inflight = self._last - self._fetched
        if inflight >= self._max_inflight:
            raise RayCgraphCapacityExceeded(
                f"The compiled graph can't have more than {self._max_inflight} in-flight executions, and you currently have "
                f"{inflight} in-flight executions. Get an output before submitting more, or compile with a larger "
                "`_max_inflight_executions`."
            )
        if client.objects.unacknowledged:
            self._await_acknowledgements()
        index = self._last + 1
        packed: dict[int, Dependency] = {}
        for slot in self._plan.feeds:
            key = self._plan.keys[slot]
            value = args[0] if key is None else args[key] if isinstance(key, int) else kwargs[key]
            packed[slot], reference = client.values.pack_value(value, slot)
            if reference is not None:
                self._held.append((index, reference))
        while self._held and self._held[0][0] <= index - self._max_inflight:
            self._held.pop(0)
        execution = _Execution(len(self._slots))
        with client.lock:
            self._executions[index] = execution
            self._last = index
        for feed in self._feeds:
            client.send(feed.address, Values(feed.inbox, index, [packed[slot] for slot in feed.slots]))
        return _Submitted(index, execution)

    def _check_input(self, args: tuple, kwargs: dict[str, Any]) -> None:
        plan = self._plan
        if len(args) != plan.positional:
            raise ValueError(
                f"dag.execute() or dag.execute_async() must be called with {plan.positional} positional args, got {len(args)}"
            )
        for name in plan.names:
            if name not in kwargs:
                raise ValueError(f"dag.execute() or dag.execute_async() must be called with kwarg `{name}`")
        for name in kwargs:
            if name not in plan.names:
                raise ValueError(f"dag.execute() or dag.execute_async() was called with kwarg `{name}`, which the graph does not use")

    def _await_acknowledgements(self) -> None:
        """References that came in results are registered with their owners before what lent them may go (GRAPH-3)."""
        client = self._client
        waiter = Waiter()
        with client.lock:
            client.objects.when_acknowledged(set(client.objects.unacknowledged), waiter.one)
        if not client.block(waiter, self._submit_timeout if self._submit_timeout >= 0 else None):
            raise RayChannelTimeoutError(f"the owners of references in earlier results did not answer in {self._submit_timeout} s")

    def _on_values(self, message: Values) -> None:
        """Under the lock."""
        execution = self._executions.get(message.number)
        if execution is not None:
            for dependency in message.values:
                execution.arrived[int(dependency.slot)] = dependency
                execution.one()

    # -------------------------------------------------------------- results

    def _fetch(self, index: int, timeout: float | None) -> None:
        """Have the results of an execution here, and those of all before it (CGRAPH-1). Blocks."""
        client = self._client
        if timeout is None:
            timeout = self._get_timeout
        deadline = None if timeout < 0 else time.monotonic() + timeout
        while self._fetched < index:
            execution = self._executions[self._fetched + 1]
            waiting = sum(i <= self._fetched for i in self._executions) if len(self._executions) >= self._max_buffered else 0
            if waiting >= self._max_buffered:
                raise RayCgraphCapacityExceeded(
                    f"The compiled graph can't have more than {self._max_buffered} buffered results, and you currently have {waiting} "
                    "buffered results. Get them, or compile with a larger `_max_buffered_results`."
                )
            if not execution.done and not client.block(
                execution, None if deadline is None else max(0.0, deadline - time.monotonic())
            ):
                raise RayChannelTimeoutError(
                    f"There was no result of execution {self._fetched + 1} within {timeout:g} s. If it takes long, give get() a "
                    "timeout, or set DAGContext.get_timeout."
                )
            if len(execution.arrived) < len(self._slots):
                assert self._error is not None
                raise self._error
            if len(execution.taken) < len(self._plan.outputs):
                values = {slot: self._load(dependency) for slot, dependency in execution.arrived.items()}
                execution.values = [values[slot] for slot in self._plan.outputs]
            execution.arrived = {}
            self._fetched += 1
            self._forget_if_taken(self._fetched)

    def _load(self, dependency: Dependency) -> Any:
        try:
            value, loans = self._client.values.value_of(dependency)
        except Exception as error:
            return _Error(error)
        if loans:
            with self._client.lock:
                self._client.objects.register(loans)
        return value

    def _take(self, index: int, channel: int | None) -> Any:
        """The value of a reference; raises its error."""
        execution = self._executions[index]
        assert execution.values is not None
        value = execution.values[channel or 0]
        execution.values[channel or 0] = None
        self._drop(index, channel)
        if isinstance(value, _Error):
            error = value.error
            raise error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        return value

    def _drop(self, index: int, channel: int | None) -> None:
        """A reference has been read, or is gone."""
        execution = self._executions.get(index)
        if execution is not None:
            execution.taken.add(channel or 0)
            self._forget_if_taken(index)

    def _forget_if_taken(self, index: int) -> None:
        if index <= self._fetched and len(self._executions[index].taken) == len(self._plan.outputs):
            del self._executions[index]

    def _release_dropped(self) -> None:
        """Executions whose references are all gone count as fetched when they are done."""
        while self._last - self._fetched >= self._max_inflight and self._error is None:
            execution = self._executions[self._fetched + 1]
            if len(execution.taken) < len(self._plan.outputs):
                return
            self._fetch(self._fetched + 1, self._submit_timeout)


class _Error(NamedTuple):
    error: Exception


def _set(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


def _close_all(members: list[_Member]) -> None:
    _close(members)


def _close(members: list[_Member]) -> list[ObjectRef]:
    closed = []
    for member in members:
        try:
            closed.append(member.handle.__ray_call__.remote(close_graph, member.inbox))
        except RayError:
            pass  # it has too many calls waiting; it keeps an idle program
    return closed


def _receiver(this: weakref.ref[CompiledDAG]) -> Callable[[Values], None]:
    def receive(message: Values) -> None:
        graph = this()
        if graph is not None:
            graph._on_values(message)

    return receive


def _watcher(this: weakref.ref[CompiledDAG]) -> Callable[[RayError], None]:
    def watch(error: RayError) -> None:
        graph = this()
        if graph is not None and not graph._torn_down:
            if isinstance(error, ActorUnavailableError):
                error = ActorDiedError(error.actor_id, f"The actor {error.actor_id} of a compiled graph: {_RESTART}")
            graph._fail(error)

    return watch


class _Result:
    """What refers to a result of one execution."""

    def __init__(self, dag: CompiledDAG, execution_index: int, channel_index: int | None = None):
        self._dag = dag
        self._execution_index = execution_index
        self._channel_index = channel_index
        self._taken = False

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self._dag.get_id()}, execution_index={self._execution_index}, channel_index={self._channel_index})"

    def __copy__(self) -> Any:
        raise ValueError(f"{type(self).__name__} cannot be copied.")

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError(f"{type(self).__name__} cannot be deep copied.")

    def __reduce__(self) -> Any:
        raise ValueError(f"{type(self).__name__} cannot be pickled.")

    def __del__(self) -> None:
        if not self.__dict__.get("_taken", True):
            self._dag._drop(self._execution_index, self._channel_index)


class CompiledDAGRef(_Result):
    """The result of an execution, for ``get``: once, and only in the process that started it."""

    def get(self, timeout: float | None = None) -> Any:
        """The value; fetches those of earlier executions too. Blocks.

        Args:
            timeout: seconds; None: ``DAGContext.get_timeout``; -1: for ever.

        Raises:
            ValueError: it has been got before.
            RayTaskError: a method failed; it is also an instance of the class that was raised.
            RayChannelTimeoutError: not there in time; ``get`` may be called again.
            ActorDiedError, RayChannelError: an actor of the graph died, or the graph was torn down.
            RayCgraphCapacityExceeded: too many earlier results would wait for their ``get``.
        """
        if self._taken:
            raise ValueError("get() can only be called once on a CompiledDAGRef, and it was already called.")
        self._dag._fetch(self._execution_index, timeout)
        self._taken = True
        return self._dag._take(self._execution_index, self._channel_index)

    def _get_for_api(self, timeout: float | None) -> Any:
        return self.get(timeout)


class CompiledDAGFuture(_Result):
    """The result of an execution, for ``await``: once. Raises what ``CompiledDAGRef.get`` raises."""

    def __init__(self, dag: CompiledDAG, execution_index: int, fut: asyncio.Future, channel_index: int | None = None):
        super().__init__(dag, execution_index, channel_index)
        self._fut = fut

    def __await__(self) -> Any:
        if self._taken:
            raise ValueError("CompiledDAGFuture can only be awaited upon once, and it has already been awaited upon.")
        import asyncio

        self._taken = True
        yield from asyncio.shield(self._fut).__await__()
        self._dag._fetch(self._execution_index, -1)
        return self._dag._take(self._execution_index, self._channel_index)

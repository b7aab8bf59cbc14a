"""The client: one per process, the meeting point of its threads, its lane and its bookkeeping.

Relied on by the public API (drivers and workers alike) and by the worker's executor. It owns the lane and the store, receives
and dispatches messages, and makes threads wait.

CLIENT-1 (one drainer): messages are received and dispatched under ``drain``, so those of one sender are handled in order.
Whoever waits drains; the background thread drains what arrives while nobody waits.
CLIENT-2 (one lock): bookkeeping changes under ``lock`` only. User code never runs under it.
CLIENT-3 (no wait without an end): a waiting thread is answered, times out, or gets ``broken`` when the node is gone.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

from hpc_ray import exceptions, serialize
from hpc_ray._core import ArenaFull, Lane, Segment, Store
from hpc_ray.client import refs
from hpc_ray.client.actors import ActorSubmitter
from hpc_ray.client.calls import CallPacker, Function
from hpc_ray.client.interrupts import AGAIN_S, Interrupts
from hpc_ray.client.objects import ARENA, ERROR, FREED, INLINE, READY, Entry, ObjectTable
from hpc_ray.client.records import Records
from hpc_ray.client.refs import ObjectRef, new_reference
from hpc_ray.client.tasks import TaskSubmitter
from hpc_ray.config import NodeConfig
from hpc_ray.exceptions import GetTimeoutError, LocalRayletDiedError, ObjectStoreFullError, RayError, RaySystemError, RayTaskError
from hpc_ray.ids import RAYLET_LANE, IdMinter, lane_of, node_of, raylet_address
from hpc_ray.protocol import (
    ActorCreated,
    Answer,
    ArenaFullNotice,
    ArenaRoom,
    Dependency,
    ExportFunction,
    JobRegistered,
    LogLines,
    Message,
    NamedActor,
    NodeDied,
    ProcessDied,
    ProcessStarted,
    Query,
    Result,
    Shutdown,
    TaskItem,
    TaskReply,
    Values,
    Welcome,
    decode,
    encode,
)
from hpc_ray.spilling import ObjectFiles

TICK_S = 0.02
ROOM_TRIES = 5  # others may take the room that was made; then the object goes to a file


class Waiter:
    """What a thread waits for: done after ``left`` calls of ``one``."""

    __slots__ = ("done", "entries", "left", "sleeper", "wake")

    def __init__(self, left: int = 1):
        self.left = left
        self.done = left <= 0
        self.entries: Collection[Entry] = ()  # that ``wake`` was left with; see ``Client.withdraw``
        self.wake: Callable[[Entry], None] = _nothing
        self.sleeper: threading.Event | None = None  # set while the owner sleeps instead of draining

    def one(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.finish()

    def one_ready(self, entry: Entry) -> None:
        self.one()

    def one_available(self, entry: Entry) -> None:
        """An error ends the wait: nobody wants the others then."""
        result = entry.result
        if result is not None and result.kind == ERROR:
            self.finish()
        else:
            self.one()

    def finish(self) -> None:
        self.done = True
        if self.sleeper is not None:
            self.sleeper.set()


def _nothing(entry: Entry) -> None:
    pass


class _Then(Waiter):
    """A waiter that nobody waits for; it calls ``then`` instead."""

    __slots__ = ("then",)

    then: Callable[[], None]

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self.then()


class _Request(Waiter):
    __slots__ = ("answer", "destination")

    def __init__(self, destination: int):
        super().__init__()
        self.destination = destination
        self.answer: Any = None


class _Closed:
    """In place of the lane and the store of a client that is closed."""

    eager = 0

    def send(self, destination: int, data: bytes) -> int:
        return -1

    def receive(self, timeout_s: float | None = None) -> list[tuple[int, bytes]]:
        return []

    def get(self, handle: int) -> None:
        return None

    def wake(self) -> None:
        pass

    wake_background = flush = wake


class _Loading(threading.local):
    loans: list[Entry] | None = None  # references met by the deserialisation under way


class Client:
    """See the module's text. Methods may be called from any thread unless they say otherwise."""

    def __init__(self, segment: Segment, lane: Lane, config: NodeConfig, kind: int, worker_id: bytes, pid: int, token: int = 0):
        self.segment = segment
        self.lane = lane
        self.store = Store(segment, lane)
        self.files = ObjectFiles(self.store, config.spill_dir)
        self.config = config
        self.settings = config.settings
        self.kind = kind
        self.worker_id = worker_id
        self.pid = pid
        self.token = token
        self.address = lane.address
        self.node = node_of(lane.address)
        self.raylet = raylet_address(self.node)
        self.now = time.monotonic
        self.lock = threading.RLock()
        self.drain = threading.Lock()
        self.broken: BaseException | None = None
        self.closed = False
        self.welcome: Welcome | None = None
        self.job_id = b"\0\0\0\0"
        self.minter = IdMinter(self.address, self.job_id)
        self.handlers: dict[type, Callable[[int, Any], None]] = {}
        self.callbacks: deque[Callable[[], None]] = deque()  # user's; run outside the lock
        self.on_blocked: Callable[[], None] | None = None  # set by workers
        self.on_unblocked: Callable[[], None] | None = None
        self.on_shutdown: Callable[[Shutdown], None] | None = None
        self.on_log: Callable[[LogLines], None] | None = None
        self._log_lines: deque[LogLines] = deque()
        self._showing = threading.Lock()
        self.lines_shown = 0
        self.log_ended = Waiter()
        self.sleepers: deque[Waiter] = deque()
        self.inboxes: dict[bytes, Callable[[Values], None]] = {}  # of graphs and groups; called under the lock
        self.mourners: list[Callable[[Callable[[int], bool]], None]] = []  # told of deaths, under the lock
        self.interrupts = Interrupts(self)
        self.dead: set[int] = set()  # processes that are known to be gone
        self.dead_nodes: set[int] = set()
        self.pull_waiters: dict[bytes, list[Callable[[], None]]] = {}
        self.in_wait = False  # a thread is in ``wait``, for those who list tasks
        self.records = Records(self)
        self.objects = ObjectTable(self)
        self.packer = CallPacker(self)
        self.tasks = TaskSubmitter(self, self.packer)
        self.actors = ActorSubmitter(self, self.packer)
        self.environments: dict[str, tuple[str, Any]] = {}  # runtime environments as given → as they travel, and the given
        self._exported: dict[int, set[bytes]] = {}
        self._batch: list[tuple[int, bytes]] = []  # what is being dispatched; the next message is the last
        self._requests: dict[int, _Request] = {}
        self._request_ids = itertools.count(1)
        self._loading = _Loading()
        self._ticking = False
        self._releasing = False  # references go: the background thread looks at them every tick, and nobody has to wake it
        self._thread: threading.Thread | None = None
        for answer in (Answer, ActorCreated, NamedActor, JobRegistered, ArenaRoom):
            self.handlers[answer] = self._on_answer
        self.handlers.update(
            {
                TaskReply: self._on_task_reply,
                TaskItem: self._on_task_item,
                ProcessDied: self._on_process_died,
                NodeDied: self._on_node_died,
                Shutdown: self._on_shutdown,
                LogLines: self._on_log_lines,
                Values: self._on_values,
                Welcome: self._on_welcome,
            }
        )

    # -------------------------------------------------------------- life

    def connect(self, timeout_s: float) -> None:
        """Register with the raylet and start the background thread. Blocks until the raylet answers.

        Raises:
            LaunchError: it does not answer in time, or refuses.
        """
        waiter = Waiter()
        self._welcomed = waiter
        self.send(self.raylet, ProcessStarted(self.kind, self.worker_id, self.pid, self.token))
        if not self.block(waiter, timeout_s):
            raise exceptions.LaunchError(f"the raylet of node {self.node} did not answer within {timeout_s:g} s")
        assert self.welcome is not None
        if self.welcome.refusal:
            raise exceptions.LaunchError(self.welcome.refusal)
        self._start()

    def adopt(self, welcome: Welcome, early: list[tuple[int, bytes]]) -> None:
        """Instead of ``connect`` where somebody else has registered this process: his Welcome, and what came before it."""
        self.welcome = welcome
        with self.drain:
            self.dispatch(early)
        self.run_callbacks()
        self._start()

    def _start(self) -> None:
        refs.install(self._meet, self.add_done_callback, self.get_one, self._leak, self.lane.wake_background)
        self._thread = threading.Thread(target=self._background, name="hpc_ray-io", daemon=True)
        self._thread.start()

    def use_job(self, job_id: bytes) -> None:
        """From now on ids carry this job."""
        self.job_id = job_id
        self.minter.set_job(job_id)

    def close(self) -> None:
        """Leave: no message is handled after this; threads that wait get an error."""
        if self.closed:
            return
        self.closed = True
        refs.install()
        self.fail(LocalRayletDiedError("the session was shut down while this call waited"))
        self.lane.wake()
        self.lane.wake_background()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def let_go(self) -> None:
        """After ``close``: references, handles and functions that stay must not keep the node's memory mapped."""
        self.lane = self.store = self.files = self.segment = _Closed()  # type: ignore[assignment]
        self.packer.let_go()
        self.objects.let_go()

    def fail(self, error: BaseException) -> None:
        """The node is gone: every wait, now and later, raises this (CLIENT-3)."""
        with self.lock:
            if self.broken is None:
                self.broken = error
            for waiter in [*self.sleepers, *self._requests.values()]:
                waiter.finish()
        self.lane.wake()

    # -------------------------------------------------------------- messages out

    def send(self, destination: int, message: Message) -> bool:
        """False if the destination is known to be dead. Never blocks."""
        if self.lane.send(destination, encode(message)) < 0:
            return False
        return destination not in self.dead and not (self.dead_nodes and node_of(destination) in self.dead_nodes)

    def export(self, worker: int, function: Function) -> None:
        """Send a function to a worker ahead of its first use."""
        known = self._exported.get(worker)
        if known is None:
            known = self._exported[worker] = set()
        if function.id not in known:
            known.add(function.id)
            self.send(worker, ExportFunction(function.id, function.blob))

    def next_request(self) -> int:
        return next(self._request_ids)

    def request(self, destination: int, make: Callable[[int], Message], timeout_s: float | None = None) -> Any:
        """Send ``make(request_id)`` and wait for the message that answers it.

        Raises:
            GetTimeoutError: no answer in time.
            RayError: the destination died.
        """
        request_id = next(self._request_ids)
        request = _Request(destination)
        with self.lock:
            self._requests[request_id] = request
        return self._await(request_id, request, self.send(destination, make(request_id)), timeout_s)

    def _await(self, request_id: int, request: _Request, sent: bool, timeout_s: float | None) -> Any:
        destination = request.destination
        try:
            if not sent:
                raise exceptions.RpcError(f"process {destination:#x} is dead")
            if not self.block(request, timeout_s):
                raise GetTimeoutError(f"no answer from process {destination:#x} within {timeout_s:g} s")
        finally:
            with self.lock:
                self._requests.pop(request_id, None)
        if request.answer is None:
            raise exceptions.RpcError(f"process {destination:#x} died before it answered")
        return request.answer

    def query(self, destination: int, name: str, timeout_s: float | None = None, /, **arguments: Any) -> Any:
        """Ask a question of the control plane (see protocol.Query); the value.

        Raises: whatever class the answer names.
        """
        answer = self.request(destination, lambda request_id: Query(request_id, name, arguments), timeout_s)
        return _value_of(answer)

    def ask(self, destination: int, name: str, /, **arguments: Any) -> Callable[[], Any]:
        """The same without waiting: what is returned waits, and gives the value or raises. To be called once."""
        request_id = next(self._request_ids)
        request = _Request(destination)
        with self.lock:
            self._requests[request_id] = request
        sent = self.send(destination, Query(request_id, name, arguments))

        def answered() -> Any:
            return _value_of(self._await(request_id, request, sent, None))

        return answered

    def query_all(
        self, destinations: Iterable[int], name: str, timeout_s: float, /, **arguments: Any
    ) -> tuple[dict[int, Any], int]:
        """Ask several processes at once; what those answered that live, and how many were late. Blocks."""
        requests = {destination: (next(self._request_ids), _Request(destination)) for destination in destinations}
        deadline = self.now() + timeout_s
        with self.lock:
            self._requests.update(requests.values())
        try:
            for destination, (request_id, request) in requests.items():
                if not self.send(destination, Query(request_id, name, arguments)):
                    request.finish()
            for _, request in requests.values():
                self.block(request, max(0.0, deadline - self.now()))
        finally:
            with self.lock:
                for request_id, _ in requests.values():
                    self._requests.pop(request_id, None)
        answers = {destination: request.answer for destination, (_, request) in requests.items()}
        late = sum(not request.done for _, request in requests.values())
        return {at: answer.value for at, answer in answers.items() if answer is not None and not answer.error}, late

    # -------------------------------------------------------------- messages in

    def dispatch(self, batch: list[tuple[int, bytes]]) -> None:
        """Handle messages. Under ``drain``."""
        batch.reverse()
        objects = self.objects
        with self.lock:
            objects.gather_deletions()
            self._batch = batch
            self._handle(batch)
            objects.send_deletions()

    def _handle(self, batch: list[tuple[int, bytes]]) -> None:
        """From the last to the first; a handler may take out some of those that follow."""
        handlers = self.handlers
        while batch:
            source, data = batch.pop()
            try:
                message = decode(data)
                handlers[type(message)](source, message)
            except Exception:
                print(f"hpc_ray: a message from process {source:#x} could not be handled:", file=sys.stderr)
                traceback.print_exc()

    def run_callbacks(self) -> None:
        """What the messages want called. Under no lock and not under ``drain``: a callback may itself wait."""
        while self.callbacks:
            try:
                callback = self.callbacks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                callback()
            except Exception:  # others wait for this thread as well
                print("hpc_ray: what was to be called back has failed:", file=sys.stderr)
                traceback.print_exc()

    def block(self, waiter: Waiter, timeout_s: float | None = None, *, gives_way: bool = True) -> bool:
        """Wait, draining meanwhile; False if the time is over. Blocks. In a worker others may use its CPU meanwhile, unless what
        it waits for is a process that has one (``gives_way``).

        Raises:
            LocalRayletDiedError: the node is gone.
            KeyboardInterrupt and whatever other signal handlers raise.
        """
        if waiter.done:
            return True
        deadline = None if timeout_s is None else self.now() + timeout_s
        blocked = False
        interrupts = self.interrupts
        main = threading.get_ident() == interrupts.main
        gives_way = gives_way and main and self.on_blocked is not None
        outer = interrupts.waiting
        try:
            if main:
                interrupts.waiting = waiter
            while not waiter.done:
                if main and interrupts.pending:
                    interrupts.strike()
                if self.broken is not None:
                    raise self.broken
                left = None if deadline is None else deadline - self.now()
                if left is not None and left <= 0:
                    left = 0.0
                if gives_way and not blocked:
                    if self.tasks.starved():
                        blocked = True
                        self.on_blocked()  # type: ignore[misc]
                    else:
                        left = 0.0005 if left is None else min(left, 0.0005)
                got = self._drain(waiter, left)
                if waiter.done:
                    break
                if gives_way and not got and not blocked:
                    blocked = True
                    self.on_blocked()  # type: ignore[misc]
                if deadline is not None and self.now() >= deadline:
                    return False
        finally:
            if blocked and self.on_unblocked is not None:
                self.on_unblocked()
            if main:
                interrupts.waiting = outer
        if self.broken is not None and not isinstance(waiter, _Request):
            raise self.broken
        return True

    def _drain(self, waiter: Waiter, left: float | None) -> bool:
        """One round of waiting: drain if nobody else does, else sleep; whether something came."""
        if self.drain.acquire(False):
            try:
                if waiter.done:  # by whoever drained until now; nothing else need ever come
                    return True
                batch = self.lane.receive(left)
                if batch:
                    self.dispatch(batch)
                return bool(batch)
            finally:
                self.drain.release()
                if self.sleepers:
                    self._pass_on()
                if self.callbacks:
                    self.run_callbacks()
        waiter.sleeper = threading.Event()
        self.sleepers.append(waiter)
        try:
            if waiter.done or not self.drain.locked():
                return True
            return waiter.sleeper.wait(left)
        finally:
            self.sleepers.remove(waiter)
            waiter.sleeper = None

    def _pass_on(self) -> None:
        """Another waiting thread drains from here on."""
        try:
            event = self.sleepers[0].sleeper
        except IndexError:
            return
        if event is not None:
            event.set()

    def _background(self) -> None:
        lane = self.lane
        try:
            while not self.closed:
                if self.interrupts.pending:
                    timeout: float | None = AGAIN_S
                elif self._ticking or self._releasing:
                    timeout = TICK_S
                    self._releasing = False
                else:
                    refs.set_parked(True)
                    timeout = None if not refs.released else 0.0
                pending = lane.wait_background(timeout)
                refs.set_parked(False)
                if self.closed:
                    return
                if pending and self.drain.acquire(False):
                    try:
                        batch = lane.receive(0.0)
                        if batch:
                            self.dispatch(batch)
                    finally:
                        self.drain.release()
                        if self.sleepers:
                            self._pass_on()
                if self.callbacks:
                    self.run_callbacks()
                if self.interrupts.pending:
                    self.interrupts.deliver()
                self.work_off_released()
                if self._ticking:
                    with self.lock:
                        self._ticking = self.tasks.tick(self.now())
        except Exception:
            traceback.print_exc()
            self.fail(exceptions.RaySystemError("the background thread of this process failed", traceback.format_exc()))

    def keep_ticking(self) -> None:
        """Timers are wanted from now on."""
        if not self._ticking:
            self._ticking = True
            self.lane.wake_background()

    def work_off_released(self) -> None:
        """Let go of what references that were collected had held."""
        released = refs.released
        if released:
            self._releasing = True
            objects = self.objects
            with self.lock:
                objects.gather_deletions()
                while released:
                    try:
                        entry: Entry = released.popleft()
                    except IndexError:  # the session is over
                        break
                    entry.count -= 1
                    if entry.count <= 0:
                        objects.drop_if_unused(entry)
                objects.send_deletions()

    def _on_welcome(self, source: int, message: Welcome) -> None:
        self.welcome = message
        self._welcomed.one()

    def _on_answer(self, source: int, message: Any) -> None:
        request = self._requests.get(message.request_id)
        if request is not None:
            request.answer = message
            request.finish()

    def _on_task_reply(self, source: int, message: TaskReply) -> None:
        task = self.actors.calls.get(message.task_id) or self.tasks.tasks.get(message.task_id)
        if task is not None and task.attempt == message.attempt:
            task.submitter.on_reply(task, message)

    def _on_task_item(self, source: int, message: TaskItem) -> None:
        task = self.tasks.tasks.get(message.task_id) or self.actors.calls.get(message.task_id)
        if task is not None and task.attempt == message.attempt and task.stream is not None:
            task.stream.add(message.index, message.result)
        else:
            self.objects.discard(message.result)

    def _on_process_died(self, source: int, message: ProcessDied) -> None:
        address = message.address
        self.hear_last_words(address)
        self.dead.add(address)
        self._exported.pop(address, None)
        self.objects.on_process_died(address)
        self.actors.on_process_died(address)
        if address == self.raylet or (lane_of(address) == RAYLET_LANE and node_of(address) == self.node):
            self.fail(LocalRayletDiedError())
        for request in list(self._requests.values()):
            if request.destination == address:
                request.finish()
        self._mourn(lambda other: other == address)

    def hear_last_words(self, address: int) -> None:
        """Handle all that a process has sent before its death is handled (PROTO-3): what is in this batch, and what has come
        since. Within ``dispatch``."""
        batch = self.lane.receive(0.0)
        batch.reverse()
        batch += self._batch
        self._batch[:] = [item for item in batch if item[0] != address]
        self._handle([item for item in batch if item[0] == address])

    def _on_node_died(self, source: int, message: NodeDied) -> None:
        self.dead_nodes.add(message.node)
        self.objects.on_node_died(message.node)
        self.tasks.on_node_died(message.node, message.text)
        self.actors.on_node_died(message.node)
        self.log_ended.one()
        for request in list(self._requests.values()):
            if node_of(request.destination) == message.node:
                request.finish()
        self._mourn(lambda other: node_of(other) == message.node)

    def _mourn(self, is_dead: Callable[[int], bool]) -> None:
        for mourner in self.mourners:
            mourner(is_dead)

    def _on_values(self, source: int, message: Values) -> None:
        receive = self.inboxes.get(message.inbox)
        if receive is not None:  # else it has ended here
            receive(message)

    def _on_shutdown(self, source: int, message: Shutdown) -> None:
        if self.on_shutdown is not None:
            self.on_shutdown(message)
        else:
            self.fail(LocalRayletDiedError(f"the session was shut down: {message.reason}"))

    def _on_log_lines(self, source: int, message: LogLines) -> None:
        if not message.lines:
            self.log_ended.one()
        elif self.on_log is not None:
            self._log_lines.append(message)
            self.callbacks.append(self.show_log_lines)

    def show_log_lines(self) -> None:
        with self._showing:  # in the order in which they came, whichever threads do it
            while self._log_lines and self.on_log is not None:
                message = self._log_lines.popleft()
                self.on_log(message)
                self.lines_shown += len(message.lines)

    # -------------------------------------------------------------- objects

    def put(self, value: Any) -> ObjectRef:
        """Store a value; its reference. Raises what ``serialize`` raises, and ``store_value``."""
        self.work_off_released()
        try:
            serialized = serialize.serialize(value)
        except TypeError as error:
            where = serialize.explain(value, "value")
            raise TypeError(f"Could not serialize the value: {error}. The part at fault: {where}") from error
        entry = self.objects.put(serialized, [reference._entry for reference in serialized.contained])
        return ObjectRef(entry)

    def store_value(self, object_id: bytes, serialized: serialize.Serialized, owner: int) -> Result:
        """Put bytes where they belong by their size: into a message, or into the arena.

        Raises:
            ObjectStoreFullError, OutOfDiskError: neither the arena nor the disk has room for it.
        """
        if serialized.size <= self.settings.inline_bytes:
            return Result(INLINE, serialized.to_bytes(), size=serialized.size)
        store = self.store
        handle = self._create(object_id, serialized.size, owner)
        on_disk = handle is None
        if handle is None:
            handle = self._create_on_disk(object_id, serialized.size, owner)
        try:
            if on_disk:
                self.files.write(handle, serialized.size, serialized.pieces())
            else:
                for offset, data in serialized.pieces():
                    store.write(handle, offset, data)
        except BaseException:
            store.abort(handle)
            raise
        store.seal(handle)
        return Result(ARENA, b"", self.node, handle, serialized.size)

    def _create(self, object_id: bytes, size: int, owner: int) -> int | None:
        """Room in the arena, after a wait for the raylet to make some if need be; None if the object shall go to a file."""
        for _ in range(ROOM_TRIES):
            try:
                return self.store.create(object_id, size, owner)
            except ArenaFull:
                self.work_off_released()
            answer = self.request(self.raylet, lambda request_id: ArenaFullNotice(request_id, size))
            if answer.error:
                raise _error_class(answer.error_kind)(answer.error)
            if answer.on_disk:
                break
        return None

    def _create_on_disk(self, object_id: bytes, size: int, owner: int) -> int:
        try:
            return self.store.create_on_disk(object_id, size, owner)
        except ArenaFull as error:
            raise ObjectStoreFullError(f"The object store of node {self.node} has more objects than it can count: {error}") from None

    def get_one(self, reference: ObjectRef, timeout_s: float | None = None) -> Any:
        """The value of a reference; raises its error. Blocks."""
        entry = reference._entry
        result = entry.result
        if entry.state != READY or result is None or result.kind == ARENA:
            self.make_available([entry], timeout_s)
        return self.load(entry)

    def get_many(self, references: Sequence[ObjectRef], timeout_s: float | None = None) -> list[Any]:
        """The values of references; raises the error of the first that has one, as soon as it is known. Blocks."""
        entries = [reference._entry for reference in references]
        self.make_available(entries, timeout_s)
        for entry in entries:
            result = entry.result
            if result is not None and result.kind == ERROR and entry.state is READY:
                self.load(entry)
        return self.load_all(entries)

    def make_ready(self, entries: Sequence[Entry], timeout_s: float | None = None) -> None:
        """Wait until all entries have a value, a place or an error. Blocks.

        Raises:
            GetTimeoutError: not in time.
        """
        with self.lock:
            unready = [entry for entry in entries if entry.state != READY]
            waiter = Waiter(len(unready))
            self._wake_when_ready(waiter, waiter.one_ready, unready)
        try:
            if not self.block(waiter, timeout_s):
                raise GetTimeoutError(f"not ready after {timeout_s:g} s")
        finally:
            self.withdraw(waiter)

    def make_available(self, entries: Sequence[Entry], timeout_s: float | None) -> None:
        """Wait until all entries can be loaded here, or one is an error. Blocks.

        Raises:
            GetTimeoutError: not in time.
        """
        if refs.released:
            self.work_off_released()
        deadline = None if timeout_s is None else self.now() + timeout_s
        while True:
            waiter = self._missing(entries)
            if waiter is None:
                return
            left = None if deadline is None else max(0.0, deadline - self.now())
            try:
                in_time = self.block(waiter, left)
            finally:
                self.withdraw(waiter)
            if not in_time:
                late = sum(entry.state != READY for entry in entries)
                raise GetTimeoutError(
                    f"Get timed out: {late or 'some'} of {len(entries)} object(s) not ready after {timeout_s:g} s."
                )

    def _missing(self, entries: Sequence[Entry], kind: type[Waiter] = Waiter) -> Waiter | None:
        """A waiter for what is not here yet; None if all is here, or one has an error. Of the results of one task that follow one another
        it waits for the first: they come together, and whoever waits looks again."""
        with self.lock:
            missing: dict[Entry, None] = {}  # each once
            elsewhere: dict[Entry, None] = {}
            objects = self.objects
            task: Any = None
            for entry in entries:
                result = entry.result
                if entry.state is READY and result is not None and result.kind == INLINE:
                    continue
                if objects.entries.get(entry.id) is not entry:
                    raise exceptions.ObjectLostError(entry.id.hex(), detail="The reference is from another session")
                if entry.state is not READY:
                    if task is None or entry.task is not task:
                        missing[entry] = None
                        task = entry.task
                else:
                    assert result is not None
                    if result.kind == ERROR:
                        return None
                    if result.kind == ARENA and objects.local_handle(entry) is None:
                        elsewhere[entry] = None
            for entry in elsewhere:
                objects.pull(entry)
            if not missing and not elsewhere:
                return None
            waiter = kind(len(missing) + len(elsewhere))

            def one_ready(entry: Entry) -> None:
                result = entry.result
                if result is not None and result.kind == ARENA and objects.local_handle(entry) is None:
                    objects.pull(entry)  # it comes while others are made; the next look waits for it
                waiter.one_available(entry)

            self._wake_when_ready(waiter, one_ready, missing)
            for entry in elsewhere:
                self.pull_waiters.setdefault(entry.id, []).append(waiter.one)
            return waiter

    def _wake_when_ready(self, waiter: Waiter, wake: Callable[[Entry], None], entries: Collection[Entry]) -> None:
        waiter.wake, waiter.entries = wake, entries
        for entry in entries:
            self.objects.on_ready(entry, wake)

    def withdraw(self, waiter: Waiter) -> None:
        """Nobody waits for it any more: take back the wakes that it has left with entries. Takes the lock."""
        if waiter.left <= 0:
            return  # all were used
        with self.lock:
            wake = waiter.wake
            for entry in waiter.entries:
                if entry.waiters is not None and wake in entry.waiters:
                    entry.waiters.remove(wake)
                    if entry.count <= 0:
                        self.objects.drop_if_unused(entry)

    def pulled(self, entry: Entry) -> None:
        """A pull ended, well or not; whoever waits looks again."""
        for wake in self.pull_waiters.pop(entry.id, ()):
            wake()

    def load(self, entry: Entry) -> Any:
        """The value of an entry that is available here; raises its error."""
        result = entry.result
        assert result is not None
        if result.kind == ARENA:
            handle = self.objects.local_handle(entry)
            data: Any = None if handle is None else self.files.read(handle)
            if data is None:
                with self.lock:
                    if entry.state == READY:
                        self.objects.lost_at(entry, self.node)
                self.make_available([entry], None)
                return self.load(entry)
        else:
            data = result.payload
        value, loans = self.load_with_loans(data)
        if loans:
            with self.lock:
                self.objects.register(loans, [entry])
        if result.kind == ERROR:
            raise value.as_instanceof_cause() if isinstance(value, RayTaskError) else value
        return value

    def load_all(self, entries: Sequence[Entry]) -> list[Any]:
        """``load`` of each; 0.4 µs for a small value."""
        loading = self._loading
        outer = loading.loans
        loans: list[Entry] = []
        loading.loans = loans
        values = []
        try:
            for entry in entries:
                result = entry.result
                if result is None or result.kind != INLINE:
                    values.append(self.load(entry))
                    continue
                try:
                    values.append(serialize.deserialize(result.payload))
                except Exception as error:
                    raise RaySystemError(str(error), traceback.format_exc()) from error
                if loans:
                    with self.lock:
                        self.objects.register(loans, [entry])
                    loans = loading.loans = []
        finally:
            loading.loans = outer
        return values

    def load_with_loans(self, data: Any) -> tuple[Any, list[Entry]]:
        """A value, and the borrowed references met in it for which this process is not registered yet.

        Raises:
            RaySystemError: it cannot be made here, for instance because a module is missing.
        """
        outer = self._loading.loans
        loans = self._loading.loans = []
        try:
            return serialize.deserialize(data), loans
        except Exception as error:
            raise RaySystemError(str(error), traceback.format_exc()) from error
        finally:
            self._loading.loans = outer

    def pack_value(self, value: Any, slot: int) -> tuple[Dependency, ObjectRef | None]:
        """A value for a message to another process; with it a reference to be held until it has been read, if that is needed.

        Raises:
            TypeError: it cannot be pickled.
            ObjectStoreFullError: no room for it.
        """
        try:
            serialized = serialize.serialize(value)
        except Exception as error:
            where = serialize.explain(value, "value")
            raise TypeError(f"Could not serialize the value: {error}. The part at fault: {where}") from error
        if serialized.size <= self.settings.inline_bytes and not serialized.contained:
            return Dependency(b"", Result(INLINE, serialized.to_bytes(), size=serialized.size), slot), None
        self.work_off_released()
        entry = self.objects.put(serialized, [reference._entry for reference in serialized.contained])
        assert entry.result is not None
        return Dependency(entry.id, entry.result, slot, entry.places or []), ObjectRef(entry)

    def value_of(self, dependency: Dependency) -> tuple[Any, list[Entry]]:
        """A value that came in a message, and the references in it that are on loan. Blocks while it is on another node.

        Raises:
            RayError: it is an error, or lost.
        """
        result = dependency.result
        if result.kind != ARENA:
            value, loans = self.load_with_loans(result.payload)
            if result.kind == ERROR:
                raise value
            return value, loans
        here = self.node
        handles = [handle for node, handle in dependency.places if node == here]
        if not handles and (brought := self.objects.brought.get(dependency.object_id)):
            handles.append(brought)
        for handle in handles:
            pin = self.files.read(handle)
            if pin is not None:
                return self.load_with_loans(pin)
        with self.lock:  # on another node: borrow it, on the caller's loan, and wait for a copy
            entry = self.objects.meet(dependency.object_id)
            entry.count += 1
            if not entry.owned:
                self.objects.set_result(entry, result, [list(place) for place in dependency.places if place[0] != here])
        try:
            self.make_available([entry], None)
            local = self.objects.local_handle(entry)
            pin = self.files.read(local) if local is not None else None
            if pin is None:
                return self.load(entry), []
            return self.load_with_loans(pin)
        finally:
            with self.lock:
                self.objects.release(entry)

    def wait(self, references: Sequence[Any], num_returns: int, timeout_s: float | None, fetch_local: bool) -> list[int]:
        """Wait until ``num_returns`` are ready or the time is over; the positions of the first that are ready, at most so
        many. Blocks. 50 ns for each reference where enough are ready.

        Raises:
            ValueError: a reference is there twice.
            ObjectLostError: one is from another session.
        """
        if refs.released:
            self.work_off_released()
        try:
            entries: list[Entry] = list(map(_entry_of, references))
        except AttributeError:  # some are generators
            with self.lock:
                entries = [item._entry if isinstance(item, ObjectRef) else item._head() for item in references]
        if len(set(entries)) != len(entries):
            raise ValueError("Wait requires a list of unique object refs.")
        ready = _first_ready(entries, num_returns)
        if len(ready) < num_returns:
            self._await_some(entries, num_returns, timeout_s)
            ready = _first_ready(entries, num_returns)
        if fetch_local:
            with self.lock:
                for entry in entries:
                    result = entry.result
                    if result is not None and result.kind == ARENA and entry.state is READY and self.objects.local_handle(entry) is None:
                        self.objects.pull(entry)
        return ready

    def _await_some(self, entries: list[Entry], count: int, timeout_s: float | None) -> None:
        """Wait until ``count`` entries are READY or the time is over. Blocks."""
        with self.lock:
            unready = [entry for entry in entries if entry.state is not READY]
            for entry in unready:
                if entry.state is FREED:
                    raise exceptions.ObjectLostError(entry.id.hex(), detail="The reference is from another session")
            waiter = Waiter(count - (len(entries) - len(unready)))
            if not waiter.done:
                self._wake_when_ready(waiter, waiter.one_ready, unready)
        if waiter.done:
            return
        self.in_wait = True
        try:
            self.block(waiter, timeout_s)
        finally:
            self.in_wait = False
            waiter.left = len(unready)  # some were not waited for
            self.withdraw(waiter)

    def add_done_callback(self, entry: Entry, callback: Callable[[], None]) -> None:
        """Call back, without the lock, once the entry can be loaded here without waiting."""

        def look() -> None:
            waiter = self._missing([entry], _Then)
            if waiter is None:
                self.callbacks.append(finished)
            else:
                assert isinstance(waiter, _Then)
                waiter.then = look

        def finished() -> None:
            self.lane.eager -= 1
            callback()

        with self.lock:
            self.lane.eager += 1
            look()
        if self.lane.eager:
            self.lane.wake_background()
        self.run_callbacks()

    def _meet(self, object_ids: Iterable[bytes]) -> list[ObjectRef]:
        """References that came from elsewhere, 0.2 µs each; those that are borrowed are on loan (OBJ-2)."""
        objects = self.objects
        known, meet = objects.entries.get, objects.meet
        entries, borrowed = [], []
        with self.lock:
            for object_id in object_ids:
                entry = known(object_id) or meet(object_id)
                entry.count += 1
                entries.append(entry)
                if not entry.owned and not entry.added:
                    borrowed.append(entry)
            if borrowed:
                if self._loading.loans is not None:
                    self._loading.loans.extend(borrowed)
                else:
                    objects.register(borrowed)
        references = []
        for entry in entries:  # without the lock: the collector may run here, and finalisers of the user's
            reference = new_reference(ObjectRef)
            reference._entry = entry
            references.append(reference)
        return references

    def _leak(self, entry: Entry) -> None:
        with self.lock:
            entry.count += 1


_entry_of = attrgetter("_entry")


def _value_of(answer: Any) -> Any:
    if answer.error:
        raise _error_class(answer.error_kind)(answer.error)
    return answer.value


def _first_ready(entries: list[Entry], count: int) -> list[int]:
    """The positions of the first ``count`` entries that are READY."""
    found = []
    for position, entry in enumerate(entries):
        if entry.state is READY:
            found.append(position)
            if len(found) == count:
                break
    return found


def _error_class(name: str) -> type[Exception]:
    found = getattr(exceptions, name, None) or {"ValueError": ValueError, "KeyError": KeyError, "TypeError": TypeError}.get(name)
    return found or RayError

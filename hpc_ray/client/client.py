"""The client: one per process, the meeting point of its threads, its lane and its bookkeeping.

Relied on by the public API (drivers and workers alike) and by the worker's executor. It owns the lane and the store, receives
and dispatches messages, and makes threads wait.

CLIENT-1 (one drainer): messages are received and dispatched under ``drain``, so those of one sender are handled in order.
Whoever waits drains; the background thread drains what arrives while nobody waits.
CLIENT-2 (one lock): bookkeeping changes under ``lock`` only. User code never runs under it.
CLIENT-3 (no wait without an end): a waiting thread is answered, times out, or gets ``broken`` when the node is gone.
CLIENT-4 (no wait under the lock): finalisers and signal handlers of the user's run wherever they strike, also under ``lock`` and ``drain``.
Where they wait, the lock is free meanwhile, and they drain in the turn of whom they have interrupted.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hpc_ray import exceptions
from hpc_ray._core import Lane, Segment, Store
from hpc_ray.client import refs
from hpc_ray.client.actors import ActorSubmitter
from hpc_ray.client.calls import CallPacker, Function
from hpc_ray.client.interrupts import AGAIN_S, Interrupts
from hpc_ray.client.objects import Entry, ObjectTable
from hpc_ray.client.records import Records
from hpc_ray.client.tasks import TaskSubmitter
from hpc_ray.client.values import ObjectValues
from hpc_ray.client.waiting import Request, Waiter, check
from hpc_ray.config import NodeConfig
from hpc_ray.exceptions import GetTimeoutError, LocalRayletDiedError
from hpc_ray.ids import RAYLET_LANE, IdMinter, lane_of, name_of, node_of, raylet_address
from hpc_ray.protocol import (
    ActorCreated,
    Answer,
    ArenaRoom,
    DeathCause,
    ExportFunction,
    JobRegistered,
    LogLines,
    Message,
    NamedActor,
    NodeDied,
    ProcessDied,
    ProcessStarted,
    Query,
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
ALL_THERE_IS = 1 << 62  # messages


class _Closed:
    """In place of the lane and the store of a client that is closed."""

    eager = 0

    def send(self, destination: int, data: bytes) -> int:
        return -1

    def receive(self, timeout_s: float | None = None, limit: int = 0) -> list[tuple[int, bytes]]:
        return []

    def get(self, handle: int) -> None:
        return None

    def wake(self) -> None:
        pass

    wake_background = flush = wake


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
        self.drain = threading.RLock()  # a signal handler may wait where the thread that it has interrupted waits and drains
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
        self.dead: dict[int, DeathCause] = {}  # processes that are known to be gone
        self.dead_nodes: set[int] = set()
        self.records = Records(self)
        self.objects = ObjectTable(self)
        self.values = ObjectValues(self)
        self.packer = CallPacker(self)
        self.tasks = TaskSubmitter(self, self.packer)
        self.actors = ActorSubmitter(self, self.packer)
        self.environments: dict[str, tuple[str, Any]] = {}  # runtime environments as given → as they travel, and the given
        self._exported: dict[int, set[bytes]] = {}
        self._batch: list[tuple[int, bytes]] = []  # what is being dispatched; the next message is the last
        self._requests: dict[int, Request] = {}
        self._request_ids = itertools.count(1)
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
            raise exceptions.LaunchError(f"{name_of(self.raylet)} did not answer within {timeout_s:g} s")
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
        values = self.values
        refs.install(values.meet, values.add_done_callback, values.get_one, values.leak, self.lane.wake_background)
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
        self.fail(LocalRayletDiedError(refs.SHUT_DOWN))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        self.run_callbacks()
        refs.install()

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
            self.values.give_up(self.broken)
        self.lane.wake()
        self.lane.wake_background()  # futures are to be called back

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
        request = Request(destination)
        with self.lock:
            self._requests[request_id] = request
        return self._await(request_id, request, self.send(destination, make(request_id)), timeout_s)

    def _await(self, request_id: int, request: Request, sent: bool, timeout_s: float | None) -> Any:
        destination = request.destination
        try:
            if not sent:
                raise exceptions.RpcError(f"{name_of(destination)} is dead")
            if not self.block(request, timeout_s):
                raise GetTimeoutError(f"no answer from {name_of(destination)} within {timeout_s:g} s")
        finally:
            with self.lock:
                self._requests.pop(request_id, None)
        if request.answer is None:
            raise exceptions.RpcError(f"{name_of(destination)} died before it answered")
        return request.answer

    def query(self, destination: int, name: str, timeout_s: float | None = None, /, **arguments: Any) -> Any:
        """Ask a question of the control plane (see protocol.Query); the value.

        Raises: whatever class the answer names.
        """
        answer = self.request(destination, lambda request_id: Query(request_id, name, arguments), timeout_s)
        check(answer)
        return answer.value

    def ask(self, destination: int, name: str, /, **arguments: Any) -> Callable[[], Any]:
        """The same without waiting: what is returned waits, and gives the value or raises. To be called once."""
        request_id = next(self._request_ids)
        request = Request(destination)
        with self.lock:
            self._requests[request_id] = request
        sent = self.send(destination, Query(request_id, name, arguments))

        def answered() -> Any:
            answer = self._await(request_id, request, sent, None)
            check(answer)
            return answer.value

        return answered

    def query_all(
        self, destinations: Iterable[int], name: str, timeout_s: float, /, **arguments: Any
    ) -> tuple[dict[int, Any], int]:
        """Ask several processes at once; what those answered that live, and how many were late. Blocks."""
        requests = {destination: (next(self._request_ids), Request(destination)) for destination in destinations}
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
            if self._batch:  # a signal handler that waits has interrupted the dispatch of these, which come first
                batch += self._batch
                self._batch.clear()
            self._batch = batch
            self._handle(batch)
            objects.send_deletions()

    def _handle(self, batch: list[tuple[int, bytes]]) -> None:
        """From the last to the first; a handler may take out some of those that follow."""
        handlers = self.handlers
        while batch:
            try:
                source, data = batch.pop()
            except IndexError:  # one that waits, in a signal handler, has handled the rest (CLIENT-4)
                return
            try:
                message = decode(data)
                handlers[type(message)](source, message)
            except Exception:
                print(f"hpc_ray: a message from {name_of(source)} could not be handled:", file=sys.stderr)
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
        if main:
            interrupts.look()
        gives_way = gives_way and main and self.on_blocked is not None
        outer = interrupts.waiting
        lock: Any = self.lock
        held = lock._release_save() if lock._is_owned() else None  # CLIENT-4; costs nothing: whoever is awaited works meanwhile
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
            if held is not None:
                lock._acquire_restore(held)
        if self.broken is not None and not isinstance(waiter, Request):
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
            if waiter.done:
                return True
            if self.drain.acquire(False):  # whoever drained has stopped just now, and may not have seen this sleeper
                self.drain.release()
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
        self.dead[address] = message.cause
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
        batch = self.lane.receive(0.0, ALL_THERE_IS)
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

"""A whole cluster in one thread under a virtual clock: the real GCS and raylet states among modelled processes.

For tests of failure without sleeping, and for the study of machines that nobody has at hand: costs are arguments.
Relies on the two states; knows nothing of ``_core``. Workers, owners, fork servers and links are models of a page
each.

Without ``Prices`` only latencies count. With them each process has a queue, and everything that it does takes a core of its host
for as long as was measured (``bench/costs.py``); messages between nodes go through the two links.

SIM-1 (deterministic): the same seed and the same calls give the same run.
SIM-2 (order): messages of one process to another arrive in order; a death notice arrives after all its subject had
sent (PROTO-3). Messages of different senders race, by a random latency.
SIM-3 (at rest): ``check`` holds when nothing is under way: states validate, and owners got an answer for everything.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_ray.config import NodeConfig, Settings
from hpc_ray.gcs.journal import MemoryJournal
from hpc_ray.gcs.state import GcsState
from hpc_ray.ids import (
    FORK_SERVER_LANE,
    GCS_ADDRESS,
    LINK_LANE,
    IdMinter,
    address_of,
    node_of,
    raylet_address,
)
from hpc_ray.machine import Action, Exit, Journal, Machine, Send, SetTimer, TimerFired
from hpc_ray.protocol import (
    UNIT,
    ActorCreated,
    ActorInfo,
    ActorInitFailed,
    ActorReady,
    ActorSpec,
    ActorState,
    ActorUpdate,
    Answer,
    ClusterView,
    CreateActor,
    DeathCause,
    FinishJob,
    InstallActor,
    JobRegistered,
    KillActor,
    KillProcess,
    LeaseContended,
    LeaseGranted,
    LeaseRedirected,
    LeaseRefused,
    LeaseRevoked,
    NodeDied,
    ObjectLocal,
    ProcessDied,
    ProcessExited,
    ProcessKind,
    ProcessLeaving,
    ProcessStarted,
    PullFailed,
    PullObject,
    PushTask,
    Query,
    RegisterJob,
    RequestLease,
    ResizeLeaseRequest,
    Resources,
    ReturnLease,
    Shape,
    Shutdown,
    StartWorker,
    Strategy,
    TaskReply,
    TerminateActor,
    TransferDone,
    TransferObject,
    Welcome,
    WorkerBlocked,
    WorkerForked,
    WorkerUnblocked,
    encode,
)
from hpc_ray.raylet.events import (
    AbortCopy,
    AllocateCopy,
    AskForkServer,
    CopyAllocated,
    CopyFound,
    DeleteObject,
    DeleteOwned,
    FindCopy,
    LimitStore,
    MarkDead,
    ObjectsSpilled,
    Reclaim,
    Reclaimed,
    SealCopy,
    SpillObjects,
)
from hpc_ray.raylet.state import WHOLE_NODE, RayletState


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that things take. The defaults are of the order measured on the reference machine."""

    lane_s: float = 10e-6  # a message on a node
    network_s: float = 40e-6  # and one between nodes
    jitter: float = 1.0  # latencies are drawn from once to (1 + jitter) times
    launch_s: float = 0.0  # until the launcher has started the nodes' processes; this and the next one with prices
    boot_s: float = 0.0  # work of a node before it registers
    fork_s: float = 0.002
    worker_start_s: float = 0.01
    reap_s: float = 0.0005
    detect_s: float = 0.1  # until the GCS hears that a node is gone
    bytes_per_s: float = 5e9


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a core that things take, as measured. A price of the deciding halves is for one event or action and depends on
    how many nodes there are: it is ``[[nodes, seconds], …]``, and lies on straight lines between."""

    events: dict[str, dict[str, list[list[float]]]] = {}  # role ("gcs", "raylet") → class of event → price
    turn_s: float = 0.0  # a role looks at its lane
    receive_s: float = 0.0  # takes a message from it and decodes it
    receive_byte_s: float = 0.0
    encode_s: float = 0.0
    encode_byte_s: float = 0.0
    send_s: float = 0.0  # puts a message into a lane
    send_byte_s: float = 0.0
    wake_s: float = 0.0  # a process that slept runs again: so much of a core, before anything else
    link_turn_s: float = 0.0  # a link looks at its lane and at MPI
    link_out_s: float = 0.0  # and takes a message out of the node
    link_in_s: float = 0.0  # or into it
    link_chunk_s: float = 0.0  # what goes to one node at once, at either end
    link_byte_s: float = 0.0  # of objects, at the receiving end
    submit_s: float = 0.0  # an owner makes and sends a task
    reply_s: float = 0.0  # and takes its result
    task_s: float = 0.0  # a worker runs a task that does nothing
    create_s: float = 0.0  # an owner makes an actor, and hears of it
    actor_s: float = 0.0  # a worker becomes an actor that does nothing in its constructor

    def event_s(self, role: str, name: str, nodes: int) -> float:
        points = self.events.get(role, {}).get(name) or self.events.get(role, {}).get("other")
        if not points:
            return 0.0
        below = points[0]
        for point in points:
            if point[0] >= nodes:
                share = (nodes - below[0]) / (point[0] - below[0]) if point[0] > below[0] else 0.0
                return below[1] + share * (point[1] - below[1])
            below = point
        return below[1]


SLICE_S = 3e-3  # other programs have a core for so long at a time


class Host:
    """Cores; of those that are ready who has had least gets the next free one, as the kernel has it, for as long as what it found in
    its queue takes. Of each core other programs have all but the share ``ours``."""

    def __init__(self, simulator: Simulator, cores: int, ours: float):
        self.simulator = simulator
        self.free = cores
        self.ready: list[tuple[float, int, Process]] = []  # heap, by what they have had
        self._had_s = 0.0  # by who got a core last: who has slept does not make up for it
        self._order = itertools.count()
        self._away_s = SLICE_S * ours / (1 - ours) if ours < 1 else 0.0
        self._others = 0  # that want a core
        for _ in range(cores if ours < 1 else 0):
            simulator.after(simulator.random.random() * (SLICE_S + self._away_s), self._other_comes)

    def _other_comes(self) -> None:
        self._others += 1
        self.dispatch()

    def _other_goes(self) -> None:
        self.free += 1
        self.simulator.after(self._away_s * 2 * self.simulator.random.random(), self._other_comes)
        self.dispatch()

    def add(self, process: Process) -> None:
        process.had_s = max(process.had_s, self._had_s)
        heapq.heappush(self.ready, (process.had_s, next(self._order), process))
        self.dispatch()

    def dispatch(self) -> None:
        while self.free and self._others:
            self._others -= 1
            self.free -= 1
            self.simulator.after(SLICE_S, self._other_goes)
        while self.free and self.ready:
            had_s, _, process = heapq.heappop(self.ready)
            self._had_s = max(self._had_s, had_s)
            if process.alive:
                self.free -= 1
                seconds = process.take_turn()
                process.had_s += seconds
                process.busy_s += seconds
                self.simulator.after(seconds, lambda process=process: self._end(process))  # type: ignore[misc]

    def _end(self, process: Process) -> None:
        self.free += 1
        if process.alive:
            process.end_turn()
            if process.inbox:
                heapq.heappush(self.ready, (process.had_s, next(self._order), process))
            else:
                process.awake = False
                process.rest()
        self.dispatch()


class Process:
    """Somebody with an address. With prices: one thread, which takes what is in its queue in turns."""

    most = 64  # messages in a turn
    turn_s = 0.0

    def __init__(self, simulator: Simulator, address: int):
        self.simulator = simulator
        self.address = address
        self.alive = True
        self.busy_s = 0.0
        self.had_s = 0.0  # of its host's cores, since everybody has had as much
        simulator.processes[address] = self
        if simulator.prices is not None:
            self.host = simulator.host_of(node_of(address))
            self.inbox: deque[tuple[float, Callable[[], None]]] = deque()
            self.outbox: list[tuple[int, Any]] = []
            self.awake = False
            self._in_turn = False
            self._spent = 0.0
            self._waking_s = 0.0
            self._encoded: Any = None

    def send(self, destination: int, message: Any) -> None:
        simulator = self.simulator
        if simulator.prices is None:
            simulator.post(self.address, destination, message)
        elif self._in_turn:
            self._spent += simulator.send_price(message, again=message is self._encoded)
            self._encoded = message
            self.outbox.append((destination, message))
        else:
            self.do_later(0.0, lambda: self.send(destination, message))

    def receive(self, source: int, message: Any) -> None:
        raise NotImplementedError

    # -- with prices

    def do_later(self, seconds: float, what: Callable[[], None]) -> None:
        """When its turn comes; it will take so long, and what it sends meanwhile leaves at the end."""
        self.inbox.append((seconds, what))
        self.wake()

    def wake(self) -> None:
        if not self.awake:
            self.awake = True
            assert self.simulator.prices is not None
            self._waking_s = self.simulator.prices.wake_s
            self.host.add(self)

    def take_turn(self) -> float:
        self._in_turn, self._spent, self._encoded = True, self.turn_s + self._waking_s, None
        self._waking_s = 0.0
        for _ in range(min(self.most, len(self.inbox))):
            seconds, what = self.inbox.popleft()
            self._spent += seconds
            what()
        self._in_turn = False
        return self._spent

    def end_turn(self) -> None:
        outbox, self.outbox = self.outbox, []
        for destination, message in outbox:
            self.simulator.post(self.address, destination, message)

    def rest(self) -> None:
        """Its queue is empty."""


# ------------------------------------------------------------------ roles: the real states


class Role(Process):
    """Performs a machine's actions under the virtual clock."""

    name = ""

    def __init__(self, simulator: Simulator, address: int, state: Machine):
        super().__init__(simulator, address)
        self.state = state
        self.exit_code: int | None = None
        self.events = 0
        self._timers: dict[str, float] = {}
        if simulator.prices is not None:
            self.turn_s = simulator.prices.turn_s

    def start(self) -> None:
        self.perform(self.state.start(self.simulator.now))

    def receive(self, source: int, message: Any) -> None:
        self.events += 1
        self.perform(self.decide(message, source))

    def decide(self, event: Any, source: int) -> list[Action]:
        simulator = self.simulator
        if simulator.stopwatch is None:
            actions = self.state.handle(event, source, simulator.now)
        else:
            actions = simulator.stopwatch(self.name, self.state, event, source, simulator.now)
        if simulator.prices is not None:
            price = simulator.prices.event_s(self.name, type(event).__name__, len(simulator.raylets))
            self._spent += price * units_of(event, actions)
        return actions

    def perform(self, actions: list[Action]) -> None:
        queue = deque(actions)
        for action in actions:  # durable before anything is sent
            if isinstance(action, Journal):
                self.commit(action)
        while queue:
            action = queue.popleft()
            if isinstance(action, Send):
                self.send(action.destination, action.message)
            elif isinstance(action, SetTimer):
                self._set_timer(action.name, action.at)
            elif isinstance(action, Exit):
                self.exit_code = action.code
            elif not isinstance(action, Journal):
                event = self.do(action)
                if event is not None:
                    queue.extend(self.decide(event, 0))

    def _set_timer(self, name: str, at: float) -> None:
        self._timers[name] = at
        self.simulator.at(at, lambda: self._fire(name, at))

    def _fire(self, name: str, at: float) -> None:
        if self.alive and self._timers.get(name) == at:
            del self._timers[name]
            if self.simulator.prices is None:
                self.perform(self.decide(TimerFired(name), 0))
            else:
                self.do_later(0.0, lambda: self.perform(self.decide(TimerFired(name), 0)))

    def commit(self, record: Journal) -> None:
        raise NotImplementedError

    def do(self, action: Action) -> Any:
        raise NotImplementedError


def units_of(event: Any, actions: list[Action]) -> int:
    """What the price of an event is for: the event itself, each node that it speaks of, each action that it leads to."""
    return 1 + len(actions) + (len(event.nodes) if isinstance(event, ClusterView) else 0)


class Gcs(Role):
    name = "gcs"

    def __init__(self, simulator: Simulator):
        self.journal = MemoryJournal()
        state = GcsState(keep_log=simulator.keep_log)
        super().__init__(simulator, GCS_ADDRESS, state)
        self.gcs = state

    def commit(self, record: Journal) -> None:
        self.journal.commit([record])


class Raylet(Role):
    """With the models of its fork server, arena and link."""

    name = "raylet"

    def __init__(self, simulator: Simulator, config: NodeConfig):
        state = RayletState(config, keep_log=simulator.keep_log)
        super().__init__(simulator, raylet_address(config.node), state)
        self.raylet = state
        self.node = config.node
        self.arena = Arena(config.arena_bytes)
        self.link = Link(simulator, self)
        self.fork_server = Process(simulator, address_of(config.node, FORK_SERVER_LANE, 1))
        self._performers: dict[type, Callable[[Any], Any]] = {
            AskForkServer: self._ask_fork_server,
            MarkDead: lambda action: None,
            Reclaim: lambda action: Reclaimed(action.address, []),
            DeleteObject: lambda action: self.arena.delete(action.handle),
            DeleteOwned: lambda action: self.arena.delete_owned(action.owner),
            LimitStore: lambda action: setattr(self.arena, "capacity", action.size),
            AllocateCopy: self._allocate,
            SpillObjects: self._spill,
            SealCopy: lambda action: self.arena.seal(action.handle),
            AbortCopy: lambda action: self.arena.delete(action.handle),
            FindCopy: lambda action: CopyFound(action.object_id, action.handle, self.arena.has(action.handle)),
        }

    def do(self, action: Action) -> Any:
        return self._performers[type(action)](action)

    def decide(self, event: Any, source: int) -> list[Action]:
        """One that is not among the ``aware`` hears of the other nodes, and forgets it."""
        if isinstance(event, ClusterView) and self.node >= self.simulator.aware:
            assert self.simulator.prices is not None
            self._spent += len(event.nodes) * self.simulator.prices.event_s("raylet", "ClusterView", len(self.simulator.raylets))
            return []
        return super().decide(event, source)

    def _allocate(self, action: AllocateCopy) -> CopyAllocated:
        return CopyAllocated(action.transfer_id, self.arena.create(action.object_id, action.size, on_disk=action.on_disk))

    def _spill(self, action: SpillObjects) -> None:
        freed = self.arena.spill(action.total)
        done = ObjectsSpilled(freed, self.arena.capacity - self.arena.used)
        self.simulator.after(freed / self.simulator.costs.bytes_per_s, lambda: self.simulator.post(0, self.address, done))

    # -- the fork server

    def _ask_fork_server(self, action: AskForkServer) -> None:
        message, simulator = action.message, self.simulator
        if isinstance(message, StartWorker):
            simulator.work(self.fork_server, simulator.costs.fork_s, lambda: self._fork(message))
        elif isinstance(message, KillProcess):
            worker = simulator.by_pid.get(message.pid)
            if worker is not None and worker.alive:
                simulator.after(simulator.costs.lane_s, lambda: simulator.kill(worker, message.signal))

    def _fork(self, message: StartWorker) -> None:
        if not self.alive:
            return
        simulator = self.simulator
        fork_server = address_of(self.node, FORK_SERVER_LANE, 1)
        fault = simulator.start_fault(message)
        if fault:
            simulator.post(fork_server, self.address, WorkerForked(message.token, 0, fault))
            return
        worker = simulator.add_worker(self.node, message.token)
        simulator.post(fork_server, self.address, WorkerForked(message.token, worker.pid))
        simulator.work(worker, simulator.costs.worker_start_s, worker.say_hello)


class Arena:
    """Sizes and handles, no bytes."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0
        self.objects: dict[int, tuple[bytes, int, bool]] = {}
        self.spilled: set[int] = set()
        self._handles = itertools.count(1)

    def create(self, object_id: bytes, size: int, sealed: bool = False, *, on_disk: bool = False) -> int:
        if not on_disk and self.used + size > self.capacity:
            return 0
        handle = next(self._handles)
        self.objects[handle] = (object_id, size, sealed)
        if on_disk:
            self.spilled.add(handle)
        else:
            self.used += size
        return handle

    def spill(self, total: int) -> int:
        freed = 0
        for handle, (_, size, sealed) in self.objects.items():
            if sealed and handle not in self.spilled and freed < total:
                self.spilled.add(handle)
                freed += size
        self.used -= freed
        return freed

    def seal(self, handle: int) -> None:
        object_id, size, _ = self.objects[handle]
        self.objects[handle] = (object_id, size, True)

    def has(self, handle: int) -> bool:
        return handle in self.objects and self.objects[handle][2]

    def delete(self, handle: int) -> None:
        found = self.objects.pop(handle, None)
        if found is not None and handle not in self.spilled:
            self.used -= found[1]
        self.spilled.discard(handle)

    def delete_owned(self, owner: int) -> None:
        whole = owner & WHOLE_NODE == WHOLE_NODE
        for handle, (object_id, _, sealed) in list(self.objects.items()):
            mine = int.from_bytes(object_id[8:16], "little")
            if sealed and (node_of(mine) == node_of(owner) if whole else mine == owner):
                self.delete(handle)


SPIN_S, FIRST_PARK_S, LIVELY_S = 500e-6, 50e-6, 2e-3  # as launcher.link's
LOOKS_S = 10e-6  # while it looks without a pause: so many looks are one turn
PARKS_S = ((1.0, 1e-3), (10.0, 2e-3), (float("inf"), 8e-3))


def longest_park_s(quiet_s: float) -> float:
    return next(park for limit, park in PARKS_S if quiet_s < limit)


class Link(Process):
    """Moves objects; and with prices messages, which else are the simulator's own business. It hears at once of what its
    node sends, and of what comes from others when it looks (LINK-3)."""

    def __init__(self, simulator: Simulator, raylet: Raylet):
        super().__init__(simulator, address_of(raylet.node, LINK_LANE, 0))
        self.raylet = raylet
        self._out: dict[int, list[tuple[int, int, Any]]] = {}
        self._arrived: list[tuple[float, Callable[[], None]]] = []
        self._quiet_since = -1.0
        self._park = FIRST_PARK_S
        self._sleeping = 0  # number of the look that is planned; another one when something came before it
        if simulator.prices is not None:
            self.turn_s = simulator.prices.link_turn_s

    # -- messages

    def carry(self, source: int, destination: int, message: Any) -> None:
        """From a process of our node to another node."""
        prices = self.simulator.prices
        assert prices is not None
        self.do_later(prices.link_out_s, lambda: self._carry(source, destination, message, prices.link_chunk_s))

    def _carry(self, source: int, destination: int, message: Any, chunk_s: float) -> None:
        self._quiet_since = self.simulator.now
        node = node_of(destination)
        if node not in self._out:
            self._out[node] = []
            self._spent += chunk_s
        self._out[node].append((source, destination, message))

    def take_turn(self) -> float:
        if self._arrived:
            self.inbox.extend(self._arrived)
            self._arrived.clear()
        found = bool(self.inbox)
        seconds = super().take_turn()
        spins = self.simulator.shared and not found and self.simulator.now - self._quiet_since < SPIN_S
        return max(seconds, LOOKS_S) if spins else seconds

    def end_turn(self) -> None:
        super().end_turn()
        out, self._out = self._out, {}
        simulator = self.simulator
        for node, messages in out.items():
            link = simulator.links.get(node)
            if link is not None and link.alive:
                size = sum(simulator.size_of(message) for _, _, message in messages)
                delay = simulator.costs.network_s + size / simulator.costs.bytes_per_s
                simulator.after(delay, lambda link=link, messages=messages: link.arrive(messages))  # type: ignore[misc]

    def arrive(self, messages: list[tuple[int, int, Any]]) -> None:
        prices = self.simulator.prices
        assert prices is not None
        seconds = prices.link_chunk_s + len(messages) * prices.link_in_s
        self.notice(seconds, lambda: self._deliver(messages))

    def _deliver(self, messages: list[tuple[int, int, Any]]) -> None:
        self._quiet_since = self.simulator.now
        for source, destination, message in messages:
            self.simulator.hand_over(source, destination, message)

    def notice(self, seconds: float, what: Callable[[], None]) -> None:
        """MPI has something for us."""
        if self.awake:
            self.inbox.append((seconds, what))
            return
        simulator = self.simulator
        if simulator.shared:  # it is found with the next look
            self._arrived.append((seconds, what))
            if not self._sleeping:
                self.rest()
            return
        quiet = simulator.now - self._quiet_since
        park = 0.0 if quiet < SPIN_S else FIRST_PARK_S if quiet < LIVELY_S else longest_park_s(quiet)
        self._arrived.append((seconds, what))
        simulator.after(park * simulator.random.random(), self.wake)

    def rest(self) -> None:
        """Nothing to do: the next look at MPI."""
        if not self.simulator.shared:
            return
        now = self.simulator.now
        quiet = now - self._quiet_since
        if quiet < LIVELY_S:
            self._park = FIRST_PARK_S
        else:
            self._park = min(self._park * 1.2, longest_park_s(quiet))
        self._sleeping += 1
        number = self._sleeping
        if quiet < SPIN_S:  # without a pause, but it lets everybody else have the core first
            self.awake = True
            self.host.add(self)
        else:
            self.simulator.after(self._park, lambda: self._look(number))

    def _look(self, number: int) -> None:
        if self.alive and number == self._sleeping:
            self.wake()

    # -- objects

    def receive(self, source: int, message: Any) -> None:
        assert isinstance(message, TransferObject), message
        simulator = self.simulator
        if simulator.prices is None:
            delay = simulator.costs.network_s + message.size / simulator.costs.bytes_per_s
            simulator.after(delay, lambda: self._done(message))
            return
        end = simulator.reserve_network(message.source_node, self.raylet.node, message.size)
        seconds = message.size * simulator.prices.link_byte_s
        simulator.at(end, lambda: self.notice(seconds, lambda: self._done(message)))

    def _done(self, message: TransferObject) -> None:
        origin = self.simulator.raylets.get(message.source_node)
        error = ""
        if origin is None or not origin.alive:
            error = f"node {message.source_node} is dead"
        elif not origin.arena.has(message.source_handle):
            error = f"node {message.source_node} has no such object"
        self.send(self.raylet.address, TransferDone(message.transfer_id, error))


# ------------------------------------------------------------------ models: owners and workers


class Task(msgspec.Struct):
    """What an owner wants run."""

    shape: Shape
    run_s: float
    children: int = 0  # tasks that it submits itself and waits for
    attempts: int = 0


class Units:
    """What an owner expects from one raylet for one request."""

    def __init__(self, node: int, shape: Shape, count: int):
        self.node = node
        self.shape = shape
        self.count = count


class HeldLease:
    def __init__(self, lease_id: int, node: int, worker: int, shape: Shape):
        self.lease_id = lease_id
        self.node = node
        self.worker = worker
        self.shape = shape
        self.tasks: dict[bytes, Task] = {}  # sent, not answered
        self.idle_since = 0.0


_encode = msgspec.msgpack.Encoder(order="sorted").encode
_CALL_S = 4e-6  # as client.tasks's

LeaseKey = tuple[int, int]  # node, number


class Owner:
    """Submits tasks under leases, short ones ahead as the real one does. Part of a driver or of a worker that runs a task."""

    def __init__(self, process: Process, job_id: bytes, on_idle: Callable[[], None]):
        self.process = process
        self.node = node_of(process.address)
        self.job_id = job_id
        self.finished = 0
        self.refused: list[LeaseRefused] = []
        self.retries = 0
        self.most_units = 16
        self._unfinished = 0
        self._on_idle = on_idle
        self._minter = IdMinter(process.address, job_id)
        self._pending: dict[bytes, deque[Task]] = {}
        self._units: dict[int, Units] = {}
        self._leases: dict[LeaseKey, HeldLease] = {}
        self._lease_of: dict[bytes, LeaseKey] = {}  # by task
        self._dead_nodes: set[int] = set()
        self._numbers = itertools.count(1)

    def submit(self, *tasks: Task) -> None:
        """Tasks of one shape."""
        self._unfinished += len(tasks)
        shape = tasks[0].shape
        key = _encode(shape)
        self._pending.setdefault(key, deque()).extend(tasks)
        for held, lease in list(self._leases.items()):
            if not lease.tasks and _encode(lease.shape) == key:
                self._feed(held, lease)
        self._ask(shape)

    @property
    def is_idle(self) -> bool:
        return not self._unfinished

    def _ask(self, shape: Shape) -> None:
        key = _encode(shape)
        wanted = min(len(self._pending.get(key, ())), self.most_units)
        asked = sum(units.count for units in self._units.values() if units.shape is shape or _encode(units.shape) == key)
        if wanted > asked:
            self._request(self.node, shape, wanted - asked, False)

    def _request(self, node: int, shape: Shape, count: int, redirected: bool) -> None:
        number = next(self._numbers)
        self._units[number] = Units(node, shape, count)
        self.process.send(raylet_address(node), RequestLease(number, shape, count, redirected))

    def receive(self, source: int, message: Any) -> bool:
        """True if the message was for an owner."""
        if isinstance(message, TaskReply):
            self._replied(message)
        elif isinstance(message, LeaseGranted):
            self._granted(source, message)
        elif isinstance(message, LeaseRedirected):
            units = self._answered(message.request_id)
            if units is not None:
                if message.node in self._dead_nodes:
                    self._ask(units.shape)
                else:
                    self._request(message.node, units.shape, 1, True)
        elif isinstance(message, LeaseRefused):
            gone = self._units.pop(message.request_id, None)
            if gone is not None:
                self.refused.append(message)
                self._unfinished -= len(self._pending.pop(_encode(gone.shape), ()))
                self._check_idle()
        elif isinstance(message, LeaseRevoked):
            self._lost(self._leases.pop((node_of(source), message.lease_id), None))
        elif isinstance(message, LeaseContended):
            for key, lease in list(self._leases.items()):
                if not lease.tasks:
                    self._give_back(key, lease)
        elif isinstance(message, NodeDied):
            self._node_died(message.node)
        else:
            return False
        return True

    def _answered(self, number: int) -> Units | None:
        units = self._units.get(number)
        if units is not None:
            units.count -= 1
            if units.count <= 0:
                del self._units[number]
        return units

    def _granted(self, source: int, message: LeaseGranted) -> None:
        units = self._answered(message.request_id)
        node = node_of(source)
        if units is None:  # cancelled while the grant was under way
            self.process.send(raylet_address(node), ReturnLease(message.lease_id))
            return
        lease = HeldLease(message.lease_id, node, message.worker, units.shape)
        self._leases[node, message.lease_id] = lease
        self._feed((node, message.lease_id), lease)

    def _feed(self, key: LeaseKey, lease: HeldLease) -> None:
        pending = self._pending.get(_encode(lease.shape))
        settings = self.process.simulator.settings
        while pending:
            task = pending[0]
            ahead = 1 if task.children else min(settings.pipeline_tasks, int(settings.pipeline_s / (task.run_s + _CALL_S)))
            if lease.tasks and (len(lease.tasks) >= ahead or any(other.children for other in lease.tasks.values())):
                return
            self._push(key, lease, pending.popleft())
        if not lease.tasks:
            self._trim(lease.shape)
            simulator = self.process.simulator
            if simulator.prices is None:
                self._give_back(key, lease)
            else:
                since = lease.idle_since = simulator.now
                simulator.after(settings.lease_idle_s, lambda: self._tired(key, lease, since))

    def _tired(self, key: LeaseKey, lease: HeldLease, since: float) -> None:
        """It has been idle since then, and not only again."""
        if self._leases.get(key) is lease and not lease.tasks and lease.idle_since == since:
            self._give_back(key, lease)

    def _push(self, key: LeaseKey, lease: HeldLease, task: Task) -> None:
        task.attempts += 1
        task_id = self._minter.task_id()
        lease.tasks[task_id] = task
        self._lease_of[task_id] = key
        self.process.simulator.running[task_id] = task
        self.process.send(lease.worker, PushTask(task_id, task.attempts, b"", "task", b"", [], 1, lease_id=lease.lease_id))

    def _give_back(self, key: LeaseKey, lease: HeldLease) -> None:
        del self._leases[key]
        self.process.send(raylet_address(lease.node), ReturnLease(lease.lease_id))

    def _trim(self, shape: Shape) -> None:
        """Nothing is left to run: take the requests back."""
        key = _encode(shape)
        for number, units in list(self._units.items()):
            if units.shape is shape or _encode(units.shape) == key:
                del self._units[number]
                self.process.send(raylet_address(units.node), ResizeLeaseRequest(number, 0))

    def _replied(self, message: TaskReply) -> None:
        key = self._lease_of.pop(message.task_id, None)
        lease = self._leases.get(key) if key is not None else None
        if key is None or lease is None:
            return  # it was lost, and runs again
        del lease.tasks[message.task_id]
        self.process.simulator.running.pop(message.task_id, None)
        self.finished += 1
        self._unfinished -= 1
        self._feed(key, lease)
        self._check_idle()

    def _lost(self, lease: HeldLease | None) -> None:
        if lease is None or not lease.tasks:
            return
        self.retries += len(lease.tasks)
        for task_id, task in lease.tasks.items():
            self._lease_of.pop(task_id, None)
            self.process.simulator.running.pop(task_id, None)
            self._pending.setdefault(_encode(lease.shape), deque()).append(task)
        self._ask(lease.shape)

    def _node_died(self, node: int) -> None:
        self._dead_nodes.add(node)
        shapes = []
        for number, units in list(self._units.items()):
            if units.node == node:
                del self._units[number]
                shapes.append(units.shape)
        for key, lease in list(self._leases.items()):
            if lease.node == node:
                del self._leases[key]
                self._lost(lease)
        for shape in shapes:
            self._ask(shape)

    def _check_idle(self) -> None:
        if self.is_idle:
            self._on_idle()


class Worker(Process):
    """Runs tasks or is an actor."""

    most = 1  # it answers each task at once

    def __init__(self, simulator: Simulator, node: int, token: int, pid: int):
        super().__init__(simulator, simulator.next_address(node))
        self.node = node
        self.token = token
        self.pid = pid
        self.actor: tuple[bytes, int] | None = None
        self.owner: Owner | None = None  # while a task with children runs
        self.status = 9
        self._free_at = 0.0  # of tasks that it has

    def say_hello(self) -> None:
        if self.alive and self.simulator.raylets[self.node].alive:
            self.send(
                raylet_address(self.node),
                ProcessStarted(ProcessKind.WORKER, self.pid.to_bytes(28, "big"), self.pid, self.token),
            )

    def receive(self, source: int, message: Any) -> None:
        simulator = self.simulator
        if isinstance(message, PushTask):
            task = simulator.running.get(message.task_id)
            if task is None:
                return
            if simulator.prices is None:
                self._free_at = max(self._free_at, simulator.now) + task.run_s
                simulator.at(self._free_at, lambda: self._ran(source, message, task))
            else:
                self._spent += task.run_s
                self._ran(source, message, task)
        elif isinstance(message, InstallActor):
            self.actor = (message.spec.actor_id, message.attempt)
            simulator.work(self, simulator.init_s, lambda: self._made(message))
        elif isinstance(message, (Shutdown, TerminateActor)):
            self.send(raylet_address(self.node), ProcessLeaving("told to leave"))
            simulator.after(simulator.costs.lane_s, lambda: simulator.kill(self, 0))
        elif isinstance(message, Welcome) and message.refusal:
            simulator.kill(self, 0)
        elif self.owner is not None:
            self.owner.receive(source, message)

    def _ran(self, caller: int, message: PushTask, task: Task) -> None:
        if not self.alive:
            return
        if not task.children:
            self._reply(caller, message)
            return
        owner = Owner(self, task.shape.job_id, lambda: self._children_done(caller, message))
        owner.most_units = task.children
        self.owner = owner
        self.send(raylet_address(self.node), WorkerBlocked())
        children, task.children = task.children, 0 if task.attempts > 3 else task.children
        for _ in range(children):
            owner.submit(Task(task.shape, task.run_s))

    def _children_done(self, caller: int, message: PushTask) -> None:
        self.send(raylet_address(self.node), WorkerUnblocked())
        self._reply(caller, message)

    def _reply(self, caller: int, message: PushTask) -> None:
        self.send(caller, TaskReply(message.task_id, message.attempt, [], nanoseconds=0))

    def _made(self, message: InstallActor) -> None:
        if not self.alive:
            return
        spec = message.spec
        if spec.class_name == "Failing":
            cause = DeathCause("INIT_FAILED", "it raised", b"error")
            self.send(GCS_ADDRESS, ActorInitFailed(spec.actor_id, message.attempt, cause))
        else:
            self.send(GCS_ADDRESS, ActorReady(spec.actor_id, message.attempt, self.address))


class Driver(Process):
    """A program: tasks, actors, questions."""

    def __init__(self, simulator: Simulator, node: int, pid: int, on_job: Callable[[Driver], None] | None = None):
        super().__init__(simulator, simulator.next_address(node))
        self.node = node
        self.pid = pid
        self.status = 9
        self.job_id = b""
        self.owner: Owner | None = None
        self.actors: dict[bytes, ActorInfo | None] = {}
        self.answers: dict[int, Any] = {}
        self.asked: set[int] = set()
        self.pulled: dict[bytes, Any] = {}
        self.groups: list[bytes] = []
        self._on_job = on_job
        self._numbers = itertools.count(1)
        self.send(raylet_address(node), ProcessStarted(ProcessKind.DRIVER, pid.to_bytes(28, "big"), pid, 0))
        self.send(GCS_ADDRESS, RegisterJob(0, self.address, pid, "simulated", "space", {}))

    def receive(self, source: int, message: Any) -> None:
        if isinstance(message, JobRegistered):
            self.job_id = message.job_id
            self.owner = Owner(self, message.job_id, lambda: None)
            if self._on_job is not None:
                self._on_job(self)
        elif isinstance(message, ActorUpdate):
            self.actors[message.info.actor_id] = message.info
        elif isinstance(message, (Answer, ActorCreated)):
            self.asked.discard(message.request_id)
            self.answers[message.request_id] = message
        elif isinstance(message, (ObjectLocal, PullFailed)):
            self.pulled[message.object_id] = message
        elif self.owner is not None:
            self.owner.receive(source, message)

    def shape(self, resources: dict[str, float], **rest: Any) -> Shape:
        amounts = {name: round(amount * UNIT) for name, amount in resources.items()}
        return Shape(amounts, self.job_id, rest.pop("strategy", Strategy()), **rest)

    def submit(self, count: int, resources: dict[str, float], run_s: float, children: int = 0, **rest: Any) -> None:
        assert self.owner is not None
        shape = self.shape(resources, **rest)
        if count:
            self.owner.submit(*(Task(shape, run_s, children) for _ in range(count)))

    def create_actor(self, **options: Any) -> bytes:
        number = next(self._numbers)
        actor_id = number.to_bytes(4, "big") + self.address.to_bytes(8, "big") + self.job_id
        shape = self.shape(options.pop("resources", {}), **options.pop("rest", {}))
        placement: Resources = {"CPU": UNIT, **shape.resources}
        spec = ActorSpec(
            actor_id,
            options.pop("class_name", "Simulated"),
            b"",
            b"",
            b"",
            [],
            [],
            shape,
            options.pop("placement", placement),
            self.address,
            self.job_id,
            namespace="space",
            **options,
        )
        self.asked.add(number)
        self.actors[actor_id] = None
        self.send(GCS_ADDRESS, CreateActor(number, spec))
        return actor_id

    def kill_actor(self, actor_id: bytes, *, no_restart: bool = True) -> None:
        self.send(GCS_ADDRESS, KillActor(actor_id, no_restart))

    def ask(self, name: str, /, **arguments: Any) -> int:
        number = next(self._numbers)
        self.asked.add(number)
        self.send(GCS_ADDRESS, Query(number, name, arguments))
        return number

    def pull(self, object_id: bytes, size: int, places: list[list[int]]) -> None:
        self.pulled[object_id] = None
        self.send(raylet_address(self.node), PullObject(object_id, size, places))

    def finish(self) -> None:
        """``shutdown()``: the job ends, the process goes."""
        self.send(GCS_ADDRESS, FinishJob(self.job_id))
        self.send(raylet_address(self.node), ProcessLeaving("the program is over"))
        self.simulator.after(self.simulator.costs.lane_s, lambda: self.simulator.kill(self, 0))


# ------------------------------------------------------------------ the simulator


class Simulator:
    """Time, the network, and who lives.

    Args:
        nodes: resources of each node.
        seed: of latencies, and of whatever the test draws from ``random``.
        keep_log: the states keep their event logs, for replay.
        prices: of what takes time on a core; None: nothing does.
        cores: of each host.
        ours: share of the cores that other programs leave.
        shared: all nodes are on one host.
        aware: only so many nodes keep a view of the others. The rest are redirected to, and redirect nobody, so that it is
            enough to count what news of other nodes costs them: ten thousand views of ten thousand nodes fit nowhere.
        stopwatch: calls ``state.handle`` for the simulator, to measure it: (role, state, event, source, now) → its actions.
    """

    def __init__(
        self,
        nodes: list[dict[str, float]],
        *,
        seed: int = 0,
        costs: Costs | None = None,
        settings: Settings | None = None,
        keep_log: bool = False,
        arena_bytes: int = 1 << 30,
        prices: Prices | None = None,
        cores: int = 2,
        ours: float = 1.0,
        shared: bool = False,
        aware: int = 1 << 16,
        stopwatch: Callable[[str, Machine, Any, int, float], list[Action]] | None = None,
    ):
        self.now = 0.0
        self.prices = prices
        self.shared = shared
        self.aware = aware
        self.stopwatch = stopwatch
        self._cores, self._ours = cores, ours
        self._hosts: dict[int, Host] = {}
        self._sized: tuple[Any, int] = (None, 0)
        self._busy_lines: dict[tuple[int, bool], float] = {}
        assert prices is not None or aware >= len(nodes), "who forgets the others must at least pay for the news of them"
        self.random = random.Random(seed)
        self.costs = costs or Costs()
        self.keep_log = keep_log
        self.init_s = 0.001  # of an actor's __init__
        self.processes: dict[int, Process] = {}
        self.by_pid: dict[int, Worker | Driver] = {}
        self.running: dict[bytes, Task] = {}
        self.messages: Counter[str] = Counter()
        self.drivers: list[Driver] = []
        self.start_fault: Callable[[StartWorker], str] = lambda message: ""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._last: dict[tuple[int, int], float] = {}
        self._lanes: dict[int, itertools.count[int]] = {}
        self._pids = itertools.count(1000)
        self.settings = settings or Settings()
        self._arena_bytes = arena_bytes
        self.raylets: dict[int, Raylet] = {}
        self.links: dict[int, Link] = {}
        self.gcs = Gcs(self)
        self.gcs.start()
        for resources in nodes:
            self.add_node(resources, launch_s=self.costs.launch_s, boot_s=self.costs.boot_s)

    # -- time

    def at(self, time: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._order), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def run(self, *, until: float | None = None, limit: int = 10_000_000) -> int:
        """Until nothing is under way, or that time; how many steps. Timers count as under way."""
        steps = 0
        while self._queue and (until is None or self._queue[0][0] <= until):
            self.step()
            steps += 1
            assert steps < limit, "it does not come to rest"
        if until is not None:
            self.now = max(self.now, until)
        return steps

    def step(self) -> None:
        time, _, what = heapq.heappop(self._queue)
        self.now = max(self.now, time)
        what()

    # -- messages (SIM-2)

    def post(self, source: int, destination: int, message: Any) -> None:
        local = node_of(source) == node_of(destination)
        if self.prices is not None:
            if local or not source:
                self.hand_over(source, destination, message)
            else:
                link = self.links[node_of(source)]
                if link.alive:
                    link.carry(source, destination, message)
            return
        latency = self.costs.lane_s if local else self.costs.network_s
        at = self.now + latency * (1.0 + self.costs.jitter * self.random.random())
        key = (source, destination)
        at = max(at, self._last.get(key, 0.0))
        self._last[key] = at
        self.at(at, lambda: self._deliver(source, destination, message))

    def _deliver(self, source: int, destination: int, message: Any) -> None:
        process = self.processes.get(destination)
        if process is None or not process.alive:
            return
        sender = self.raylets.get(node_of(source))
        if sender is not None and not sender.alive and node_of(source) != node_of(destination):
            return  # lost with the node
        self.messages[type(message).__name__] += 1
        process.receive(source, message)

    # -- prices

    def work(self, process: Process, seconds: float, what: Callable[[], None]) -> None:
        """``what`` after so much work of the process."""
        if self.prices is None:
            self.after(seconds, what)
        else:
            process.do_later(seconds, what)

    def host_of(self, node: int) -> Host:
        number = 0 if self.shared else node
        if number not in self._hosts:
            self._hosts[number] = Host(self, self._cores, self._ours)
        return self._hosts[number]

    def hand_over(self, source: int, destination: int, message: Any) -> None:
        """Into the queue of a process of the same node, or of the link's own."""
        process = self.processes.get(destination)
        if process is None or not process.alive:
            return
        process.do_later(self._receive_price(message), lambda: self._deliver(source, destination, message))

    def size_of(self, message: Any) -> int:
        if self._sized[0] is not message:
            self._sized = (message, len(encode(message)))
        return self._sized[1]

    def _receive_price(self, message: Any) -> float:
        prices = self.prices
        assert prices is not None
        kind = type(message)
        if kind is PushTask:
            return prices.task_s
        if kind is TaskReply:
            return prices.reply_s
        extra = prices.actor_s if kind is InstallActor else 0.0
        return extra + prices.receive_s + self.size_of(message) * prices.receive_byte_s

    def send_price(self, message: Any, *, again: bool) -> float:
        """``again``: the same message to one more receiver; it is encoded once."""
        prices = self.prices
        assert prices is not None
        kind = type(message)
        if kind is PushTask:
            return prices.submit_s
        if kind is TaskReply:
            return 0.0  # in the price of the task
        if kind is CreateActor:
            return prices.create_s
        size = self.size_of(message)
        price = prices.send_s + size * prices.send_byte_s
        return price if again else price + prices.encode_s + size * prices.encode_byte_s

    def reserve_network(self, source: int, destination: int, size: int) -> float:
        """When so many bytes will have left the one node and come to the other; each has a line out and a line in. On one host
        all is memory, and only the receiving link's work counts."""
        if self.shared:
            return self.now + self.costs.network_s
        out, into = (source, True), (destination, False)
        start = max(self.now, self._busy_lines.get(out, 0.0), self._busy_lines.get(into, 0.0))
        self._busy_lines[out] = self._busy_lines[into] = end = start + size / self.costs.bytes_per_s
        return end + self.costs.network_s

    # -- who lives

    def next_address(self, node: int) -> int:
        return address_of(node, next(self._lanes.setdefault(node, itertools.count(16))), 1)

    def add_node(
        self,
        resources: dict[str, float],
        labels: dict[str, str] | None = None,
        *,
        launch_s: float = 0.0,
        boot_s: float = 0.0,
    ) -> Raylet:
        node = len(self.raylets)
        config = NodeConfig(
            session="simulated",
            session_dir="",
            node=node,
            node_id=(b"node" + node.to_bytes(24, "big")).hex(),
            hostname=f"host{node}",
            ip=f"10.0.{node >> 8}.{node & 255}",
            resources=resources,
            labels=labels or {},
            arena_bytes=self._arena_bytes,
            settings=self.settings,
        )
        raylet = Raylet(self, config)
        self.raylets[node] = raylet
        self.links[node] = raylet.link
        if self.prices is None:
            raylet.start()
        else:
            self.after(launch_s / self._ours, lambda: raylet.do_later(boot_s, raylet.start))
        return raylet

    def add_worker(self, node: int, token: int) -> Worker:
        worker = Worker(self, node, token, next(self._pids))
        self.by_pid[worker.pid] = worker
        return worker

    def add_driver(self, node: int, on_job: Callable[[Driver], None] | None = None) -> Driver:
        driver = Driver(self, node, next(self._pids), on_job)
        self.by_pid[driver.pid] = driver
        self.drivers.append(driver)
        return driver

    def workers(self) -> list[Worker]:
        return [process for process in self.processes.values() if isinstance(process, Worker) and process.alive]

    def kill(self, process: Worker | Driver, status: int = 9) -> None:
        """It is dead now; its raylet hears of it after all that it had sent."""
        if not process.alive:
            return
        process.alive = False
        del self.processes[process.address]
        self.by_pid.pop(process.pid, None)
        raylet = raylet_address(process.node)
        at = max(self.now, self._last.get((process.address, raylet), 0.0)) + self.costs.reap_s
        if isinstance(process, Driver):
            event = ProcessExited(process.pid, status, ProcessKind.DRIVER, process.address)
        else:
            event = ProcessExited(process.pid, status, ProcessKind.WORKER)
        self.at(at, lambda: self.post(address_of(process.node, FORK_SERVER_LANE, 1), raylet, event))

    def kill_node(self, node: int) -> None:
        """The host is gone, with all that it had; the GCS hears of it a little later."""
        assert node != 0, "the head node is the session"
        raylet = self.raylets[node]
        if not raylet.alive:
            return
        for address, process in list(self.processes.items()):
            if node_of(address) == node:
                process.alive = False
                del self.processes[address]
                if isinstance(process, (Worker, Driver)):
                    self.by_pid.pop(process.pid, None)
        link = address_of(node, LINK_LANE, 1)
        notice = ProcessDied(link, b"", 0, ProcessKind.LINK, DeathCause("CRASHED", "the host is lost"))
        own_link = address_of(0, LINK_LANE, 1)
        self.after(self.costs.detect_s, lambda: self.post(own_link, GCS_ADDRESS, notice))

    # -- checks (SIM-3)

    def check(self) -> None:
        """To be called at rest."""
        self.gcs.gcs.validate()
        for raylet in self.raylets.values():
            if raylet.alive:
                raylet.raylet.validate()
        for driver in self.drivers:
            if driver.alive:
                assert driver.owner is None or driver.owner.is_idle, f"driver {driver.pid} still waits"
                assert not driver.asked, f"unanswered: {driver.asked}"

    def check_free(self) -> None:
        """Nobody holds anything any more."""
        for raylet in self.raylets.values():
            state = raylet.raylet
            if raylet.alive:
                assert state.pool.available == state.pool.total, (state.node, state.pool.available, state.leases)
                assert not state.leases and not state.requests and not state.bundles

    def check_replay(self) -> None:
        """The logs give the same states (MACHINE-2), and the journal the same memory (GCS-2)."""
        for raylet in self.raylets.values():
            again = RayletState(raylet.raylet.config)
            again.replay_log(raylet.raylet.log or [])
            assert again.snapshot() == raylet.raylet.snapshot()
        gcs = GcsState()
        gcs.replay_log(self.gcs.gcs.log or [])
        assert gcs.snapshot() == self.gcs.gcs.snapshot()
        restored = GcsState()
        restored.replay(self.gcs.journal.load())
        assert restored.durable() == self.gcs.gcs.durable()

    def actor_states(self) -> Counter[str]:
        return Counter(ActorState(actor.record.state).name for actor in self.gcs.gcs.actors.values())

"""The GCS and the raylets: their real states, and models of what performs them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.config import NodeConfig
from hpc_ray.gcs.journal import MemoryJournal
from hpc_ray.gcs.state import GcsState
from hpc_ray.ids import FORK_SERVER_LANE, GCS_ADDRESS, address_of, node_of, raylet_address
from hpc_ray.machine import Action, Exit, Journal, Machine, Send, SetTimer, TimerFired
from hpc_ray.protocol import ClusterView, KillProcess, StartWorker, WorkerForked
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
from hpc_ray.simulator.link import Link
from hpc_ray.simulator.process import Process

if TYPE_CHECKING:
    from hpc_ray.simulator.cluster import Simulator


class Role(Process, ABC):
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
                self.do(action)
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

    @abstractmethod
    def do(self, action: Action) -> Any:
        """Performs one that is its role's own; the event that it leads to at once, if any."""


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

    def do(self, action: Action) -> None:
        assert isinstance(action, Journal), action
        self.journal.commit([action])
        if self.simulator.prices is not None:
            self._spent += self.simulator.prices.commit_s


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

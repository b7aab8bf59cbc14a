"""The simulator itself: time, the network, and who lives."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from hpc_ray.config import NodeConfig, Settings
from hpc_ray.gcs.state import GcsState
from hpc_ray.ids import FORK_SERVER_LANE, GCS_ADDRESS, LINK_LANE, address_of, node_of, raylet_address
from hpc_ray.machine import Action, Machine
from hpc_ray.protocol import (
    ActorState,
    CreateActor,
    DeathCause,
    InstallActor,
    ProcessDied,
    ProcessExited,
    ProcessKind,
    PushTask,
    StartWorker,
    TaskReply,
    encode,
)
from hpc_ray.raylet.state import RayletState
from hpc_ray.simulator.costs import Costs, Prices
from hpc_ray.simulator.link import Link
from hpc_ray.simulator.process import Host, Process
from hpc_ray.simulator.programs import Driver, Task, Worker
from hpc_ray.simulator.roles import Gcs, Raylet

_SIZES = 1000  # messages whose size is remembered


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
        self._sizes: dict[int, tuple[Any, int]] = {}  # the latest messages' by their id(); one may go to thousands
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
        sizes = self._sizes
        found = sizes.get(id(message))
        if found is None:
            found = sizes[id(message)] = message, len(encode(message))
            if len(sizes) > _SIZES:
                del sizes[next(iter(sizes))]
        return found[1]

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
        """The host is gone, with all that it had; the GCS hears of it a little later. Or the node is, where all are on one host: then
        its link lives, and tells the others."""
        assert node != 0, "the head node is the session"
        raylet, link = self.raylets[node], self.links[node]
        if not raylet.alive:
            return
        gone: list[Process] = []
        for address, process in list(self.processes.items()):
            if node_of(address) == node and not (self.shared and process is link):
                process.alive = False
                del self.processes[address]
                if isinstance(process, (Worker, Driver)):
                    self.by_pid.pop(process.pid, None)
                gone.append(process)
        address = address_of(node, LINK_LANE, 1)
        notice = ProcessDied(address, b"", 0, ProcessKind.LINK, DeathCause("CRASHED", "the host is lost"))
        own_link = address_of(0, LINK_LANE, 1)

        def heard() -> None:
            self.post(own_link, GCS_ADDRESS, notice)

        def detected() -> None:
            if self.prices is None or not self.shared:
                heard()
                return
            link.tell_all(heard)
            for _ in gone[1:]:  # the others end with the fork server; what the kernel has to do then takes cores
                Process(self, self.next_address(node)).do_later(self.prices.exit_s, lambda: None)

        self.after(self.costs.detect_s, detected)

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

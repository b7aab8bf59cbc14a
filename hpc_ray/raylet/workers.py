"""The worker processes of a node: starting, keeping ready, ending. The part of ``RayletState`` that knows processes.

WORKER-1 (one life): a worker goes through WORKER_STEPS only, and each process that was forked is reaped once.
WORKER-2 (one job): once used by a job, a worker never serves another one.
WORKER-3 (told): whoever is registered on the node, and the GCS, hears of the death of each process that was ever used;
after the notice nothing of its leases is left.
WORKER-4 (not before its objects): a worker that ends because it is not needed stays for as long as others use objects that it owns,
and the session and its job go on; it takes no tasks, and holds no resources.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from hpc_ray.config import DEFAULT_SETUP_TIMEOUT_S
from hpc_ray.ids import GCS_ADDRESS, RAYLET_LANE, lane_of, node_of, raylet_address
from hpc_ray.machine import Table, death_text, handles
from hpc_ray.protocol import (
    UNIT,
    VERSION,
    DeathCause,
    EnvironmentFailed,
    FollowLogs,
    InstallEnvironment,
    KillProcess,
    LeaveHistory,
    ProcessDied,
    ProcessExited,
    ProcessKind,
    ProcessLeaving,
    ProcessStarted,
    Shutdown,
    StartWorker,
    StayingOn,
    WorkerForked,
)
from hpc_ray.raylet.events import AskForkServer, MarkDead, Reclaim
from hpc_ray.raylet.part import Part

if TYPE_CHECKING:
    from hpc_ray.raylet.leases import Lease

SIGKILL = 9
MAX_START_FAILURES = 3  # in a row for one environment, before its requests get the error
MAX_BURIED = 1000  # dead processes kept for questions about them
MAX_LEFT_ROWS = 50_000  # of tasks, that ended processes have left
START_RETRY_S = 1.0  # pause after that for workers that nobody asked for
OTHER_IDLE_S = 1.0  # after that a worker's place may go to another environment


class WorkerState(enum.Enum):
    STARTING = 0  # asked for; pid set once forked
    IDLE = 1  # registered, no lease
    LEASED = 2
    ACTOR = 3  # leased for good
    ENDING = 4  # told to leave or killed; not reaped yet
    DEAD = 5


WORKER_STEPS = Table(
    "worker",
    {
        WorkerState.STARTING: {WorkerState.IDLE, WorkerState.ENDING, WorkerState.DEAD},
        WorkerState.IDLE: {WorkerState.LEASED, WorkerState.ACTOR, WorkerState.ENDING, WorkerState.DEAD},
        WorkerState.LEASED: {WorkerState.IDLE, WorkerState.ENDING, WorkerState.DEAD},
        WorkerState.ACTOR: {WorkerState.ENDING, WorkerState.DEAD},
        WorkerState.ENDING: {WorkerState.DEAD},
        WorkerState.DEAD: (),
    },
)


class Worker:
    """A process that this raylet asked for."""

    def __init__(self, token: int, env: str, now: float):
        self.token = token
        self.env = env
        self.state = WorkerState.STARTING
        self.pid = 0  # from WorkerForked or ProcessStarted on
        self.address = 0  # from IDLE on
        self.worker_id = b""  # from IDLE on
        self.job_id = b""  # from the first lease on (WORKER-2)
        self.last_owner = 0
        self.lease: Lease | None = None  # while LEASED or ACTOR, and while ENDING after those
        self.since = now  # of the present state
        self.asked_at = now
        self.started_at = 0.0  # from IDLE on
        self.leaving = ""  # said ProcessLeaving, why
        self.stays = False  # ENDING, for as long as others use objects that it owns (WORKER-4)
        self.cause: DeathCause | None = None  # set when we end it
        self.kill_unforked = False  # to be killed as soon as its pid is known


class Peer:
    """A process of the node that somebody else started: a driver, the link, an MPI worker."""

    def __init__(self, address: int, kind: int, worker_id: bytes, pid: int, now: float):
        self.started_at = now
        self.address = address
        self.kind = kind
        self.worker_id = worker_id
        self.pid = pid
        self.leaving = ""


class Workers(Part):
    """See the module's text."""

    def init_workers(self) -> None:
        self.workers: dict[int, Worker] = {}  # by token, all that are not DEAD
        self.idle: dict[int, Worker] = {}  # by token; the most recently used last
        self.by_address: dict[int, Worker] = {}
        self.by_pid: dict[int, Worker] = {}
        self.peers: dict[int, Peer] = {}
        self.follows: dict[tuple[int, bytes], None] = {}
        self._starting: dict[str, int] = {}  # environment → workers in STARTING
        self._made: set[str] = {""}  # environments that a worker of this node has been in
        self._start_failures: dict[str, int] = {}  # environment → failures in a row
        self.paused_until = 0.0
        self._next_token = 1
        self.buried: deque[tuple[ProcessDied, float, float, float]] = deque(maxlen=MAX_BURIED)  # asked for, started, died at
        self.left: deque[LeaveHistory] = deque()
        self._left_rows = 0

    @property
    def cpus(self) -> int:
        return self.pool.total.get("CPU", 0) // UNIT

    @property
    def prestart(self) -> int:
        wanted = self.settings.prestart_workers
        return min(self.cpus, 8) if wanted < 0 else wanted

    # -- starting

    def start_workers(self, env: str, count: int) -> int:
        """Fork up to ``count`` more, within the limit of concurrent starts; how many.

        The first worker of an environment makes it, which may take minutes: the others start when it is there, and it is
        not among those that count as starting."""
        if env in self._made:
            starting = sum(number for other, number in self._starting.items() if other in self._made)
            count = min(count, max(2, self.cpus) - starting)
        else:
            count = min(count, 1 - self.starting(env))
        room = self.settings.max_processes - 16 - len(self.workers) - len(self.peers)
        self._make_room(env, count, count > room)
        count = min(count, room)
        for _ in range(count):
            token = self._next_token
            self._next_token += 1
            worker = Worker(token, env, self.now)
            self.workers[token] = worker
            self._starting[env] = self._starting.get(env, 0) + 1
            self.note(worker, "asked for")
            self.act(AskForkServer(StartWorker(token, env, {})))
            timeout_s = _setup_timeout_s(env)
            if timeout_s >= 0:
                self.set_timer(f"start:{token}", self.now + self.settings.start_timeout_s + timeout_s)
        return max(count, 0)

    def _make_room(self, env: str, count: int, full: bool) -> None:
        """End idle workers of other environments where there are more than the node needs; ``full``: no process more fits."""
        surplus = len(self.idle) + sum(self._starting.values()) + count - max(self.cpus, self.prestart)
        for worker in list(self.idle.values()):
            if count <= 0 or surplus <= 0:
                return
            if worker.env != env and (full or (worker.env and worker.since + OTHER_IDLE_S <= self.now)):
                self.end(worker, "another environment needs its place", unless_used=True)
                surplus -= 1

    def is_made(self, env: str) -> bool:
        """Has a worker of this node been in the environment? Then the next one starts in milliseconds."""
        return env in self._made

    def starting(self, env: str) -> int:
        return self._starting.get(env, 0)

    def replenish(self) -> None:
        """Keep the wanted number of plain workers about, whatever actors took."""
        if self.stopping or self.drain is not None or self.now < self.paused_until:
            return
        plain = sum(
            1
            for worker in self.workers.values()
            if not worker.env and worker.state in (WorkerState.STARTING, WorkerState.IDLE, WorkerState.LEASED)
        )
        if plain < self.prestart:
            self.start_workers("", self.prestart - plain)

    @handles(WorkerForked)
    def on_worker_forked(self, event: WorkerForked, source: int) -> None:
        worker = self.workers.get(event.token)
        if worker is None:
            return
        if not event.pid:
            self._start_failed(worker, event.error or "the fork failed", final=bool(worker.env))
            return
        worker.pid = event.pid
        self.by_pid[event.pid] = worker
        if worker.kill_unforked:
            self.kill_process(event.pid)

    @handles(ProcessStarted)
    def on_process_started(self, event: ProcessStarted, source: int) -> None:
        if event.version != VERSION:
            self._turn_away(
                source, f"it speaks version {event.version} of the protocol, this session version {VERSION}"
            )
            return
        if not event.token or event.kind != ProcessKind.WORKER:
            self.peers[source] = Peer(source, event.kind, event.worker_id, event.pid, self.now)
            self.history.add(f"process {source:#x}", self.now, f"started as {ProcessKind(event.kind).name}")
            self.send(source, self.welcome)
            return
        worker = self.workers.get(event.token)
        if worker is None or worker.address:
            self._turn_away(source, "nobody waits for this worker any more")
            return
        worker.address, worker.worker_id, worker.started_at = source, event.worker_id, self.now
        if not worker.pid:
            worker.pid = event.pid
            self.by_pid[event.pid] = worker
        self.by_address[source] = worker
        if worker.state is WorkerState.ENDING:
            return
        self._start_failures.pop(worker.env, None)
        self._made.add(worker.env)
        self.send(source, self.welcome)
        self._starting[worker.env] -= 1
        self.set_idle(worker)

    def _turn_away(self, source: int, text: str) -> None:
        self.send(source, msgspec.structs.replace(self.welcome, refusal=text))

    def set_idle(self, worker: Worker) -> None:
        self.step(worker, WorkerState.IDLE)
        self.idle[worker.token] = worker
        self.dirty = True
        if len(self.idle) > max(self.cpus, self.prestart):
            self.set_timer("trim", self.now + self.settings.idle_worker_s)

    def _start_failed(self, worker: Worker, text: str, *, final: bool) -> None:
        self.forget(worker)
        self.dirty = True
        env = worker.env
        failures = self._start_failures.get(env, 0) + 1
        self._start_failures[env] = failures
        if not final and failures < MAX_START_FAILURES:
            return
        self._start_failures.pop(env)
        if not env:
            self.paused_until = self.now + START_RETRY_S
            self.set_timer("unpause", self.paused_until)
        self.refuse_environment(env, text)

    def timer_unpause(self) -> None:
        self.dirty = True

    def timer_start(self, token: str) -> None:
        worker = self.workers.get(int(token))
        if worker is not None and worker.state is WorkerState.STARTING:
            limit = self.settings.start_timeout_s + _setup_timeout_s(worker.env)
            kind = "RUNTIME_ENV" if worker.env else "CRASHED"
            self.kill(worker, DeathCause(kind, f"it did not start within {limit:g} s"))

    @handles(EnvironmentFailed)
    def on_environment_failed(self, event: EnvironmentFailed, source: int) -> None:
        """The worker leaves; who waits is answered when it is reaped."""
        worker = self.workers.get(event.token)
        if worker is not None and worker.cause is None:
            worker.cause = DeathCause("RUNTIME_ENV", event.text)

    @handles(InstallEnvironment)
    def on_install_environment(self, event: InstallEnvironment, source: int) -> None:
        if event.runtime_env not in self._made and not self.stopping:
            self.start_workers(event.runtime_env, 1)

    # -- taking one

    def claim(self, job_id: bytes, env: str, owner: int, *, unused_first: bool) -> Worker | None:
        """An idle worker for the job (WORKER-2): the owner's last one, else one of the job, else an unused one."""
        best: Worker | None = None
        best_rank = 99
        for worker in reversed(self.idle.values()):
            if worker.env != env or worker.job_id not in (b"", job_id):
                continue
            if not worker.job_id:
                rank = 0 if unused_first else 3
            else:
                rank = 1 if worker.last_owner == owner else 2
            if rank < best_rank:
                best, best_rank = worker, rank
                if rank <= (0 if unused_first else 1):
                    break
        if best is not None:
            del self.idle[best.token]
            best.job_id = job_id
            best.last_owner = owner
        return best

    # -- ending

    def kill(self, worker: Worker, cause: DeathCause) -> None:
        """At once, by SIGKILL; what it holds comes back when it is reaped."""
        if worker.state is WorkerState.ENDING:
            if worker.cause is None:
                worker.cause = cause
        else:
            worker.cause = cause
            self._begin_end(worker)
        if worker.pid:
            self.kill_process(worker.pid)
        else:
            worker.kill_unforked = True

    def kill_process(self, pid: int) -> None:
        self.act(AskForkServer(KillProcess(pid, SIGKILL)))

    def end(self, worker: Worker, reason: str, *, unless_used: bool = False) -> None:
        """In order: it is told, and killed only if it does not go within the grace. ``unless_used``: or stays (WORKER-4)."""
        if worker.state is WorkerState.ENDING and worker.stays and not unless_used:
            worker.stays = False
            self._tell_to_leave(worker, reason, False)
        if worker.state in (WorkerState.ENDING, WorkerState.DEAD):
            return
        if not worker.address:
            self.kill(worker, DeathCause("KILLED", reason))
            return
        worker.cause = DeathCause("EXITED", reason)
        self._begin_end(worker)
        self._tell_to_leave(worker, reason, unless_used)

    def _tell_to_leave(self, worker: Worker, reason: str, unless_used: bool) -> None:
        self.send(worker.address, Shutdown(reason, not self.stopping, unless_used))
        self.set_timer(f"reap:{worker.token}", self.now + self.settings.kill_on_exit_s)

    @handles(StayingOn)
    def on_staying_on(self, event: StayingOn, source: int) -> None:
        """It has retired by itself (max_calls), or was told to."""
        worker = self.by_address.get(source)
        if worker is None or self.stopping or (worker.cause is not None and worker.cause.kind != "EXITED"):
            return
        worker.stays = True
        if worker.state is WorkerState.IDLE:
            self._begin_end(worker)
        elif worker.state is WorkerState.ENDING and worker.lease is not None:
            self.free(worker.lease)

    def _begin_end(self, worker: Worker) -> None:
        self.idle.pop(worker.token, None)
        if worker.state is WorkerState.STARTING:
            self._starting[worker.env] -= 1
        self.step(worker, WorkerState.ENDING)

    def timer_reap(self, token: str) -> None:
        worker = self.workers.get(int(token))
        if worker is not None and worker.pid and not worker.stays:
            self.kill_process(worker.pid)

    def timer_trim(self) -> None:
        """End the longest idle workers beyond the number of CPUs."""
        surplus = len(self.idle) - max(self.cpus, self.prestart)
        for worker in list(self.idle.values()):
            if surplus <= 0:
                return
            due = worker.since + self.settings.idle_worker_s
            if due > self.now:
                self.set_timer("trim", due)
                return
            self.end(worker, "idle for long", unless_used=True)
            surplus -= 1

    @handles(ProcessLeaving)
    def on_process_leaving(self, event: ProcessLeaving, source: int) -> None:
        process = self.by_address.get(source) or self.peers.get(source)
        if process is not None:
            process.leaving = event.reason or "it left"

    @handles(LeaveHistory)
    def on_leave_history(self, event: LeaveHistory, source: int) -> None:
        """The latest rows are kept, whole histories at a time."""
        self.left.append(event)
        self._left_rows += event.rows
        while len(self.left) > 1 and self._left_rows > MAX_LEFT_ROWS:
            self._left_rows -= self.left.popleft().rows

    @handles(ProcessExited)
    def on_process_exited(self, event: ProcessExited, source: int) -> None:
        worker = self.by_pid.get(event.pid) if event.kind == ProcessKind.WORKER else None
        if worker is None:
            peer = self.peers.get(event.address) if event.address else self._peer_of(event.pid)
            if peer is not None:
                self._peer_exited(peer, event.status)
            return
        kind, text = death_text(event.status)
        if not worker.address and not self.stopping:  # STARTING, or killed because it did not start in time
            text = worker.cause.text if worker.cause else f"the worker process ended while it started: {text}"
            self._start_failed(worker, text, final=worker.cause is not None and worker.cause.kind == "RUNTIME_ENV")
            return
        cause = worker.cause or (DeathCause("EXITED", worker.leaving) if worker.leaving else DeathCause(kind, text))
        cause = msgspec.structs.replace(cause, node_id=self.node_id, pid=worker.pid)
        self.forget(worker)
        if worker.address:
            notice = ProcessDied(worker.address, worker.worker_id, worker.pid, ProcessKind.WORKER, cause)
            self.buried.append((notice, worker.asked_at, worker.started_at, self.now))
            self.bury(notice, bool(worker.job_id))
        if worker.lease is not None:
            self.close_lease(worker.lease, cause)
        if self.stopping:
            self.check_stopped()

    def address_of_worker(self, pid: int) -> int:
        """0: there is none, or it has not registered."""
        worker = self.by_pid.get(pid)
        return worker.address if worker is not None else 0

    def _peer_of(self, pid: int) -> Peer | None:
        return next((peer for peer in self.peers.values() if peer.pid == pid), None)

    def _peer_exited(self, peer: Peer, status: int) -> None:
        kind, text = death_text(status)
        if peer.leaving:
            kind, text = "EXITED", peer.leaving
        del self.peers[peer.address]
        cause = DeathCause(kind, text, node_id=self.node_id, pid=peer.pid)
        notice = ProcessDied(peer.address, peer.worker_id, peer.pid, peer.kind, cause)
        self.buried.append((notice, 0.0, peer.started_at, self.now))
        self.bury(notice, True)

    def forget(self, worker: Worker) -> None:
        """The process is gone."""
        self.idle.pop(worker.token, None)
        if worker.state is WorkerState.STARTING:
            self._starting[worker.env] -= 1
        self.step(worker, WorkerState.DEAD)
        del self.workers[worker.token]
        self.by_pid.pop(worker.pid, None)
        self.by_address.pop(worker.address, None)
        self.dirty = True

    def bury(self, notice: ProcessDied, known: bool) -> None:
        """A registered process is gone: free what it held, tell all who may have known it (WORKER-3)."""
        address, cause = notice.address, notice.cause
        self.history.add(f"process {address:#x}", self.now, f"died: {cause.kind} {cause.text}")
        self.act(MarkDead(address))
        self.act(Reclaim(address))
        if known:
            self.tell_local(notice)
            self.send(GCS_ADDRESS, notice)
        self.owner_died(address)
        self.unfollow(lambda driver: driver == address)

    def tell_local(self, message: object) -> None:
        for worker in self.workers.values():
            if worker.address:
                self.send(worker.address, message)
        for address in self.peers:
            self.send(address, message)

    @handles(ProcessDied)
    def on_process_died(self, event: ProcessDied, source: int) -> None:
        """Of another node, from the GCS; or of the own link, from the launcher."""
        if node_of(event.address) == self.node and lane_of(event.address) == RAYLET_LANE:
            return
        self.tell_local(event)
        self.unfollow(lambda driver: driver == event.address)
        self.remote_owner_died(event.address)

    @handles(FollowLogs)
    def on_follow_logs(self, event: FollowLogs, source: int) -> None:
        """From a driver of this node, for all nodes; or from another node's raylet, for its driver."""
        key = (event.driver, event.job_id)
        if event.on:
            self.follows[key] = None
        else:
            self.follows.pop(key, None)
        self.act(AskForkServer(event))
        if node_of(event.driver) == self.node:
            for node, view in self.views.items():
                if node != self.node and view.alive:
                    self.send(raylet_address(node), event)

    def follow_on(self, node: int) -> None:
        """A node that has just joined."""
        for driver, job_id in self.follows:
            if node_of(driver) == self.node:
                self.send(raylet_address(node), FollowLogs(driver, job_id, True))

    def unfollow(self, gone: Callable[[int], bool]) -> None:
        for driver, job_id in [key for key in self.follows if gone(key[0])]:
            del self.follows[driver, job_id]
            self.act(AskForkServer(FollowLogs(driver, job_id, False)))

    # -- common

    def step(self, worker: Worker, end: WorkerState, event: str = "") -> None:
        identity = str(worker.token)
        WORKER_STEPS.check(identity, worker.state, end, event, self.history)
        worker.state = end
        worker.since = self.now
        self.note(worker, end.name)

    def note(self, worker: Worker, text: str) -> None:
        self.history.add(str(worker.token), self.now, text)


def _setup_timeout_s(env: str) -> float:
    """How long an environment may take to be made; -1: as long as it takes."""
    if not env:
        return 0.0
    config = msgspec.json.decode(env).get("config", {})
    return float(config.get("setup_timeout_seconds", DEFAULT_SETUP_TIMEOUT_S))

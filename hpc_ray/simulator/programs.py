"""The models of programs: owners that submit tasks, workers that run them, drivers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.ids import GCS_ADDRESS, IdMinter, node_of, raylet_address
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
    CreateActor,
    DeathCause,
    FinishJob,
    InstallActor,
    JobRegistered,
    KillActor,
    LeaseContended,
    LeaseGranted,
    LeaseRedirected,
    LeaseRefused,
    LeaseRevoked,
    NodeDied,
    ObjectLocal,
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
    Strategy,
    SubscribeActor,
    TaskReply,
    TerminateActor,
    Welcome,
    WorkerBlocked,
    WorkerUnblocked,
)
from hpc_ray.simulator.process import Process

if TYPE_CHECKING:
    from hpc_ray.simulator.cluster import Simulator
import msgspec


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
        self.minter = IdMinter(process.address, job_id)
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
            units = self._answered(message.request_id, message.count)
            if units is not None:
                if message.node in self._dead_nodes:
                    self._ask(units.shape)
                else:
                    self._request(message.node, units.shape, message.count, True)
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

    def _answered(self, number: int, count: int = 1) -> Units | None:
        units = self._units.get(number)
        if units is not None:
            units.count -= count
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
        task_id = self.minter.task_id()
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
        self.waiting: set[bytes] = set()  # actors that are called once they live
        self.calls: set[bytes] = set()  # tasks
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
            info = self.actors[message.info.actor_id] = message.info
            if info.actor_id in self.waiting and info.state == ActorState.ALIVE:
                self.waiting.discard(info.actor_id)
                self._call(info)
        elif isinstance(message, TaskReply) and message.task_id in self.calls:
            self.simulator.running.pop(message.task_id, None)
            self.calls.discard(message.task_id)
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
        self.send(GCS_ADDRESS, SubscribeActor(actor_id))
        return actor_id

    def call_actor(self, actor_id: bytes) -> None:
        """A method that does nothing."""
        info = self.actors[actor_id]
        if info is None or info.state != ActorState.ALIVE:
            self.waiting.add(actor_id)
        else:
            self._call(info)

    def _call(self, info: ActorInfo) -> None:
        assert self.owner is not None
        task_id = self.owner.minter.task_id()
        self.calls.add(task_id)
        self.simulator.running[task_id] = Task(self.shape({}), 0.0)
        self.send(info.address, PushTask(task_id, 1, b"", "call", b"", [], 1))

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

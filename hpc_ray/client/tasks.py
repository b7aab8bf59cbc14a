"""Submitting tasks: from a call to its results, over leased workers.

This is the hot path of an owner. A task is prepared (``calls``), waits for its dependencies, then in the
queue of its *scheduler* (one per shape of resources) for a worker. The scheduler leases workers from the raylet and sends
tasks straight to them, several ahead when the tasks are short.

TASK-1 (one reply counts): the reply with the current attempt number ends the task; any other is ignored.
TASK-2 (no task waits behind a long one): tasks are sent ahead only for about ``pipeline_s`` of work, or one, where all workers that can
be had are busy and it would wait anyway; a worker that blocks gives back what it has not started, and when it stays busy the owner
takes it back as soon as another worker is free.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hpc_ray.client import context
from hpc_ray.client.calls import CallPacker, Task, Template
from hpc_ray.client.objects import ERROR
from hpc_ray.client.records import now_ns
from hpc_ray.exceptions import (
    NodeDiedError,
    RayError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from hpc_ray.ids import TaskID, node_of, owner_of, raylet_address
from hpc_ray.protocol import (
    CancelOwned,
    CancelTask,
    LeaseContended,
    LeaseGranted,
    LeaseRedirected,
    LeaseRefusal,
    LeaseRefused,
    LeaseRevoked,
    PushTask,
    RequestLease,
    ResizeLeaseRequest,
    Result,
    ReturnLease,
    Shape,
    StealTasks,
    TaskReply,
    TasksStolen,
    UseLease,
)
from hpc_ray.serialize import dumps

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

CALL_NS = 4_000  # what a task costs a worker besides the user's code
NEXT_NS = 100_000_000  # a function that runs longer than this does not notice that its worker had to wait for it
SATURATED_S = 0.01  # no worker was granted for so long though one was wanted: there is none
FAIR_SHARE_S = 0.1  # while others wait, a worker is given back after this long


class Lease:
    """A worker that is ours for a while."""

    __slots__ = (
        "busy_since",
        "id",
        "idle_since",
        "inflight",
        "load_ns",
        "pid",
        "raylet",
        "scheduler",
        "since",
        "stealing",
        "worker",
        "worker_id",
    )

    def __init__(self, scheduler: Scheduler, raylet: int, granted: LeaseGranted, now: float):
        self.scheduler = scheduler
        self.id = granted.lease_id
        self.raylet = raylet
        self.worker = granted.worker
        self.worker_id = granted.worker_id
        self.pid = granted.pid
        self.inflight: dict[bytes, Task] = {}
        self.load_ns = 0  # expected run time of what is in flight
        self.since = now
        self.idle_since = now
        self.busy_since = now  # when the task at the head can have started
        self.stealing = False


class LeaseRequest:
    """Workers that one raylet was asked for."""

    __slots__ = ("count", "id", "node", "redirected")

    def __init__(self, request_id: int, node: int, redirected: bool):
        self.id = request_id
        self.node = node
        self.redirected = redirected  # by another raylet
        self.count = 0  # not answered


class Scheduler:
    """The queue and the leases of one shape."""

    def __init__(self, submitter: TaskSubmitter, shape: Shape):
        self.submitter = submitter
        self.client = submitter.client
        self.shape = shape
        self.queue: deque[Task] = deque()
        self.leases: dict[tuple[int, int], Lease] = {}
        self.idle: dict[Lease, None] = {}
        self.open: dict[Lease, None] = {}  # busy, with room for more
        self.single: dict[Lease, None] = {}  # busy with one task that takes a while
        self.requests: dict[int, LeaseRequest] = {}  # by their ids; at most two for each node
        self.asked = 0  # units of all of them
        self.ahead_ns = int(self.client.settings.pipeline_s * 1e9)
        self.contended_until = 0.0
        self.asked_at = 0.0  # or granted: since then the requests wait

    # -------------------------------------------------------------- tasks out

    def enqueue(self, task: Task) -> None:
        queue = self.queue
        if not queue:
            lease = self.pick(task)
            if lease is not None:
                self.push(lease, task)
                return
        queue.append(task)
        self.request()

    def pick(self, task: Task) -> Lease | None:
        """A worker for the task: an idle one, or one that is busy for so short that the task may wait there (TASK-2)."""
        if self.idle:
            return self.idle.popitem()[0]  # the last one that had something to do: it may still look for more
        room = self.ahead_ns - task.template.function.cost_ns
        if room > 0:
            for lease in self.open:
                if lease.load_ns <= room:
                    return lease
        elif self.single and task.template.function.cost_ns < NEXT_NS and self.is_saturated():
            return next(iter(self.single))  # or it waits for this process to be woken, on a machine that is busy
        return None

    def is_saturated(self) -> bool:
        now = self.client.now()
        return bool(self.requests) and now - self.asked_at >= SATURATED_S and now >= self.contended_until

    def pump(self) -> None:
        queue = self.queue
        while queue:
            lease = self.pick(queue[0])
            if lease is None:
                break
            self.push(lease, queue.popleft())
        if queue:
            self.request()

    def push(self, lease: Lease, task: Task) -> None:
        packer = self.submitter.packer
        if task.dependencies:
            dependencies = packer.resolve(task)
            if isinstance(dependencies, Result):
                self.settle(lease)
                self.submitter.end(task)
                packer.fail(task, dependencies)
                return
        else:
            dependencies = []
        template = task.template
        function = template.function
        client = self.client
        client.export(lease.worker, function)
        if not lease.inflight:
            lease.busy_since = client.now()
        lease.inflight[task.id] = task
        lease.load_ns += function.cost_ns + CALL_NS
        task.lane = task.seat = lease
        task.sent = now_ns()
        client.send(
            lease.worker,
            PushTask(
                task.id,
                task.attempt,
                function.id,
                template.name,
                task.arguments,
                dependencies,
                template.num_returns,
                b"",
                template.extras,
                lease.id,
            ),
        )
        self.settle(lease)

    def settle(self, lease: Lease) -> None:
        """Put the lease where ``pick`` finds it, by how much it has to do."""
        if not lease.inflight:
            lease.load_ns = 0
            self.open.pop(lease, None)
            self.single.pop(lease, None)
            now = lease.idle_since = self.client.now()
            if now < self.contended_until and (not self.queue or now - lease.since >= FAIR_SHARE_S):
                self.give_back(lease)  # and ask again, behind the others
            else:
                self.idle[lease] = None
        elif lease.load_ns < self.ahead_ns and len(lease.inflight) < self.client.settings.pipeline_tasks:
            now = self.client.now()
            self.single.pop(lease, None)
            if now >= self.contended_until or now - lease.since < FAIR_SHARE_S:
                self.open[lease] = None
        elif len(lease.inflight) == 1:
            self.open.pop(lease, None)
            self.single[lease] = None
        else:
            self.open.pop(lease, None)
            self.single.pop(lease, None)

    # -------------------------------------------------------------- leases

    def request(self) -> None:
        """See that enough workers are asked for, here or wherever that was sent on to; told again only when the wish has doubled."""
        more = len(self.queue) - self.asked
        if more > 0 and more >= self.asked:
            self.ask(self.client.node, more, False)

    def ask(self, node: int, count: int, redirected: bool) -> None:
        """For so many (more) workers."""
        for request in self.requests.values():
            if request.node == node and request.redirected == redirected:
                break
        else:
            request = LeaseRequest(self.client.next_request(), node, redirected)
            self.requests[request.id] = request
            self.submitter.by_request[request.id] = self
            self.asked_at = self.client.now()
        request.count += count
        self.asked += count
        self.client.send(raylet_address(node), RequestLease(request.id, self.shape, count, redirected))

    def withdraw(self) -> None:
        """No more workers are wanted."""
        for request in list(self.requests.values()):
            self.forget(request.id)
            self.client.send(raylet_address(request.node), ResizeLeaseRequest(request.id, 0))

    def answered(self, request_id: int, count: int = 1) -> None:
        request = self.requests.get(request_id)
        if request is not None:
            request.count -= count
            self.asked -= count
            if request.count <= 0:
                self.forget(request_id)

    def forget(self, request_id: int) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            self.asked -= request.count
        self.submitter.by_request.pop(request_id, None)

    def on_granted(self, source: int, message: LeaseGranted) -> None:
        self.answered(message.request_id)
        self.asked_at = self.client.now()
        lease = Lease(self, source, message, self.asked_at)
        key = (node_of(source), lease.id)
        self.leases[key] = lease
        self.submitter.leases[key] = lease
        self.client.send(lease.worker, UseLease(lease.id, self.shape, context.namespace, message.instances, context.logging))
        self.client.keep_ticking()
        self.idle[lease] = None
        self.pump()
        if lease in self.idle:
            self.steal()

    def give_back(self, lease: Lease, reusable: bool = True) -> None:
        self.remove(lease)
        self.client.send(lease.raylet, ReturnLease(lease.id, reusable))

    def remove(self, lease: Lease) -> None:
        key = (node_of(lease.raylet), lease.id)
        self.leases.pop(key, None)
        self.submitter.leases.pop(key, None)
        self.idle.pop(lease, None)
        self.open.pop(lease, None)
        self.single.pop(lease, None)

    def steal(self) -> None:
        """A worker is free and nothing is queued: take back what waits behind a task that runs long (TASK-2)."""
        late = self.client.now() - 2 * self.client.settings.pipeline_s
        for lease in self.leases.values():
            if len(lease.inflight) > 1 and lease.busy_since < late and not lease.stealing:
                lease.stealing = True
                self.client.send(lease.worker, StealTasks(lease.id))
                return

    def tick(self, now: float) -> None:
        """Every 20 ms while there are leases or requests."""
        if not self.queue:
            self.withdraw()
            for lease in list(self.idle):
                if now - lease.idle_since >= self.client.settings.lease_idle_s:
                    self.give_back(lease)
        stuck = any(
            len(lease.inflight) > 1 and now - lease.busy_since > 2 * self.client.settings.pipeline_s
            for lease in self.leases.values()
        )
        if stuck:
            if self.idle:
                self.steal()
            elif not self.requests:
                self.ask(self.client.node, 1, False)


class TaskSubmitter:
    """All tasks of this process that are not done. Methods run under the client's lock unless they say otherwise."""

    def __init__(self, client: Client, packer: CallPacker):
        self.client = client
        self.packer = packer
        self.tasks: dict[bytes, Task] = {}
        self.schedulers: dict[bytes, Scheduler] = {}
        self.leases: dict[tuple[int, int], Lease] = {}
        self.by_request: dict[int, Scheduler] = {}
        client.handlers.update(
            {
                LeaseGranted: self.on_lease_granted,
                LeaseRedirected: self.on_lease_redirected,
                LeaseRefused: self.on_lease_refused,
                LeaseRevoked: self.on_lease_revoked,
                LeaseContended: self.on_lease_contended,
                TasksStolen: self.on_tasks_stolen,
                CancelOwned: self.on_cancel_owned,
            }
        )

    def submit(self, template: Template, args: tuple, kwargs: dict) -> Any:
        """Run a remote function; what ``make_returns`` says. Takes the lock; never blocks.

        Raises:
            TypeError: an argument cannot be pickled.
        """
        client = self.client
        client.work_off_released()
        task = Task(self, template, client.minter.task_id())
        self.packer.pack(task, args, kwargs)
        with client.lock:
            made = self.packer.make_returns(task)
            self.tasks[task.id] = task
            if not task.dependencies or self.packer.wait_for_dependencies(task, self.ready):
                self.ready(task)
        return made

    def ready(self, task: Task) -> None:
        """Its dependencies are there."""
        if task.cancelled:
            return
        scheduler = self.schedulers.get(task.template.shape_key)
        if scheduler is None:
            assert task.template.shape is not None
            scheduler = self.schedulers[task.template.shape_key] = Scheduler(self, task.template.shape)
        scheduler.enqueue(task)

    def end(self, task: Task) -> None:
        self.tasks.pop(task.id, None)
        task.lane = None

    def on_reply(self, task: Task, message: TaskReply) -> None:
        """``message`` is of the current attempt of ``task`` (checked by the client)."""
        lease = task.lane
        scheduler = lease.scheduler
        inflight = lease.inflight
        inflight.pop(task.id, None)
        lease.busy_since = self.client.now()
        function = task.template.function
        lease.load_ns -= function.cost_ns + CALL_NS
        function.learn(message.nanoseconds)
        if message.retiring:
            self.retire(lease)
        else:
            scheduler.settle(lease)
        if message.retryable and task.retries_left != 0 and not task.cancelled:
            self.packer.discard(task, message.results)
            self.retry(task)
        else:
            del self.tasks[task.id]
            task.lane = None
            self.packer.finish(task, message.results)
        if scheduler.queue:
            scheduler.pump()

    def retire(self, lease: Lease) -> None:
        """The worker takes no more tasks; it has given back none, so what we sent ahead goes elsewhere."""
        scheduler = lease.scheduler
        scheduler.give_back(lease, reusable=False)
        tasks = list(lease.inflight.values())
        lease.inflight.clear()
        self.requeue(scheduler, tasks)

    def requeue(self, scheduler: Scheduler, tasks: list[Task]) -> None:
        for task in reversed(tasks):
            task.lane = None
            task.sent = 0
            task.attempt += 1
            scheduler.queue.appendleft(task)
        scheduler.pump()

    def retry(self, task: Task) -> None:
        if task.retries_left > 0:
            task.retries_left -= 1
        task.attempt += 1
        task.lane = None
        task.sent = 0
        if self.packer.wait_for_dependencies(task, self.ready):
            self.ready(task)

    def is_under_way(self, task: Task) -> bool:
        return task.id in self.tasks

    def start_again(self, task: Task) -> None:
        """A finished task, whose arguments are held and whose lost results are PENDING."""
        self.tasks[task.id] = task
        self.retry(task)

    # -------------------------------------------------------------- messages

    def on_lease_granted(self, source: int, message: LeaseGranted) -> None:
        scheduler = self.by_request.get(message.request_id)
        if scheduler is None:  # we had taken the wish back
            self.client.send(source, ReturnLease(message.lease_id))
        else:
            scheduler.on_granted(source, message)

    def on_lease_redirected(self, source: int, message: LeaseRedirected) -> None:
        scheduler = self.by_request.get(message.request_id)
        if scheduler is not None:
            scheduler.answered(message.request_id, message.count)
            if message.node in self.client.dead_nodes:  # who sent us there had not heard
                scheduler.pump()
            else:
                scheduler.ask(message.node, message.count, True)

    def on_lease_refused(self, source: int, message: LeaseRefused) -> None:
        scheduler = self.by_request.get(message.request_id)
        if scheduler is None:
            return
        scheduler.forget(message.request_id)
        error: RayError
        if message.reason == LeaseRefusal.GROUP_REMOVED:
            error = TaskPlacementGroupRemoved()
        elif message.reason == LeaseRefusal.RUNTIME_ENV:
            error = RuntimeEnvSetupError(message.text)
        else:
            error = TaskUnschedulableError(message.text)
        tasks = list(scheduler.queue)
        scheduler.queue.clear()
        for task in tasks:
            self.end(task)
            self.packer.fail(task, error)

    def on_lease_contended(self, source: int, message: LeaseContended) -> None:
        now = self.client.now()
        for scheduler in self.schedulers.values():
            scheduler.contended_until = now + 1.0
            if not scheduler.queue:
                for lease in list(scheduler.idle):
                    scheduler.give_back(lease)

    def on_tasks_stolen(self, source: int, message: TasksStolen) -> None:
        lease = self.find_lease(source, message.lease_id)
        if lease is None:
            return
        lease.stealing = False
        tasks = [lease.inflight.pop(task_id) for task_id in message.task_ids if task_id in lease.inflight]
        scheduler = lease.scheduler
        for head in lease.inflight.values():  # it takes longer than was thought
            head.template.function.learn(int((self.client.now() - lease.busy_since) * 1e9))
            break
        lease.load_ns = scheduler.ahead_ns
        scheduler.settle(lease)  # idle, if the task at the head has ended meanwhile
        self.requeue(scheduler, tasks)

    def find_lease(self, worker: int, lease_id: int) -> Lease | None:
        return self.leases.get((node_of(worker), lease_id))

    def on_lease_revoked(self, source: int, message: LeaseRevoked) -> None:
        lease = self.leases.get((node_of(source), message.lease_id))
        if lease is not None:
            self.lease_lost(lease, WorkerCrashedError(message.cause.text))

    def lease_lost(self, lease: Lease, error: RayError) -> None:
        """The worker is gone. It ran the task at the head, if any; the others had not started."""
        scheduler = lease.scheduler
        scheduler.remove(lease)
        tasks = list(lease.inflight.values())
        if tasks:
            head = tasks.pop(0)
            if head.cancelled:
                self.end(head)
                self.packer.fail(head, TaskCancelledError(TaskID(head.id)))
            elif head.retries_left == 0:
                self.end(head)
                self.packer.fail(head, error)
            else:
                self.client.records.note_call(head, [Result(ERROR, dumps(error))])
                self.retry(head)
        lease.inflight.clear()  # records keep the lease
        self.requeue(scheduler, tasks)

    def on_node_died(self, node: int, text: str) -> None:
        for lease in list(self.leases.values()):
            if node_of(lease.raylet) == node:
                self.lease_lost(lease, NodeDiedError(text))
        for request_id, scheduler in list(self.by_request.items()):
            request = scheduler.requests.get(request_id)
            if request is not None and request.node == node:
                scheduler.forget(request_id)
                scheduler.pump()

    def tick(self, now: float) -> bool:
        """Timers; True while there is anything to time."""
        for scheduler in self.schedulers.values():
            scheduler.tick(now)
        return bool(self.leases or self.by_request)

    def give_back_idle(self) -> None:
        """No more tasks will come: idle workers may leave in order."""
        for scheduler in self.schedulers.values():
            scheduler.withdraw()
            for lease in list(scheduler.idle):
                scheduler.give_back(lease)

    def starved(self) -> bool:
        """Whether tasks wait for a worker; then a blocked process should say so at once."""
        return bool(self.by_request)

    # -------------------------------------------------------------- cancelling

    def cancel_by_id(self, task_id: bytes, force: bool, recursive: bool) -> None:
        """Cancel a task or an actor's call, whoever has submitted it; nothing if it is over.

        Raises:
            ValueError: ``force`` for an actor's call that this process has submitted.
        """
        owner = owner_of(task_id)
        if owner != self.client.address:
            self.client.send(owner, CancelOwned(task_id, force, recursive))
        elif (task := self.tasks.get(task_id)) is not None:
            self.cancel(task, force, recursive)
        elif (call := self.client.actors.calls.get(task_id)) is not None:
            if force:
                raise ValueError("force=True is not supported for actor tasks.")
            self.client.actors.cancel(call, force, recursive)

    def on_cancel_owned(self, source: int, message: CancelOwned) -> None:
        force = message.force and message.task_id in self.tasks  # an actor's call is never cancelled by force
        self.cancel_by_id(message.task_id, force, message.recursive)

    def cancel(self, task: Task, force: bool, recursive: bool) -> None:
        if task.cancelled or task.id not in self.tasks:
            return
        task.cancelled = True
        task.retries_left = 0
        lease = task.lane
        if lease is not None:
            self.client.send(lease.worker, CancelTask(task.id, task.attempt, force, recursive))
            return
        scheduler = self.schedulers.get(task.template.shape_key)
        if scheduler is not None and task in scheduler.queue:
            scheduler.queue.remove(task)
        self.end(task)
        self.packer.fail(task, TaskCancelledError(TaskID(task.id)))



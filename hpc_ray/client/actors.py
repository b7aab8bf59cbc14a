"""Calling actors, and making them: one ``ActorLink`` for each actor this process has to do with.

Calls go straight to the actor's lane, in the order in which they were made. The GCS is asked only where the actor is and told
about at each change.

ACTOR-1 (order): calls from this process start in the order of submission; one that waits for its arguments holds back the
later ones, unless the actor allows otherwise.
ACTOR-2 (fate of a call): a call that was sent to a process that died is sent again if it has retries and the actor
comes back; otherwise it fails with an error that says why the actor died. One that was not sent waits for the
actor to come back.
ACTOR-3 (scope): while a counted handle exists anywhere the actor lives. Handles are counted as references to the
``scope`` object, owned by whoever made the actor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.client.calls import CallPacker, Task, Template
from hpc_ray.client.objects import FREED, Entry, State
from hpc_ray.client.records import now_ns
from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    PendingCallsLimitExceeded,
    RayError,
    RuntimeEnvSetupError,
    TaskCancelledError,
)
from hpc_ray.ids import GCS_ADDRESS, TaskID, node_of
from hpc_ray.protocol import (
    ActorArguments,
    ActorInfo,
    ActorOutOfScope,
    ActorSpec,
    ActorState,
    ActorUpdate,
    CancelTask,
    CreateActor,
    DeathCause,
    KillActor,
    PushTask,
    Result,
    ResultKind,
    SubscribeActor,
    TaskReply,
    encode,
)
from hpc_ray.serialize import dumps, loads

if TYPE_CHECKING:
    from hpc_ray.client.client import Client


def death_error(actor_id: bytes, class_name: str, cause: DeathCause | None, info: ActorInfo | None = None) -> RayError:
    """The error that calls to a dead actor get."""
    identity = actor_id.hex()
    if cause is None:
        return ActorDiedError(identity, "The actor died.")
    if cause.kind == "RUNTIME_ENV":
        return RuntimeEnvSetupError(cause.text)
    if cause.kind == "UNSCHEDULABLE":
        return ActorUnschedulableError(cause.text)
    if cause.kind == "INIT_FAILED":
        text = f"The actor died because of an error raised in its creation task, {cause.text}"
        error = ActorDiedError(identity, text, actor_init_failed=True)
        if cause.error:
            error.__cause__ = loads(cause.error)
        return error
    lines = [
        "The actor died unexpectedly before finishing this task.",
        f"\tclass_name: {class_name}",
        f"\tactor_id: {identity}",
    ]
    if cause.pid:
        lines.append(f"\tpid: {cause.pid}")
    if info is not None and info.name:
        lines.append(f"\tname: {info.name}")
    if info is not None and info.namespace:
        lines.append(f"\tnamespace: {info.namespace}")
    text = cause.text
    if cause.kind in ("CRASHED", "EXITED", "OOM"):
        text = f"its worker process has died: {'exit_actor() is called' if text == 'exit_actor' else text}"
    return ActorDiedError(identity, "\n".join(lines) + f"\nThe actor is dead because {text}.")


_ALIVE = ActorState.ALIVE  # looking it up in its class costs more than all else that a call looks at


class ActorLink:
    """What this process knows about one actor, and its calls that are not done."""

    __slots__ = (
        "address",
        "attempt",
        "cause",
        "class_name",
        "doomed",
        "id",
        "inflight",
        "info",
        "max_pending",
        "out_of_order",
        "pending",
        "queue",
        "scope",
        "state",
        "watchers",
    )

    def __init__(self, actor_id: bytes, class_name: str, out_of_order: bool, max_pending: int):
        self.id = actor_id
        self.class_name = class_name
        self.state = ActorState.PENDING_CREATION
        self.address = 0  # ALIVE
        self.attempt = 0
        self.cause: DeathCause | None = None  # DEAD
        self.info: ActorInfo | None = None
        self.queue: deque[Task] = deque()  # not sent, in order
        self.inflight: dict[bytes, Task] = {}  # sent, in order
        self.out_of_order = out_of_order
        self.max_pending = max_pending
        self.pending = 0  # calls without a reply; while there are any they hold ``scope`` (ACTOR-3)
        self.scope: Entry | None = None
        self.doomed = False  # it takes no more calls: nothing but its death is news
        self.watchers: list[Callable[[RayError], None]] = []  # told, under the lock, when the process is gone

    @property
    def worker(self) -> int:
        return self.address


class ActorSubmitter:
    """All actor calls of this process that are not done. Under the client's lock unless a method says otherwise."""

    def __init__(self, client: Client, packer: CallPacker):
        self.client = client
        self.packer = packer
        self.links: dict[bytes, ActorLink] = {}
        self.calls: dict[bytes, Task] = {}
        self.creating: dict[bytes, list[Entry]] = {}  # actor id → holds for its constructor's arguments
        client.handlers.update({ActorUpdate: self.on_actor_update})

    # -------------------------------------------------------------- making

    def create(self, spec: ActorSpec, task: Task, get_if_exists: bool, unready: bool) -> Any:
        """Send the spec to the GCS and wait until it is accepted; its ActorCreated. Takes the lock, blocks.

        ``task`` carries the packed constructor arguments and their holds, which last until the actor has them. ``unready``: some are
        still made; the spec's dependencies follow."""
        client = self.client
        client.work_off_released()  # an actor whose last handle has just gone leaves its name
        with client.lock:
            link = ActorLink(spec.actor_id, spec.class_name, spec.out_of_order, spec.max_pending_calls)
            self.links[link.id] = link
            self.creating[spec.actor_id] = [entry for _, entry in task.dependencies] + list(task.contained)
        answer = client.request(GCS_ADDRESS, lambda request_id: CreateActor(request_id, spec, get_if_exists, unready))
        if answer.error or answer.existing:
            with client.lock:
                self.links.pop(link.id, None)
                self.arguments_done(spec.actor_id)
        else:
            client.send(GCS_ADDRESS, SubscribeActor(spec.actor_id))
            if unready:
                task.lane = link
                with client.lock:
                    if self.packer.wait_for_dependencies(task, self.on_arguments):
                        self.on_arguments(task)
        return answer

    def on_arguments(self, task: Task) -> None:
        """Of a constructor: all are ready."""
        if task.lane.id in self.creating:
            self.client.send(GCS_ADDRESS, ActorArguments(task.lane.id, self.packer.resolved(task)))

    def arguments_done(self, actor_id: bytes) -> None:
        for entry in self.creating.pop(actor_id, ()):
            self.client.objects.release(entry)

    def set_scope(self, link: ActorLink, scope: ObjectRef) -> None:
        """The link's calls count as a handle (ACTOR-3)."""
        with self.client.lock:
            if link.scope is None or self.client.objects.entries.get(link.scope.id) is not link.scope:
                link.scope = scope._entry
                if link.pending:
                    link.scope.count += 1

    def new_scope(self, actor_id: bytes) -> ObjectRef:
        """The counted reference that keeps an actor alive (ACTOR-3)."""
        client = self.client
        with client.lock:
            entry = client.objects.own(client.minter.put_id(), State.PENDING)
            entry.on_free = lambda: self.out_of_scope(actor_id)
            reference = client.objects.reference(entry)
            client.objects.set_result(entry, Result(ResultKind.INLINE))
        return reference

    def out_of_scope(self, actor_id: bytes) -> None:
        link = self.links.get(actor_id)
        if link is not None and link.state == ActorState.DEAD:
            del self.links[actor_id]
            return
        self.client.send(GCS_ADDRESS, ActorOutOfScope(actor_id))

    def link(self, actor_id: bytes, class_name: str, out_of_order: bool = False, max_pending: int = -1) -> ActorLink:
        link = self.links.get(actor_id)
        if link is None:
            link = self.links[actor_id] = ActorLink(actor_id, class_name, out_of_order, max_pending)
            self.client.send(GCS_ADDRESS, SubscribeActor(actor_id))
        return link

    # -------------------------------------------------------------- calling

    def call(self, link: ActorLink, template: Template, args: tuple, kwargs: dict) -> Any:
        """Call a method; what ``CallPacker.make_returns`` says. Takes the lock; never blocks. 3 µs for a plain call: a third to
        pack it, a third for its entry and reference, a third to send it.

        Raises:
            TypeError: an argument cannot be pickled.
            PendingCallsLimitExceeded: the actor's ``max_pending_calls`` are waiting.
        """
        client = self.client
        client.work_off_released()
        if 0 < link.max_pending <= len(link.queue) + len(link.inflight):
            raise PendingCallsLimitExceeded(
                f"The task {template.name} could not be submitted to {link.class_name}: {link.max_pending} calls are "
                "pending, which is its max_pending_calls. Wait for some of them first."
            )
        task = Task(self, template, client.minter.task_id())
        self.packer.pack(task, args, kwargs)
        with client.lock:
            made = self.packer.make_returns(task)
            self.admit(link, task)
            ready = not task.dependencies or self.packer.wait_for_dependencies(task, self.on_dependencies)
            if link.state == _ALIVE and ready and not link.queue:
                self.push(link, task)
            elif link.state == ActorState.DEAD:
                self.end(task)
                self.packer.fail(task, death_error(link.id, link.class_name, link.cause, link.info))
            else:
                link.queue.append(task)
                if link.out_of_order:
                    self.flush(link)
        return made

    def admit(self, link: ActorLink, task: Task) -> None:
        """The call is one of the actor's until ``end``."""
        task.lane = task.seat = link
        self.calls[task.id] = task
        link.pending += 1
        if link.pending == 1 and link.scope is not None:
            link.scope.count += 1

    def on_dependencies(self, task: Task) -> None:
        self.flush(task.lane)

    def flush(self, link: ActorLink) -> None:
        """Send what can be sent (ACTOR-1)."""
        if link.state != ActorState.ALIVE:
            return
        queue = link.queue
        if link.out_of_order:
            ready = [task for task in queue if task.unresolved == 0]
            for task in ready:
                queue.remove(task)
                self.push(link, task)
            return
        while queue and queue[0].unresolved == 0:
            self.push(link, queue.popleft())

    def push(self, link: ActorLink, task: Task) -> None:
        if task.dependencies:
            dependencies = self.packer.resolve(task)
            if isinstance(dependencies, Result):
                self.end(task)
                self.packer.fail(task, dependencies)
                return
        else:
            dependencies = []
        template = task.template
        link.inflight[task.id] = task
        task.seat = link.info
        task.sent = now_ns()
        message = PushTask(
            task.id,
            task.attempt,
            b"",
            template.name,
            task.arguments,
            dependencies,
            template.num_returns,
            link.id,
            template.extras,
        )
        self.client.lane.send(link.address, encode(message))

    def end(self, task: Task) -> None:
        """No reply is expected any more."""
        del self.calls[task.id]
        link = task.lane
        link.inflight.pop(task.id, None)
        link.pending -= 1
        if link.pending == 0 and link.scope is not None:
            self.client.objects.release(link.scope)

    def on_reply(self, task: Task, message: TaskReply) -> None:
        link = task.lane
        if message.retryable and task.retries_left != 0 and not task.cancelled:
            link.inflight.pop(task.id, None)
            self.packer.discard(task, message.results)
            self.again(link, task)
            self.flush(link)
            return
        self.end(task)
        self.packer.finish(task, message.results)

    def again(self, link: ActorLink, task: Task) -> None:
        if task.retries_left > 0:
            task.retries_left -= 1
        task.attempt += 1
        task.sent, task.seat = 0, link
        link.queue.append(task)

    def is_under_way(self, task: Task) -> bool:
        return task.id in self.calls

    def start_again(self, task: Task) -> None:
        """A finished call with retries, whose arguments are held and whose lost results are PENDING: it is made once more, by the
        actor as it is now or will be when it has been restarted."""
        link = task.lane
        self.admit(link, task)
        if link.state == ActorState.DEAD:
            self.end(task)
            self.packer.fail(task, death_error(link.id, link.class_name, link.cause, link.info))
            return
        self.again(link, task)
        ready = self.packer.wait_for_dependencies(task, self.on_dependencies)
        if ready and node_of(link.address) not in self.client.dead_nodes:  # else it goes with the news of the restart
            self.flush(link)

    # -------------------------------------------------------------- what becomes of actors

    def on_actor_update(self, source: int, message: ActorUpdate) -> None:
        info = message.info
        link = self.links.get(info.actor_id)
        if link is None or (info.state != ActorState.DEAD and (link.doomed or info.attempt < link.attempt)):
            return
        link.info = info
        if info.stopping and info.state != ActorState.DEAD:
            self.doom(link)
            return
        if info.state in (ActorState.DEAD, ActorState.RESTARTING) and link.address:
            self.client.hear_last_words(link.address)  # its replies come another way than this
        if info.state == ActorState.ALIVE:
            if info.address in self.client.dead:
                return  # said before its death; the GCS will say more
            if info.address != link.address:
                self.lost_process(link, None)
            link.state, link.address, link.attempt = ActorState.ALIVE, info.address, info.attempt
            if info.restarts_left == 0:
                self.arguments_done(link.id)
            self.flush(link)
        elif info.state == ActorState.DEAD:
            link.state, link.cause = ActorState.DEAD, info.cause
            self.arguments_done(link.id)
            self.fail_all(link)
            if link.scope is not None and link.scope.state == FREED:
                self.links.pop(link.id, None)  # no handle is left
        elif info.state == ActorState.RESTARTING:
            link.attempt = info.attempt
            self.lost_process(link, info.cause)
            link.state = ActorState.RESTARTING

    def lost_process(self, link: ActorLink, cause: DeathCause | None) -> None:
        """The process that had our calls is gone and the actor comes back (ACTOR-2)."""
        unavailable = ActorUnavailableError(
            cause.text if cause is not None else "its process died and it is being restarted", link.id
        )
        self.tell_watchers(link, unavailable)
        if not link.inflight:
            return
        tasks = list(link.inflight.values())
        link.inflight.clear()
        error = Result(ResultKind.ERROR, dumps(unavailable))
        for task in reversed(tasks):
            if task.retries_left != 0 and not task.cancelled:
                self.client.records.note_call(task, [error])
                if task.retries_left > 0:
                    task.retries_left -= 1
                task.attempt += 1
                task.sent, task.seat = 0, link
                link.queue.appendleft(task)
            else:
                self.end(task)
                self.packer.fail(task, error)

    def fail_all(self, link: ActorLink) -> None:
        error = death_error(link.id, link.class_name, link.cause, link.info)
        self.tell_watchers(link, error)
        tasks = [*link.inflight.values(), *link.queue]
        link.inflight.clear()
        link.queue.clear()
        for task in tasks:
            self.end(task)
            self.packer.fail(task, TaskCancelledError(TaskID(task.id)) if task.cancelled else error)

    def tell_watchers(self, link: ActorLink, error: RayError) -> None:
        watchers, link.watchers = link.watchers, []
        for watch in watchers:
            watch(error)

    def on_process_died(self, address: int) -> None:
        for link in self.links.values():
            if link.address == address and link.state == ActorState.ALIVE:
                link.state = ActorState.RESTARTING  # or DEAD: the GCS will say
                link.address = 0

    def on_node_died(self, node: int) -> None:
        for link in self.links.values():
            if link.address and node_of(link.address) == node and link.state == ActorState.ALIVE:
                link.state = ActorState.RESTARTING
                link.address = 0

    def doom(self, link: ActorLink) -> None:
        """Calls made from now on wait for the news of its death, and fail, instead of reaching it before its end does."""
        link.doomed = True
        link.state = ActorState.RESTARTING

    def kill(self, actor_id: bytes, no_restart: bool) -> None:
        link = self.links.get(actor_id)
        if link is not None and no_restart and link.state != ActorState.DEAD:
            self.doom(link)
        self.client.send(GCS_ADDRESS, KillActor(actor_id, no_restart))

    def cancel(self, task: Task, force: bool, recursive: bool) -> None:
        if task.cancelled or task.id not in self.calls:
            return
        link = task.lane
        task.cancelled = True
        if task.id in link.inflight:
            self.client.send(link.address, CancelTask(task.id, task.attempt, force, recursive))
            return
        link.queue.remove(task)
        self.end(task)
        self.packer.fail(task, TaskCancelledError(TaskID(task.id)))
        self.flush(link)

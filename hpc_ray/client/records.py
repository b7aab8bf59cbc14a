"""What a process remembers of its tasks and objects, for those who list them: who asks pays.

Submitters and the executor append a tuple for each attempt of a task to a ring; nothing else happens until a Query comes, which
turns tuples into rows (``protocol.CallRow``, ``RunRow``). Relied on by ``tasks``, ``actors``, ``worker``, and ``util.state``.

RECORD-1 (off the path): no message is sent and nothing is converted for a task that nobody asks about.
RECORD-2 (bounded): each ring holds ``Settings.task_history`` attempts; older ones are forgotten.
RECORD-3 (handed over): a process that ends in order leaves its rings with its raylet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from hpc_ray import exceptions
from hpc_ray.client import context
from hpc_ray.exceptions import RayTaskError
from hpc_ray.protocol import (
    Answer,
    CallRow,
    History,
    LeaveHistory,
    ObjectRow,
    ProcessKind,
    Query,
    Result,
    ResultKind,
    RunRow,
    SpanRow,
    pack,
    short_name,
)
from hpc_ray.serialize import loads

if TYPE_CHECKING:
    from hpc_ray.client.calls import Task, Template
    from hpc_ray.client.client import Client
    from hpc_ray.client.objects import Entry

LONGEST_ERROR = 4096  # bytes of a pickled error that is kept as it is; of a larger one the text is kept, so much of it
_ERROR = int(ResultKind.ERROR)
now_ns = time.monotonic_ns  # as cheap as it gets; rows have times of the epoch

# What the state API calls the errors that are not raised by the user's code; a subclass comes before its base.
_ERROR_TYPES: dict[type[BaseException], str] = {
    exceptions.TaskCancelledError: "TASK_CANCELLED",
    exceptions.WorkerCrashedError: "WORKER_DIED",
    exceptions.ActorUnavailableError: "ACTOR_UNAVAILABLE",
    exceptions.ActorDiedError: "ACTOR_DIED",
    exceptions.OutOfMemoryError: "OUT_OF_MEMORY",
    exceptions.NodeDiedError: "NODE_DIED",
    exceptions.LocalRayletDiedError: "LOCAL_RAYLET_DIED",
    exceptions.OwnerDiedError: "OWNER_DIED",
    exceptions.ObjectFreedError: "OBJECT_FREED",
    exceptions.ObjectLostError: "OBJECT_LOST",
    exceptions.RuntimeEnvSetupError: "RUNTIME_ENV_SETUP_FAILED",
    exceptions.TaskPlacementGroupRemoved: "TASK_PLACEMENT_GROUP_REMOVED",
    exceptions.ActorPlacementGroupRemoved: "ACTOR_PLACEMENT_GROUP_REMOVED",
    exceptions.TaskUnschedulableError: "TASK_UNSCHEDULABLE_ERROR",
    exceptions.ActorUnschedulableError: "ACTOR_UNSCHEDULABLE_ERROR",
}


def describe_error(payload: bytes) -> tuple[str, str]:
    """Type and text of a pickled error. An error that cannot be read here is one of the user's code."""
    try:
        error = loads(payload)
    except Exception:
        return "TASK_EXECUTION_EXCEPTION", ""
    text = str(error)[:LONGEST_ERROR]
    if not isinstance(error, RayTaskError) or isinstance(error.cause, exceptions.TaskCancelledError):
        error = getattr(error, "cause", error)
        for kind, name in _ERROR_TYPES.items():
            if isinstance(error, kind):
                return name, text
    return "TASK_EXECUTION_EXCEPTION", text


class Records:
    """See the module's text. ``note_call`` is for the client's lock; queries are answered under it."""

    def __init__(self, client: Client):
        size = max(0, client.settings.task_history)
        self.client = client
        # (task id, attempt, template, parent, where it was, created, sent, ended, error: None, its pickle or its description)
        self.calls: deque[tuple] = deque(maxlen=size)
        # (task id, attempt, name, function, started, called, returned, ended, failed); of constructors one more: "creation"
        self.runs: deque[tuple] = deque(maxlen=size)
        self.spans: deque[tuple[str, bytes, int, int, dict[str, Any]]] = deque(maxlen=size)  # as SpanRow
        self.now_running: Callable[[], list[tuple]] = list  # worker: like ``runs``, and the state at the end
        self.actor_id = b""  # of the actor that this process is
        self.questions: dict[str, Callable[..., Any]] = {"history": self.history, "objects": self.objects}
        client.handlers[Query] = self.on_query

    # -------------------------------------------------------------- recording

    def note_call(self, task: Task, results: list[Result]) -> None:
        """An attempt of a call has ended with these results."""
        if not task.template.recorded:
            return
        error: Any = None
        if results and results[0].kind == _ERROR:
            error = results[0].payload
            if len(error) > LONGEST_ERROR:
                error = describe_error(error)
        self.calls.append(
            (task.id, task.attempt, task.template, task.parent, task.seat, task.created, task.sent, now_ns(), error)
        )

    # -------------------------------------------------------------- questions

    def on_query(self, source: int, message: Query) -> None:
        question = self.question(message.name)
        try:
            if question is None:
                raise ValueError(f"this process has no {message.name!r}; it has {', '.join({**self.questions, **context.questions})}")
            answer = Answer(message.request_id, question(**message.arguments))
        except Exception as error:  # whoever waits is answered
            answer = Answer(message.request_id, None, str(error), type(error).__name__)
        self.client.send(source, answer)

    def question(self, name: str) -> Callable[..., Any] | None:
        return self.questions.get(name) or context.questions.get(name)

    def leave(self) -> None:
        """Hand over to the raylet (RECORD-3)."""
        if self.calls or self.runs or self.spans:
            with self.client.lock:
                history = self.history()
            rows = len(history.calls) + len(history.runs) + len(history.spans)
            self.client.send(self.client.raylet, LeaveHistory(rows, pack(history)))

    def history(self, limit: int = 1 << 30) -> History:
        """The latest ``limit`` rows of each kind, and all that is under way."""
        client = self.client
        offset = time.time_ns() - now_ns()
        current = [*client.tasks.tasks.values(), *client.actors.calls.values()]
        calls = [self._call(*record, offset=offset) for record in _last(self.calls, limit)]
        calls += [self._pending(task, offset) for task in current if task.template.recorded]
        runs = [self._run(*record, offset=offset) for record in _last(self.runs, limit)]
        runs += [self._run(*record, offset=offset) for record in self.now_running()]
        spans = [
            SpanRow(name, task_id, started + offset, ended + offset, extra)
            for name, task_id, started, ended, extra in _last(self.spans, limit)
        ]
        return History(client.worker_id, client.address, client.pid, client.kind == ProcessKind.DRIVER, calls, runs, spans)

    def _call(
        self,
        task_id: bytes,
        attempt: int,
        template: Template,
        parent: bytes | None,
        seat: Any,
        created: int,
        sent: int,
        ended: int,
        error: Any,
        state: str = "",
        *,
        offset: int,
    ) -> CallRow:
        error_type, error_text = ("", "") if error is None else describe_error(error) if type(error) is bytes else error
        shape = template.shape
        actor_id, worker, pid = b"", 0, 0
        rest: tuple[Any, ...] = ()
        if shape is None:  # the seat is the ActorLink, or the ActorInfo of the process that has it
            function = f"{short_name(seat.class_name)}.{template.name}"
            extras = loads(template.extras) if template.extras else {}
            name = extras.get("task_name") or function
            actor_id, worker, pid = (seat.actor_id, seat.address, seat.pid) if sent else (seat.id, 0, 0)
        else:  # the seat is the Lease
            function, name = template.function.name, template.name
            if sent:
                worker, pid = seat.worker, seat.pid
            rest = (shape.resources, shape.group_id, shape.runtime_env)
        return CallRow(
            task_id,
            attempt,
            "ACTOR_TASK" if shape is None else "NORMAL_TASK",
            name,
            function,
            state or ("FINISHED" if error is None else "FAILED"),
            parent or b"",
            actor_id,
            worker,
            pid,
            created + offset,
            sent + offset if sent else 0,
            ended + offset if ended else 0,
            error_type,
            error_text,
            *rest,
        )

    def _pending(self, task: Task, offset: int) -> CallRow:
        record = (task.id, task.attempt, task.template, task.parent, task.seat, task.created, task.sent, 0, None)
        return self._call(*record, _state_of(task), offset=offset)

    def _run(
        self,
        task_id: bytes,
        attempt: int,
        name: str,
        function: str,
        started: int,
        called: int,
        returned: int,
        ended: int,
        failed: bool,
        state: str = "",
        *,
        offset: int,
    ) -> RunRow:
        kind = "ACTOR_TASK" if self.actor_id else "NORMAL_TASK"
        if state == "creation":
            kind, state = "ACTOR_CREATION_TASK", "" if ended else "RUNNING"
        return RunRow(
            task_id,
            attempt,
            kind,
            name,
            function,
            state or ("FAILED" if failed else "FINISHED"),
            self.actor_id,
            started + offset if started else 0,
            called + offset if called else 0,
            returned + offset if returned else 0,
            ended + offset if ended else 0,
        )

    def objects(self) -> list[ObjectRow]:
        """Every object that this process refers to."""
        client = self.client
        scopes = {link.scope for link in client.actors.links.values()}
        calls = [*client.tasks.tasks.values(), *client.actors.calls.values()]
        used = {entry for task in calls for _, entry in task.dependencies} | {entry for task in calls for entry in task.contained}
        captured = {inner for entry in client.objects.entries.values() for inner in entry.contained or ()}
        return [self._object(entry, scopes, used, captured) for entry in client.objects.entries.values()]

    def _object(self, entry: Entry, scopes: set[Entry | None], used: set[Entry], captured: set[Entry]) -> ObjectRow:
        result, task = entry.result, entry.task
        size = -1 if result is None else result.size or len(result.payload)
        status = "FINISHED" if result is not None else _state_of(task) if task is not None else "NIL"
        if entry in scopes:  # what an actor's life hangs on
            size, status, reference = -1, "NIL", "ACTOR_HANDLE"
        elif entry in used:
            reference = "USED_BY_PENDING_TASK"
        elif entry in captured:
            reference = "CAPTURED_IN_OBJECT"
        else:
            reference = "LOCAL_REFERENCE" if entry.count > 0 else "PINNED_IN_MEMORY"
        return ObjectRow(entry.id, size, status, 1 + (task.attempt if task is not None else 0), reference)


def _state_of(task: Task) -> str:
    """Of a call that is under way."""
    if task.sent:
        return "SUBMITTED_TO_WORKER"
    return "PENDING_ARGS_AVAIL" if task.unresolved else "PENDING_NODE_ASSIGNMENT"


def _last(ring: deque, count: int) -> list[Any]:
    return list(ring) if count >= len(ring) else list(islice(ring, len(ring) - count, None))

"""A call of a function or a method, on its way from its caller to its results: prepared, remembered, and ended.

Relied on by ``tasks`` and ``actors``, which know where it runs. Preparing means that its arguments are packed and the references in them
held; then it may have to wait for those that are not here yet.

CALL-1 (holds): a call holds its dependencies and what its arguments contain until its reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from hpc_ray.client import context
from hpc_ray.client.objects import ARENA, ERROR, FREED, INLINE, PENDING, READY, Entry
from hpc_ray.client.records import now_ns
from hpc_ray.client.refs import ObjectRef, new_reference
from hpc_ray.client.streams import DYNAMIC, ObjectRefGenerator, Stream
from hpc_ray.exceptions import RayError, RayTaskError
from hpc_ray.ids import object_id_of, object_ids_of
from hpc_ray.protocol import ALL_ARGUMENTS, Dependency, Result, Shape, encode
from hpc_ray.serialize import dumps, explain_arguments, loads, plain_arguments, serialize

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

UNKNOWN_COST_NS = 1 << 60  # of a function that has not run yet: nothing is sent ahead


class Function:
    """A pickled function or class, its id (a digest of the pickle), and how long it usually runs."""

    __slots__ = ("blob", "cost_ns", "id", "name")

    def __init__(self, function_id: bytes, blob: bytes, name: str):
        self.id = function_id
        self.blob = blob
        self.name = name
        self.cost_ns = UNKNOWN_COST_NS

    def learn(self, nanoseconds: int) -> None:
        """A run took this long. Longer ones count at once, shorter ones slowly."""
        cost = self.cost_ns
        if nanoseconds > 4 * cost or cost == UNKNOWN_COST_NS:
            self.cost_ns = nanoseconds
        else:
            self.cost_ns = cost + (nanoseconds - cost) // 8


class Template:
    """What all calls of one remote function with the same options share."""

    __slots__ = (
        "extras",
        "function",
        "limited",
        "listed",
        "max_retries",
        "name",
        "num_returns",
        "recorded",
        "retry_exceptions",
        "shape",
        "shape_key",
    )

    def __init__(
        self,
        function: Function,
        name: str,
        shape: Shape | None,
        *,
        num_returns: int = 1,
        max_retries: int = 3,
        retry_exceptions: bool = False,
        extras: bytes = b"",
        limited: bool = False,
        listed: bool = False,
        recorded: bool = True,
    ):
        self.function = function
        self.name = name
        self.shape = shape
        self.shape_key = encode(shape) if shape is not None else b""
        self.num_returns = num_returns  # or STREAMING, DYNAMIC
        self.limited = limited  # a stream that waits for its consumer
        self.listed = listed  # its one reference comes in a list: that of a gang's only rank
        self.max_retries = max_retries
        self.retry_exceptions = retry_exceptions
        self.extras = extras
        self.recorded = recorded  # in what list_tasks and timeline show


class Task:
    """One call on its way: of a remote function, or of an actor's method."""

    __slots__ = (
        "arguments",
        "attempt",
        "cancelled",
        "contained",
        "created",
        "dependencies",
        "id",
        "lane",
        "parent",
        "record_bytes",
        "retries_left",
        "returns",
        "seat",
        "sent",
        "stream",
        "submitter",
        "template",
        "unresolved",
        "unreturned",
    )

    def __init__(self, submitter: Any, template: Template, task_id: bytes):
        self.submitter = submitter
        self.template = template
        self.id = task_id
        self.attempt = 0
        self.retries_left = template.max_retries
        self.arguments = b""
        self.dependencies: Sequence[tuple[int | str, Entry]] = ()
        self.contained: Sequence[Entry] = ()
        self.returns: Sequence[Entry] = ()
        self.unreturned = 0  # returns whose ``task`` this still is
        self.unresolved = 0
        self.lane: Any = None  # the Lease or ActorLink that has it, while it is sent
        self.cancelled = False
        self.record_bytes = 0  # once it is finished and remembered
        self.stream: Stream | None = None
        parent = context.task.get()
        self.parent = None if parent is None else parent.task_id  # the task that made this call
        self.created = now_ns()
        self.sent = 0  # when; 0 while this attempt is not sent
        self.seat: Any = None  # for the records: the Lease, or the ActorInfo, that it was sent to

    @property
    def worker(self) -> int:
        """The address of the process that has it."""
        return self.lane.worker

    @property
    def may_repeat(self) -> bool:
        """Whether a result that is lost may be made again."""
        return self.template.max_retries != 0

    def run_again(self) -> str:
        """Make a lost result once more; the reason if that is impossible, "" if it is under way."""
        packer: CallPacker = self.submitter.packer
        return packer.run_again(self)

    def result_gone(self, entry: Entry) -> None:
        """Nobody will want this result again. When that was the last one, neither will anybody want this task's arguments."""
        gone = [entry]
        while gone:
            entry = gone.pop()
            task, entry.task = entry.task, None
            task.unreturned -= 1
            if task.unreturned:
                continue
            task.submitter.packer.forget(task)
            for _, argument in task.dependencies:
                argument.lineage -= 1
                if argument.lineage == 0 and argument.state == FREED and argument.task is not None:
                    gone.append(argument)
            task.dependencies = ()


TASK_BYTES = 1500  # that a remembered task takes besides its arguments, about
_ROOTS = 1000  # errors of arguments whose first cause is remembered


class CallPacker:
    """Shared by tasks and actor calls: arguments in, a Task with its holds and its return entries out."""

    def __init__(self, client: Client):
        self.client = client
        self.objects = client.objects
        self.lineage: dict[bytes, Task] = {}  # finished tasks that are remembered, oldest first (OBJ-5)
        self.lineage_bytes = 0
        self.failing: deque[tuple[Task, Result]] = deque()  # the first one's consequences are being drawn
        self.roots: dict[bytes, bytes] = {}  # the latest errors of arguments → the error that each goes back to

    def pack(self, task: Task, args: tuple, kwargs: dict) -> None:
        """Pack the arguments and take the holds. Takes the client's lock.

        Raises:
            TypeError: an argument cannot be pickled; what else its pickling raises is raised as it is.
        """
        plain = plain_arguments(args, kwargs)
        if plain is not None and len(plain) <= self.client.settings.inline_bytes:
            task.arguments = plain
            return
        dependencies: list[tuple[int | str, Entry]] = []
        for i, value in enumerate(args):
            if type(value) is ObjectRef:
                dependencies.append((i, value._entry))
        if dependencies:
            values = list(args)
            for slot, _ in dependencies:
                values[cast("int", slot)] = None
            args = tuple(values)
        if kwargs:
            for name, value in kwargs.items():
                if type(value) is ObjectRef:
                    dependencies.append((name, value._entry))
                    kwargs = {**kwargs, name: None}
        try:
            serialized = serialize((args, kwargs))
        except TypeError as error:
            where = explain_arguments(args, kwargs)
            name = task.template.name
            raise TypeError(f"Could not serialize the arguments of {name}: {error}. The part at fault: {where}") from error
        contained = [reference._entry for reference in serialized.contained]
        if serialized.size <= self.client.settings.inline_bytes:
            task.arguments = serialized.to_bytes()
            task.contained = contained
        else:
            large = self.objects.put(serialized, contained)
            large.count -= 1  # counted with the others below
            dependencies.insert(0, (ALL_ARGUMENTS, large))
        task.dependencies = dependencies
        if dependencies or contained:
            entries = self.objects.entries
            with self.client.lock:
                for _, entry in dependencies:
                    if entries.get(entry.id) is not entry:
                        raise RayError(f"{entry.id.hex()} is a reference from another session")
                for _, entry in dependencies:
                    entry.count += 1
                for entry in task.contained:
                    entry.count += 1

    def wait_for_dependencies(self, task: Task, then: Callable[[Task], None]) -> bool:
        """True if they are all ready; otherwise ``then(task)`` is called when they are. Under the lock."""
        waiting = [entry for _, entry in task.dependencies if entry.state < READY]
        if not waiting:
            return True
        task.unresolved = len(waiting)

        def one_ready(entry: Entry) -> None:
            task.unresolved -= 1
            if task.unresolved == 0:
                then(task)

        for entry in waiting:
            self.objects.on_ready(entry, one_ready)
        return False

    def resolve(self, task: Task) -> list[Dependency] | Result:
        """The dependencies for the message, or the error of the first that failed."""
        found = []
        for slot, entry in task.dependencies:
            result = entry.result
            if result is None:
                return Result(ERROR, dumps(RayError(f"argument {entry.id.hex()} was freed before the task could run")))
            if result.kind == ERROR:
                return self.error_of(task, result.payload)
            if result.contained:
                result = Result(result.kind, result.payload, result.node, result.handle, result.size)
            found.append(Dependency(entry.id, result, slot, entry.places or []))
        return found

    def resolved(self, task: Task) -> list[Dependency]:
        """The dependencies of a constructor; an error stands for itself: the constructor fails with it."""
        found = self.resolve(task)
        return found if isinstance(found, list) else [Dependency(b"\0" * 28, found, 0)]

    def make_returns(self, task: Task) -> Any:
        """What the caller gets: a reference, a list of them, None, or a generator. Under the lock."""
        count = task.template.num_returns
        if count == 1:
            entry = self.make_return(task, 0)
            task.returns = (entry,)
            reference = new_reference(ObjectRef)
            reference._entry = entry
            return reference
        if count >= 0:
            ids = object_ids_of(task.id, count)
            entries = task.returns = [Entry(object_id, True, PENDING, task, 1) for object_id in ids]
            self.objects.entries.update(zip(ids, entries, strict=True))
            task.unreturned += count
            references = [new_reference(ObjectRef) for _ in entries]
            for reference, entry in zip(references, entries, strict=True):
                reference._entry = entry
            return references or None
        stream = Stream(self.client, task)
        if count == DYNAMIC:
            task.returns = (self.make_return(task, 0),)
            return ObjectRef(task.returns[0])
        return ObjectRefGenerator(self.client, stream)

    def make_return(self, task: Task, index: int) -> Entry:
        """The entry of a result, with the hold of the reference that the caller gets."""
        object_id = object_id_of(task.id, index)
        entry = self.objects.entries[object_id] = Entry(object_id, True, PENDING, task, 1)
        task.unreturned += 1
        return entry

    def finish(self, task: Task, results: list[Result]) -> None:
        """Hand out the results and let go of the arguments (CALL-1). 1 µs for one small result."""
        self.client.records.note_call(task, results)
        objects = self.objects
        if len(results) == 1 and task.stream is None and not task.dependencies and not task.contained:
            result, entry = results[0], task.returns[0]
            if result.kind != ARENA and entry.task is task and len(task.returns) == 1:  # the usual call, in short
                task.arguments = b""
                entry.task = None
                task.unreturned = 0
                objects.receive_result(entry, result)
                return
        if task.stream is not None:
            task.stream.end(results[0] if results else None, task.cancelled or bool(self.failing))
            if len(results) > 1:  # dynamic, and not one of its items failed but all of it
                task.stream.drop()
                results = results[:1]
            else:
                results = [task.stream.collect()] if task.returns else []
        arguments, contained, task.contained = task.dependencies, task.contained, ()
        if task.may_repeat and any(result.kind == ARENA for result in results):
            self.remember(task)
        else:
            task.dependencies = ()
            task.arguments = b""
        for entry, result in zip(task.returns, results, strict=True):
            if result.kind == INLINE and entry.state is PENDING and task.unreturned > 1 and not result.contained:  # in short
                task.unreturned -= 1
                entry.task = None
                objects.set_result(entry, result)
            elif entry.state < READY:
                objects.receive_result(entry, result)
            else:  # made once more along with one that was lost
                objects.discard(result)
        for entry, result in zip(task.returns, results, strict=True):
            if entry.task is task and result.kind != ARENA:  # it cannot be lost
                task.result_gone(entry)
        for _, entry in arguments:
            objects.release(entry)
        for entry in contained:
            objects.release(entry)

    def discard(self, task: Task, results: list[Result]) -> None:
        """An attempt is over that another one follows."""
        self.client.records.note_call(task, results)
        for result in results:
            self.client.objects.discard(result)

    def remember(self, task: Task) -> None:
        """Keep a finished task, and drop the oldest ones when that takes too much memory (OBJ-5)."""
        small = 0
        for _, entry in task.dependencies:
            entry.lineage += 1
            if entry.result is not None:
                small += len(entry.result.payload)
        task.record_bytes = TASK_BYTES + len(task.arguments) + small
        self.lineage[task.id] = task
        self.lineage_bytes += task.record_bytes
        while self.lineage_bytes > self.client.settings.max_lineage_bytes:
            oldest = next(iter(self.lineage.values()))
            for entry in oldest.returns:
                if entry.task is oldest:
                    oldest.result_gone(entry)

    def run_again(self, task: Task) -> str:
        """Make the lost results of a finished task once more, and what it needs for that; why not, or ""."""
        plan: list[Task] = []
        seen = {task.id}
        look = [task]
        while look:
            one = look.pop()
            if one.submitter.is_under_way(one):
                continue  # under way for another of its results
            if not one.may_repeat:
                return "OBJECT_UNRECONSTRUCTABLE_RETRIES_DISABLED"
            if one.retries_left == 0:
                return "OBJECT_UNRECONSTRUCTABLE_MAX_ATTEMPTS_EXCEEDED"
            if one.cancelled:
                return "OBJECT_UNRECONSTRUCTABLE_TASK_CANCELLED"
            plan.append(one)
            for _, argument in one.dependencies:
                if argument.state == FREED and argument.result is None:
                    if argument.task is None:
                        return self.objects.why_no_task(argument)
                    if argument.task.id not in seen:
                        seen.add(argument.task.id)
                        look.append(argument.task)
        for one in plan:
            self.forget(one)
            for _, argument in one.dependencies:
                if argument.state == FREED:
                    self.objects.revive(argument)
                argument.count += 1
                argument.lineage -= 1
            for result in one.returns:
                if result.state == READY and result.result is not None and result.result.kind == ARENA and not result.places:
                    result.state = PENDING
        for one in plan:
            one.submitter.start_again(one)
        return ""

    def let_go(self) -> None:
        """The session is over (see ``objects.Entry``)."""
        for task in self.lineage.values():
            task.returns = task.dependencies = ()

    def forget(self, task: Task) -> None:
        if self.lineage.pop(task.id, None) is not None:
            self.lineage_bytes -= task.record_bytes

    def fail(self, task: Task, error: BaseException | Result) -> None:
        """Those that wait for its results fail too, and so on: one after the other, for a chain may be longer than the stack."""
        failing = self.failing
        failing.append((task, error if isinstance(error, Result) else Result(ERROR, dumps(error))))
        if len(failing) > 1:
            return
        try:
            while failing:
                task, result = failing[0]
                self.finish(task, [result] * abs(task.template.num_returns))
                failing.popleft()
        except BaseException:
            failing.clear()
            raise

    def error_of(self, task: Task, payload: bytes) -> Result:
        """What a task fails with whose argument has failed. However long the chain, it carries the first error only."""
        root = self.roots.get(payload, payload)
        made = dumps(_ErrorOfArgument(task.template.name, root))
        self.roots[made] = root
        if len(self.roots) > _ROOTS:
            del self.roots[next(iter(self.roots))]
        return Result(ERROR, made)


class _ErrorOfArgument:
    """Turns into the error of a task whose argument failed, where that is read: no user's class is made under the lock."""

    def __init__(self, name: str, payload: bytes):
        self.name = name
        self.payload = payload

    def __reduce__(self) -> Any:
        return error_of_argument, (self.name, self.payload)


def error_of_argument(name: str, payload: bytes) -> BaseException:
    """The cause is what user code raised, or another failure, of a crash for instance; a chain of such errors tells its ends."""
    error = loads(payload)
    kind, text = type(error), str(error)
    if isinstance(error, RayTaskError):
        text = text.partition(_NOT_RUN)[2] or f"{kind.__module__}.{kind.__name__}: {text}"
    else:
        text = f"{kind.__module__}.{kind.__name__}: {text}"
    return RayTaskError(name, f"hpc_ray::{name}()\n{_NOT_RUN}{text}", error)


_NOT_RUN = "  At least one of the input arguments for this task could not be computed:\n"

"""ObjectRef: the user's name for a value that exists, will exist, or will fail.

Relied on by the public API and by ``objects``. A reference is one counted hold on its ``Entry``; when it is collected the entry goes
into ``released``, which the client works off later, because a finaliser must not take locks or send.

REF-1 (no I/O in ``__del__``): dropping a reference appends to ``released`` and at most wakes a parked thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from hpc_ray.exceptions import LocalRayletDiedError
from hpc_ray.ids import OBJECT_ID_BYTES, JobID, TaskID
from hpc_ray.serialize import batch_references, note_contained

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

    from hpc_ray.client.objects import Entry

T = TypeVar("T")
released: deque[Any] = deque()
SHUT_DOWN = "the session was shut down while this call waited"


def _not_connected(object_ids: Iterable[bytes]) -> NoReturn:
    raise RuntimeError("an ObjectRef can only be unpickled in a process that is connected to its session")


class _Hooks:
    """Set by the client that is connected; see ``install``."""

    meet: Callable[[Iterable[bytes]], list[ObjectRef]] = _not_connected
    add_done_callback: Callable[[Any, Callable], None] | None = None
    get: Callable[[ObjectRef], Any] | None = None
    leak: Callable[[Any], None] | None = None
    parked = True  # nobody looks at ``released``: the client's background thread sleeps for good, or there is no client
    unpark: Callable[[], None] | None = None


def _unpark(_hooks: type[_Hooks] = _Hooks, _released: deque[Any] = released) -> None:
    """A reference was released while nobody looked. (Its names are its own: the interpreter may be about to end.)"""
    if _hooks.unpark is None:
        _released.clear()  # the session is over
    else:
        _hooks.parked = False
        _hooks.unpark()


def install(
    meet: Callable[[Iterable[bytes]], list[ObjectRef]] | None = None,
    add_done_callback: Callable[[Any, Callable], None] | None = None,
    get: Callable[[ObjectRef], Any] | None = None,
    leak: Callable[[Any], None] | None = None,
    unpark: Callable[[], None] | None = None,
) -> None:
    """Connect references to a client; without arguments: disconnect."""
    _Hooks.parked = meet is None
    _Hooks.meet, _Hooks.add_done_callback, _Hooks.get = meet or _not_connected, add_done_callback, get
    _Hooks.leak, _Hooks.unpark = leak, unpark
    if meet is None:
        released.clear()


def set_parked(parked: bool) -> None:
    _Hooks.parked = parked


def _entry_of(data: Any) -> Any:
    if not isinstance(data, bytes):
        raise TypeError(f"ObjectRef is made from bytes, not {type(data).__name__}")
    if len(data) != OBJECT_ID_BYTES:
        raise ValueError(f"ObjectRef has {OBJECT_ID_BYTES} bytes, got {len(data)}")
    if _Hooks.meet is _not_connected or data == _NIL:
        return _Name(data)
    reference = _rebuild(data)
    entry = reference._entry
    reference._entry = _Name(data)  # its hold passes to the new reference
    return entry


def _meet(object_ids: Iterable[bytes]) -> list[ObjectRef]:
    return _Hooks.meet(object_ids)


def _rebuild(object_id: bytes) -> ObjectRef:
    return _meet((object_id,))[0]


def _id_of(reference: ObjectRef) -> bytes | None:
    entry = reference._entry
    return None if type(entry) is _Name else entry.id


class _Name:
    """Stands for an entry where there is none: the nil reference, or one made without a session."""

    __slots__ = ("count", "id")

    def __init__(self, object_id: bytes):
        self.id = object_id
        self.count = 1 << 60  # there is nothing to be let go of

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            f"The reference {self.id.hex()} is to no object of this session: it is nil, or was made from bytes outside of a session."
        )


_NIL = b"\xff" * OBJECT_ID_BYTES


class ObjectRef(Generic[T]):
    """A reference to an object in the cluster. Made by ``put`` and ``remote``; ``get`` gives the value."""

    __slots__ = ("__weakref__", "_entry")

    def __init__(self, entry: Entry | bytes):
        """From the 28 bytes of an id; the runtime itself gives the entry, in whose count it has put this reference."""
        if type(entry) is bytes or not hasattr(entry, "id"):
            entry = _entry_of(entry)
        self._entry: Any = entry  # an Entry, or a _Name

    @classmethod
    def nil(cls) -> ObjectRef:
        """The reference to nothing."""
        return cls(_NIL)

    @classmethod
    def from_binary(cls, id_bytes: bytes) -> ObjectRef:
        return cls(id_bytes)

    @classmethod
    def from_hex(cls, hex_id: str) -> ObjectRef:
        return cls(bytes.fromhex(hex_id))

    def __del__(
        self,
        _append: Callable[[Any], None] = released.append,
        _hooks: type[_Hooks] = _Hooks,
        _unpark: Callable[[], None] = _unpark,
    ) -> None:
        try:
            _append(self._entry)
        except AttributeError:  # __init__ did not get that far
            return
        if _hooks.parked:
            _unpark()

    def binary(self) -> bytes:
        return self._entry.id

    def hex(self) -> str:
        return self._entry.id.hex()

    def task_id(self) -> TaskID:
        return TaskID(self._entry.id[:24])

    def job_id(self) -> JobID:
        return JobID(self._entry.id[20:24])

    def is_nil(self) -> bool:
        return self._entry.id == _NIL

    @classmethod
    def size(cls) -> int:
        return OBJECT_ID_BYTES

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and self._entry.id == other._entry.id

    def __hash__(self) -> int:
        return hash(int.from_bytes(self._entry.id, "little"))  # the same in all processes

    def __repr__(self) -> str:
        return f"ObjectRef({self._entry.id.hex()})"

    def __reduce__(self) -> Any:
        if type(self._entry) is _Name:
            return ObjectRef.from_binary, (self._entry.id,)
        if not note_contained(self) and _Hooks.leak is not None:
            _Hooks.leak(self._entry)  # pickled by hand: nobody can know when the copy goes
        return _rebuild, (self._entry.id,)

    def future(self) -> concurrent.futures.Future:
        """A future that gets the value or the error; done in a thread of the runtime."""
        import concurrent.futures  # costs start-up time where nobody asks for it

        future: concurrent.futures.Future = concurrent.futures.Future()
        self._when_done(lambda: _fill(future, self))
        return future

    def as_future(self, _internal: bool = False) -> asyncio.Future:
        """An asyncio future of the running loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        future = loop.create_future()

        self._when_done(lambda: call_in_loop(loop, _fill_unless_done, future, self))
        return future

    def __await__(self) -> Any:
        return self.as_future().__await__()

    def _on_completed(self, py_callback: Callable[[Any], None]) -> ObjectRef:
        """Call back, in any thread, with the value or the error, once it is there; the reference itself."""
        self._when_done(lambda: py_callback(_outcome(self)))
        return self

    def _when_done(self, callback: Callable[[], None]) -> None:
        if _Hooks.add_done_callback is None:
            raise RuntimeError("not connected: call init() first")
        _Hooks.add_done_callback(self._entry, callback)


batch_references(ObjectRef, _id_of, _meet)
new_reference: Callable[[type[ObjectRef]], ObjectRef] = object.__new__  # for hot paths: ``_entry`` is to be set


def call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable, *args: Any) -> None:
    """From any thread; a loop that is closed has nobody left who waits."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _value_of(reference: ObjectRef) -> Any:
    if _Hooks.get is None:  # an event loop may come to this late
        raise LocalRayletDiedError(SHUT_DOWN)
    return _Hooks.get(reference)


def _outcome(reference: ObjectRef) -> Any:
    try:
        return _value_of(reference)
    except Exception as error:
        return error


def _fill(future: concurrent.futures.Future, reference: ObjectRef) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = _value_of(reference)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)


def _fill_unless_done(future: asyncio.Future, reference: ObjectRef) -> None:
    if future.done():
        return
    try:
        value = _value_of(reference)
    except BaseException as error:
        if isinstance(error, StopIteration):
            error = RuntimeError(f"the task raised StopIteration: {error}")
        future.set_exception(error)
    else:
        future.set_result(value)

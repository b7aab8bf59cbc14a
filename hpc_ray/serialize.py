"""Values to bytes and back: pickle 5 with the buffers out of band, cloudpickle for what lives in ``__main__``.

A stored value is one run of bytes, the same in a message and in the arena. Numbers, texts and the like, by themselves or as the
arguments of a call, are a byte that says so, and MessagePack, which takes a third of pickle's time; all else is

    kind 1 byte · 3 zero · count of buffers u32 · length of the pickle u64 · length of each buffer u64 … · pickle · buffers

every buffer at a multiple of ``ALIGNMENT`` from the start. Instead of the pickle, an array of numbers by itself, and those among the
arguments of a call or in a tuple whose other parts are plain, have MessagePack again, of the plain parts and of what each array is
like: a quarter of the time. Reading never copies a buffer: arrays are views on the memory that
was read from, and read-only because that memory is.

The ids of references, but for the first, come before the pickle, after their number (u32), and in the pickle each is "the next one". So
the reader makes all of them in one go, and what remains of each is done by the unpickler itself, without a call of Python's.

SER-1 (references are seen): every ObjectRef and actor handle that is pickled reports itself to ``note_contained`` of the
serialisation under way, so that whoever sends the bytes can keep them alive.
SER-2 (in order): a pickle is read in the order in which it was written, so the next reference is the right one. Those that something else
pickles on the way, which may be read at any time, carry their ids themselves.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import threading
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import cloudpickle
import msgspec

from hpc_ray.ids import OBJECT_ID_BYTES, split_object_ids

ALIGNMENT = 64
PICKLE, BYTES, PLAIN, ARGUMENTS, REFERENCES = 1, 2, 3, 4, 5  # kinds
ARRAY, TUPLE_WITH_ARRAYS, ARGUMENTS_WITH_ARRAYS = 6, 7, 8

_HEADER = struct.Struct("<BxxxIQ")
_LENGTH = struct.Struct("<Q")
_COUNT = struct.Struct("<I")
_PLAIN = frozenset({int, float, bool, type(None), str})
_SHORT = 4096  # bytes: copying so many costs less than a view on them
_NO_BUFFERS = {kind: _HEADER.pack(kind, 0, 0) for kind in (PICKLE, REFERENCES)}  # the header where everything is in the pickle
_PICKLE_ALONE = _NO_BUFFERS[PICKLE]
_PICKLED = slice(_HEADER.size, None)  # of such data
_loads = pickle.loads
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
_PADDING = bytes(ALIGNMENT)
_PLAIN_BYTE, _ARGUMENTS_BYTE = bytes([PLAIN]), bytes([ARGUMENTS])


class _Session(threading.local):
    contained: list | None = None  # what the pickling under way has met
    references: Iterator[Any] = iter(())  # of the data that is being read, those still to come


_session = _Session()
_custom: dict[type, tuple[Callable, Callable]] = {}


def note_contained(reference: Any) -> bool:
    """Called by a reference that is being pickled; False if nobody of ours is pickling (SER-1)."""
    if _session.contained is None:
        return False
    _session.contained.append(reference)
    return True


class _Batch:
    """How references are made; set by their module."""

    cls: type | None = None
    id_of: Callable[[Any], bytes | None]
    make: Callable[[list[bytes]], list]


def batch_references(cls: type, id_of: Callable[[Any], bytes | None], make: Callable[[list[bytes]], list]) -> None:
    """References are of this class; ``id_of`` says what ``make`` makes one of the same object from, or None for one that pickles itself."""
    _Batch.cls, _Batch.id_of, _Batch.make = cls, id_of, make


class _Next:
    """Stands in a pickle for what gives the references of its data, each in its turn (SER-2)."""

    def __reduce__(self) -> Any:
        return _next_of_this_data, ()

    def __call__(self) -> None:
        """Only what can be called may make something when it is unpickled."""


def _next_of_this_data() -> Callable[[], Any]:
    return _session.references.__next__


_NEXT = _Next(), ()


def register_serializer(cls: type, *, serializer: Callable, deserializer: Callable) -> None:
    """Use ``serializer(object) -> picklable`` and ``deserializer(picklable) -> object`` for exactly this class.

    For what this process pickles; not for subclasses. An earlier pair is replaced. What the first raises comes out of ``put`` and
    ``remote``, what the second raises out of ``get``.
    """
    _custom[cls] = (serializer, deserializer)


def deregister_serializer(cls: type) -> None:
    """Pickle objects of this class as usual again. Harmless if nothing was registered."""
    _custom.pop(cls, None)


def _rebuild_custom(deserializer: Callable, state: Any) -> Any:
    return deserializer(state)


_FILENAME = 10  # of the arguments of types.CodeType


def _reduce_code(code: types.CodeType) -> Any:
    """With the name of the file that it is from, which cloudpickle has left out since 3.1.3: tracebacks show lines of it."""
    make, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return make, (*arguments[:_FILENAME], "".join(code.co_filename), *arguments[_FILENAME + 1 :])  # a copy, as cloudpickle's of other names


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    _first, *_others = cloudpickle.Pickler.dispatch_table.maps  # one map more would cost something for each object
    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap({**_first, types.CodeType: _reduce_code}, *_others)

    def __init__(self, file: io.BytesIO, buffers: list, contained: list):
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.contained = contained
        self.ids: list[bytes] = []  # of the references that go out of band

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        custom = _custom.get(kind)
        if custom is not None:
            return _rebuild_custom, (custom[1], custom[0](obj))
        if kind is _Batch.cls and self.contained:  # one alone is faster in the pickle
            object_id = _Batch.id_of(obj)
            if object_id is None:
                return NotImplemented
            self.ids.append(object_id)
            self.contained.append(obj)
            return _NEXT
        return super().reducer_override(obj)


class Serialized:
    """A value ready to be written: header and pickle in ``head``, then ``buffers``; ``size`` in bytes.

    ``contained``: the references inside, held here until this object goes.
    """

    __slots__ = ("buffers", "contained", "head", "size")

    def __init__(self, head: bytes, buffers: list[memoryview], contained: list):
        self.head = head
        self.buffers = buffers
        self.contained = contained
        size = len(head)
        for buffer in buffers:
            size += -size % ALIGNMENT + buffer.nbytes
        self.size = size

    def to_bytes(self) -> bytes:
        if not self.buffers:
            return self.head
        parts: list[Any] = [self.head]
        end = len(self.head)
        for buffer in self.buffers:
            parts.append(_PADDING[: -end % ALIGNMENT])
            parts.append(buffer)
            end += -end % ALIGNMENT + buffer.nbytes
        return b"".join(parts)

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """(offset, bytes-like) of each piece, in order; what lies between them is padding."""
        yield 0, self.head
        offset = len(self.head)
        for buffer in self.buffers:
            offset += -offset % ALIGNMENT
            if buffer.nbytes:
                yield offset, buffer
            offset += buffer.nbytes


_NO_REFERENCES: list = []


def plain_value(value: Any) -> bytes | None:
    """The short way (0.1 µs) for what has no parts: what ``serialize`` would give, as bytes; None for all else."""
    kind = type(value)
    if (kind in _PLAIN or (kind is bytes and len(value) < _SHORT)) and not (_custom and kind in _custom):
        try:
            return _PLAIN_BYTE + _pack(value)
        except (OverflowError, ValueError):  # more than 64 bits, or half of a surrogate pair
            return None
    return None


def plain_arguments(args: tuple, kwargs: dict) -> bytes | None:
    """The same for the arguments of a call."""
    if kwargs or _custom:
        return None
    if not args:
        return NO_ARGUMENTS
    for value in args:
        kind = type(value)
        if kind not in _PLAIN and not (kind is bytes and len(value) < _SHORT):
            return None
    try:
        return _ARGUMENTS_BYTE + _pack(args)
    except (OverflowError, ValueError):
        return None


NO_ARGUMENTS = _ARGUMENTS_BYTE + _pack(())


_FEW, _DEEP = 16, 3


def _array_class() -> Any:
    """None as long as numpy is not imported, or another thread is about to."""
    return getattr(sys.modules.get("numpy"), "ndarray", None)


def _is_simple(value: Any, depth: int = _DEEP) -> bool:
    """Whether it is numbers, texts and arrays of numbers, by themselves or as the arguments of a call: then there is no reference in it
    and nothing that only cloudpickle can do, and pickle by itself takes a third of the time."""
    kind = type(value)
    if kind in _PLAIN or kind is bytes:
        return True
    if kind is tuple or kind is dict:
        if not depth or len(value) > _FEW:
            return False
        if kind is dict:
            return all(type(name) is str and _is_simple(part, depth - 1) for name, part in value.items())
        return all(_is_simple(part, depth - 1) for part in value)
    if kind is not _array_class():
        return False
    dtype = value.dtype
    return dtype.isbuiltin == 1 and not dtype.hasobject and dtype.metadata is None


_NUMBERS = frozenset("biufc")  # kinds of dtype


def _with_arrays(value: Any) -> Serialized | None:
    """The short way (2 µs) for an array of numbers, a tuple of such and of plain values, and the arguments of a call that are like that;
    None for all else."""
    ndarray = _array_class()
    if ndarray is None:
        return None
    values: list[Any]
    if type(value) is ndarray:
        kind, values = ARRAY, [value]
    elif type(value) is not tuple:
        return None
    elif len(value) == 2 and type(value[0]) is tuple and type(value[1]) is dict and not value[1]:
        kind, values = ARGUMENTS_WITH_ARRAYS, list(value[0])
    else:
        kind, values = TUPLE_WITH_ARRAYS, list(value)
    arrays: list[tuple[int, str, tuple[int, ...]]] = []
    views: list[memoryview] = []
    for slot, part in enumerate(values):
        cls = type(part)
        if cls is ndarray:
            dtype = part.dtype
            if dtype.kind not in _NUMBERS or dtype.isbuiltin != 1 or dtype.metadata is not None or not part.flags.c_contiguous:
                return None
            arrays.append((slot, dtype.char, part.shape))
            views.append(pickle.PickleBuffer(part).raw())
        elif cls not in _PLAIN and (cls is not bytes or len(part) >= _SHORT):
            return None
    if not arrays:
        return None
    if len(arrays) > 1 and len({id(values[slot]) for slot, _, _ in arrays}) < len(arrays):  # pickle has an array that comes twice once
        return None
    for slot, _, _ in arrays:
        values[slot] = None
    try:
        data = _pack((values, arrays))
    except (OverflowError, ValueError):
        return None
    return Serialized(_head(kind, data, views), views, _NO_REFERENCES)


def _load_with_arrays(data: Any) -> Any:
    from numpy import ndarray

    view = memoryview(data).toreadonly()
    kind, count, length = _HEADER.unpack_from(view)
    begin = _HEADER.size + _LENGTH.size * count
    offset = begin + length
    values, arrays = _unpack(view[begin:offset])
    for number, (slot, char, shape) in enumerate(arrays):
        offset += -offset % ALIGNMENT
        values[slot] = ndarray(shape, char, view, offset)
        offset += _LENGTH.unpack_from(view, _HEADER.size + _LENGTH.size * number)[0]
    if kind == ARRAY:
        return values[0]
    return tuple(values) if kind == TUPLE_WITH_ARRAYS else (tuple(values), {})


def serialize(value: Any) -> Serialized:
    """The value as bytes.

    Raises:
        TypeError, pickle.PicklingError: it cannot be pickled; the text says which part of it (see ``explain``).
    """
    plain = plain_value(value)
    if plain is not None:
        return Serialized(plain, [], _NO_REFERENCES)
    if type(value) is bytes:
        return Serialized(_HEADER.pack(BYTES, 1, 0) + _LENGTH.pack(len(value)), [memoryview(value)], _NO_REFERENCES)
    if type(value) is not dict and not _custom and (short := _with_arrays(value)) is not None:
        return short
    buffers: list = []
    kind = PICKLE
    if not _custom and _is_simple(value):
        contained = _NO_REFERENCES
        data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    else:
        outer = _session.contained
        contained = _session.contained = []
        try:
            with io.BytesIO() as file:
                pickler = _Pickler(file, buffers, contained)
                pickler.dump(value)
                data = file.getvalue()
        finally:
            _session.contained = outer
        if pickler.ids:
            kind = REFERENCES
            data = b"".join((_COUNT.pack(len(pickler.ids)), *pickler.ids, data))
    if not buffers:
        return Serialized(_NO_BUFFERS[kind] + data, [], contained)
    views = [buffer.raw() for buffer in buffers]
    return Serialized(_head(kind, data, views), views, contained)


def _head(kind: int, data: bytes, views: list[memoryview]) -> bytes:
    return b"".join((_HEADER.pack(kind, len(views), len(data)), *[_LENGTH.pack(view.nbytes) for view in views], data))


def deserialize(data: Any, copying: bool = False) -> Any:
    """The value in ``data`` (bytes or a buffer in the arena); arrays in it are views on ``data`` that keep it alive. With ``copying``
    those of a pickle are copies, which may be changed."""
    short = type(data) is bytes and len(data) < _SHORT
    view = data if short else memoryview(data)
    kind = view[0]
    if kind == PLAIN:
        return _unpack(view[1:])
    if kind == ARGUMENTS:
        return tuple(_unpack(view[1:])), {}
    if kind >= ARRAY:
        return _load_with_arrays(data)
    if short and data.startswith(_PICKLE_ALONE):
        return _loads(data[_PICKLED])
    _, count, length = _HEADER.unpack_from(view)
    if count == 0:
        return _loads(view[_PICKLED]) if kind == PICKLE else _load_with_references(view[_PICKLED])
    view = memoryview(data)
    offset = _HEADER.size
    lengths = [_LENGTH.unpack_from(view, offset + 8 * i)[0] for i in range(count)]
    offset += 8 * count
    pickled = view[offset : offset + length]
    offset += length
    buffers = []
    for size in lengths:
        offset += -offset % ALIGNMENT
        buffers.append(view[offset : offset + size])
        offset += size
    if kind == BYTES:
        return bytes(buffers[0])
    buffers = [memoryview(bytearray(buffer)) if copying else buffer.toreadonly() for buffer in buffers]
    return _loads(pickled, buffers=buffers) if kind == PICKLE else _load_with_references(pickled, buffers)


def _load_with_references(view: Any, buffers: Sequence[memoryview] = ()) -> Any:
    end = _COUNT.size + OBJECT_ID_BYTES * _COUNT.unpack_from(view)[0]
    outer, _session.references = _session.references, iter(_Batch.make(split_object_ids(view[_COUNT.size : end])))
    try:
        return _loads(view[end:], buffers=buffers)
    finally:
        _session.references = outer


def dumps(value: Any) -> bytes:
    """A value that has no references inside and goes into a message."""
    return serialize(value).to_bytes()


def loads(data: Any) -> Any:
    """What ``dumps`` made. Arrays that a function or class refers to may be changed, as in Ray: they are this process's own."""
    return deserialize(data, copying=True)


def explain(value: Any, name: str, depth: int = 4) -> str:
    """Which part of a value cannot be pickled, as a path such as ``self.model.lock``; "" if none was found."""

    def fails(part: Any) -> bool:
        try:
            serialize(part)
        except Exception:
            return True
        return False

    def search(part: Any, path: str, left: int, seen: set[int]) -> str:
        if id(part) in seen or not fails(part):
            return ""
        seen.add(id(part))
        if left and not _refuses(part):
            for label, child in _parts(part):
                found = search(child, path + label, left - 1, seen)
                if found:
                    return found
        return f"{path} ({type(part).__name__}: {_short(part)})"

    return search(value, name, depth, set())


def explain_arguments(args: tuple, kwargs: dict) -> str:
    """``explain`` for the arguments of a call: which one, and which part of it."""
    for label, value in [*enumerate(args), *kwargs.items()]:
        found = explain(value, f"argument {label}")
        if found:
            return found
    return "the arguments together"


def _refuses(value: Any) -> bool:
    """Whether it is the value itself that does not want to be pickled, and not a part of it."""
    if not any("__reduce__" in vars(kind) for kind in type(value).__mro__[:-1]):
        return False
    try:
        value.__reduce__()
    except Exception:
        return True
    return False


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        return "no repr"
    return text if len(text) < 80 else text[:77] + "..."


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in list(value.items())[:100]]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{i}]", item) for i, item in enumerate(list(value)[:100])]
    if isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        cells = zip(names, value.__closure__ or (), strict=False)
        used = [(n, value.__globals__[n]) for n in value.__code__.co_names if n in value.__globals__]
        return [(f" → closure {n}", c.cell_contents) for n, c in cells] + [
            (f" → global {n}", item) for n, item in used if not isinstance(item, types.ModuleType)
        ]
    if isinstance(value, type):
        return [(f".{n}", item) for n, item in vars(value).items() if not n.startswith("__")]
    return [(f".{n}", item) for n, item in getattr(value, "__dict__", {}).items()]

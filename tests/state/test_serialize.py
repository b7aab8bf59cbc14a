"""Values to bytes and back, without a session."""

import math
import sys
import time
import types

import numpy as np
import pytest

from hpc_ray import serialize

PLAIN = [0, -1, 1 << 62, (1 << 64) - 1, 1.5, -0.0, math.inf, True, False, None, "", "ä\N{GRINNING FACE}", "x" * 10_000, b"", b"ok"]
OTHERS = [1 << 64, -(1 << 63) - 1, "\ud800", 1j, b"x" * 5000, (1, "a"), [1, [2]], {"a": b"b"}]


@pytest.mark.parametrize("value", [*PLAIN, *OTHERS], ids=lambda value: repr(value)[:20])
def test_values_come_back_as_they_were(value):
    data = serialize.serialize(value).to_bytes()
    for given in (data, memoryview(bytearray(data))):  # from a message, and from the arena
        found = serialize.deserialize(given)
        assert found == value
        assert type(found) is type(value)
        assert repr(found) == repr(value)


@pytest.mark.parametrize("args", [(), tuple(PLAIN), ("x" * 10_000, 1), (math.nan,)], ids=["none", "plain", "long", "nan"])
def test_plain_arguments_come_back_as_they_were(args):
    data = serialize.plain_arguments(args, {})
    assert data is not None
    found, kwargs = serialize.deserialize(data)
    assert kwargs == {}
    assert type(found) is tuple
    assert repr(found) == repr(args)


@pytest.mark.parametrize("value", [1 << 64, "\ud800", 1j, b"x" * 5000, (1,), np.float64(1)], ids=lambda value: repr(value)[:20])
def test_what_is_not_plain_goes_the_long_way(value):
    assert serialize.plain_value(value) is None
    assert serialize.plain_arguments((1, value), {}) is None


def test_a_serializer_for_a_plain_class_is_heeded():
    serialize.register_serializer(str, serializer=str.upper, deserializer=lambda text: text + "!")
    try:
        assert serialize.plain_value("a") is None
        assert serialize.plain_arguments((1,), {}) is None
        assert serialize.plain_value(1) is not None
    finally:
        serialize.deregister_serializer(str)


def test_code_knows_its_file():
    """Whoever reads a traceback of a function that travelled by value sees its lines."""
    function = serialize.loads(serialize.dumps(lambda: serialize))
    assert function.__code__.co_filename == __file__
    assert function.__code__.co_firstlineno == test_code_knows_its_file.__code__.co_firstlineno + 2


class Own(np.ndarray):
    """Not an array of numbers and no more: it may have anything in it."""


def unpicklable_by_name():
    return lambda: 7


@pytest.mark.parametrize(
    "value",
    [
        np.arange(1000.0).reshape(10, 100),
        np.arange(1000.0).reshape(10, 100).T[::2],
        np.array(3, dtype=np.int16),
        np.array(["a", "bc"]),
        np.zeros(0),
        np.zeros(3, dtype=[("x", "f4"), ("y", "i8")]),
        np.array(["2026-11-28"], dtype="M8[D]"),
        ((np.ones(5), 1, "text", b"bytes" * 2000), {"weights": np.ones(3), "none": None}),
    ],
    ids=lambda value: str(getattr(value, "dtype", "arguments")),
)
def test_arrays_and_arguments(value):
    """By the short way or not, they come back as they were, with large buffers out of band."""
    back = serialize.deserialize(serialize.serialize(value).to_bytes())
    if isinstance(value, tuple):
        (array, *rest), names = back
        (expected, *others), _ = value
        assert rest == others and list(names) == ["weights", "none"]
        assert np.array_equal(array, expected) and np.array_equal(names["weights"], np.ones(3))
    else:
        assert type(back) is np.ndarray and back.dtype == value.dtype
        assert np.array_equal(back, value)


KINDS = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D"]


@pytest.mark.parametrize("char", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5)], ids=str)
def test_arrays_of_numbers(char, shape):
    """By themselves, in a tuple and as arguments: the same numbers, read only, at aligned places."""
    array = np.zeros(shape, char)
    array[...] = np.arange(math.prod(shape)).reshape(shape) % 2
    for value in (array, (array, 1, "text", array.copy()), ((None, array), {}), ((array, array.copy()), {}), ((), {}, array)):
        data = serialize.serialize(value).to_bytes()
        for given in (data, memoryview(bytearray(data))):
            assert_same(serialize.deserialize(given), value)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for part, of in zip(found, expected, strict=True):
            assert_same(part, of)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape and np.array_equal(found, expected)
        assert found.flags.aligned and not found.flags.writeable
    else:
        assert found == expected


@pytest.mark.parametrize("order", ["F", ">", "twice", "long"])
def test_arrays_for_pickle(order):
    """Those that the short way leaves to pickle: columns first, the other byte order, one that is there twice, beside a large integer."""
    array = np.arange(12.0).reshape(3, 4)
    if order == "F":
        back = serialize.deserialize(serialize.serialize(np.asfortranarray(array)).to_bytes())
        assert back.flags.f_contiguous and np.array_equal(back, array)
    elif order == ">":
        back = serialize.deserialize(serialize.serialize(array.astype(">f8")).to_bytes())
        assert back.dtype == np.dtype(">f8") and np.array_equal(back, array)
    elif order == "twice":
        serialized = serialize.serialize(((array, array), {}))
        (first, second), _ = serialize.deserialize(serialized.to_bytes())
        assert first is second and len(serialized.buffers) == 1
    else:
        back = serialize.deserialize(serialize.serialize((array, 1 << 70)).to_bytes())
        assert np.array_equal(back[0], array) and back[1] == 1 << 70


def test_a_tuple_of_many_arrays_takes_as_long_as_they_are_many():
    arrays = tuple(np.full(1, number) for number in range(20_000))
    begun = time.monotonic()
    back = serialize.deserialize(serialize.serialize(arrays).to_bytes())
    assert time.monotonic() - begun < 2  # compared each with each they took 6 s
    assert len(back) == len(arrays) and back[-1][0] == len(arrays) - 1


def test_while_another_thread_imports_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", types.ModuleType("numpy"))
    for value in ([1, 2], (1, [2]), {"a": {3}}):
        assert serialize.loads(serialize.dumps(value)) == value


def test_what_looks_like_an_array_of_numbers():
    """Objects in arrays, subclasses and what is registered go the long way, which knows cloudpickle and registered serializers."""
    objects = np.array([unpicklable_by_name(), 1], dtype=object)
    assert serialize.deserialize(serialize.serialize(objects).to_bytes())[0]() == 7
    assert serialize.deserialize(serialize.serialize(((objects,), {})).to_bytes())[0][0][0]() == 7
    own = np.ones(3).view(Own)
    own.extra = 1
    assert type(serialize.deserialize(serialize.serialize(own).to_bytes())) is Own
    described = np.zeros(2, dtype=np.dtype("i4", metadata={"how": unpicklable_by_name()}))
    assert np.array_equal(serialize.deserialize(serialize.serialize(described).to_bytes()), np.zeros(2))
    serialize.register_serializer(np.ndarray, serializer=lambda array: array.tolist(), deserializer=tuple)
    try:
        assert serialize.deserialize(serialize.serialize(np.arange(3)).to_bytes()) == (0, 1, 2)
    finally:
        serialize.deregister_serializer(np.ndarray)
    cycle = {}
    cycle["self"] = (cycle,)
    back = serialize.deserialize(serialize.serialize(cycle).to_bytes())
    assert back["self"][0] is back

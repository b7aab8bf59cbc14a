"""Values to bytes and back, without a session."""

import math

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

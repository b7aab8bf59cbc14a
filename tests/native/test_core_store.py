"""The binding of the store: zero-copy views, how long they keep memory, and errors."""

import gc
import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpc_ray import _core

ID = bytes(range(28))


@pytest.fixture
def segment() -> Iterator[_core.Segment]:
    made = _core.Segment(node=1, arena_bytes=64 << 20)
    yield made
    assert made.validate() == []


@pytest.fixture
def lane(segment: _core.Segment) -> Iterator[_core.Lane]:
    opened = segment.open_lane()
    yield opened
    gc.collect()
    opened.close()
    assert segment.statistics()["slots_used"] == 0
    assert segment.statistics()["arena_used_bytes"] == 0


@pytest.fixture
def store(segment: _core.Segment, lane: _core.Lane) -> _core.Store:
    return _core.Store(segment, lane)


def array_of(pin: Any, dtype: Any) -> Any:
    return np.frombuffer(pin, dtype=dtype)


def put(store: _core.Store, content: bytes, owner: int = 0) -> int:
    handle = store.create(ID, len(content), owner)
    store.write(handle, 0, content)
    store.seal(handle)
    return handle


def test_zero_copy_read_only_arrays(store: _core.Store) -> None:
    handle = put(store, np.arange(1000.0).tobytes())
    pin = store.get(handle)
    assert pin is not None and len(pin) == 8000 and pin.handle == handle
    array = array_of(pin, float)
    assert array[999] == 999 and not array.flags.writeable and array.ctypes.data % 64 == 0
    with pytest.raises(ValueError):
        array.flags.writeable = True
    assert memoryview(pin).readonly
    other = array_of(store.get(handle), float)
    assert other.ctypes.data == array.ctypes.data
    assert store.delete(handle)


def test_views_keep_memory(store: _core.Store) -> None:
    handle = put(store, b"z" * 100_000)
    array = array_of(store.get(handle), np.uint8)[50_000:]
    view = memoryview(store.get(handle))  # type: ignore[arg-type]
    assert store.delete(handle) and not store.delete(handle)
    assert store.get(handle) is None and store.info(handle) is None
    assert store.statistics()["doomed"] == 1
    again = [put(store, b"a" * 100_000) for _ in range(5)]  # would overwrite it
    assert (array == ord("z")).all()
    del array
    assert view[0] == ord("z") and store.statistics()["doomed"] == 1
    view.release()
    del view
    assert store.statistics()["doomed"] == 0
    for other in again:
        store.delete(other)


def test_life_and_info(store: _core.Store, lane: _core.Lane) -> None:
    handle = store.create(ID, 10, lane.address)
    assert store.info(handle) == (ID, 10, lane.address, False, False)
    assert store.get(handle) is None
    view = store.write_buffer(handle)
    assert not view.readonly and len(view) == 10
    view[:] = b"0123456789"
    store.seal(handle)
    with pytest.raises(ValueError):
        store.write_buffer(handle)
    with pytest.raises(ValueError):
        store.write(handle, 0, b"x")
    with pytest.raises(ValueError):
        store.seal(handle)
    assert store.info(handle) == (ID, 10, lane.address, True, False)
    assert store.list_objects() == [(ID, handle, 10, lane.address, lane.address, True, False)]
    assert store.claim(handle)
    assert store.list_objects()[0][6] is True
    assert bytes(store.get(handle)) == b"0123456789"  # type: ignore[arg-type]
    store.delete(handle)
    assert not store.claim(handle)
    aborted = store.create(ID, 10, 0)
    store.abort(aborted)
    assert store.info(aborted) is None


def test_bad_arguments(store: _core.Store, segment: _core.Segment) -> None:
    with pytest.raises(ValueError, match="28 bytes"):
        store.create(b"short", 1, 0)
    handle = store.create(ID, 10, 0)
    with pytest.raises(ValueError, match="past the object's end"):
        store.write(handle, 5, b"123456")
    store.abort(handle)
    other = _core.Segment(node=1, arena_bytes=1 << 20)
    with pytest.raises(ValueError, match="another segment"):
        _core.Store(segment, other.open_lane())


def test_arena_full(store: _core.Store) -> None:
    kept = put(store, bytes(1 << 20))
    with pytest.raises(_core.ArenaFull, match="arena is full") as caught:
        store.create(ID, 1 << 30, 0)
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.asked_bytes == 1 << 30 and error.capacity_bytes == 64 << 20
    assert error.largest_free_bytes <= error.free_bytes < 63 << 20
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is _core.ArenaFull and copy.free_bytes == error.free_bytes
    store.delete(kept)


def test_large_writes(store: _core.Store) -> None:
    content = np.random.default_rng(0).integers(0, 256, 20 << 20, dtype=np.uint8)
    handle = store.create(ID, content.nbytes, 0)
    store.write(handle, 0, content.data)
    store.seal(handle)
    assert (array_of(store.get(handle), np.uint8) == content).all()
    store.delete(handle)
    assert store.trim() >= content.nbytes - 8192


def test_a_pin_survives_a_fork_and_the_childs_end(store: _core.Store) -> None:
    handle = put(store, b"y" * 1000)
    pin = store.get(handle)
    pid = os.fork()
    if pid == 0:
        del pin  # must not touch the parent's pin
        os._exit(0)
    os.waitpid(pid, 0)
    store.delete(handle)
    assert store.statistics()["doomed"] == 1
    assert bytes(pin) == b"y" * 1000  # type: ignore[arg-type]


def test_a_killed_process_leaves_nothing(segment: _core.Segment, store: _core.Store, lane: _core.Lane) -> None:
    mine = put(store, b"m" * 1000)
    pid = os.fork()
    if pid == 0:
        own = segment.open_lane()
        theirs = _core.Store(segment, own)
        pins = [theirs.get(mine) for _ in range(3)]
        theirs.create(ID, 5000, 0)
        put(theirs, b"owned by the dead", own.address)
        result = put(theirs, b"a result", lane.address)
        own.send(lane.address, result.to_bytes(8, "little"))
        signal.pause()
        del pins
    ((address, payload),) = lane.receive(20)
    result = int.from_bytes(payload, "little")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert segment.mark_dead(address)
    assert segment.reclaim(address) == [(ID, result, lane.address)]
    assert segment.reclaim(address) == []
    assert bytes(store.get(result)) == b"a result"  # type: ignore[arg-type]
    assert store.statistics()["pinned"] == 0
    store.delete(mine)
    store.delete(result)


def test_views_after_close_are_harmless(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    store = _core.Store(segment, lane)
    handle = put(store, b"q" * 100)
    array = array_of(store.get(handle), np.uint8)
    lane.close()
    successor = segment.open_lane()
    assert successor.address != lane.address
    theirs = _core.Store(segment, successor)
    pin = theirs.get(handle)
    del array  # must not take the successor's pin away
    assert theirs.statistics()["pinned"] == 1
    with pytest.raises(RuntimeError, match="closed"):
        store.get(handle)
    theirs.delete(handle)
    del pin
    assert segment.statistics()["slots_used"] == 0

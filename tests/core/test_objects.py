"""Objects: put, get, wait, what is freed when, arrays without copies."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading

import numpy as np
import pytest

from hpc_ray import exceptions

LARGE = 1_000_000  # bytes; well above what travels in messages


@pytest.fixture
def is_empty(store, eventually):
    """Call it: everything in the object store has been freed, now or soon."""

    def check():
        gc.collect()
        eventually(lambda: store()["used_bytes"] == 0 and store()["objects"] == 0, "the object store is empty")

    check()
    return check


VALUES = {
    "None": None,
    "numbers": [1, 2.5, 3j, True, 2**100],
    "text": ["", "ascii", "grüße 🎓"],
    "bytes": [b"", b"\0\x1e\n", bytearray(b"abc")],
    "containers": {"a": [1, (2, {3})], 4: None, ("x",): frozenset({1})},
    "range": range(10),
    "exception": repr(ValueError("v")),
}


@pytest.mark.parametrize("name", VALUES)
def test_put_get(ray, name):
    assert ray.get(ray.put(VALUES[name])) == VALUES[name]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4),
        np.zeros(0),
        np.array(5.0),
        np.arange(200_000, dtype=np.float32).reshape(400, 500),
        np.asfortranarray(np.arange(200_000).reshape(400, 500)),
        np.arange(200_000)[::2],
        np.array(["a", "bc"]),
        np.array([{"an": "object"}, None], dtype=object),
        np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2026-01-01"], dtype="datetime64[D]"),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays(ray, array):
    found = ray.get(ray.put(array))
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


def test_user_classes_closures_and_modules(ray):
    class Point:
        def __init__(self, x):
            self.x = x

    offset = 10
    found, function, module = ray.get(ray.put((Point(3), lambda x: x + offset, os.path)))
    assert found.x == 3 and function(1) == 11 and module is os.path


def test_put_is_a_copy(ray):
    values = np.zeros(LARGE)
    small = [1]
    references = ray.put(values), ray.put(small)
    values[:] = 1
    small[0] = 2
    array, number = ray.get(list(references))
    assert array.sum() == 0 and number == [1]


def test_arrays_are_views_and_read_only(ray):
    reference = ray.put(np.zeros(LARGE))
    one, other = ray.get(reference), ray.get(reference)
    assert not one.flags.writeable and not one.flags.owndata
    assert np.shares_memory(one, other), "no copy is made"
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1

    @ray.remote
    def write(array):
        array[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        ray.get(write.remote(reference))


def test_an_array_outlives_its_reference(ray, is_empty):
    array = ray.get(ray.put(np.full(LARGE, 7.0)))
    gc.collect()
    others = [ray.put(np.full(LARGE, 8.0)) for _ in range(5)]
    assert (array == 7).all()
    del others, array
    is_empty()


def test_many_references_to_one_object(ray):
    reference = ray.put("value")
    assert ray.get([reference] * 100) == ["value"] * 100


def test_references(ray):
    one, other = ray.put(1), ray.put(1)
    assert one == one and one != other and len({one, other, one}) == 2
    assert one.hex() in repr(one) and bytes.fromhex(one.hex()) == one.binary()


def test_references_inside_of_objects(ray, is_empty):
    inner = ray.put(np.ones(LARGE))
    outer = ray.put({"key": [inner]})
    box = ray.put(outer_in_list := [outer])
    del inner, outer, outer_in_list
    found = ray.get(ray.get(ray.get(box)[0])["key"][0])
    assert found.sum() == LARGE
    del found, box
    is_empty()


# ------------------------------------------------------------------ get


class PickledByHand:
    """Has a pickle in its pickle, which is read when it likes."""

    def __init__(self, references):
        self.references = references

    def __getstate__(self):
        return pickle.dumps(self.references)

    def __setstate__(self, data):
        self.data = data

    def read(self):
        return pickle.loads(self.data)


class PutOnTheWay:
    """Another value with references is made, and read, while this one is pickled, and read."""

    def __init__(self, references, ray):
        self.references, self.ray = references, ray

    def __reduce__(self):
        return self.ray.get, (self.ray.put(self.references),)


def test_many_references_inside(ray, is_empty):
    """SER-2: each is the right one, here and in another process, whatever else is pickled between them."""
    ones = [ray.put(number) for number in range(6)]
    value = {
        "list": ones[:3],
        "array": np.arange(LARGE),
        "again": (ones[1], ones[1]),
        "by hand": PickledByHand(ones[2:4]),
        "on the way": PutOnTheWay(ones[3:], ray),
        "last": [ones[5], ray.ObjectRef.nil(), ones[0]],
    }

    def look(value):
        assert value["again"][0] is value["again"][1] and value["array"][-1] == LARGE - 1 and value["last"].pop(1).is_nil()
        found = [*value["list"], *value["again"], *value["by hand"].read(), *value["on the way"], *value["last"]]
        return ray.get(found)

    expected = [0, 1, 2, 1, 1, 2, 3, 3, 4, 5, 5, 0]
    assert look(ray.get(ray.put(value))) == expected
    assert ray.get(ray.remote(look).remote(value)) == expected
    assert ray.get(ray.remote(lambda values: look(values[0])).remote([value])) == expected
    del value, ones
    is_empty()


def test_get_timeout(ray, gate):
    @ray.remote
    def wait(gate):
        return gate.wait()

    reference = wait.remote(gate)
    for timeout in (0, 0.05):
        with pytest.raises(exceptions.GetTimeoutError):
            ray.get(reference, timeout=timeout)
        with pytest.raises(TimeoutError):
            ray.get([ray.put(1), reference], timeout=timeout)
    gate.open()
    assert ray.get(reference, timeout=30) == "passed"


def test_get_with_a_timeout_that_is_long_enough(ray):
    assert ray.get(ray.put(1), timeout=0) == 1
    assert ray.get([ray.put(np.ones(LARGE))], timeout=0)[0].sum() == LARGE


def test_get_empty_list(ray):
    assert ray.get([]) == []


def test_get_from_threads(ray):
    @ray.remote
    def double(x):
        return 2 * x

    results = {}

    def work(k):
        results[k] = ray.get([double.remote(k * 100 + i) for i in range(100)])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [2 * (k * 100 + i) for i in range(100)] for k in range(6)}


def test_futures(ray):
    @ray.remote
    def double(x):
        return 2 * x

    @ray.remote
    def fail():
        raise LookupError("in a future")

    assert double.remote(4).future().result(timeout=30) == 8
    with pytest.raises(LookupError):
        fail.remote().future().result(timeout=30)

    async def use():
        found = await asyncio.gather(*[double.remote(i) for i in range(10)], ray.put("put"))
        with pytest.raises(LookupError):
            await fail.remote()
        return found

    assert asyncio.run(use()) == [*range(0, 20, 2), "put"]


# ------------------------------------------------------------------ wait


def test_wait(ray, gate):
    @ray.remote
    def pass_gate(gate, name):
        return gate.wait(name)

    a, b, c = (pass_gate.remote(gate, name) for name in "abc")
    assert ray.wait([a, b, c], num_returns=3, timeout=0) == ([], [a, b, c])
    assert ray.wait([a, b, c], timeout=0.05) == ([], [a, b, c])
    gate.open("b")
    assert ray.wait([a, b, c], timeout=30) == ([b], [a, c])
    gate.open("c")
    assert ray.wait([a, b, c], num_returns=2, timeout=30) == ([b, c], [a])
    assert ray.wait([c, b], num_returns=1, timeout=30) == ([c], [b]), "no more than asked for, in the order given"
    gate.open("a")
    assert ray.wait([c, a, b], num_returns=3) == ([c, a, b], [])


def test_wait_counts_errors_as_ready(ray):
    @ray.remote
    def fail():
        raise ValueError

    reference = fail.remote()
    assert ray.wait([reference], timeout=30) == ([reference], [])


def test_wait_for_nothing(ray):
    assert ray.wait([], timeout=0) == ([], [])


def test_wait_loop(ray):
    @ray.remote
    def identity(x):
        return x

    waiting, found = [identity.remote(i) for i in range(100)], []
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=30)
        found += ray.get(ready)
    assert sorted(found) == list(range(100))


# ------------------------------------------------------------------ what is freed


def test_put_objects_are_freed(ray, store, is_empty):
    references = [ray.put(np.zeros(LARGE, dtype=np.uint8)) for _ in range(10)]
    assert store()["objects"] == 10 and store()["used_bytes"] >= 10 * LARGE
    del references[:5]
    gc.collect()
    ray.put(b"")
    assert store()["objects"] <= 6
    del references
    is_empty()


def test_results_are_freed(ray, is_empty):
    @ray.remote(num_returns=2)
    def make():
        return np.zeros(LARGE), np.zeros(LARGE)

    references = [make.remote() for _ in range(10)]
    ray.get([one for pair in references for one in pair])
    del references
    is_empty()


def test_results_that_nobody_wants_are_freed(ray, gate, is_empty):
    @ray.remote
    def make(gate):
        gate.wait()
        return np.zeros(LARGE)

    make.remote(gate)
    gate.await_arrivals(1)
    gate.open()
    is_empty()


def test_large_arguments_are_freed(ray, is_empty):
    @ray.remote
    def size(array):
        return array.nbytes

    assert ray.get([size.remote(np.zeros(LARGE)) for _ in range(10)]) == [8 * LARGE] * 10
    is_empty()


def test_arguments_live_as_long_as_the_task(ray, gate, is_empty):
    @ray.remote
    def use(gate, array):
        gate.wait()
        return float(array.sum())

    reference = ray.put(np.ones(LARGE))
    used = use.remote(gate, reference)
    del reference
    gate.await_arrivals(1)
    gate.open()
    assert ray.get(used) == LARGE
    is_empty()


def test_borrowed_references_keep_objects(ray, store, is_empty):
    @ray.remote
    class Keeper:
        def keep(self, box):
            self.box = box

        def look(self):
            return float(ray.get(self.box[0]).sum())

        def drop(self):
            del self.box

    keeper = Keeper.remote()
    reference = ray.put(np.ones(LARGE))
    ray.get(keeper.keep.remote([reference]))
    del reference
    gc.collect()
    assert ray.get(keeper.look.remote()) == LARGE
    assert store()["objects"] == 1
    ray.get(keeper.drop.remote())
    is_empty()


def test_objects_of_a_dead_borrower_are_freed(ray, is_empty):
    @ray.remote
    class Keeper:
        def keep(self, box):
            self.box = box

    keeper = Keeper.remote()
    reference = ray.put(np.ones(LARGE))
    ray.get(keeper.keep.remote([reference]))
    del reference
    ray.kill(keeper)
    is_empty()


def test_objects_of_a_dead_owner_are_lost(ray, is_empty, eventually):
    @ray.remote
    class Owner:
        def make(self):
            return [ray.put(np.ones(LARGE))]

    owner = Owner.remote()
    (reference,) = ray.get(owner.make.remote())
    assert ray.get(reference).sum() == LARGE
    ray.kill(owner)

    def is_lost(reference):
        try:
            ray.get(reference, timeout=30)
        except exceptions.ObjectLostError:
            return True
        return False

    eventually(lambda reference=reference: is_lost(reference), "the object went with its owner")
    del reference
    is_empty()


def test_pinned_by_a_dead_process(ray, gate, is_empty):
    """Views that a killed worker had do not keep the memory."""

    @ray.remote(max_retries=0)
    def hold(gate, array):
        gate.arrive(str(float(array.sum())))
        gate.wait()

    reference = ray.put(np.ones(LARGE))
    running = hold.remote(gate, reference)
    gate.await_arrivals(1, str(float(LARGE)))
    ray.cancel(running, force=True)
    with pytest.raises(exceptions.RayError):
        ray.get(running, timeout=30)
    del reference, running
    is_empty()


def test_errors_hold_nothing(ray, is_empty):
    @ray.remote
    def fail(array):
        raise ValueError(array.sum())

    with pytest.raises(ValueError):
        ray.get(fail.remote(np.ones(LARGE)))
    is_empty()


def test_passing_on_many_large_objects(ray, is_empty):
    @ray.remote
    def make(i):
        return np.full(LARGE // 8, i, dtype=np.float64)

    @ray.remote
    def add(a, b):
        return a + b

    total = make.remote(0)
    for i in range(1, 60):
        total = add.remote(total, make.remote(i))
    assert ray.get(total)[0] == sum(range(60))
    del total
    is_empty()


# ------------------------------------------------------------------ beyond


def test_a_pickled_reference_works_in_its_session(ray):
    """Whoever pickles a reference by hand keeps the object; it can be unpickled in the same session."""
    reference = ray.put("kept")
    data = pickle.dumps(reference)
    del reference
    assert ray.get(pickle.loads(data)) == "kept"



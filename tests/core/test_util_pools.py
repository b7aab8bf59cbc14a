"""Pools: of actors, in place of processes, for joblib and as an executor."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import operator
import os
import time

import pytest

from hpc_ray import exceptions
from hpc_ray.util import ActorPool, as_completed, map_unordered
from hpc_ray.util.concurrent import TaskExecutor
from hpc_ray.util.multiprocessing import Pool


class Worker:
    def double(self, x):
        return 2 * x

    def late(self, x, seconds):
        time.sleep(seconds)
        return x

    def fail(self, x):
        raise ValueError(x)

    def wait(self, gate, name):
        return gate.wait(name)


@pytest.fixture
def actors(ray):
    return [ray.remote(num_cpus=0)(Worker).remote() for _ in range(2)]


def double(actor, x):
    return actor.double.remote(x)


def fail_at_two(x):
    if x == 2:
        raise KeyError(x)
    return x


# ------------------------------------------------------------------ ActorPool


def test_actor_pool_maps_in_order_and_not(actors):
    pool = ActorPool(actors)
    assert list(pool.map(double, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert sorted(pool.map_unordered(double, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert not pool.has_next() and pool.has_free()


def test_actor_pool_takes_what_is_done(actors, gate):
    pool = ActorPool(actors)
    pool.submit(lambda actor, name: actor.wait.remote(gate, name), "held")
    pool.submit(double, 1)
    pool.submit(double, 2)
    assert [pool.get_next_unordered(), pool.get_next_unordered()] == [2, 4]
    with pytest.raises(TimeoutError):
        pool.get_next_unordered(timeout=0.01)
    with pytest.raises(ValueError, match="nothing left in order"):
        pool.get_next()
    gate.open("held")
    assert pool.get_next_unordered() == "passed"
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_actor_pool_gives_up_a_late_result(actors, gate):
    pool = ActorPool(actors)
    pool.submit(lambda actor, name: actor.wait.remote(gate, name), "held")
    pool.submit(double, 4)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.01)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.01, ignore_if_timedout=True)
    assert pool.get_next() == 8
    assert not pool.has_next()
    gate.open("held")


def test_actor_pool_goes_on_after_an_error(actors):
    pool = ActorPool(actors[:1])
    pool.submit(lambda actor, x: actor.fail.remote(x), "no")
    pool.submit(double, 1)
    with pytest.raises(ValueError, match="no"):
        pool.get_next()
    assert pool.get_next() == 2


def test_actor_pool_grows_and_shrinks(actors):
    pool = ActorPool(actors[:1])
    with pytest.raises(ValueError, match="already"):
        pool.push(actors[0])
    assert pool.pop_idle() == actors[0]
    assert pool.pop_idle() is None
    pool.submit(double, 3)
    assert not pool.has_next()  # nobody can do it
    pool.push(actors[1])
    assert pool.get_next() == 6


# ------------------------------------------------------------------ as_completed, map_unordered


def test_results_as_they_come(ray):
    square = ray.remote(lambda x: x * x)
    assert sorted(as_completed([square.remote(i) for i in range(5)], chunk_size=2)) == [0, 1, 4, 9, 16]
    assert sorted(map_unordered(square, iter(range(25)), backpressure_size=4, chunk_size=3)) == [i * i for i in range(25)]
    assert all(isinstance(item, ray.ObjectRef) for item in map_unordered(square, range(3), yield_obj_refs=True))
    for wrong in ({"chunk_size": 0}, {"backpressure_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            list(map_unordered(square, [1], **wrong))


# ------------------------------------------------------------------ multiprocessing.Pool


def test_pool_has_the_interface_of_multiprocessing(ray):
    with Pool(2) as pool:
        assert pool.apply(pow, (2, 3)) == 8
        assert pool.apply(functools.partial(int, base=2), ("11",)) == 3
        assert pool.map(abs, [-1, 2, -3], chunksize=2) == [1, 2, 3]
        assert pool.map(abs, iter([])) == []
        assert pool.starmap(operator.add, [(1, 2), (3, 4)]) == [3, 7]
        assert list(pool.imap(abs, range(-3, 0))) == [3, 2, 1]
        assert sorted(pool.imap_unordered(abs, range(-3, 0), chunksize=2)) == [1, 2, 3]
    with pytest.raises(ValueError, match="not running"):
        pool.apply(abs, (1,))
    pool.join()


def test_pool_raises_what_the_function_raised(ray):
    seen = []
    with Pool(2) as pool:
        result = pool.map_async(fail_at_two, range(4), callback=seen.append, error_callback=seen.append)
        with pytest.raises(KeyError):
            result.get(30)
        assert not result.successful()
        assert [type(error) for error in seen] == [KeyError]
        results = pool.imap(fail_at_two, range(4))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(KeyError):
            next(results)
        assert next(results) == 3
        with pytest.raises(StopIteration):
            next(results)


def test_pool_of_endless_items(ray):
    def count():
        number = 0
        while True:
            yield number
            number += 1

    with Pool(1) as pool:
        results = pool.imap(abs, count())
        assert [next(results) for _ in range(30)] == list(range(30))


def test_pool_gives_work_to_whoever_is_free(ray, gate):
    """MPOOL-1: a chunk does not wait behind a long one while another actor has nothing to do."""
    with Pool(2) as pool:
        held = pool.apply_async(gate.wait, ("held",))
        assert pool.map(abs, range(8), chunksize=1) == list(range(8))
        assert not held.ready()
        with pytest.raises(multiprocessing.TimeoutError):
            held.get(timeout=0.01)
        with pytest.raises(ValueError, match="not ready"):
            held.successful()
        gate.open("held")
        assert held.get(30) == "passed"


def test_pool_replaces_actors(ray):
    """MPOOL-2, MPOOL-3."""
    with Pool(1, maxtasksperchild=2) as pool:
        assert len({pool.apply(os.getpid) for _ in range(6)}) == 3
        with pytest.raises(exceptions.ActorDiedError):
            pool.apply(os._exit, (1,))
        assert pool.apply(abs, (-1,)) == 1


def test_terminated_pool_answers(ray, gate):
    """MPOOL-2."""
    pool = Pool(1)
    running, waiting = pool.apply_async(gate.wait, ("never",)), pool.apply_async(abs, (1,))
    gate.await_arrivals(1, "never")
    pool.terminate()
    for result in (running, waiting):
        with pytest.raises(RuntimeError, match="terminated"):
            result.get(30)
    pool.join()


def test_closed_pool_does_its_work(ray):
    pool = Pool(2)
    results, lazily = pool.map_async(abs, range(10)), pool.imap(abs, range(10))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    pool.join()
    assert results.get(0) == list(lazily) == list(range(10))


def test_pool_in_a_task(ray):
    pool = Pool(2)
    assert ray.get(ray.remote(lambda pool: pool.map(abs, [-1, -2])).remote(pool)) == [1, 2]
    assert pool.apply(abs, (-3,)) == 3
    pool.terminate()


def test_bad_pools(ray):
    for size in (0, -1, 100):
        with pytest.raises(ValueError, match=r"[Pp]rocess"):
            Pool(size)
    with pytest.raises(exceptions.ActorDiedError):
        Pool(1, initializer=operator.truediv, initargs=(1, 0))
    with Pool(1) as pool:
        lock = importlib.import_module("threading").Lock()
        with pytest.raises(TypeError):
            pool.apply(abs, (lock,))
        assert pool.apply(abs, (-1,)) == 1


# ------------------------------------------------------------------ Executor, joblib


def test_executor(ray, gate):
    with TaskExecutor(num_cpus=1) as executor:
        assert executor.submit(pow, 2, 3).result() == 8
        assert list(executor.map(operator.mul, range(5), range(5), chunksize=2)) == [0, 1, 4, 9, 16]
        assert isinstance(executor.submit(fail_at_two, 2).exception(), KeyError)
        held = executor.submit(gate.wait, "held")
        gate.await_arrivals(1, "held")
        assert held.cancel() and held.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)


def test_joblib(ray):
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    importlib.import_module("hpc_ray.util.joblib").register_ray()
    with joblib.parallel_config("ray"):
        assert joblib.Parallel(n_jobs=2)(joblib.delayed(pow)(i, 2) for i in range(10)) == [i * i for i in range(10)]
        with pytest.raises(KeyError):
            joblib.Parallel(n_jobs=-1)(joblib.delayed(fail_at_two)(i) for i in range(4))

"""Many threads, coroutines, futures, interrupts and deep waits in one session."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import threading
import time

import pytest
import workloads
from workloads import PATIENCE_S, in_threads

import hpc_ray as ray
from hpc_ray.exceptions import GetTimeoutError, TaskCancelledError
from hpc_ray.interpreter import python_command


def _increment():
    @ray.remote
    def increment(x):
        return x + 1

    return increment


def _sleep():
    @ray.remote
    def sleep(seconds, value=None):
        time.sleep(seconds)
        return value

    return sleep


def test_threads_of_a_driver(cluster):
    increment, sleep = _increment(), _sleep()

    def job(seed):
        random_ = random.Random(seed)
        for k in range(150):
            do = random_.randrange(5)
            if do == 0:
                data = os.urandom(random_.randrange(200_000))
                assert ray.get(ray.put(data), timeout=PATIENCE_S) == data
            elif do == 1:
                assert ray.get(increment.remote(k), timeout=PATIENCE_S) == k + 1
            elif do == 2:
                left = [increment.remote(i) for i in range(20)]
                while left:
                    ready, left = ray.wait(left, num_returns=random_.randrange(1, len(left) + 1), timeout=PATIENCE_S)
                    assert ready
            elif do == 3:
                try:
                    ray.get(sleep.remote(0.01), timeout=0.005)
                except GetTimeoutError:
                    pass
            else:
                assert ray.get(increment.remote(increment.remote(ray.put(k))), timeout=PATIENCE_S) == k + 2

    for _ in workloads.rounds(5):
        in_threads([lambda seed=seed: job(seed) for seed in range(12)])


def test_waits_that_end_early_leave_nothing(cluster):
    """A get that timed out, a wait that was cut short: no trace at the object."""
    reference = _sleep().remote(1, 7)
    for _ in range(200):
        with pytest.raises(GetTimeoutError):
            ray.get(reference, timeout=0.0005)
        assert ray.wait([reference], timeout=0.0005) == ([], [reference])
    assert not reference._entry.waiters
    assert ray.get(reference) == 7


def test_a_futures_callback_may_wait(cluster):
    increment, sleep = _increment(), _sleep()
    done = threading.Event()
    found = []

    def callback(future):
        found.append(ray.get(increment.remote(future.result())))
        done.set()

    sleep.remote(0.1, 1).future().add_done_callback(callback)
    assert done.wait(PATIENCE_S)
    assert found == [2]


def test_futures(cluster):
    increment = _increment()
    for _ in workloads.rounds(3):
        futures = [increment.remote(i).future() for i in range(2000)]
        assert [future.result(PATIENCE_S) for future in futures] == list(range(1, 2001))


def test_asyncio(cluster):
    increment, sleep = _increment(), _sleep()

    async def chain(x, length):
        for _ in range(length):
            x = await increment.remote(x)
        return x

    async def main():
        assert await asyncio.gather(*[increment.remote(i) for i in range(3000)]) == list(range(1, 3001))
        assert await asyncio.gather(*[chain(i, 20) for i in range(50)]) == [i + 20 for i in range(50)]
        slow = sleep.remote(0.5, 1)
        for _ in range(20):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(slow.as_future(), 0.001)
        assert await slow == 1

    for _ in workloads.rounds(3):
        asyncio.run(main())


def test_deeper_than_the_cpus(cluster):
    """A task that waits lends its CPU; recursion far deeper than the CPUs goes on."""

    @ray.remote
    def fibonacci(n):
        return n if n < 2 else sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    @ray.remote
    def down(n):
        return 0 if n == 0 else 1 + ray.get(down.remote(n - 1))

    assert ray.get(fibonacci.remote(9), timeout=PATIENCE_S) == 34
    assert ray.get(down.remote(60), timeout=PATIENCE_S) == 60


def test_threaded_and_async_actors(cluster):
    increment = _increment()

    @ray.remote(max_concurrency=8)
    class Threaded:
        def nested(self, x):
            return ray.get(increment.remote(x))

    @ray.remote
    class Async:
        async def nested(self, x):
            return await increment.remote(x)

    for _ in workloads.rounds(3):
        threaded, coroutines = Threaded.remote(), Async.remote()
        references = [actor.nested.remote(i) for i in range(500) for actor in (threaded, coroutines)]
        assert ray.get(references, timeout=PATIENCE_S) == [i + 1 for i in range(500) for _ in range(2)]


def test_chains_of_actors(cluster):
    @ray.remote(num_cpus=0)
    class Link:
        def __init__(self, following):
            self.following = following

        def call(self, x):
            return x if self.following is None else ray.get(self.following.call.remote(x + 1))

    actor = None
    for _ in range(10):
        actor = Link.remote(actor)
    assert ray.get([actor.call.remote(i) for i in range(50)], timeout=PATIENCE_S) == [i + 9 for i in range(50)]


STORM = """
import random, signal, threading, time
import hpc_ray as ray

ray.init(num_cpus=4)
increment = ray.remote(lambda x: x + 1)
over, main, random_ = False, threading.main_thread().ident, random.Random(1)
catching = False  # what is sent now will strike in a "try"; no Event, which KeyboardInterrupt may leave locked

def storm():
    global catching
    while not over:
        time.sleep(random_.random() * 0.003)
        if catching:
            catching = False
            signal.pthread_kill(main, signal.SIGINT)

def one():
    global interrupts, catching
    references = [increment.remote(i) for i in range(200)]
    while True:
        try:
            catching = True
            return ray.get(references, timeout=60)
        except KeyboardInterrupt:
            interrupts += 1

thread = threading.Thread(target=storm)
expected = list(range(1, 201))
interrupts = done = 0
thread.start()
while True:
    try:
        catching = True
        while done < ROUNDS:
            found = one()
            if found != expected:
                print("wrong", found)
            done += 1
        over = True
        thread.join()
        break
    except KeyboardInterrupt:
        interrupts += 1
found = None
import workloads
workloads.assert_all_released()
print("right", interrupts > 0)
"""


def test_interrupts():
    """Ctrl-C at any moment: KeyboardInterrupt, everything goes on afterwards and nothing is left held (INT-1)."""
    script = STORM.replace("ROUNDS", str(200 * len(workloads.rounds(3))))
    found = subprocess.run(
        python_command("-c", script),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.path.dirname(workloads.__file__)},
        check=False,
    )
    assert found.stdout == "right True\n", found.stdout + found.stderr
    assert "hpc_ray" not in found.stderr, found.stderr


def test_cancelling(cluster):
    """Each cancelled task has its value or TaskCancelledError; no other task is hit, and the workers go on."""
    increment = _increment()

    @ray.remote(max_retries=0)
    def spin(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(100))
        return 1

    for seed in workloads.rounds(10):
        random_ = random.Random(seed)
        references = [spin.remote(0.02) for _ in range(40)]
        cancelled = [random_.random() < 0.7 for _ in references]
        for reference, wanted in zip(references, cancelled, strict=True):
            if wanted:
                ray.cancel(reference)
                time.sleep(random_.random() * 0.005)
        for reference, wanted in zip(references, cancelled, strict=True):
            try:
                assert ray.get(reference, timeout=PATIENCE_S) == 1
            except TaskCancelledError:
                assert wanted
        assert ray.get([increment.remote(i) for i in range(100)], timeout=PATIENCE_S) == list(range(1, 101))

"""Tasks: results, arguments, options, errors, retries."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from hpc_ray import exceptions


class Custom(Exception):
    """An error of the user's own, with data."""

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


def test_result(ray):
    @ray.remote
    def add(a, b=1, *rest, c=0, **others):
        return a + b + sum(rest) + c + sum(others.values())

    assert ray.get(add.remote(1)) == 2
    assert ray.get(add.remote(1, 2, 3, c=4, d=5)) == 15
    assert ray.get([add.remote(i, i) for i in range(50)]) == [2 * i for i in range(50)]


def test_in_another_process(ray):
    @ray.remote
    def pid():
        return os.getpid()

    assert ray.get(pid.remote()) != os.getpid()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_num_returns(ray, count):
    @ray.remote(num_returns=count)
    def several():
        return list(range(count)) if count != 1 else "one"

    found = several.remote()
    if count == 0:
        assert found is None
    elif count == 1:
        assert ray.get(found) == "one"
    else:
        assert isinstance(found, list) and ray.get(found) == list(range(count))


def test_num_returns_by_options(ray):
    @ray.remote
    def pair():
        return 1, 2

    assert ray.get(pair.remote()) == (1, 2)
    assert ray.get(pair.options(num_returns=2).remote()) == [1, 2]
    assert ray.get(pair.remote()) == (1, 2), "options make another remote function"


def test_zero_returns_runs(ray, gate):
    @ray.remote(num_returns=0)
    def silent(gate):
        gate.arrive()

    assert silent.remote(gate) is None
    gate.await_arrivals(1)


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), 7], ids=["fewer", "more", "no sequence"])
def test_wrong_number_of_results(ray, value):
    @ray.remote(num_returns=2)
    def pair():
        return value

    for reference in pair.remote():
        with pytest.raises((ValueError, TypeError), match="num_returns"):
            ray.get(reference)


def test_results_of_one_task_by_themselves(ray):
    """One of several results can be used and dropped without the others."""

    @ray.remote(num_returns=3)
    def three():
        return np.zeros(100_000), 2, np.ones(100_000)

    first, second, third = three.remote()
    del first
    assert ray.get(third).sum() == 100_000 and ray.get(second) == 2


def test_references_as_arguments(ray):
    """A reference is replaced by its value where it is an argument itself, and stays one inside of another value."""

    @ray.remote
    def look(a, inside, *, key):
        return a, isinstance(inside[0], ray.ObjectRef), ray.get(inside[0]), key

    one = ray.put(1)
    assert ray.get(look.remote(one, [one], key=one)) == (1, True, 1, 1)


def test_chain_of_tasks(ray):
    @ray.remote
    def increment(x):
        return x + 1

    x = 0
    for _ in range(100):
        x = increment.remote(x)
    assert ray.get(x) == 100


def test_task_graph(ray):
    @ray.remote
    def read(seed):
        return np.random.default_rng(seed).random((64, 64))

    @ray.remote
    def add(a, b):
        return a + b

    parts = [read.remote(seed) for seed in range(8)]
    while len(parts) > 1:
        parts = [add.remote(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    expected = np.sum([np.random.default_rng(seed).random((64, 64)) for seed in range(8)], axis=0)
    assert np.allclose(ray.get(parts[0]), expected)


@pytest.mark.parametrize("size", [0, 1, 60_000, 70_000, 20_000_000])
def test_large_arguments_and_results(ray, size):
    """Below and above what travels in messages."""

    @ray.remote
    def twice(data):
        return data + data

    data = os.urandom(size)
    assert ray.get(twice.remote(data)) == data + data
    array = np.frombuffer(data, dtype=np.uint8)
    assert np.array_equal(ray.get(twice.remote(array)), array + array)


def test_arguments_are_copied(ray):
    """What happens to an argument after the call does not matter."""

    @ray.remote
    def first(values):
        return values[0]

    values = [1]
    reference = first.remote(values)
    values[0] = 2
    assert ray.get(reference) == 1


def test_closures_and_globals(ray):
    factor = 3

    @ray.remote
    def times(x):
        return x * factor

    assert ray.get(times.remote(2)) == 6


@pytest.mark.parametrize("size", [3, 1_000_000])
def test_arrays_that_a_function_refers_to_may_be_changed(ray, size):
    """Unlike arguments: they are the worker's own, and stay as they were left, as in Ray."""
    array = np.zeros(size)

    @ray.remote
    def count():
        array[0] += 1
        return array[0]

    @ray.remote
    class Counter:
        shared = np.zeros(size)

        def count(self):
            self.shared += 1
            return self.shared[0]

    assert ray.get(count.remote()) == 1
    counter = Counter.remote()
    assert ray.get([counter.count.remote(), counter.count.remote()]) == [1, 2]
    assert array[0] == 0


def test_recursion(ray):
    """Tasks submit tasks and wait for them; more of them wait than there are CPUs."""

    @ray.remote
    def fibonacci(n):
        if n < 2:
            return n
        return sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert ray.get(fibonacci.remote(8)) == 21


def test_returning_references(ray):
    @ray.remote
    def inner():
        return "deep"

    @ray.remote
    def outer():
        return inner.remote()

    reference = ray.get(outer.remote())
    assert isinstance(reference, ray.ObjectRef) and ray.get(reference) == "deep"


def test_passing_remote_functions(ray):
    @ray.remote
    def one():
        return 1

    @ray.remote
    def call(function):
        return ray.get(function.remote())

    assert ray.get(call.remote(one)) == 1


def test_decorated_function_keeps_its_face(ray):
    @ray.remote
    def documented(x):
        """What it does."""

    assert documented.__name__ == "documented" and documented.__doc__ == "What it does."


# ------------------------------------------------------------------ errors


def test_error_has_class_cause_and_remote_traceback(ray):
    @ray.remote
    def fail_here():
        raise Custom(7, "it broke")

    with pytest.raises(Custom) as caught:
        ray.get(fail_here.remote())
    error = caught.value
    assert isinstance(error, exceptions.RayTaskError)
    assert isinstance(error.cause, Custom) and error.cause.code == 7 and error.code == 7
    assert error.pid != os.getpid() and "fail_here" in error.function_name
    text = str(error)
    assert "it broke" in text and "fail_here" in text and 'raise Custom(7, "it broke")' in text
    shown = "".join(traceback.format_exception(error))
    assert "fail_here" in shown and "it broke" in shown


def test_chained_error_keeps_its_cause(ray):
    @ray.remote
    def fail():
        try:
            {}["missing"]
        except KeyError as error:
            raise Custom(1, "outer") from error

    with pytest.raises(Custom, match="outer") as caught:
        ray.get(fail.remote())
    assert "KeyError" in str(caught.value) and "missing" in str(caught.value)


def test_error_of_an_argument(ray):
    """The root cause goes through tasks that would have used the value."""

    @ray.remote
    def root():
        raise ZeroDivisionError("at the root")

    @ray.remote
    def use(x):
        return x

    with pytest.raises(ZeroDivisionError, match="at the root"):
        ray.get(use.remote(use.remote(root.remote())))


def test_error_through_nested_tasks(ray):
    @ray.remote
    def root():
        raise ZeroDivisionError("at the root")

    @ray.remote
    def nested():
        return ray.get(root.remote())

    with pytest.raises(ZeroDivisionError, match="at the root") as caught:
        ray.get(nested.remote())
    assert type(caught.value.cause) is ZeroDivisionError


def test_error_for_all_results(ray):
    @ray.remote(num_returns=2)
    def fail():
        raise Custom(1, "none")

    for reference in fail.remote():
        with pytest.raises(Custom):
            ray.get(reference)


def test_error_is_raised_each_time(ray):
    @ray.remote
    def fail():
        raise Custom(1, "again")

    reference = fail.remote()
    for _ in range(3):
        with pytest.raises(Custom):
            ray.get(reference)


def test_error_that_cannot_be_pickled(ray):
    @ray.remote
    def fail():
        import threading

        error = RuntimeError("has a lock")
        error.lock = threading.Lock()
        raise error

    with pytest.raises(exceptions.RayError, match="has a lock"):
        ray.get(fail.remote())


def test_error_whose_class_cannot_be_rebuilt(ray):
    class Picky(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    @ray.remote
    def fail():
        raise Picky(1, 2)

    with pytest.raises(exceptions.RayError, match="1 and 2"):
        ray.get(fail.remote())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit])
def test_special_exceptions_end_in_an_error(ray, error):
    """No exception of user code hangs the caller or is mistaken for something else."""

    @ray.remote(max_retries=0)
    def fail():
        raise error

    with pytest.raises(BaseException) as caught:
        ray.get(fail.remote(), timeout=30)
    assert isinstance(caught.value, exceptions.RayError)
    assert not isinstance(caught.value, exceptions.GetTimeoutError)

    @ray.remote
    def fine():
        return 1

    assert ray.get(fine.remote()) == 1


def test_get_many_raises_the_first_error_without_waiting_for_all(ray, gate):
    @ray.remote
    def slow(gate):
        return gate.wait()

    @ray.remote
    def fail():
        raise Custom(1, "early")

    waiting = slow.remote(gate)
    with pytest.raises(Custom, match="early"):
        ray.get([waiting, fail.remote()], timeout=30)
    gate.open()
    assert ray.get(waiting) == "passed"


# ------------------------------------------------------------------ retries


def test_crashed_worker_is_an_error(ray):
    @ray.remote(max_retries=0)
    def crash():
        os._exit(13)

    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(crash.remote())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_is_an_error(ray, number):
    @ray.remote(max_retries=0)
    def die():
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(60)

    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(die.remote())


class Carries(Exception):
    def __init__(self, reference):
        super().__init__(reference)
        self.reference = reference


@pytest.mark.parametrize("count", [1, 2])
def test_references_in_an_error(ray, count):
    """They live as long as the error."""

    @ray.remote(num_returns=count, max_retries=1, retry_exceptions=True)
    def fails():
        raise Carries(ray.put([1, 2]))

    references = fails.remote()
    for reference in references if count > 1 else [references]:
        with pytest.raises(Carries) as caught:
            ray.get(reference)
        assert ray.get(caught.value.reference, timeout=30) == [1, 2]


@pytest.mark.parametrize("end", ["crash", "cancel", "raise"])
def test_completed_says_what_broke_a_stream_off(ray, gate, eventually, end):
    @ray.remote(max_retries=0)
    def items():
        yield 1
        gate.arrive()
        if end == "crash":
            os._exit(1)
        if end == "raise":
            raise ValueError
        time.sleep(1000)

    stream = items.remote()
    eventually(gate.arrived, "it runs")
    if end == "cancel":
        ray.cancel(stream)
    if end == "raise":
        assert ray.get(stream.completed(), timeout=30) is None
    else:
        error = exceptions.WorkerCrashedError if end == "crash" else exceptions.TaskCancelledError
        with pytest.raises(error):
            ray.get(stream.completed(), timeout=30)


@pytest.mark.parametrize("readers", ["threads", "coroutines"])
def test_several_readers_of_a_stream(ray, readers):
    """Each item goes to one of them, and each of them comes to the end."""

    @ray.remote
    def items():
        for number in range(100):
            time.sleep(0.001)  # they wait for the same item
            yield number

    stream = items.remote()
    found = []

    def read():
        found.extend(ray.get(reference) for reference in stream)

    async def read_all():
        async def read():
            found.extend([await reference async for reference in stream])

        await asyncio.wait_for(asyncio.gather(*[read() for _ in range(4)]), 30)

    if readers == "coroutines":
        asyncio.run(read_all())
    else:
        threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
    assert sorted(found) == list(range(100))


def test_crash_is_retried(ray, gate):
    @ray.remote(max_retries=2)
    def third_time(gate):
        gate.arrive()
        if gate.arrived() < 3:
            os._exit(1)
        return gate.arrived()

    assert ray.get(third_time.remote(gate)) == 3


def test_retries_run_out(ray, gate):
    @ray.remote(max_retries=2)
    def always(gate):
        gate.arrive()
        os._exit(1)

    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(always.remote(gate))
    assert gate.arrived() == 3


def test_a_crash_costs_no_other_task(ray, gate):
    """Those that were sent ahead to the worker that died run elsewhere."""

    @ray.remote
    def quick(i):
        return i

    @ray.remote(max_retries=0)
    def crash():
        os._exit(1)

    ray.get([quick.remote(i) for i in range(20)])
    references = []
    for i in range(200):
        references.append(quick.remote(i))
        if i % 50 == 25:
            crash.remote()
    assert ray.get(references) == list(range(200))


def test_exceptions_are_not_retried_unless_asked(ray, gate):
    @ray.remote(max_retries=5)
    def fail(gate):
        gate.arrive()
        raise Custom(1, "no retry")

    with pytest.raises(Custom):
        ray.get(fail.remote(gate))
    assert gate.arrived() == 1


@pytest.mark.parametrize("chosen", [True, [Custom], [OSError, Custom]], ids=["all", "listed", "among others"])
def test_retry_exceptions(ray, gate, chosen):
    @ray.remote(max_retries=2, retry_exceptions=chosen)
    def third_time(gate):
        gate.arrive()
        if gate.arrived() < 3:
            raise Custom(1, "not yet")
        return "done"

    assert ray.get(third_time.remote(gate)) == "done"
    assert gate.arrived() == 3


def test_retry_exceptions_leaves_others_alone(ray, gate):
    @ray.remote(max_retries=5, retry_exceptions=[OSError])
    def fail(gate):
        gate.arrive()
        raise Custom(1, "another")

    with pytest.raises(Custom):
        ray.get(fail.remote(gate))
    assert gate.arrived() == 1


def test_retried_exceptions_run_out(ray, gate):
    @ray.remote(max_retries=2, retry_exceptions=True)
    def fail(gate):
        gate.arrive()
        raise Custom(gate.arrived(), "each time")

    with pytest.raises(Custom) as caught:
        ray.get(fail.remote(gate))
    assert gate.arrived() == 3 and caught.value.code == 3, "the last error is the one that is raised"


def test_max_calls(ray):
    """A worker leaves after so many runs of the function."""

    @ray.remote(max_calls=1)
    def pid():
        return os.getpid()

    pids = [ray.get(pid.remote()) for _ in range(4)]
    assert len(set(pids)) == 4
    pids = ray.get([pid.remote() for _ in range(8)])
    assert len(set(pids)) == 8


def test_max_calls_process_is_gone(ray, eventually):
    @ray.remote(max_calls=1)
    def pid():
        return os.getpid()

    number = ray.get(pid.remote())
    eventually(lambda: not Path(f"/proc/{number}").exists(), "the retired worker is gone")


def test_max_calls_and_objects_of_the_worker(ray, eventually):
    """What a retired worker owns lives as long as somebody uses it, and so does the worker; its CPU is free at once."""

    @ray.remote
    def late():
        return "late"

    @ray.remote(max_calls=1)
    def owns():
        return os.getpid(), ray.put(list(range(100))), late.remote()

    number, value, result = ray.get(owns.remote())
    eventually(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "all CPUs are free")
    assert ray.get([owns.remote() for _ in range(8)])
    assert ray.get(value) == list(range(100)) and ray.get(result) == "late"
    assert Path(f"/proc/{number}").exists()
    del value, result
    eventually(lambda: not Path(f"/proc/{number}").exists(), "the retired worker is gone")


def test_max_calls_of_tasks_with_a_gpu(ray):
    """One, unless it is said: what a library keeps on a GPU goes with the process."""

    def plain():
        return os.getpid()

    given = ({"num_gpus": 1}, {"num_gpus": 1, "max_calls": 0}, {"num_cpus": 1})
    assert [ray.remote(**one)(plain)._options.get("max_calls") for one in given] == [1, 0, None]


def test_numerical_libraries_have_the_threads_of_the_task(ray):
    """As in Ray: as many as the task has CPUs, unless the user has said how many."""

    @ray.remote
    def threads():
        return os.environ.get("OMP_NUM_THREADS")

    @ray.remote
    class Actor:
        def threads(self):
            return os.environ.get("OMP_NUM_THREADS")

    mine = os.environ.get("OMP_NUM_THREADS")
    for cpus in (1, 2, 0.5, 0, 1):
        assert ray.get(threads.options(num_cpus=cpus).remote()) == (mine or str(max(1, int(cpus))))
    assert ray.get(Actor.remote().threads.remote()) == (mine or "1")
    assert ray.get(Actor.options(num_cpus=2).remote().threads.remote()) == (mine or "2")
    given = threads.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "7"}})
    assert ray.get([given.remote() for _ in range(2)]) == ["7", "7"]


def test_dynamic_results_that_fail(ray):
    """An error of the generator is its last item; what ends the task otherwise is the error of all of it."""

    @ray.remote
    def fail():
        raise KeyError("no argument")

    @ray.remote(max_retries=0)
    def items(then):
        yield 1
        if then == "raise":
            raise LookupError("after one")
        os._exit(1)

    with pytest.warns(DeprecationWarning, match="streaming"):
        dynamic = items.options(num_returns="dynamic")
    raised, died, not_run = [dynamic.remote(then) for then in ("raise", "die", fail.remote())]
    first, last = ray.get(raised, timeout=30)
    assert ray.get(first) == 1
    with pytest.raises(LookupError, match="after one"):
        ray.get(last)
    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(died, timeout=30)
    with pytest.raises(KeyError, match="no argument"):
        ray.get(not_run, timeout=30)


# ------------------------------------------------------------------ cancelling


def test_cancel_running(ray, gate):
    @ray.remote
    def wait(gate):
        return gate.wait()

    reference = wait.remote(gate)
    gate.await_arrivals(1)
    ray.cancel(reference)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(reference, timeout=30)


def test_cancelled_task_says_what_it_was_stopped_at(ray, gate):
    """What it makes of the interruption is its outcome; and it is not tried again."""

    @ray.remote(max_retries=2, retry_exceptions=True)
    def wait(gate):
        try:
            return gate.wait()
        except KeyboardInterrupt:
            raise LookupError("at step 7") from None

    reference = wait.remote(gate)
    gate.await_arrivals(1)
    ray.cancel(reference)
    with pytest.raises(LookupError, match="at step 7") as caught:
        ray.get(reference, timeout=30)
    assert not isinstance(caught.value, exceptions.TaskCancelledError)


def test_cancel_by_force(ray, gate):
    @ray.remote
    def stubborn(gate):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return gate.wait()
        except KeyboardInterrupt:
            return gate.wait()

    reference = stubborn.remote(gate)
    gate.await_arrivals(1)
    ray.cancel(reference, force=True)
    with pytest.raises((exceptions.TaskCancelledError, exceptions.WorkerCrashedError)):
        ray.get(reference, timeout=30)


def test_cancel_waiting(ray, gate):
    @ray.remote
    def wait(gate, name):
        return gate.wait(name)

    running = [wait.remote(gate, "") for _ in range(4)]
    gate.await_arrivals(4)
    queued = wait.remote(gate, "never")
    ray.cancel(queued)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(queued, timeout=30)
    gate.open()
    ray.get(running)
    assert gate.arrived("never") == 0


@pytest.mark.parametrize("force", [False, True])
def test_cancel_what_another_process_has_submitted(ray, gate, force):
    """The process that submitted it hears of it: a task of a task, and the driver's own from within a task."""

    @ray.remote(max_retries=0)
    def slow(gate):
        gate.wait()
        while True:
            time.sleep(0.01)

    @ray.remote
    class Owner:  # an actor: no task of its own can run in it, and its end would be that of the reference
        def start(self, gate):
            return [slow.remote(gate)]

    @ray.remote
    def stop(references):
        ray.cancel(references[0], force=force)

    owner = Owner.remote()
    (borrowed,) = ray.get(owner.start.remote(gate))
    mine = slow.remote(gate)
    gate.await_arrivals(2)
    gate.open()
    ray.cancel(borrowed, force=force)
    ray.get(stop.remote([mine]))
    for reference in borrowed, mine:
        with pytest.raises(exceptions.TaskCancelledError):
            ray.get(reference, timeout=30)


def test_cancel_a_call_that_another_process_has_made(ray):
    @ray.remote
    class Sleeper:
        async def sleep(self):
            await asyncio.sleep(600)

    @ray.remote
    def start(sleeper):
        return [sleeper.sleep.remote()]

    sleeper = Sleeper.remote()
    for force in False, True:  # by force as without: a borrower does not know whether it is an actor's
        (borrowed,) = ray.get(start.remote(sleeper))
        ray.cancel(borrowed, force=force)
        with pytest.raises(exceptions.TaskCancelledError):
            ray.get(borrowed, timeout=30)


def test_cancel_what_waits_for_arguments(ray, gate):
    @ray.remote
    def wait(gate):
        return gate.wait()

    @ray.remote
    def use(x):
        return x

    running = wait.remote(gate)
    dependent = use.remote(running)
    ray.cancel(dependent)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(dependent, timeout=30)
    gate.open()
    assert ray.get(running) == "passed"


def test_cancel_what_is_done(ray):
    @ray.remote
    def one():
        return 1

    reference = one.remote()
    assert ray.get(reference) == 1
    ray.cancel(reference)
    assert ray.get(reference) == 1


# ------------------------------------------------------------------ many


def test_many_tasks(ray):
    @ray.remote
    def identity(x):
        return x

    assert ray.get([identity.remote(i) for i in range(5000)]) == list(range(5000))


def test_nested_submitters(ray):
    @ray.remote
    def identity(x):
        return x

    @ray.remote
    def submit(start):
        return sum(ray.get([identity.remote(start + i) for i in range(500)]))

    assert sum(ray.get([submit.remote(500 * k) for k in range(4)])) == sum(range(2000))


def test_long_tasks_spread_over_workers(ray, gate):
    """Tasks that run at the same time do, though they were sent one by one."""

    @ray.remote
    def wait(gate):
        gate.wait()
        return os.getpid()

    references = [wait.remote(gate) for _ in range(4)]
    gate.await_arrivals(4)
    gate.open()
    assert len(set(ray.get(references))) == 4


def test_short_tasks_then_long_ones(ray, gate):
    """A function that has been quick so far is not stuck behind a slow call (TASK-2)."""

    @ray.remote
    def sometimes(gate, wait):
        return gate.wait() if wait else "quick"

    ray.get([sometimes.remote(gate, False) for _ in range(200)])
    slow = [sometimes.remote(gate, True) for _ in range(3)]
    assert ray.get([sometimes.remote(gate, False) for _ in range(50)], timeout=30) == ["quick"] * 50
    gate.open()
    assert ray.get(slow) == ["passed"] * 3


def test_a_long_chain_behind_a_failure(ray, gate):
    """Longer than Python's stack; its error carries the first one only."""

    @ray.remote
    def fails(gate):
        gate.wait()
        raise ValueError("at the root")

    @ray.remote
    def passes_on(value):
        return value

    reference = fails.remote(gate)
    for _ in range(3000):
        reference = passes_on.remote(reference)
    gate.open()
    with pytest.raises(ValueError, match="at the root") as caught:
        ray.get(reference, timeout=60)
    assert type(caught.value.cause) is ValueError and len(str(caught.value)) < 2000
    assert ray.get(passes_on.remote(1)) == 1

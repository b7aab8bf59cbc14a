"""Actors: state, order, names, death and restart, async and threaded ones, handles and their end."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_ray import exceptions
from hpc_ray.actor import ActorClass, ActorHandle, ActorProxy
from hpc_ray.launcher import session


class Counter:
    def __init__(self, start=0):
        self.value = start

    def add(self, amount=1):
        self.value += amount
        return self.value

    def get(self):
        return self.value

    def pid(self):
        return os.getpid()

    def fail(self):
        raise ValueError("the actor's own")

    def crash(self):
        os._exit(1)

    def wait(self, gate, name=""):
        return gate.wait(name)


def gone(pid):
    """Whether the process has ended, whoever may still have to await it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture
def remote_counter(ray):
    return ray.remote(Counter)


def test_state(ray, remote_counter):
    counter, other = remote_counter.remote(), remote_counter.remote(10)
    assert [ray.get(counter.add.remote()) for _ in range(3)] == [1, 2, 3]
    assert ray.get(other.add.remote(5)) == 15
    assert ray.get(counter.get.remote()) == 3


def test_constructor_arguments(ray):
    @ray.remote
    class Holder:
        def __init__(self, value, *rest, key=None):
            self.all = value, rest, key

        def get(self):
            return self.all

    large = np.arange(200_000)
    value, rest, key = ray.get(Holder.remote(ray.put(1), 2, key=large).get.remote())
    assert (value, rest) == (1, (2,)) and np.array_equal(key, large)


def test_calls_run_in_order(ray, remote_counter):
    counter = remote_counter.remote()
    assert ray.get([counter.add.remote() for _ in range(2000)]) == list(range(1, 2001))


def test_a_call_that_waits_for_its_argument_holds_back_later_ones(ray, gate):
    """ACTOR-1."""

    @ray.remote
    class Log:
        def __init__(self):
            self.seen = []

        def note(self, what):
            self.seen.append(what)
            return list(self.seen)

    @ray.remote
    def late(gate):
        return gate.wait() and "late"

    log = Log.remote()
    first = log.note.remote(late.remote(gate))
    second = log.note.remote("second")
    gate.await_arrivals(1)
    gate.open()
    assert ray.get([first, second]) == [["late"], ["late", "second"]]


def test_order_for_each_caller(ray):
    """Eight callers at once: all calls arrive, those of one in the order in which they were made."""

    @ray.remote
    class Log:
        def __init__(self):
            self.seen = []

        def note(self, who, number):
            self.seen.append((who, number))

        def get(self):
            return self.seen

    @ray.remote
    def call(log, who):
        ray.get([log.note.remote(who, number) for number in range(200)])

    log = Log.remote()
    ray.get([call.remote(log, who) for who in range(8)])
    seen = ray.get(log.get.remote())
    assert len(seen) == 1600
    for who in range(8):
        assert [number for caller, number in seen if caller == who] == list(range(200))


def test_each_actor_has_a_process(ray, remote_counter):
    pids = ray.get([remote_counter.options(num_cpus=0).remote().pid.remote() for _ in range(5)])
    assert len({*pids, os.getpid()}) == 6


def test_num_returns_of_methods(ray):
    @ray.remote
    class Pair:
        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

        def one(self):
            return 3, 4

    pair = Pair.remote()
    assert ray.get(pair.two.remote()) == [1, 2]
    assert ray.get(pair.one.options(num_returns=2).remote()) == [3, 4]
    assert ray.get(pair.one.remote()) == (3, 4)


def test_errors_of_methods(ray, remote_counter):
    counter = remote_counter.remote()
    with pytest.raises(ValueError, match="the actor's own") as caught:
        ray.get(counter.fail.remote())
    assert "Counter.fail" in caught.value.function_name or "fail" in str(caught.value)
    assert ray.get(counter.add.remote()) == 1, "an error does not end the actor"


def test_inheritance_static_and_class_methods(ray):
    class Base:
        def inherited(self):
            return "base"

        @staticmethod
        def static(x):
            return x

        @classmethod
        def of_class(cls):
            return cls.__name__

    @ray.remote
    class Derived(Base):
        def own(self):
            return super().inherited() + "!"

    actor = Derived.remote()
    found = ray.get([actor.inherited.remote(), actor.static.remote(1), actor.own.remote()])
    assert found == ["base", 1, "base!"]
    assert "Derived" in ray.get(actor.of_class.remote())


def test_actors_use_actors_and_tasks(ray, remote_counter):
    @ray.remote
    def double(x):
        return 2 * x

    @ray.remote
    class User:
        def __init__(self, counter):
            self.counter = counter

        def use(self):
            return ray.get(double.remote(self.counter.add.remote()))

    counter = remote_counter.remote()
    users = [User.options(num_cpus=0).remote(counter) for _ in range(3)]
    assert sorted(ray.get([user.use.remote() for user in users])) == [2, 4, 6]


def test_an_actor_makes_an_actor(ray, remote_counter):
    @ray.remote
    class Parent:
        def __init__(self):
            self.children = [ray.remote(Counter).options(num_cpus=0).remote(i) for i in range(3)]

        def values(self):
            return ray.get([child.get.remote() for child in self.children])

        def child(self):
            return self.children[0]

    parent = Parent.remote()
    assert ray.get(parent.values.remote()) == [0, 1, 2]
    child = ray.get(parent.child.remote())
    assert ray.get(child.add.remote(5)) == 5
    assert ray.get(parent.values.remote()) == [5, 1, 2]


def test_handles_compare_and_show_their_class(ray, remote_counter):
    one, other = remote_counter.remote(), remote_counter.remote()
    assert one == one and one != other and len({one, other, one}) == 2
    assert "Counter" in repr(one)
    with pytest.raises(AttributeError, match="no_such"):
        one.no_such  # noqa: B018


def test_decorated_generators_stream(ray):
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    class Yields:
        @decorated
        def count(self, n):
            yield from range(n)

    class YieldsAsynchronously:
        async def makes_it_asynchronous(self):
            pass

        @decorated
        async def count(self, n):
            for i in range(n):
                yield i

    for cls in Yields, YieldsAsynchronously:
        assert ray.get(list(ray.remote(cls).remote().count.remote(2))) == [0, 1]


def test_annotations_name_the_class(ray, remote_counter):
    one: ActorProxy[Counter] = remote_counter.remote()
    assert isinstance(one, ActorHandle)
    assert ActorHandle[Counter].__args__ == ActorClass[Counter].__args__ == (Counter,)
    assert ActorHandle[Counter] | None and dict[str, ActorProxy[Counter]]


# ------------------------------------------------------------------ names


def test_named(ray, remote_counter, eventually):
    counter = remote_counter.options(name="tally").remote()
    found = ray.get_actor("tally")
    assert found == counter
    assert ray.get(found.add.remote()) == 1
    ray.kill(counter)
    del found

    def is_gone():
        try:
            ray.get_actor("tally")
        except ValueError:
            return True
        return False

    eventually(is_gone, "the name is free again")
    again = remote_counter.options(name="tally").remote(5)
    assert ray.get(again.get.remote()) == 5


def test_name_that_is_taken(ray, remote_counter):
    first = remote_counter.options(name="taken").remote()
    with pytest.raises(ValueError, match="taken"):
        remote_counter.options(name="taken").remote()
    assert ray.get(first.get.remote()) == 0


def test_get_if_exists(ray, remote_counter):
    @ray.remote
    def join():
        counter = ray.remote(Counter).options(name="one for all", get_if_exists=True, num_cpus=0).remote()
        return ray.get(counter.add.remote())

    counter = remote_counter.options(name="one for all", get_if_exists=True).remote()
    ray.get(counter.get.remote())
    assert sorted(ray.get([join.remote() for _ in range(8)])) == list(range(1, 9))


def test_no_such_name(ray):
    with pytest.raises(ValueError, match="nobody"):
        ray.get_actor("nobody")


def test_namespaces(ray, remote_counter):
    here = remote_counter.options(name="same").remote(1)
    there = remote_counter.options(name="same", namespace="elsewhere").remote(2)
    assert ray.get(ray.get_actor("same").get.remote()) == 1
    assert ray.get(ray.get_actor("same", namespace="elsewhere").get.remote()) == 2
    assert here != there
    with pytest.raises(ValueError, match="same"):
        ray.get_actor("same", namespace="nowhere")


def test_detached_outlives_its_handle(ray, remote_counter, eventually):
    remote_counter.options(name="stays", lifetime="detached").remote(3)
    found = ray.get_actor("stays")
    assert ray.get(found.get.remote()) == 3
    pid = ray.get(found.pid.remote())
    ray.kill(found)
    eventually(lambda: gone(pid), "killed")


# ------------------------------------------------------------------ end


def test_out_of_scope(ray, remote_counter, eventually):
    """An actor ends when its last handle goes, after the calls that were made (ACTOR-3)."""
    counter = remote_counter.remote()
    pid = ray.get(counter.pid.remote())
    last = [counter.add.remote() for _ in range(100)]
    del counter
    eventually(lambda: gone(pid), "the actor's process is gone")
    assert ray.get(last) == list(range(1, 101))


def test_a_handle_inside_of_an_object_keeps_an_actor(ray, remote_counter, eventually):
    counter = remote_counter.remote()
    pid = ray.get(counter.pid.remote())
    box = ray.put([counter])
    del counter
    (again,) = ray.get(box)
    assert ray.get(again.add.remote()) == 1
    del again
    (again,) = ray.get(box)
    assert ray.get(again.add.remote()) == 2
    del again, box
    eventually(lambda: gone(pid), "the actor's process is gone")


def test_a_handle_in_a_task_keeps_an_actor(ray, remote_counter, gate, eventually):
    @ray.remote
    def use(counter, gate):
        gate.wait()
        return ray.get(counter.add.remote())

    counter = remote_counter.options(num_cpus=0).remote()
    pid = ray.get(counter.pid.remote())
    used = use.remote(counter, gate)
    del counter
    gate.await_arrivals(1)
    assert not gone(pid)
    gate.open()
    assert ray.get(used) == 1
    eventually(lambda: gone(pid), "the actor's process is gone")


def test_never_used_actor_goes(ray, gate, eventually):
    @ray.remote
    class Sign:
        def __init__(self, gate):
            gate.arrive()

    Sign.remote(gate)
    eventually(lambda: gate.arrived() == 0 or all(gone(pid) for pid in gate.pids()), "it ended, or never began")


def test_kill(ray, remote_counter, gate, eventually):
    counter = remote_counter.remote()
    pid = ray.get(counter.pid.remote())
    running = counter.wait.remote(gate)
    queued = counter.add.remote()
    gate.await_arrivals(1)
    ray.kill(counter)
    for reference in (running, queued, counter.add.remote()):
        with pytest.raises(exceptions.ActorDiedError):
            ray.get(reference, timeout=30)
    eventually(lambda: gone(pid), "killed")


def test_a_call_after_a_kill_never_arrives(ray, remote_counter):
    for _ in range(30):  # each is a race of the call with the signal
        counter = remote_counter.remote()
        ray.get(counter.get.remote())
        ray.kill(counter)
        with pytest.raises(exceptions.ActorDiedError):
            ray.get(counter.get.remote(), timeout=30)


def test_kill_at_birth(ray, remote_counter):
    counter = remote_counter.remote()
    ray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.get.remote(), timeout=30)


def test_crash(ray, remote_counter):
    counter = remote_counter.remote()
    before = counter.add.remote()
    crashed = counter.crash.remote()
    assert ray.get(before) == 1
    for reference in (crashed, counter.add.remote()):
        with pytest.raises(exceptions.ActorDiedError) as caught:
            ray.get(reference, timeout=30)
        assert "Counter" in str(caught.value)
        assert caught.value.actor_id == counter._ray_actor_id.hex()


def test_killed_from_outside(ray, remote_counter):
    counter = remote_counter.remote()
    os.kill(ray.get(counter.pid.remote()), signal.SIGKILL)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.add.remote(), timeout=30)


def test_constructor_fails(ray):
    @ray.remote
    class Broken:
        def __init__(self):
            raise RuntimeError("cannot be built")

        def method(self):
            return 1

    broken = Broken.remote()
    for _ in range(2):
        with pytest.raises(exceptions.ActorDiedError, match="cannot be built") as caught:
            ray.get(broken.method.remote(), timeout=30)
        assert caught.value.actor_init_failed


def test_why_a_constructor_failed_is_known_though_the_gcs_reads_late(ray, gate, eventually):
    """It reads what the worker has sent and the raylet's news of its end at once (PROTO-3)."""
    from hpc_ray.client import context

    @ray.remote
    class Broken:
        def __init__(self, gate):
            gate.wait()
            raise RuntimeError("cannot be built")

        def method(self):
            return 1

    leader = json.loads(Path(context.client.config.session_dir, "lock").read_text())["pid"]
    gcs = next(pid for pid in session.children(leader) if Path(f"/proc/{pid}/cmdline").read_text().startswith("hpc_ray::gcs"))
    broken = Broken.remote(gate)
    gate.await_arrivals(1)
    os.kill(gcs, signal.SIGSTOP)
    try:
        gate.open()
        eventually(lambda: gone(gate.pids()[0]), "its process has ended")
        time.sleep(0.05)  # nothing tells that the raylet has heard of it
    finally:
        os.kill(gcs, signal.SIGCONT)
    with pytest.raises(exceptions.ActorDiedError, match="cannot be built"):
        ray.get(broken.method.remote(), timeout=30)


def test_constructor_crashes(ray):
    @ray.remote
    class Broken:
        def __init__(self):
            os._exit(1)

        def method(self):
            return 1

    with pytest.raises(exceptions.ActorDiedError):
        ray.get(Broken.remote().method.remote(), timeout=30)


def holds(ray, **options):
    class Holds:
        def __init__(self, value):
            self.value = value

        def get(self):
            return self.value

    return ray.remote(Holds).options(**options)


@pytest.mark.parametrize("options", [{}, {"name": "waits"}, {"name": "waits", "lifetime": "detached"}, {"max_concurrency": 2}])
def test_an_actor_does_not_wait_for_its_arguments(ray, gate, options):
    @ray.remote(num_cpus=0)
    def slow():
        gate.wait()
        return ray.put(5)

    actor = holds(ray, **options).remote(slow.remote())  # returns at once
    calls = [actor.get.remote() for _ in range(2)]
    if "name" in options:
        calls.append(ray.get_actor("waits").get.remote())
    assert ray.wait(calls, timeout=0.2)[0] == []
    gate.open()
    assert [ray.get(value) for value in ray.get(calls, timeout=30)] == len(calls) * [5]
    ray.kill(actor)


def test_an_actor_whose_argument_comes_from_what_its_maker_does_next(ray):
    @ray.remote(num_cpus=0)
    class Signal:
        def __init__(self):
            self.event = asyncio.Event()

        async def send(self):
            self.event.set()

        async def wait(self):
            await self.event.wait()
            return 7

    signal = Signal.remote()
    actor = holds(ray).remote(signal.wait.remote())
    signal.send.remote()
    assert ray.get(actor.get.remote(), timeout=30) == 7


def test_an_actor_is_killed_before_its_arguments_are_ready(ray, gate):
    @ray.remote(num_cpus=0)
    def slow():
        gate.wait()

    argument = slow.remote()
    actor = holds(ray).remote(argument)
    call = actor.get.remote()
    ray.kill(actor)
    with pytest.raises(exceptions.ActorDiedError, match=r"ray\.kill"):
        ray.get(call, timeout=30)
    gate.open()
    assert ray.get(argument, timeout=30) is None


def test_a_constructor_whose_argument_is_cancelled(ray, gate):
    @ray.remote(num_cpus=0)
    def slow():
        gate.wait()

    argument = slow.remote()
    actor = holds(ray).remote(argument)
    ray.cancel(argument)
    with pytest.raises(exceptions.ActorDiedError, match="cancelled"):
        ray.get(actor.get.remote(), timeout=30)


def test_constructor_argument_fails(ray, remote_counter):
    @ray.remote
    def fail():
        raise KeyError("no argument")

    with pytest.raises(exceptions.RayError, match="no argument"):
        ray.get(remote_counter.remote(fail.remote()).get.remote(), timeout=30)


def test_exit_actor(ray, gate, eventually):
    from hpc_ray.actor import exit_actor

    @ray.remote(max_restarts=3)
    class Leaver:
        def work(self):
            return os.getpid()

        def leave(self):
            exit_actor()

    leaver = Leaver.remote()
    pid = ray.get(leaver.work.remote())
    for reference in (leaver.leave.remote(), leaver.work.remote(), leaver.work.remote()):
        with pytest.raises(exceptions.RayActorError):
            ray.get(reference, timeout=30)
    eventually(lambda: gone(pid), "it left")


def test_exit_actor_cannot_be_caught(ray):
    from hpc_ray.actor import exit_actor

    @ray.remote
    class Leaver:
        def leave(self):
            try:
                exit_actor()
            except BaseException:
                return "goes on"

        def work(self):
            return 1

    leaver = Leaver.remote()
    for reference in (leaver.leave.remote(), leaver.work.remote()):
        with pytest.raises(exceptions.ActorDiedError):
            ray.get(reference, timeout=30)


@pytest.mark.parametrize("is_async", [False, True])
def test_exit_actor_in_the_constructor(ray, tmp_path, is_async):
    """As in a method: an orderly end, no failure of the constructor, and no restart."""
    from hpc_ray.actor import exit_actor

    class Leaver:
        def __init__(self, path):
            path.write_text(path.read_text() + "x")
            exit_actor()

    class AsyncLeaver(Leaver):
        async def work(self):
            return 1

    class PlainLeaver(Leaver):
        def work(self):
            return 1

    begun = tmp_path / "begun"
    begun.write_text("")
    leaver = ray.remote(max_restarts=3)(AsyncLeaver if is_async else PlainLeaver).remote(begun)
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor") as caught:
        ray.get(leaver.work.remote(), timeout=30)
    assert "LeaveProcess" not in str(caught.value)
    assert begun.read_text() == "x"


@pytest.mark.parametrize("how", ["out of scope", "terminate", "exit_actor"])
@pytest.mark.parametrize("kind", ["plain", "async", "threaded"])
def test_what_runs_at_the_orderly_end_of_an_actor(ray, tmp_path, eventually, kind, how):
    from hpc_ray.actor import exit_actor

    here = os.getpid()

    class Base:
        def __ray_shutdown__(self):
            (tmp_path / "shutdown").touch()

        def __del__(self):
            if os.getpid() != here:  # what makes actors is of a subclass, as in Ray
                (tmp_path / "del").touch()

    class Plain(Base):
        def work(self):
            return 1

        def leave(self):
            exit_actor()

    class Async(Base):
        async def work(self):
            return 1

        async def leave(self):
            exit_actor()

    if kind == "async":
        actor = ray.remote(Async).remote()
    else:
        actor = ray.remote(max_concurrency=2 if kind == "threaded" else 1)(Plain).remote()
    assert ray.get(actor.work.remote()) == 1
    if how == "exit_actor":
        actor.leave.remote()
    elif how == "terminate":
        actor.__ray_terminate__.remote()
    else:
        del actor
    eventually(lambda: {path.name for path in tmp_path.iterdir()} >= {"shutdown", "del"}, "both have run")


def test_a_failing_shutdown_is_told_of(ray, tmp_path, eventually):
    here = os.getpid()

    @ray.remote
    class Fails:
        def __ray_shutdown__(self):
            raise ValueError

        def __del__(self):
            if os.getpid() != here:  # what makes actors is of a subclass, as in Ray
                (tmp_path / "del").touch()

        def work(self):
            return 1

    actor = Fails.remote()
    assert ray.get(actor.work.remote()) == 1
    del actor
    eventually((tmp_path / "del").exists, "it has ended all the same")


def test_calls_before_exit_actor_are_answered(ray, gate):
    from hpc_ray.actor import exit_actor

    @ray.remote(max_restarts=3, num_cpus=0)
    class Leaver:
        def work(self):
            return "done"

        def leave(self):
            exit_actor()

    @ray.remote(num_cpus=0)
    def burn(gate):
        gate.arrive()
        while not gate.is_open():
            pass

    burning = [burn.remote(gate) for _ in range(6)]
    gate.await_arrivals(6)
    wrong = []
    for _ in range(30):
        leaver = Leaver.remote()
        before, leaving, after = leaver.work.remote(), leaver.leave.remote(), leaver.work.remote()
        try:
            ray.get(before, timeout=30)
        except exceptions.RayError as error:
            wrong.append(error)
        for reference in (leaving, after):
            with pytest.raises(exceptions.RayActorError) as caught:
                ray.get(reference, timeout=30)
            if not isinstance(caught.value, exceptions.ActorDiedError):
                wrong.append(caught.value)
    gate.open()
    ray.get(burning)
    assert wrong == []


def test_all_that_an_actor_has_answered_counts_when_it_dies(ray, remote_counter, eventually):
    """Also where its caller reads the news of its death ahead of hundreds of answers (PROTO-3)."""
    from hpc_ray.client import context

    counter = remote_counter.remote()
    pid = ray.get(counter.pid.remote())
    with context.client.drain:  # nobody reads meanwhile
        references = [counter.add.remote() for _ in range(600)]
        crashing = counter.crash.remote()
        eventually(lambda: gone(pid), "it has died")
    assert ray.get(references, timeout=30) == list(range(1, 601))
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(crashing, timeout=30)


def test_an_actor_that_leaves_waits_for_a_caller_that_is_slow_to_read(ray, remote_counter):
    """Its answers are more than fit between two processes, and the caller computes for longer than a second."""
    from hpc_ray.client import context

    counter = remote_counter.remote()
    ray.get(counter.get.remote())
    with context.client.drain:  # nobody reads meanwhile
        references = [counter.add.remote() for _ in range(3000)]
        counter.__ray_terminate__.remote()
        time.sleep(2)
    assert ray.get(references, timeout=30) == list(range(1, 3001))


class Leaver:
    """Its handle of itself comes later."""

    def know(self, handle):
        self.handle = handle

    def wait(self, gate, name):
        return gate.wait(name)

    def wait_for_itself(self, gate):
        gate.wait("leaving")
        import hpc_ray as ray

        return ray.get(self.handle.work.remote())

    def work(self):
        return "worked"

    def leave(self, how):
        from hpc_ray.actor import exit_actor

        if how == "sys.exit":
            raise SystemExit
        try:
            exit_actor()
        except BaseException:
            if how != "caught":
                raise


@pytest.mark.parametrize("how", ["exit_actor", "caught", "sys.exit"])
def test_calls_that_run_beside_exit_actor_are_answered_and_later_ones_hold_nobody_up(ray, gate, how):
    actor = ray.remote(max_concurrency=2)(Leaver).remote()
    early = actor.wait.remote(gate, "early")
    gate.await_arrivals(1, "early")
    left = [actor.leave.remote(how), *[actor.wait.remote(gate, "late") for _ in range(5)]]
    gate.await_arrivals(1, "late")  # so the thread that left is free again
    gate.open("early")
    assert ray.get(early, timeout=30) == "passed"
    for reference in left:
        with pytest.raises(exceptions.ActorDiedError):
            ray.get(reference, timeout=30)


def test_an_actor_that_leaves_still_gives_its_calls_what_they_wait_for(ray, gate):
    """Else it would wait for a call that waits for it, and whoever waits for either for ever."""
    actor = ray.remote(max_concurrency=2)(Leaver).remote()
    ray.get(actor.know.remote(actor))
    waiting = actor.wait_for_itself.remote(gate)
    gate.await_arrivals(1, "leaving")
    leaving, behind = actor.leave.remote("exit_actor"), actor.wait.remote(gate, "behind")
    gate.await_arrivals(1, "behind")  # it has left, and goes on
    gate.open("behind")
    gate.open("leaving")
    assert ray.get(waiting, timeout=30) == "worked"
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(leaving, timeout=30)
    ray.wait([behind], timeout=30)


def test_exit_actor_runs_exit_handlers(ray, gate):
    from hpc_ray.actor import exit_actor

    @ray.remote
    class Leaver:
        def leave(self, gate):
            import atexit

            atexit.register(gate.arrive)
            exit_actor()

    leaver = Leaver.remote()
    leaver.leave.remote(gate)
    gate.await_arrivals(1)


def test_exit_actor_outside_of_one(ray):
    from hpc_ray.actor import exit_actor

    with pytest.raises(TypeError, match="actor"):
        exit_actor()


def test_terminate_in_order(ray, remote_counter, eventually):
    counter = remote_counter.remote()
    pid = ray.get(counter.pid.remote())
    calls = [counter.add.remote() for _ in range(10)]
    counter.__ray_terminate__.remote()
    assert ray.get(calls) == list(range(1, 11))
    eventually(lambda: gone(pid), "it ended")


# ------------------------------------------------------------------ restart


def test_restart(ray, eventually):
    """A new process with a fresh state; as often as it may."""
    counter = ray.remote(max_restarts=2)(Counter).remote()
    seen = set()
    for _ in range(2):
        assert ray.get(counter.add.remote()) == 1
        seen.add(ray.get(counter.pid.remote()))
        with pytest.raises(exceptions.RayActorError):
            ray.get(counter.crash.remote(), timeout=30)

        def back():
            try:
                return ray.get(counter.pid.remote(), timeout=30)
            except exceptions.ActorUnavailableError:
                return None

        seen.add(eventually(back, "it came back"))
    assert len(seen) == 3
    with pytest.raises(exceptions.RayActorError):
        ray.get(counter.crash.remote(), timeout=30)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.get.remote(), timeout=30)


def test_calls_that_run_at_a_crash_may_be_repeated(ray, gate):
    """max_task_retries: the call runs again in the restarted actor (ACTOR-2)."""

    @ray.remote(max_restarts=1, max_task_retries=1)
    class Fragile:
        def once_dead(self, gate):
            gate.arrive()
            if gate.arrived() == 1:
                os._exit(1)
            return gate.arrived()

    fragile = Fragile.remote()
    calls = [fragile.once_dead.remote(gate) for _ in range(3)]
    assert ray.get(calls, timeout=30) == [2, 3, 4]


def test_calls_without_retries_fail_at_a_crash(ray, gate):
    @ray.remote(max_restarts=1)
    class Fragile:
        def crash(self):
            os._exit(1)

        def fine(self):
            return 1

    fragile = Fragile.remote()
    with pytest.raises(exceptions.RayActorError):
        ray.get(fragile.crash.remote(), timeout=30)


def test_exceptions_of_methods_are_retried_on_request(ray, gate):
    @ray.remote
    class Moody:
        @ray.method(max_task_retries=3, retry_exceptions=[ValueError])
        def third_time(self, gate):
            gate.arrive()
            if gate.arrived() < 3:
                raise ValueError("not yet")
            return gate.arrived()

    assert ray.get(Moody.remote().third_time.remote(gate), timeout=30) == 3


def test_kill_with_restart(ray, remote_counter, eventually):
    counter = remote_counter.options(max_restarts=1).remote()
    first = ray.get(counter.pid.remote())
    ray.kill(counter, no_restart=False)

    def other_pid():
        try:
            found = ray.get(counter.pid.remote(), timeout=30)
        except exceptions.ActorUnavailableError:
            return None
        return found if found != first else None

    assert eventually(other_pid, "it came back")


def test_killing_ends_restarts(ray, remote_counter, gate):
    counter = remote_counter.options(max_restarts=-1).remote()
    running = counter.wait.remote(gate)
    gate.await_arrivals(1)
    ray.kill(counter)
    for reference in (running, counter.get.remote()):
        with pytest.raises(exceptions.ActorDiedError):
            ray.get(reference, timeout=30)


def test_restart_is_known_to_the_actor(ray, gate):
    @ray.remote(max_restarts=1, max_task_retries=1)
    class Aware:
        def __init__(self):
            self.restarted = ray.get_runtime_context().was_current_actor_reconstructed

        def die_once(self, gate):
            gate.arrive()
            if gate.arrived() == 1:
                os._exit(1)
            return self.restarted

    assert ray.get(Aware.remote().die_once.remote(gate), timeout=30) is True


# ------------------------------------------------------------------ at the same time


def test_threaded(ray, gate):
    @ray.remote(max_concurrency=3)
    class Threaded:
        def wait(self, gate):
            gate.wait()
            return threading.get_ident()

    threaded = Threaded.remote()
    references = [threaded.wait.remote(gate) for _ in range(3)]
    gate.await_arrivals(3)
    gate.open()
    assert len(set(ray.get(references))) == 3


def test_threaded_limit(ray, gate):
    @ray.remote(max_concurrency=2)
    class Threaded:
        def __init__(self):
            self.lock = threading.Lock()
            self.now = self.most = 0

        def work(self):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            threading.Event().wait(0.001)
            with self.lock:
                self.now -= 1
            return self.most

    threaded = Threaded.remote()
    assert max(ray.get([threaded.work.remote() for _ in range(50)])) <= 2


def test_async(ray, gate):
    """Calls of an asyncio actor wait for one another in one thread."""

    @ray.remote
    class Meeting:
        def __init__(self):
            self.here = 0
            self.all_here = asyncio.Event()

        async def meet(self, count):
            self.here += 1
            if self.here == count:
                self.all_here.set()
            await self.all_here.wait()
            return self.here

    meeting = Meeting.remote()
    assert ray.get([meeting.meet.remote(50) for _ in range(50)], timeout=30) == [50] * 50


def test_async_constructor_is_on_the_loop(ray):
    """It may start tasks there, and raise as any other."""

    @ray.remote(max_restarts=1)
    class Ticking:
        def __init__(self):
            self.loop = asyncio.get_running_loop()
            self.ticked = asyncio.Event()
            self.ticking = asyncio.create_task(self.tick())
            self.put = ray.get(ray.put("put"))

        async def tick(self):
            await asyncio.sleep(0)
            self.ticked.set()

        async def look(self):
            await self.ticked.wait()
            return self.loop is asyncio.get_running_loop(), self.put

        def die(self):
            os._exit(1)

    ticking = Ticking.remote()
    assert ray.get(ticking.look.remote(), timeout=30) == (True, "put")
    with pytest.raises(exceptions.RayActorError):
        ray.get(ticking.die.remote(), timeout=30)
    assert ray.get(ticking.look.remote(), timeout=30) == (True, "put")


def test_constructor_is_awaited(ray):
    """Before any method runs, a plain one too; and it may wait for calls."""

    @ray.remote
    def double(x):
        return 2 * x

    @ray.remote
    class Slow:
        async def __init__(self, x):
            await asyncio.sleep(0.01)
            self.x = await double.remote(x)

        def get(self):
            return self.x

    assert ray.get(Slow.remote(3).get.remote(), timeout=30) == 6


@pytest.mark.parametrize(
    "error", [LookupError("cannot be built"), SystemExit("cannot be built"), asyncio.CancelledError("cannot be built")]
)
def test_awaited_constructor_fails(ray, error):
    @ray.remote
    class Broken:
        async def __init__(self):
            await asyncio.sleep(0)
            raise error

        async def method(self):
            return 1

    with pytest.raises(exceptions.ActorDiedError, match="cannot be built") as caught:
        ray.get(Broken.remote().method.remote(), timeout=30)
    assert caught.value.actor_init_failed
    assert "asyncio/" not in str(caught.value)


def test_leave_or_be_killed_while_the_constructor_is_awaited(ray, gate):
    from hpc_ray.actor import exit_actor

    @ray.remote
    class Leaver:
        async def __init__(self):
            await asyncio.sleep(0)
            exit_actor()

        async def method(self):
            return 1

    @ray.remote
    class Waiting:
        async def __init__(self, gate):
            gate.arrive()
            await asyncio.Event().wait()

        async def method(self):
            return 1

    with pytest.raises(exceptions.ActorDiedError):
        ray.get(Leaver.remote().method.remote(), timeout=30)
    waiting = Waiting.remote(gate)
    reference = waiting.method.remote()
    gate.await_arrivals(1)
    ray.kill(waiting)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(reference, timeout=30)


def test_async_awaits_references(ray):
    @ray.remote
    def double(x):
        return 2 * x

    @ray.remote
    class Async:
        async def use(self, x):
            return await double.remote(x) + sum(await asyncio.gather(*[double.remote(i) for i in range(4)]))

    actor = Async.remote()
    assert ray.get([actor.use.remote(i) for i in range(5)], timeout=30) == [12 + 2 * i for i in range(5)]


def test_async_errors(ray):
    @ray.remote
    class Async:
        async def fail(self):
            await asyncio.sleep(0)
            raise LookupError("in the loop")

    with pytest.raises(LookupError, match="in the loop"):
        ray.get(Async.remote().fail.remote(), timeout=30)


def test_async_generator_with_num_returns(ray):
    """Only a stream gives its items."""

    @ray.remote
    class Async:
        async def items(self):
            yield 1
            yield 2

    items = Async.remote().items
    assert [ray.get(item, timeout=30) for item in items.remote()] == [1, 2]
    for count in (1, 2):
        with pytest.raises(TypeError, match="'async_generator' object is not iterable") as caught:
            ray.get(items.options(num_returns=count).remote(), timeout=30)
        assert isinstance(caught.value, exceptions.RayTaskError)
    with pytest.warns(DeprecationWarning, match="streaming"):
        dynamic = items.options(num_returns="dynamic").remote()
    with pytest.raises(ValueError, match="dynamic") as refused:
        ray.get(dynamic, timeout=30)
    assert isinstance(refused.value, exceptions.RayTaskError)


def test_async_limit(ray):
    @ray.remote(max_concurrency=2)
    class Async:
        def __init__(self):
            self.now = self.most = 0

        async def work(self):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.001)
            self.now -= 1
            return self.most

    actor = Async.remote()
    assert max(ray.get([actor.work.remote() for _ in range(30)], timeout=30)) <= 2


def test_cancel_async_call(ray, gate):
    @ray.remote
    class Async:
        async def wait(self, gate):
            gate.arrive()
            await asyncio.Event().wait()

        async def fine(self):
            return 1

    actor = Async.remote()
    reference = actor.wait.remote(gate)
    gate.await_arrivals(1)
    ray.cancel(reference)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(reference, timeout=30)
    assert ray.get(actor.fine.remote(), timeout=30) == 1


def test_cancelled_whatever_its_coroutine_does(ray, gate):
    @ray.remote
    class Async:
        async def stubborn(self, gate, error):
            gate.arrive()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if error:
                    raise LookupError("instead") from None
            return "caught"

        async def items(self, gate):
            yield 1
            gate.arrive()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield 2

        async def cancel_itself(self):
            raise asyncio.CancelledError

        async def fine(self):
            return 1

    actor = Async.remote()
    items = actor.items.remote(gate)
    calls = [actor.stubborn.remote(gate, error) for error in (False, True)]
    gate.await_arrivals(3)
    for cancelled in (*calls, items):
        ray.cancel(cancelled)
    assert ray.get(next(items), timeout=30) == 1
    for reference in (*calls, next(items), actor.cancel_itself.remote()):
        with pytest.raises(exceptions.TaskCancelledError) as caught:
            ray.get(reference, timeout=30)
        assert isinstance(caught.value, exceptions.RayTaskError)
    assert next(items, None) is None
    assert ray.get(actor.fine.remote(), timeout=30) == 1


@pytest.mark.parametrize("limit", [1, 10])
def test_cancel_async_call_that_waits(ray, gate, limit):
    """For the loop, which something blocks, or for its turn: it never begins."""

    @ray.remote(max_concurrency=limit)
    class Blocking:
        def __init__(self):
            self.ran = []

        async def block(self, gate, name):
            return gate.wait(name)

        async def run(self):
            self.ran.append(1)

        async def look(self):
            return self.ran

    actor = Blocking.remote()
    calls = [actor.block.remote(gate, "first")]
    gate.await_arrivals(1, "first")
    calls.append(actor.block.remote(gate, "second"))
    waiting = actor.run.remote()
    time.sleep(0.1)
    gate.open("first")  # the loop gets both now, and begins one
    gate.await_arrivals(1, "second")
    ray.cancel(waiting)
    time.sleep(0.2)
    gate.open("second")
    with pytest.raises(exceptions.TaskCancelledError) as caught:
        ray.get(waiting, timeout=30)
    assert not isinstance(caught.value, exceptions.RayTaskError)
    assert ray.get(calls, timeout=30) == ["passed", "passed"]
    assert ray.get(actor.look.remote(), timeout=30) == []


def test_the_name_of_an_actor_whose_handle_has_gone_is_free(ray):
    for _ in range(10):
        actor = ray.remote(num_cpus=0, name="again and again")(Counter).remote()
        assert ray.get(actor.__ray_ready__.remote(), timeout=30)
        del actor


def test_cancel_call_that_waits_for_a_thread(ray, gate):
    @ray.remote(max_concurrency=2)
    class Threaded:
        def __init__(self):
            self.ran = []

        def block(self, gate):
            return gate.wait()

        def run(self, name):
            self.ran.append(name)

        def look(self):
            return self.ran

    actor = Threaded.remote()
    blocked = [actor.block.remote(gate) for _ in range(2)]
    gate.await_arrivals(2)
    cancelled, other = actor.run.remote("cancelled"), actor.run.remote("other")
    time.sleep(0.1)
    ray.cancel(cancelled)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(cancelled, timeout=30)  # at once: no thread is free yet
    gate.open()
    assert ray.get([*blocked, other], timeout=30) == ["passed", "passed", None]
    assert ray.get(actor.look.remote(), timeout=30) == ["other"]


@pytest.mark.parametrize("kind", ["plain", "threaded"])
def test_cancelled_stream_of_a_method_ends(ray, gate, kind):
    """With its next item: the method is not interrupted, but nobody wants more of it."""

    class Endless:
        def __init__(self):
            self.ended = False

        def items(self, gate):
            try:
                yield 1
                gate.wait()
                yield 2
                while True:
                    yield 3
            finally:
                self.ended = True

        def look(self):
            return self.ended

    actor = ray.remote(max_concurrency=2 if kind == "threaded" else 1)(Endless).remote()
    items = actor.items.remote(gate)
    assert ray.get(next(items), timeout=30) == 1
    gate.await_arrivals(1)
    ray.cancel(items)
    time.sleep(0.2)
    gate.open()
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(list(items), timeout=30)
    assert ray.get(actor.look.remote(), timeout=30)


def test_cancelled_stream_does_not_wait_for_its_consumer(ray):
    @ray.remote
    class Limited:
        @ray.method(_generator_backpressure_num_objects=1)
        def items(self):
            yield from range(100)

        def look(self):
            return True

    actor = Limited.remote()
    items = actor.items.remote()
    assert ray.get(next(items), timeout=30) == 0
    ray.cancel(items)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(items.completed(), timeout=10)
    assert ray.get(actor.look.remote(), timeout=10)


def test_finaliser_of_the_class_is_for_its_instances(ray, capfd):
    """What ``options`` gives, and the actor class, are none."""

    class Finalised:
        def __init__(self):
            self.ready = True

        def __del__(self):
            assert self.ready

    actor_class = ray.remote(Finalised)
    actor_class.options(num_cpus=0)
    del actor_class
    gc.collect()
    assert "ready" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["plain", "threaded", "asyncio"])
def test_references_of_a_call_that_fails(ray, store, eventually, kind):
    """What came with its arguments and stays in the actor is borrowed; what does not stay goes (EXEC-2)."""

    class Plain:
        kept = None

        def keep(self, box, stays):
            self.kept = box if stays else None
            raise LookupError("kept")

        def look(self):
            return None if self.kept is None else len(ray.get(self.kept[0]))

    class Asyncio(Plain):
        async def keep(self, box, stays):
            self.kept = box if stays else None
            raise LookupError("kept")

    before = store()["objects"]
    actor = ray.remote(max_concurrency=2 if kind == "threaded" else None)(Asyncio if kind == "asyncio" else Plain).remote()
    for stays in (True, False):
        reference = ray.put(bytes(1 << 20))
        with pytest.raises(LookupError):
            ray.get(actor.keep.remote([reference], stays), timeout=30)
        del reference
        time.sleep(0.1)
        assert ray.get(actor.look.remote(), timeout=30) == (1 << 20 if stays else None)
    eventually(lambda: store()["objects"] == before, "all objects gone")


def test_async_concurrency_groups(ray, gate):
    """Each has a loop of its own: one that blocks keeps neither the others waiting nor those without a group."""

    @ray.remote(concurrency_groups={"health": 1, "io": 2})
    class Grouped:
        def __init__(self):
            self.loop = asyncio.get_running_loop()

        async def block(self, gate, name):
            return gate.wait(name)

        @ray.method(concurrency_group="health")
        async def ping(self, reference=None):
            if reference:
                assert await reference[0] == ray.get(reference[0])
            return "pong", self.loop is asyncio.get_running_loop()

        @ray.method(concurrency_group="io")
        async def sleep(self, gate):
            gate.arrive("sleep")
            await asyncio.sleep(60)

        @ray.method(concurrency_group="io")
        async def items(self):
            yield 1
            yield 2

    actor = Grouped.remote()
    assert ray.get(actor.ping.remote([ray.put(1)]), timeout=30) == ("pong", False)
    assert ray.get(actor.ping.options(concurrency_group="").remote(), timeout=30) == ("pong", False)
    blocked = actor.block.remote(gate, "main")
    gate.await_arrivals(1, "main")
    assert ray.get([actor.ping.remote() for _ in range(5)], timeout=10) == [("pong", False)] * 5
    assert [ray.get(item, timeout=10) for item in actor.items.remote()] == [1, 2]
    sleeping = actor.sleep.remote(gate)
    gate.await_arrivals(1, "sleep")
    ray.cancel(sleeping)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(sleeping, timeout=10)
    never = actor.block.remote(gate, "never")
    assert ray.get(actor.ping.remote(), timeout=10) == ("pong", False)
    ray.cancel(never)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(never, timeout=10)
    gate.open("main")
    assert ray.get(blocked, timeout=30) == "passed"
    blocked = actor.block.options(concurrency_group="io").remote(gate, "io")
    gate.await_arrivals(1, "io")
    assert ray.get(actor.block.remote(gate, "main"), timeout=10) == "passed"
    ended = actor.__ray_terminate__.options(concurrency_group="health").remote()
    gate.open("io")
    assert ray.get(blocked, timeout=30) == "passed"
    with pytest.raises(exceptions.RayActorError):
        ray.get(ended, timeout=30)


def test_concurrency_groups(ray, gate):
    """A group that is busy does not keep another one waiting."""

    @ray.remote(concurrency_groups={"io": 1, "compute": 1})
    class Grouped:
        @ray.method(concurrency_group="io")
        def wait(self, gate):
            return gate.wait()

        @ray.method(concurrency_group="compute")
        def work(self):
            return "worked"

        def other(self):
            return "default"

    actor = Grouped.remote()
    waiting = actor.wait.remote(gate)
    gate.await_arrivals(1)
    assert ray.get([actor.work.remote(), actor.other.remote()], timeout=30) == ["worked", "default"]
    gate.open()
    assert ray.get(waiting) == "passed"


def test_max_pending_calls(ray, gate):
    waiter = ray.remote(max_pending_calls=2)(Counter).remote()
    first = waiter.wait.remote(gate)
    second = waiter.add.remote()
    with pytest.raises(exceptions.PendingCallsLimitExceeded):
        waiter.add.remote()
    gate.open()
    assert ray.get([first, second]) == ["passed", 1]
    assert ray.get(waiter.add.remote()) == 2


# ------------------------------------------------------------------ many


def test_many_actors(ray):
    counters = [ray.remote(Counter).options(num_cpus=0).remote(i) for i in range(30)]
    assert ray.get([counter.add.remote() for counter in counters]) == list(range(1, 31))


def test_parameter_server(ray):
    @ray.remote
    class Server:
        def __init__(self, size):
            self.weights = np.zeros(size)

        def apply(self, *gradients):
            self.weights = self.weights + np.sum(gradients, axis=0)
            return self.weights

    @ray.remote
    class Worker:
        def gradient(self, weights):
            return np.ones_like(weights)

    server = Server.options(num_cpus=0).remote(50_000)
    workers = [Worker.options(num_cpus=0).remote() for _ in range(3)]
    weights = server.apply.remote()
    for _ in range(20):
        weights = server.apply.remote(*[worker.gradient.remote(weights) for worker in workers])
    assert np.array_equal(ray.get(weights), np.full(50_000, 60.0))

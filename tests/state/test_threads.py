"""The threads of a threaded actor, without an actor."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from hpc_ray.worker.threads import Threads


def test_calls_begin_in_their_order():
    threads, begun, all_over = Threads(1, "one"), [], threading.Event()
    for i in range(1000):
        threads.run(lambda i=i: begun.append(i))
    threads.run(all_over.set)
    assert all_over.wait(30)
    assert begun == list(range(1000))
    threads.end()


def test_after_the_end_no_call_begins_and_none_is_waited_for():
    threads, leave, left, late = Threads(1, "one"), threading.Event(), threading.Event(), []

    def call():
        leave.wait(30)
        left.set()

    threads.run(call)
    threads.run(lambda: late.append(1))
    threads.end()
    leave.set()
    assert left.wait(30)
    threads._threads[0].join(30)
    assert not threads._threads[0].is_alive()
    assert not late


def test_fewer_threads_where_no_more_can_be_had(monkeypatch, capsys):
    """A limit of the machine on threads is no end of the actor: the calls have those that there are."""
    threads, together, done = Threads(1000, "many"), threading.Barrier(3), threading.Semaphore(0)
    start, started = threading.Thread.start, []

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    for _ in range(2):
        threads.run(lambda: together.wait(30))
    for _ in range(100):
        threads.run(done.release)
    together.wait(30)
    for _ in range(100):
        assert done.acquire(timeout=30)
    threads.end()
    assert capsys.readouterr().err.count("can't start new thread") == 1


def test_as_many_at_once_as_there_are_threads_and_no_more():
    threads, together, more = Threads(3, "three"), threading.Barrier(4), threading.Event()
    for _ in range(3):
        threads.run(lambda: together.wait(30))
    threads.run(more.set)
    assert not more.wait(0.05)
    together.wait(30)  # as each of three threads does
    assert more.wait(30)
    threads.end()


def test_a_thread_that_has_nothing_to_do_is_used_before_one_is_started():
    threads, names = Threads(8, "few"), set()
    for _ in range(50):
        called = threading.Event()

        def call(called=called):
            names.add(threading.current_thread().name)
            called.set()

        threads.run(call)
        assert called.wait(30)
        while not threads._idle:  # it has been called, but may not have come back yet
            time.sleep(0.0005)
    threads.end()
    assert names == {"few_0"}


def test_a_busy_thread_holds_nobody_up():
    threads, leave, done = Threads(16, "busy"), threading.Event(), threading.Semaphore(0)
    for _ in range(15):
        threads.run(lambda: leave.wait(30))
    for _ in range(200):
        threads.run(done.release)
    for _ in range(200):
        assert done.acquire(timeout=30)
    leave.set()
    threads.end()


def test_what_a_call_raises_ends_the_process(tmp_path):
    program = (
        "import time; from hpc_ray.worker.threads import Threads; "
        "t = Threads(2, 'x'); t.run(lambda: 1 / 0); time.sleep(60); print('went on')"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert "ZeroDivisionError" in found.stderr
    assert not found.stdout

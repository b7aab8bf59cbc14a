"""init and shutdown: what there is in between, and that nothing stays."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hpc_ray
from hpc_ray import exceptions
from hpc_ray.client.client import Client
from hpc_ray.launcher import session


@pytest.fixture(autouse=True)
def ended(no_leaks):
    """After each test there is no session, and then there is nothing of it."""
    yield
    hpc_ray.shutdown()


def start(**options):
    return hpc_ray.init(**{"num_cpus": 2, "log_to_driver": False, **options})


def pid():
    """Of a worker. The remote function is a new one each time, as it remembers the session it was last used in."""
    return hpc_ray.get(hpc_ray.remote(lambda: os.getpid()).remote())  # noqa: PLW0108 (builtins cannot be remote)


def test_start_and_stop_and_start():
    pids = set()
    for _ in range(3):
        assert not hpc_ray.is_initialized()
        start()
        assert hpc_ray.is_initialized()
        pids.add(pid())
        hpc_ray.shutdown()
    assert len(pids) == 3


def test_shutdown_without_a_session():
    hpc_ray.shutdown()
    hpc_ray.shutdown()


def test_context_manager():
    with start() as context:
        assert context["node_id"] == hpc_ray.nodes()[0]["NodeID"]
        assert pid()
    assert not hpc_ray.is_initialized()


def test_the_first_call_starts_a_session():
    assert pid() != os.getpid()
    assert hpc_ray.is_initialized()


def test_resources_as_given():
    start(num_cpus=3, num_gpus=2, resources={"a": 4}, object_store_memory=100 << 20)
    total = hpc_ray.cluster_resources()
    assert (total["CPU"], total["GPU"], total["a"]) == (3, 2, 4)
    assert abs(total["object_store_memory"] - (100 << 20)) < 1 << 20


def test_more_cpus_than_there_are():
    start(num_cpus=16)
    assert hpc_ray.cluster_resources()["CPU"] == 16


def test_gpus_are_told_apart(gate):
    """Each task sees the GPUs that are its own, and only those. (None is used.)"""
    start(num_cpus=4, num_gpus=3)

    @hpc_ray.remote(num_gpus=1)
    def mine(gate):
        gate.wait()
        return hpc_ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    references = [mine.remote(gate) for _ in range(3)]
    gate.await_arrivals(3)
    gate.open()
    found = hpc_ray.get(references)
    assert sorted(ids[0] for ids, _ in found) == [0, 1, 2]
    assert all(variable == str(ids[0]) for ids, variable in found)


def test_room_comes_free_for_who_waits():
    """Twenty times what fits, one after the other."""
    start(object_store_memory=60 << 20)
    for i in range(40):
        assert hpc_ray.get(hpc_ray.put(np.full(30 << 20, i % 200, np.uint8)))[-1] == i % 200


def segments():
    """Mapped memory of nodes."""
    gc.collect()
    return [fd for fd in os.listdir("/proc/self/fd") if "memfd:hpc_ray" in os.path.realpath(f"/proc/self/fd/{fd}")]


def test_memory_goes_though_functions_stay():
    before = segments()
    start()

    @hpc_ray.remote
    def one():
        return 1

    assert hpc_ray.get(one.remote()) == 1
    hpc_ray.shutdown()
    assert segments() == before


def test_memory_goes_though_references_went_later():
    before = segments()
    start()
    reference = hpc_ray.remote(lambda: 1).remote()
    assert hpc_ray.get(reference) == 1
    hpc_ray.shutdown()
    del reference
    assert segments() == before


def test_memory_goes_though_tasks_were_unfinished():
    before = segments()
    start()
    reference = hpc_ray.remote(lambda: threading.Event().wait()).remote()
    assert hpc_ray.wait([reference], timeout=0)[1]
    hpc_ray.shutdown()
    del reference
    assert segments() == before


def test_no_session_to_join():
    if session.running():
        pytest.skip("another session of this user runs on this machine")
    with pytest.raises(ConnectionError, match="hpc-ray start"):
        hpc_ray.init(address="auto")


def by_future(reference):
    return reference.future().result()


def by_await(reference):
    async def use():
        return await reference

    return asyncio.run(use())


def kill_node(worker):
    os.kill(int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)


@pytest.mark.parametrize("get", [hpc_ray.get, by_future, by_await])
@pytest.mark.parametrize("end", ["shutdown", "killed"])
def test_the_end_answers_those_who_wait(gate, get, end):
    start()
    worker = pid()

    @hpc_ray.remote
    def wait(gate):
        return gate.wait()

    reference = wait.remote(gate)
    gate.await_arrivals(1)
    caught = []

    def wait_for_it():
        try:
            get(reference)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    time.sleep(0.1)  # else shutdown comes first, and nobody waits yet
    if end == "shutdown":
        hpc_ray.shutdown()
    else:
        kill_node(worker)
    thread.join(30)
    assert not thread.is_alive()
    (error,) = caught
    assert isinstance(error, exceptions.RayError)


@pytest.fixture
def run(tmp_path):
    """Start a program that has called init()."""

    def run(code, **options):
        return subprocess.Popen(
            [sys.executable, "-c", "import hpc_ray as ray, os, sys, time\nray.init(num_cpus=2)\n" + code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,  # -c puts the working directory on sys.path, and the repository's hpc_ray/ is not installed
            **options,
        )

    return run


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("ray.shutdown()", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('uncaught')", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.abort()", -6),
        ("ray.get(ray.remote(lambda: time.sleep(1000)).remote(), timeout=0.5)", 1),
        ("a = ray.remote(type('A', (), {'f': lambda self: 1})).remote(); ray.get(a.f.remote())", 0),
    ],
)
def test_however_a_program_ends(run, code, status):
    """Its exit code is its own, and nothing stays (the fixture looks)."""
    child = run(code)
    _, err = child.communicate(timeout=60)
    assert child.returncode == status, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_signals(run, number):
    child = run("ray.get(ray.remote(lambda: print('runs', flush=True) or time.sleep(1000)).remote())")
    assert "runs" in child.stdout.readline()
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode in ((1, 130, -number) if number == signal.SIGINT else (-number,))


@pytest.mark.parametrize("wait", ["ray.get(slow)", "ray.wait([slow])"])
def test_a_signal_handler_may_wait_too(run, wait):
    """It has interrupted the main thread where that waits for messages: then it is the handler who receives them."""
    child = run(
        "import signal\n"
        "slow = ray.remote(lambda: time.sleep(1)).remote()\n"
        "quick = ray.remote(lambda x: x)\n"
        "signal.signal(signal.SIGALRM, lambda *_: print('handled', ray.get([quick.remote(1), ray.put(2)])))\n"
        f"signal.setitimer(signal.ITIMER_REAL, 0.3)\n{wait}\nprint('waited')",
    )
    out, err = child.communicate(timeout=60)
    assert out == "handled [1, 2]\nwaited\n", err


TIME_LIMITS = """
import random, signal
class Late(Exception):
    pass
def on_alarm(*_):
    raise Late
echo, choose, late = ray.remote(lambda x: x), random.Random(2), 0
signal.signal(signal.SIGALRM, on_alarm)
for _ in range(150):
    references = [echo.remote(i) for i in range(100)]
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.002 * choose.random())
        ray.get(references)
    except Late:
        late += 1
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Late:  # it came just before
            late += 1
    assert ray.get(references, timeout=30) == list(range(100))
print(late > 0, signal.getsignal(signal.SIGALRM) == on_alarm)
ray.shutdown()
print(signal.getsignal(signal.SIGALRM) is on_alarm)
"""


def test_a_time_limit_may_strike_anywhere(run):
    """A handler that raises loses no message, and strikes before the program goes on; it is the program's own when the session ends."""
    out, err = run(TIME_LIMITS).communicate(timeout=60)
    assert out == "True True\nTrue\n", err


@pytest.mark.parametrize("switched", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_a_handler_that_is_switched_off_while_its_signal_waits(run, switched):
    child = run(
        "import signal\nfrom hpc_ray.client import context\n"
        "signal.signal(signal.SIGALRM, lambda *_: print('handled'))\n"
        "ray.get(ray.remote(lambda: 1).remote())\n"
        "with context.client.lock:  # where a signal waits\n"
        "    signal.raise_signal(signal.SIGALRM)\n    print('locked')\n"
        f"    signal.signal(signal.SIGALRM, {switched})\n"
        "print(context.client.interrupts.pending, ray.get(ray.remote(lambda: 2).remote()))",
    )
    out, err = child.communicate(timeout=60)
    assert out == "locked\nTrue 2\n", err


def test_a_signal_handler_may_end_the_session(run):
    child = run(
        "import signal\nsignal.signal(signal.SIGALRM, lambda *_: (ray.shutdown(), sys.exit(3)))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3)\nray.get(ray.remote(lambda: time.sleep(1000)).remote())",
    )
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (3, "")


def test_a_fork_of_the_program(run):
    """Its end is not the session's, and it may have a session of its own."""
    child = run(
        "if os.fork() == 0:\n    sys.exit(0)\n"
        "os.wait()\n"
        "if os.fork() == 0:\n    ray.init(num_cpus=1); print('child', ray.get(ray.put(1)), flush=True); sys.exit(0)\n"
        "os.wait()\nprint('parent', ray.get(ray.remote(lambda: 2).remote()))",
    )
    assert child.communicate(timeout=60) == ("child 1\nparent 2\n", "")


@pytest.mark.parametrize("threshold", [10, 17, 24])
def test_finalisers_may_wait(run, threshold):
    """CLIENT-4: the collector runs them wherever it is run itself, in any thread, also under the client's lock."""
    child = run(
        "import gc\n"
        "task = ray.remote(lambda x: x)\n"
        "class Cycle:\n    def __init__(self): self.me = self\n    def __del__(self): ray.get(task.remote(1))\n"
        f"gc.set_threshold({threshold})\n"
        "for _ in range(100): Cycle(); ray.get([task.remote(i) for i in range(5)]); ray.get(ray.put(bytes(200_000)))\n"
        "gc.set_threshold(700); gc.collect(); print('done')"
    )
    out, err = child.communicate(timeout=60)
    assert out == "done\n", err


def test_a_finaliser_that_comes_after_the_end(run):
    """It does not begin a new session, nor hang."""
    child = run(
        "class Late:\n    def __del__(self): ray.get(task.remote())\n"
        "task = ray.remote(lambda: 1)\nlate = Late()\nray.get(task.remote())"
    )
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "about to end" in err


def test_closed_standard_streams(tmp_path):
    """As daemons have them. What is printed must not go into a socket of ours."""
    code = (
        "import os\nos.closerange(0, 3)\nimport hpc_ray as ray\nray.init(num_cpus=1)\nos.write(1, b'text')\n"
        "@ray.remote\ndef say(): print('from a worker'); return 7\nassert ray.get(say.remote()) == 7"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0


def test_sessions_side_by_side(run):
    """Two programs of one user do not see each other."""
    code = (
        "A = ray.remote(type('A', (), {'f': lambda self: os.getppid()}))\n"
        "a = A.options(name='same').remote()\nprint(ray.get(a.f.remote()), flush=True)\nsys.stdin.read()"
    )
    children = [run(code, stdin=subprocess.PIPE) for _ in range(2)]
    lines = [child.stdout.readline() for child in children]
    assert len(set(lines)) == 2 and all(lines)
    for child in children:
        child.communicate("", timeout=60)
        assert child.returncode == 0


def test_in_a_thread():
    """init, use and shutdown outside of the main thread."""
    found = []

    def work():
        start()
        found.append(pid())
        hpc_ray.shutdown()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found and not hpc_ray.is_initialized()


def test_the_death_of_a_node_is_told():
    """When the session's processes are killed, whoever waits is told, and a new session can be made."""
    start()

    @hpc_ray.remote
    def kill_node():
        os.kill(os.getppid(), signal.SIGKILL)
        threading.Event().wait()

    with pytest.raises(exceptions.RayError):
        hpc_ray.get(kill_node.remote(), timeout=30)
    hpc_ray.shutdown()
    start()
    assert pid()


def test_the_older_way_to_connect():
    builder = hpc_ray.client("local").namespace("older")
    assert isinstance(builder, hpc_ray.ClientBuilder)
    with builder.connect():
        assert hpc_ray.get_runtime_context().namespace == "older"
    assert not hpc_ray.is_initialized()
    with pytest.raises(ConnectionError):
        hpc_ray.client("no_such_session").connect()


@pytest.mark.parametrize(
    ("config", "error"),
    [({"encoding": "XML"}, "XML"), ({"log_level": "LOUD"}, "LOUD"), ({"additional_log_standard_attrs": ["colour"]}, "colour")],
)
def test_a_logging_config_that_cannot_be(config, error):
    with pytest.raises(ValueError, match=error):
        hpc_ray.LoggingConfig(**config)
    with pytest.raises(ValueError, match=error):
        start(logging_config=config)
    with pytest.raises(TypeError, match="LoggingConfig"):
        start(logging_config="JSON")
    assert not hpc_ray.is_initialized()


def use_and_leave():
    """A session in which something is pending, remembered for a second run, and out of scope when it ends."""

    @hpc_ray.remote
    class Echo:
        def echo(self, value=None):
            return value

    @hpc_ray.remote(max_retries=3)
    def large():
        return bytes(1 << 20)

    @hpc_ray.remote
    def wait(values):
        threading.Event().wait()

    start()
    kept, dropped, result = Echo.remote(), Echo.remote(), large.remote()
    hpc_ray.get([kept.echo.remote(result), dropped.echo.remote(1)])
    pending = wait.remote([result])
    del dropped
    hpc_ray.shutdown()
    return kept, pending


def test_a_session_that_is_over_leaves_nothing_in_memory():
    """Its entries are unknown to Python's collector, which sees no cycle through them."""

    def clients():
        gc.collect()
        return sum(type(thing) is Client for thing in gc.get_objects())

    before = clients()
    held = use_and_leave()
    assert clients() > before
    del held
    assert clients() == before

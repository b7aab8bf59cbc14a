"""Runtime environments: what tasks and actors find, who inherits it, and what those hear who ask for what cannot be made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpc_ray import exceptions
from hpc_ray.runtime_env import RuntimeEnv
from hpc_ray.util import state


def variable(name):
    return os.environ.get(name)


def files_here():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# ------------------------------------------------------------------ variables


def test_variables_and_who_sees_them(ray):
    look = ray.remote(variable)
    red = look.options(runtime_env={"env_vars": {"COLOUR": "red"}})
    blue = look.options(runtime_env=RuntimeEnv(env_vars={"COLOUR": "blue"}))
    assert ray.get([look.remote("COLOUR"), red.remote("COLOUR"), blue.remote("COLOUR"), red.remote("COLOUR")]) == [
        None, "red", "blue", "red",
    ]  # fmt: skip
    assert variable("COLOUR") is None


@pytest.mark.parametrize("empty", [None, {}, RuntimeEnv()])
def test_an_empty_environment_in_options(ray, empty):
    """A function keeps its own, an actor has none: as in Ray."""
    fields = {"env_vars": {"COLOUR": "red"}}
    look = ray.remote(runtime_env=fields)(variable)

    @ray.remote(runtime_env=fields)
    class Looks:
        def look(self):
            return variable("COLOUR")

    assert ray.get(look.options(runtime_env=empty).remote("COLOUR")) == "red"
    assert ray.get(Looks.options(runtime_env=empty).remote().look.remote()) is None


def test_a_worker_never_changes_its_environment(ray):
    @ray.remote
    def who():
        return os.getpid(), os.environ.get("COLOUR")

    seen: dict[int, set] = {}
    for colour in ["red", "blue", None] * 5:
        fields = {"env_vars": {"COLOUR": colour}} if colour else None
        pid, found = ray.get(who.options(runtime_env=fields).remote())
        assert found == colour
        seen.setdefault(pid, set()).add(found)
    assert all(len(colours) == 1 for colours in seen.values())


def test_variables_are_expanded(ray):
    look = ray.remote(variable)
    fields = {"env_vars": {"A": "first", "B": "${A}:${NOT_THERE_AT_ALL}:$HOME"}}
    assert ray.get(look.options(runtime_env=fields).remote("B")) == f"first::{os.environ['HOME']}"


def test_variables_that_only_a_new_interpreter_notices(ray):
    @ray.remote(runtime_env={"env_vars": {"PYTHONHASHSEED": "7"}})
    def hashed():
        return hash("text")

    found = {ray.get(hashed.remote()) for _ in range(2)}
    own = subprocess.run(
        [sys.executable, "-c", "print(hash('text'))"], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert found == {int(own.stdout)}


def test_inheritance(ray):
    @ray.remote
    def child(*names):
        return [os.environ.get(name) for name in names], dict(ray.get_runtime_context().runtime_env)

    @ray.remote(runtime_env={"env_vars": {"A": "parent", "B": "parent"}})
    class Parent:
        def plain(self):
            return ray.get(child.remote("A", "B", "C"))

        def changed(self):
            return ray.get(child.options(runtime_env={"env_vars": {"B": "child", "C": "child"}}).remote("A", "B", "C"))

    parent = Parent.remote()
    assert ray.get(parent.plain.remote()) == (["parent", "parent", None], {"env_vars": {"A": "parent", "B": "parent"}})
    assert ray.get(parent.changed.remote())[0] == ["parent", "child", "child"]


def test_actors(ray):
    @ray.remote(runtime_env={"env_vars": {"SHAPE": "round"}})
    class Looker:
        def __init__(self):
            self.first = os.environ["SHAPE"]

        def look(self):
            return self.first, os.environ["SHAPE"]

    flat = Looker.options(runtime_env={"env_vars": {"SHAPE": "flat"}})
    assert ray.get([Looker.remote().look.remote(), flat.remote().look.remote()]) == [("round", "round"), ("flat", "flat")]


def test_a_restarted_actor_has_its_environment(ray):
    @ray.remote(max_restarts=1, max_task_retries=-1, runtime_env={"env_vars": {"SHAPE": "round"}})
    class Looker:
        def look(self):
            return os.getpid(), os.environ["SHAPE"]

    looker = Looker.remote()
    pid, _ = ray.get(looker.look.remote())
    os.kill(pid, signal.SIGKILL)
    again, shape = ray.get(looker.look.remote())
    assert again != pid and shape == "round"


def test_state_shows_them(ray):
    ray.get(ray.remote(variable).options(runtime_env={"env_vars": {"SHOWN": "yes"}}).remote("SHOWN"))
    assert {"env_vars": {"SHOWN": "yes"}} in [row.runtime_env for row in state.list_runtime_envs()]


# ------------------------------------------------------------------ files


def test_working_dir_of_a_task_and_as_an_archive(ray, project, tmp_path):
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("inner/x.txt", "x")
    look = ray.remote(files_here)
    assert "data.txt" in ray.get(look.options(runtime_env={"working_dir": str(project)}).remote())
    assert ray.get(look.options(runtime_env={"working_dir": str(packed)}).remote()) == ["inner/x.txt"]
    # An archive from elsewhere is taken out of its only folder, as it is in Ray.
    assert ray.get(look.options(runtime_env={"working_dir": packed.as_uri()}).remote()) == ["x.txt"]


def test_equal_files_are_one_package(ray, project, tmp_path):
    @ray.remote
    def uri():
        return ray.get_runtime_context().runtime_env["working_dir"]

    copied, changed = (Path(shutil.copytree(project, tmp_path / name / "project")) for name in ("copied", "changed"))
    os.utime(copied / "data.txt", (1, 1))
    (changed / "data.txt").write_text("other")
    folders = [project, copied, changed]
    first, same, other = ray.get([uri.options(runtime_env={"working_dir": str(folder)}).remote() for folder in folders])
    assert first == same != other


def test_a_module_of_a_loaded_name(ray, tmp_path):
    """The worker has loaded the driver's setproctitle before it is asked; it gets the one that was sent."""
    (tmp_path / "setproctitle.py").write_text("VALUE = 'sent'\ndef setproctitle(title):\n    pass\n")

    @ray.remote(runtime_env={"py_modules": [str(tmp_path / "setproctitle.py")]})
    def look():
        import setproctitle

        return setproctitle.VALUE

    assert ray.get(look.remote()) == "sent"


def test_a_function_with_files_works_in_another_process(ray, project):
    """Its files are the driver's: what travels are packages."""

    @ray.remote(runtime_env={"working_dir": str(project)})
    def inner():
        return Path("data.txt").read_text()

    @ray.remote
    def call(function):
        return ray.get(function.remote())

    reference = ray.put(inner)
    shutil.rmtree(project)
    assert ray.get(call.remote(reference)) == "data"


# ------------------------------------------------------------------ installed packages


def test_pip_with_a_local_wheel(ray, wheel, tmp_path):
    new = wheel(tmp_path, "made_for_the_test", "2.0", "VALUE = 'two'\n")
    title = wheel(tmp_path, "setproctitle", "99.0", "VALUE = 'wheel'\ndef setproctitle(title):\n    pass\n")

    @ray.remote(runtime_env={"pip": [new, title], "env_vars": {"PIP_NO_INDEX": "1"}})
    def look():
        import importlib.metadata

        import cloudpickle  # the driver's
        import made_for_the_test
        import setproctitle

        assert cloudpickle
        version = importlib.metadata.version("setproctitle")
        return made_for_the_test.VALUE, setproctitle.VALUE, version, os.environ["VIRTUAL_ENV"], os.getpid()

    found = ray.get([look.remote() for _ in range(6)])
    assert {row[:3] for row in found} == {("two", "wheel", "99.0")}
    assert len({row[3] for row in found}) == 1  # one environment

    @ray.remote
    def plain():
        import setproctitle

        return hasattr(setproctitle, "VALUE")

    assert not ray.get(plain.remote())


def test_pip_by_file_and_in_working_dir(ray, wheel, tmp_path):
    folder = tmp_path / "with_wheel"
    folder.mkdir()
    path = Path(wheel(folder, "made_for_the_test", "3.0", "VALUE = 'three'\n"))
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"# comment\n--no-index\n${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{path.name}\n")

    @ray.remote(runtime_env={"working_dir": str(folder), "pip": {"packages": str(requirements), "pip_check": False}})
    def look():
        import made_for_the_test

        return made_for_the_test.VALUE, path.name in os.listdir()

    assert ray.get(look.remote()) == ("three", True)


def test_a_wheel_among_py_modules(ray, wheel, tmp_path):
    fields = {"py_modules": [wheel(tmp_path, "made_for_the_test", "4.0", "VALUE = 'four'\n")], "env_vars": {"PIP_NO_INDEX": "1"}}

    @ray.remote(runtime_env=fields)
    class Looker:
        def look(self):
            import made_for_the_test

            return made_for_the_test.VALUE

    assert ray.get(Looker.remote().look.remote()) == "four"


def test_pip_check_and_options(ray, wheel, tmp_path):
    path = wheel(tmp_path, "made_for_the_test", "5.0", "VALUE = 'five'\n", requires="nothing-like-this")
    look = ray.remote(lambda: __import__("made_for_the_test").VALUE)
    wish = {"packages": [path], "pip_install_options": ["--no-deps", "--no-cache-dir"]}
    assert ray.get(look.options(runtime_env={"pip": wish}).remote()) == "five"
    with pytest.raises(exceptions.RuntimeEnvSetupError, match="requires nothing-like-this"):
        ray.get(look.options(runtime_env={"pip": {**wish, "pip_check": True}}).remote())


def test_another_executable(ray):
    @ray.remote(runtime_env={"py_executable": f"{sys.executable} -X dev"})
    def look():
        return sys.flags.dev_mode

    assert ray.get(look.remote()) is True


# ------------------------------------------------------------------ the hook


def test_setup_hook_by_name(ray, project):
    (project / "hooks.py").write_text("import os\ndef hook():\n    os.environ['HOOKED'] = 'by name'\n")
    fields = {"working_dir": str(project), "worker_process_setup_hook": "hooks.hook"}
    assert ray.get(ray.remote(variable).options(runtime_env=fields).remote("HOOKED")) == "by name"


# ------------------------------------------------------------------ what fails


def raises():
    raise ValueError("the hook says no")


def leaves():
    raise SystemExit(3)


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"worker_process_setup_hook": raises}, "the hook says no"),
        ({"worker_process_setup_hook": leaves}, "SystemExit"),
        ({"worker_process_setup_hook": dies}, "SIGKILL"),
        ({"worker_process_setup_hook": "no_such_module.function"}, "no_such_module"),
        ({"pip": ["--no-index", "no-such-package-of-the-test"]}, "no-such-package-of-the-test"),
        ({"py_executable": "no-such-python"}, "no-such-python"),
        ({"py_executable": "false"}, "exit code 1"),
        ({"working_dir": "file:///no/such/archive.zip"}, "archive.zip"),
        ({"working_dir": "gcs://0123456789abcdef/never_uploaded.zip"}, "never_uploaded"),
    ],
)
def test_a_setup_that_fails(ray, fields, words):
    look = ray.remote(variable).options(runtime_env=fields)
    references = [look.remote("HOME") for _ in range(3)]
    for reference in references:
        with pytest.raises(exceptions.RuntimeEnvSetupError, match=words):
            ray.get(reference, timeout=60)

    @ray.remote(runtime_env=fields)
    class Never:
        def call(self):
            return 1

    with pytest.raises(exceptions.RuntimeEnvSetupError, match=words):
        ray.get(Never.remote().call.remote(), timeout=60)
    assert ray.get(ray.remote(variable).remote("HOME"), timeout=60) == os.environ["HOME"]


def test_a_setup_that_fails_can_succeed_later(ray, tmp_path):
    archive = tmp_path / "later.zip"
    look = ray.remote(files_here).options(runtime_env={"working_dir": archive.as_uri()})
    with pytest.raises(exceptions.RuntimeEnvSetupError):
        ray.get(look.remote(), timeout=60)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/x.txt", "x")
    assert ray.get(look.remote(), timeout=60) == ["x.txt"]


def test_a_setup_that_takes_too_long(ray, gate):
    fields = {"worker_process_setup_hook": lambda: gate.wait("hook"), "config": {"setup_timeout_seconds": 1}}
    with pytest.raises(exceptions.RuntimeEnvSetupError, match="setup_timeout_seconds of 1"):
        ray.get(ray.remote(variable).options(runtime_env=fields).remote("HOME"), timeout=60)


def test_others_start_while_an_environment_is_made(ray, gate):
    """More tasks of it than there are CPUs: one worker makes it, the others' places stay free."""
    hook = {"worker_process_setup_hook": lambda: gate.wait("hook")}
    look = ray.remote(variable)
    waiting = [look.options(runtime_env=hook).remote("HOME") for _ in range(8)]
    gate.await_arrivals(1, "hook")
    for number in range(3):
        fields = {"env_vars": {"NUMBER": str(number)}}
        assert ray.get(look.options(runtime_env=fields).remote("NUMBER"), timeout=60) == str(number)
    assert gate.arrived("hook") == 1
    gate.open("hook")
    assert ray.get(waiting, timeout=60) == [os.environ["HOME"]] * 8


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"env_vars": ["A=1"]}, TypeError, "env_vars"),
        ({"env_vars": {1: "A"}}, TypeError, "key"),
        ({"working_dir": 5}, TypeError, "working_dir"),
        ({"working_dir": __file__}, ValueError, "folder"),
        ({"py_modules": [5]}, TypeError, "py_module"),
        ({"py_modules": ["/no/such/module"]}, ValueError, "/no/such/module"),
        ({"py_modules": [sys]}, ValueError, "sys"),
        ({"pip": {"packages": ["a"], "other": 1}}, ValueError, "other"),
        ({"pip": {"packages": [1]}}, TypeError, "packages"),
        ({"pip": ["a"], "uv": ["b"]}, ValueError, "pip"),
        ({"container": {"image": "x"}}, ValueError, "apptainer"),
        ({"nsight": "default"}, ValueError, "nsys profile"),
        ({"worker_process_setup_hook": 3}, TypeError, "hook"),
        ({"py_executable": ""}, TypeError, "py_executable"),
        ({"env_vars": {"LONG": "x" * 200_000}}, ValueError, "200"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_given(ray, fields, error, words):
    with pytest.raises(error, match=words):
        ray.remote(variable).options(runtime_env=fields).remote("A")
    with pytest.raises(error, match=words):
        ray.remote(type("Some", (), {})).options(runtime_env=fields).remote()


def test_fields_without_a_value_change_nothing(ray):
    look = ray.remote(lambda: ray.get_runtime_context().get_runtime_env_string())
    for fields in (None, {}, {"env_vars": None}, {"env_vars": {}}, {"pip": [], "excludes": [], "working_dir": None}):
        assert ray.get(look.options(runtime_env=fields).remote()) == "{}"

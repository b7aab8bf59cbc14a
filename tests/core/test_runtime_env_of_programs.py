"""Runtime environments of whole programs, and sessions that end while one is made. See also ``test_runtime_env``."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_ray
from hpc_ray import as_ray, exceptions
from hpc_ray.job_config import JobConfig
from hpc_ray.runtime_env import RuntimeEnv


@pytest.fixture
def session(no_leaks):
    """``session(**options)`` starts one with two CPUs; it ends with the test, and nothing of it stays."""

    def start(**options):
        return hpc_ray.init(**{"num_cpus": 2, "log_to_driver": False, **options})

    yield start
    hpc_ray.shutdown()


def variable(name):
    return os.environ.get(name)


def files_here():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_of_the_program(session):
    session(runtime_env={"env_vars": {"JOB": "yes", "BOTH": "job"}})
    look = hpc_ray.remote(variable)
    own = look.options(runtime_env={"env_vars": {"BOTH": "task"}})
    assert hpc_ray.get([look.remote("JOB"), look.remote("BOTH"), own.remote("JOB"), own.remote("BOTH")]) == [
        "yes", "job", "yes", "task",
    ]  # fmt: skip
    assert variable("JOB") is None
    context = hpc_ray.get_runtime_context()
    assert isinstance(context.runtime_env, RuntimeEnv)
    assert context.runtime_env == json.loads(context.get_runtime_env_string()) == {"env_vars": {"JOB": "yes", "BOTH": "job"}}
    hpc_ray.shutdown()
    session()
    assert hpc_ray.get(hpc_ray.remote(variable).remote("JOB")) is None
    assert hpc_ray.get_runtime_context().get_runtime_env_string() == "{}"


def test_job_config(session):
    config = JobConfig(
        runtime_env={"env_vars": {"JOB": "config"}},
        ray_namespace="mine",
        metadata={"for": "test"},
        default_actor_lifetime="detached",
    )
    session(job_config=config)

    @hpc_ray.remote
    class Named:
        def ready(self):
            return os.environ["JOB"]

    @hpc_ray.remote
    def make(name, lifetime=None):
        return hpc_ray.get(Named.options(name=name, lifetime=lifetime).remote().ready.remote())

    assert hpc_ray.get_runtime_context().namespace == "mine"
    assert hpc_ray.get(make.remote("stays")) == "config"
    assert hpc_ray.get(hpc_ray.get_actor("stays", namespace="mine").ready.remote()) == "config"
    assert {row["config"]["metadata"]["for"] for row in _jobs()} == {"test"}
    hpc_ray.kill(hpc_ray.get_actor("stays"))


def _jobs():
    from hpc_ray.client import context
    from hpc_ray.ids import GCS_ADDRESS

    assert context.client is not None
    return context.client.query(GCS_ADDRESS, "list_jobs")


def test_the_argument_goes_before_the_job_config(session):
    session(job_config=JobConfig(runtime_env={"env_vars": {"A": "config"}}), runtime_env={"env_vars": {"B": "argument"}})
    look = hpc_ray.remote(variable)
    assert hpc_ray.get([look.remote("A"), look.remote("B")]) == [None, "argument"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"runtime_env": {"working_dir": "/no/such/folder"}}, ValueError, "/no/such/folder"),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError, "env_vars"),
        ({"runtime_env": "x"}, TypeError, "runtime_env"),
        ({"runtime_env": {"conda": "base"}}, ValueError, "py_executable"),
        ({"runtime_env": {"image_uri": "x"}}, ValueError, "apptainer"),
        ({"runtime_env": {"working_dir": "s3://bucket/x.zip"}}, ValueError, "file system"),
        ({"job_config": 5}, TypeError, "JobConfig"),
        ({"job_config": JobConfig(jvm_options=["-x"])}, ValueError, "Java"),
        ({"job_config": JobConfig(runtime_env={"pip": 5})}, TypeError, "pip"),
    ],
)
def test_init_refuses_what_cannot_be(session, options, error, words):
    with pytest.raises(error, match=words):
        session(**options)
    assert not hpc_ray.is_initialized()


def test_working_dir(session, project):
    session(runtime_env={"working_dir": str(project), "excludes": ["*.md", "/deep/nothing"]})

    @hpc_ray.remote
    def look():
        import of_the_project

        tool = subprocess.run(["./tool.sh"], capture_output=True, text=True, check=True).stdout
        inner = subprocess.run(
            [sys.executable, "-c", "import of_the_project as p; print(p.VALUE)"], capture_output=True, text=True, check=True
        ).stdout
        return of_the_project.VALUE, Path("data.txt").read_text(), tool, inner, Path("empty").is_dir()

    assert hpc_ray.get(look.remote()) == ("project", "data", "tool\n", "project\n", True)
    assert hpc_ray.get(hpc_ray.remote(files_here).remote()) == [
        ".gitignore", "data.txt", "deep/deeper/kept.txt", "of_the_project.py", "tool.sh",
    ]  # fmt: skip
    assert Path.cwd() != project


def test_py_modules(session, tmp_path):
    package = tmp_path / "sent_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 'package'\n")
    (package / "inner" / "__init__.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "sent_file.py").write_text("VALUE = 'file'\n")
    session(runtime_env={"py_modules": [str(package), tmp_path / "sent_file.py", json]})

    @hpc_ray.remote
    def look():
        import sent_file
        import sent_package
        from sent_package.inner import twice

        return sent_package.VALUE, twice(21), sent_file.VALUE

    @hpc_ray.remote
    class Looker:
        def look(self):
            return hpc_ray.get(look.remote())

    assert hpc_ray.get(Looker.remote().look.remote()) == ("package", 42, "file")


def test_nodes_that_share_nothing(session, project):
    session(num_nodes=2, runtime_env={"working_dir": str(project)})

    @hpc_ray.remote(num_cpus=2)
    class Looker:
        def look(self):
            return os.getcwd(), Path("data.txt").read_text()

    lookers = [Looker.remote() for _ in range(2)]
    found = hpc_ray.get([looker.look.remote() for looker in lookers])
    assert [text for _, text in found] == ["data", "data"]
    assert len({folder for folder, _ in found}) == 2


def test_a_package_that_is_too_large_names_its_files(session, project):
    (project / "large.bin").write_bytes(os.urandom(200_000))
    with pytest.raises(ValueError, match=r"large\.bin") as caught:
        session(runtime_env={"working_dir": str(project)}, _system_config={"package_bytes": 100_000})
    assert "excludes" in str(caught.value)
    session(runtime_env={"working_dir": str(project), "excludes": ["large.bin"]}, _system_config={"package_bytes": 100_000})
    assert "data.txt" in hpc_ray.get(hpc_ray.remote(files_here).remote())


def test_a_new_interpreter_knows_ray_by_its_other_name(session, monkeypatch):
    monkeypatch.setenv(as_ray.VARIABLE, "1")
    session(runtime_env={"py_executable": sys.executable})

    @hpc_ray.remote
    def look():
        return importlib.import_module("ray.util").__name__

    assert hpc_ray.get(look.remote()) == "hpc_ray.util"


def test_uv(session, wheel, tmp_path, monkeypatch):
    """With a ``uv`` that hands over to pip and says what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""#!{sys.executable}
import os, sys
assert sys.argv[1:4] == ["pip", "install", "--python"], sys.argv
print("this is uv", sys.argv[4:], flush=True)
os.execv(sys.executable, [sys.executable, "-m", "pip", "--python", sys.argv[4], "install", *sys.argv[6:]])
"""
    (folder / "uv").write_text(script)
    (folder / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = wheel(tmp_path, "made_for_the_test", "6.0", "VALUE = 'six'\n")
    session(runtime_env={"uv": [path]})

    @hpc_ray.remote
    def look():
        import made_for_the_test

        return made_for_the_test.VALUE

    assert hpc_ray.get([look.remote() for _ in range(3)]) == ["six"] * 3
    [log] = Path(hpc_ray.get_runtime_context().get_temp_dir(), "logs").glob("runtime_env-uv-*.log")
    assert log.read_text().count("this is uv") == 1


def test_setup_hook(session):
    def hook():
        os.environ["HOOKED"] = os.environ["BEFORE"] + str(os.getpid())

    session(runtime_env={"worker_process_setup_hook": hook, "env_vars": {"BEFORE": "b"}})

    @hpc_ray.remote
    def look():
        return os.environ["HOOKED"] == f"b{os.getpid()}"

    assert hpc_ray.get([look.remote() for _ in range(5)]) == [True] * 5
    assert hpc_ray.get_runtime_context().runtime_env["worker_process_setup_hook"] == "hook"


def test_the_session_ends_during_a_setup(session, gate):
    session()
    fields = {"worker_process_setup_hook": lambda: gate.wait("hook")}
    waiting = hpc_ray.remote(variable).options(runtime_env=fields).remote("HOME")
    gate.await_arrivals(1, "hook")
    hpc_ray.shutdown()
    del waiting


def test_the_log_of_a_setup(session):
    session()
    fields = {"pip": ["--no-index", "no-such-package-of-the-test"]}
    with pytest.raises(exceptions.RuntimeEnvSetupError):
        hpc_ray.get(hpc_ray.remote(variable).options(runtime_env=fields).remote("HOME"), timeout=60)
    logs = Path(hpc_ray.get_runtime_context().get_temp_dir(), "logs")
    [log] = logs.glob("runtime_env-pip-*.log")
    assert "no-such-package-of-the-test" in log.read_text()

"""What is public: the names, that each says what it is, and that importing them costs little."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from hpc_ray.interpreter import python_command

hpc_ray = pytest.importorskip("hpc_ray")
if not hasattr(hpc_ray, "init"):
    pytest.skip("needs the built package", allow_module_level=True)

PUBLIC = {
    # functions
    "available_resources", "cancel", "client", "cluster_resources", "cpp_function", "get", "get_actor", "get_gpu_ids",
    "get_runtime_context", "init", "install_as_ray", "is_initialized", "java_actor_class", "java_function", "kill", "method",
    "mpi_comm", "mpi_run", "nodes", "put", "remote", "shutdown", "timeline", "wait",
    # classes
    "ActorClassID", "ActorID", "ClientBuilder", "DynamicObjectRefGenerator", "FunctionID", "JobID", "Language",
    "LoggingConfig", "NodeID", "ObjectID", "ObjectRef", "ObjectRefGenerator", "PlacementGroupID", "TaskID", "UniqueID",
    "WorkerID",
    # modules and constants
    "actor", "exceptions", "util", "SCRIPT_MODE", "WORKER_MODE", "__version__",
}  # fmt: skip
# Packages that `import hpc_ray` leaves alone: heavy, optional, or with threads and state of their own.
NOT_IMPORTED = {
    "torch", "cupy", "mpi4py", "numpy", "asyncio", "concurrent.futures", "multiprocessing", "sqlite3", "psutil", "rich", "click",
    "matplotlib", "sklearn", "pandas", "starlette", "uvicorn",
    "hpc_ray.gcs", "hpc_ray.raylet", "hpc_ray.worker", "hpc_ray.simulator", "hpc_ray.transport.mpi", "hpc_ray.dashboard",
    "hpc_ray.commands", "hpc_ray.util.state", "hpc_ray.launcher.local", "hpc_ray.launcher.world", "hpc_ray.uploads",
    "subprocess", "hashlib", "tempfile", "shutil",
}  # fmt: skip


def test_the_public_names():
    """Whoever adds a name here adds it to the changelog too."""
    assert set(hpc_ray.__all__) == PUBLIC
    assert len(hpc_ray.__all__) == len(set(hpc_ray.__all__))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_exists_and_has_a_docstring(name):
    value = getattr(hpc_ray, name)
    if not isinstance(value, (int, str)):
        assert value.__doc__ and value.__doc__.strip()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_functions_and_methods_are_annotated(name):
    value = getattr(hpc_ray, name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not signature.empty
        assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


def test_version():
    from importlib.metadata import version

    assert hpc_ray.__version__ == version("hpc-ray")


def test_import_is_light():
    code = "import sys; before = set(sys.modules); import hpc_ray; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run(python_command("-c", code), capture_output=True, text=True, timeout=60, check=True)
    imported = set(found.stdout.split())
    if sys.version_info < (3, 11):
        imported.discard("subprocess")  # cloudpickle has it through platform there
    assert "hpc_ray.client.client" in imported
    assert not imported & NOT_IMPORTED


def test_the_package_is_marked_as_typed():
    from importlib.resources import files

    assert (files("hpc_ray") / "py.typed").is_file()


def test_names_that_are_left_out_say_why():
    for name in ("data", "autoscaler", "workflow", "widgets", "internal", "_config"):
        with pytest.raises(AttributeError, match=f"'{name}': .{{20}}"):
            getattr(hpc_ray, name)
    with pytest.raises(AttributeError, match=r"'nonsense'$"):
        hpc_ray.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "call",
    [
        lambda: hpc_ray.java_function("a.B", "c"),
        lambda: hpc_ray.java_actor_class("a.B"),
        lambda: hpc_ray.cpp_function("f"),
    ],
)
def test_other_languages_are_refused(call):
    with pytest.raises(RuntimeError, match=r"from a Python task|in a Python actor"):
        call()
    assert str(hpc_ray.Language.PYTHON) == "PYTHON" and hpc_ray.Language.CPP.value() == 2

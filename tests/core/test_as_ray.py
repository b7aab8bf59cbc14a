"""``import ray`` as hpc_ray, in drivers and workers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpc_ray.interpreter import python_command

PROGRAM = """
import sys
import ray, ray.util.queue
from ray._raylet import ObjectRef, ObjectRefGenerator
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
import hpc_ray

assert ray.remote is hpc_ray.remote and ray.util.queue is hpc_ray.util.queue
assert hpc_ray.util.queue.__spec__.name == "hpc_ray.util.queue"
assert ray.__version__.startswith("2.") and hpc_ray.__version__ != ray.__version__
assert ObjectRef is hpc_ray.ObjectRef and ObjectRefGenerator is hpc_ray.ObjectRefGenerator
assert ray.__commit__ == hpc_ray.__commit__
ray.init(num_cpus=1)

class Mine(ray.exceptions.RayError):
    pass

@ray.remote
def inside():
    import ray
    from ray.util.queue import Queue
    return [type(ray).__name__, ray.__version__, Queue.__module__, ray.get(ray.put(3))]

@ray.remote
def outside():  # uses the program's own import
    return ray.get(ray.put(4))

@ray.remote
def fail():
    raise Mine("mine")

print(ray.get(inside.remote()), ray.get(outside.remote()))
try:
    ray.get(fail.remote())
except Mine as error:
    print(isinstance(error, RayTaskError), isinstance(error, hpc_ray.exceptions.RayTaskError))
print(__name__, sys.argv[1:], hpc_ray.install_as_ray())
"""
SHOWN = ["['_Ray', '2.60.0', 'hpc_ray.util.queue', 3] 4", "True True", "__main__ ['a', 'b'] None"]
INSTALL = "import hpc_ray; hpc_ray.install_as_ray()\n"


@pytest.mark.parametrize("way", ["call", "run", "run on two nodes"])
def test_programs_for_ray(way, tmp_path):
    path = tmp_path / "program.py"
    path.write_text((INSTALL if way == "call" else "") + PROGRAM)
    command = [sys.executable] if way == "call" else python_command("-m", "hpc_ray.launcher.cli", "run", "--as-ray", "-q")
    nodes = ["-n", "2", "--nodes", "2"] if "nodes" in way else []
    found = subprocess.run([*command, *nodes, str(path), "a", "b"], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert found.stdout.splitlines() == SHOWN, found.stderr
    assert "Warning" not in found.stderr


LIBRARY = """
import hpc_ray
hpc_ray.install_as_ray()
def helper():
    import ray
    return ray.__name__, ray.get(ray.put(3))
"""

USER = """
import ray
ray.init(num_cpus=1)
@ray.remote
def uses():
    import library
    return library.helper()
print(ray.get(uses.remote()))
"""


def test_a_library_may_install_it_too(tmp_path):
    """In a worker as well, which has it from its start."""
    (tmp_path / "library.py").write_text(LIBRARY)
    found = python(INSTALL + USER, tmp_path)
    assert found.stdout == "('ray', 3)\n", found.stderr


def python(code, tmp_path):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (INSTALL + "import ray.train", "ModuleNotFoundError: No module named 'ray.train': hpc_ray stands in for Ray Core"),
        (INSTALL + "import ray.nothing", "ModuleNotFoundError: No module named 'ray.nothing'"),
        (INSTALL + "import ray; ray.nothing", "AttributeError: module 'ray' (which is hpc_ray here) has no attribute 'nothing'"),
        (INSTALL + "from ray.data import from_items; from_items([1])", "RuntimeError: ray.data.from_items is not there"),
        ("import sys; sys.modules['ray'] = sys\n" + INSTALL, "RuntimeError: Ray itself has been imported"),
        ("import hpc_ray; hpc_ray.init(num_cpus=1); hpc_ray.install_as_ray()", "RuntimeError: call hpc_ray.install_as_ray() before"),
    ],
)
def test_what_is_not_there(code, error, tmp_path):
    found = python(code, tmp_path)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith(error), found.stderr

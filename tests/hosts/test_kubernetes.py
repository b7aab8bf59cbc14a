"""The MPIJob of the examples on hosts in a box instead of pods: the launcher's own command and program, with a hostfile such as the
operator writes, and an agent instead of ssh."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "testbed"))
import boxes

from hpc_ray.launcher import submission

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra test)")
pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def hosts() -> Iterator[boxes.Hosts]:
    problem = boxes.missing()
    if problem:
        pytest.skip(problem)
    made = boxes.Hosts(2)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture
def folder() -> Iterator[Path]:
    """That all hosts see."""
    parent = boxes.ROOT / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def test_the_launchers_command(hosts, folder):
    program, job = yaml.safe_load_all((boxes.ROOT / "examples" / "kubernetes" / "mpijob.yaml").read_text())
    (launcher,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    (folder / "pi.py").write_text(program["data"]["pi.py"])
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    line = shlex.join([*launcher["command"], *launcher["args"]])
    line = line.replace("/program/", f"{folder}/").replace("/etc/mpi/hostfile", f"{folder}/hostfile")
    if "Open MPI" not in submission.mpi_library():
        pytest.skip("the manifest is for Open MPI")
    environment = dict(hosts.environment, PRTE_MCA_plm_ssh_agent=hosts.do("agent").strip())
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = hosts.on(0, "sh", "-c", f"exec {line}")
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "pi is about 3.1" in ended.stdout and ended.stdout.rstrip().endswith("says node1, node2"), ended.stdout + ended.stderr
    assert [what for host in range(3) for what in hosts.left(host)] == []

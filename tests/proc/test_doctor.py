"""``hpc-ray doctor`` on this machine: its questions are asked, none hangs, and under mpirun the ranks answer as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_ray.launcher import facts, world

try:
    MPIRUN = world.find_mpirun()
except Exception:
    MPIRUN = None
HPC_RAY = str(Path(sys.executable).with_name("hpc-ray"))
needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no MPI is installed")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


@needs_mpi
def test_this_machine():
    done = run(HPC_RAY, "doctor", "--json")
    report = json.loads(done.stdout)
    topics = [row["topic"] for row in report["findings"]]
    assert report["ok"] == (done.returncode == 0), done.stderr
    assert {"Python", "MPI", "mpirun", "threads", "fabric", "shared memory", "/dev/shm", "machine", "session folder"} <= set(topics)
    assert [row for row in report["findings"] if row["topic"] in ("MPI", "mpirun", "threads") and row["level"] == "error"] == []


@needs_mpi
def test_the_table():
    done = run(HPC_RAY, "doctor", COLUMNS="200")
    assert "✓  Python" in done.stdout and "1 host, 0 errors" in done.stdout, done.stdout + done.stderr


@pytest.mark.each_mpi
@needs_mpi
@pytest.mark.links
def test_ranks_answer_as_one():
    line = world.mpirun_command(MPIRUN, 2, [HPC_RAY, "doctor", "--json"], passed=())
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, env=world.under_root(dict(os.environ)))
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], done.stderr
    assert len(report["hosts"]) == 1
    assert sum(row["topic"] == "Python" for row in report["findings"]) == 1


def test_a_world_that_does_not_come_together():
    """The launcher's variables of one rank of two; the other one never comes."""
    before = set(os.listdir("/dev/shm"))
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    done = run(HPC_RAY, "doctor", "--json", "--limit-s", "30", **variables)
    assert done.returncode == 1
    if done.stdout:
        assert "do not belong together" in json.loads(done.stdout)["findings"][0]["text"]
    else:
        assert "have not come together within 30 s" in done.stderr
    assert set(os.listdir("/dev/shm")) <= before


def test_a_library_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "mpi4py.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert facts.mpi(0.5)["problem"] == "no answer within 0.5 s"


def test_a_library_that_crashes_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)  # it would have more to say
    found = facts.gpus(30.0)
    assert found["ids"] == ["0"] and "exit code -6" in found["cuda"]["problem"]


def test_programs_that_are_not_there():
    assert facts.ask(["/no/such/program"], 1.0) == ("", "/no/such/program cannot be run: No such file or directory")

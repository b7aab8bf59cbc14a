"""Programs whose results on Ray are known, in a job of two hosts: those that lose nodes, and place groups."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from slurm_site import HPC_RAY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(170)]

RUNNER = str(Path(__file__).parents[1] / "conformance" / "runner.py")


@pytest.mark.thorough
def test_cases_of_clusters_by_srun(slurm):
    shared = slurm.folder / "conformance"  # the cases' own files: tasks on the other host must see them
    shared.mkdir()
    launch = shlex.join(["env", "-u", "TMPDIR", "srun", f"--mpi={slurm.mpi}", "--cpus-per-task=2", HPC_RAY, "run", "--quiet"])
    check = [RUNNER, "check", "--engine", "hpc_ray", "--only", "fault_tolerance", "--only", "placement_groups", "--launch", launch]
    allocation = ["salloc", "-N2", "-c2", "--ntasks-per-node=1", "env", f"TMPDIR={shared}"]
    ended = slurm.run(*allocation, sys.executable, *check, timeout_s=160)
    assert ended.returncode == 0 and ", 0 failed" in ended.stdout, ended.stdout + ended.stderr

"""``hpc-ray doctor`` in jobs: every node is looked at."""

from __future__ import annotations

import json

import pytest
from slurm_site import HPC_RAY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def findings(report, topic):
    return [row for row in report["findings"] if row["topic"] == topic]


@pytest.mark.parametrize("launch", ["salloc", pytest.param("srun", marks=pytest.mark.thorough)])
def test_all_nodes(slurm, launch):
    """In an allocation it starts a rank on each node by itself; in ranks it is one of them."""
    line = ["salloc", "-N3"] if launch == "salloc" else ["srun", f"--mpi={slurm.mpi}", "-N3", "--ntasks-per-node=2"]
    ended = slurm.run(*line, HPC_RAY, "doctor", "--json", timeout_s=100)
    report = json.loads(ended.stdout)
    assert ended.returncode == 0 and report["ok"], ended.stdout + ended.stderr
    assert len(report["hosts"]) == 3
    assert findings(report, "versions")[0]["text"].endswith("the same on 3 hosts")
    assert findings(report, "clocks")[0]["level"] == "ok"
    assert findings(report, "Slurm")[0]["hosts"] == report["hosts"]
    assert f"--mpi={slurm.mpi}" in findings(report, "srun")[0]["text"]
    assert findings(report, "threads")


def test_the_wrong_pmi(slurm):
    ended = slurm.run("srun", "--mpi=none", "-N2", HPC_RAY, "doctor", "--json")
    report = json.loads(ended.stdout)
    assert not report["ok"] and ended.returncode == 1
    assert "do not belong together" in findings(report, "ranks")[0]["text"]

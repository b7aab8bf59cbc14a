"""The Slurm that these tests need: one that is here, with at least two idle hosts of the files that this one has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skips where there is no Slurm to submit to."""
    if shutil.which("sbatch") is None:
        pytest.skip("there is no sbatch on this host")
    try:
        answer = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.skip("Slurm does not answer")
    if answer.returncode or len(set(answer.stdout.split())) < 2:
        pytest.skip(f"Slurm has not two idle hosts: {answer.stderr.strip() or answer.stdout.split()}")


@pytest.fixture
def shared(slurm: None) -> Path:
    """A folder that all hosts see: below this one, or HPC_RAY_SLURM_TEST_DIR."""
    folder = Path(os.environ.get("HPC_RAY_SLURM_TEST_DIR", Path(__file__).parents[2] / "build" / "slurm-tests"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder

"""The Slurm of these tests: in a box of their own, which they bring up; or the site's, where HPC_RAY_SLURM_TEST_DIR names a folder that
all its hosts see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "testbed"))
import boxes
from slurm_site import Slurm

SITE = "HPC_RAY_SLURM_TEST_DIR"


def _site() -> str:
    """Why the site's Slurm cannot be used."""
    if shutil.which("sbatch") is None:
        return "there is no sbatch on this host"
    try:
        answer = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "Slurm does not answer"
    few = answer.returncode or len(set(answer.stdout.split())) < 2
    return f"Slurm has not two idle hosts: {answer.stderr.strip() or answer.stdout.split()}" if few else ""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """With at least two hosts. Skips, with the reason, where there can be none."""
    site = os.environ.get(SITE, "")
    problem = _site() if site else boxes.missing("slurmctld", "slurmd", "srun", "sbatch", "munged")
    if problem:
        pytest.skip(problem)
    parent = Path(site or boxes.ROOT / "build" / "slurm-tests")
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    folder.chmod(0o755)
    box = None if site else boxes.SlurmBox(3)
    try:
        yield Slurm(folder, box)
    finally:
        if box is not None:
            box.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def box(slurm: Slurm) -> boxes.SlurmBox:
    """For tests that break hosts or look into them."""
    if slurm.box is None:
        pytest.skip(f"it needs hosts of its own, but {SITE} names a site")
    return slurm.box

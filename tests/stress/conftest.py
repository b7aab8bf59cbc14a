"""Stress tests: real processes, real deaths. ``HPC_RAY_STRESS=20`` repeats each twenty times as often."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers import ``workloads`` by its name, as a driver's own module
import workloads

import hpc_ray as ray


@pytest.fixture(scope="session", autouse=True)
def _own_folder(tmp_path_factory):
    """Sessions of these tests lie apart, so that others on this machine are not taken for leftovers."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(autouse=True)
def _nothing_left(_own_folder):
    """After each test: no process, session folder, shared-memory file or zombie of ours (FORK-1)."""
    before = workloads.Traces.now()
    yield
    ray.shutdown()
    workloads.eventually(lambda: workloads.Traces.now().beyond(before), [], timeout_s=20)


@pytest.fixture
def cluster():
    """A session of one node; at its end nothing may be held by anyone."""
    ray.init(num_cpus=4)
    yield ray
    if ray.is_initialized():
        workloads.assert_all_released()
        ray.shutdown()

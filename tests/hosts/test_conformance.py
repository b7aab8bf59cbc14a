"""Programs whose results on Ray are known, where nodes are hosts: those that lose nodes, place groups, and leave actors behind."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import world

CONFORMANCE = Path(__file__).parents[1] / "conformance"
NAMES = ["node1", "node2", "node3"]


@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    ("how", "cases"),
    [
        ("mpirun", ["fault_tolerance"]),
        pytest.param("mpirun", ["placement_groups", "actor_names/detached*"], marks=pytest.mark.thorough),
        pytest.param("tcp", ["fault_tolerance"], marks=pytest.mark.thorough),
    ],
    ids=["mpirun", "mpirun-more", "tcp"],
)
def test_cases_of_clusters(hosts, how, cases):
    agent = hosts.tool("agent")
    variables: dict[str, str] = {}
    if how == "mpirun":
        try:
            mpirun = world.find_mpirun()
        except LaunchError as error:
            pytest.skip(str(error))
        options, variables = world.host_options(mpirun, NAMES, 3, agent)
        launch = world.mpirun_command(mpirun, 3, ["hpc-ray", "run", "--quiet"], options, passed=())
    else:
        launch = ["hpc-ray", "run", "--quiet", "--survive-nodes", "--hosts", ",".join(NAMES), "--agent", agent]
    shared = hosts.folder / "conformance"  # the cases' own files: tasks on other hosts must see them
    shared.mkdir(exist_ok=True)
    line = shlex.join(["env", "-u", "TMPDIR", *map(str, launch)])
    chosen = [word for case in cases for word in ("--only", case)]
    check = [sys.executable, CONFORMANCE / "runner.py", "check", "--engine", "hpc_ray", *chosen, "--launch", line]
    process = hosts.start(1, *check, TMPDIR=str(shared), **world.under_root(variables))
    out, err = process.communicate(timeout=160)
    assert process.returncode == 0 and ", 0 failed" in out, out + err
    hosts.await_nothing_left()

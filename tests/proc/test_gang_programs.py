"""Gangs of whole programs: nothing of them is left. No session runs beside them in this process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import world

try:
    MPIRUN = world.find_mpirun()
except LaunchError:
    pytest.skip("no mpirun is installed", allow_module_level=True)


IDLE = """
import os, time
import hpc_ray as ray
ray.init(num_cpus=2, _system_config={"gang_idle_s": 0.2})
@ray.remote(mpi_ranks=2)
def pid():
    ray.mpi_comm().barrier()
    return os.getpid()
first = ray.get(pid.remote())
deadline = time.monotonic() + 30
while any(os.path.exists(f"/proc/{one}") for one in first):
    assert time.monotonic() < deadline, "idle ranks stay"
    time.sleep(0.01)
print("gone", not set(first) & set(ray.get(pid.remote())))
"""


@pytest.mark.usefixtures("no_leaks")
def test_idle_ranks_leave_in_order(tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", IDLE], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "gone True\n"), done.stderr
    assert done.stderr == ""


IN_A_WORLD = """
import hpc_ray as ray
ray.init()
@ray.remote(mpi_ranks=2, num_cpus=0)
def node():
    return ray.mpi_comm().allreduce(1), ray.get_runtime_context().get_node_id()
strategies = [ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(n["NodeID"], soft=False) for n in ray.nodes()]
found = ray.get([node.options(scheduling_strategy=one).remote() for one in strategies])
for ranks, strategy in zip(found, strategies):
    print(ranks == [(2, strategy.node_id)] * 2)
"""


@pytest.mark.usefixtures("no_leaks")
def test_gangs_on_the_nodes_of_a_launched_world(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(IN_A_WORLD)
    command = [sys.executable, "-P", "-m", "hpc_ray.launcher.cli", "run", "--nodes", "2", str(program)]
    line = world.mpirun_command(MPIRUN, 2, command, passed=())
    environment = world.under_root(dict(os.environ))
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr

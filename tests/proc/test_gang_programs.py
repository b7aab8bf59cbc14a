"""Gangs of whole programs: nothing of them is left. No session runs beside them in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

import hpc_ray as ray
from hpc_ray.cluster_utils import Cluster
from hpc_ray.exceptions import ActorDiedError, GangError, LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import world
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
    done = subprocess.run(python_command("-c", IDLE), capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "gone True\n"), done.stderr
    assert done.stderr == ""


SHARING = """
import os
import hpc_ray as ray
from hpc_ray.launcher import host
ray.init(num_cpus=1)  # so that one leader has both calls
@ray.remote(mpi_ranks=1)
def yields():
    return os.environ.get("OMPI_MCA_mpi_yield_when_idle")
own, shared = (ray.get(yields.options(num_cpus=cpus).remote()) for cpus in (1, 0.5))
name = "OMPI_MCA_mpi_yield_when_idle"
chosen = ray.mpi_run(["printenv", name], ranks=1, num_cpus=0.25, env={name: "0"}).stdout.strip()
ray.shutdown()
ray.init(num_cpus=host.cpu_count() + 1)
print(own, shared, chosen, ray.get(yields.remote()))
"""


@pytest.mark.skipif(MPIRUN.family != "openmpi", reason="the setting is one of Open MPI")
def test_ranks_that_share_a_cpu_let_others_look():
    """Half a CPU each, or more CPUs booked than there are; the word of who runs a program counts."""
    done = subprocess.run(python_command("-c", SHARING), capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "[None] ['1'] 0 ['1']\n"), done.stderr


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


@pytest.mark.each_mpi
@pytest.mark.usefixtures("no_leaks")
def test_gangs_on_the_nodes_of_a_launched_world(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(IN_A_WORLD)
    command = python_command("-m", "hpc_ray.launcher.cli", "run", "--nodes", "2", str(program))
    line = world.mpirun_command(MPIRUN, 2, command, passed=())
    environment = world.under_root(dict(os.environ))
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


@pytest.mark.usefixtures("no_leaks")
def test_a_node_that_dies_takes_its_gangs_along(gate):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}, connect=True)
    try:
        other = cluster.add_node(num_cpus=1)
        head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

        @ray.remote(num_cpus=0, scheduling_strategy=head)
        def calls():
            @ray.remote(mpi_ranks=2, max_retries=0)
            def waits():
                gate.arrive("rank")
                ray.mpi_comm().recv()

            ray.get(waits.remote())

        @ray.remote(mpi_ranks=2, max_restarts=-1)
        class Waits:
            def wait(self):
                gate.arrive("actor")
                ray.mpi_comm().recv()

        reference = calls.remote()
        gate.await_arrivals(2, "rank")
        cluster.remove_node(other, allow_graceful=False)
        with pytest.raises(GangError, match="rank"):
            ray.get(reference)
        other = cluster.add_node(num_cpus=1)
        actor = Waits.options(max_restarts=0).remote()
        reference = actor.wait.remote()
        gate.await_arrivals(2, "actor")
        cluster.remove_node(other, allow_graceful=False)
        with pytest.raises(ActorDiedError, match=r"rank \d of 2|its node died"):
            ray.get(reference)
    finally:
        ray.shutdown()
        cluster.shutdown()


EXAMPLE = Path(__file__).parents[2] / "examples" / "parallel_solver.py"


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("how", [*(pytest.param(how, marks=pytest.mark.thorough) for how in ("one node", "two nodes")), "mpirun"])
def test_the_example(how, tmp_path):
    run = python_command("-m", "hpc_ray.launcher.cli", "run", "--nodes", "2")
    command = {
        "one node": [sys.executable, str(EXAMPLE)],
        "two nodes": [*run, "-n", "2", str(EXAMPLE), "--ranks-per-node", "2"],
        "mpirun": world.mpirun_command(MPIRUN, 4, [*run, str(EXAMPLE)], passed=()),
    }[how]
    environment = world.under_root(dict(os.environ))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same as in one piece: True") == 2
    assert done.stdout.count("on 4 ranks") == 2

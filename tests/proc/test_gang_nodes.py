"""Gangs over several nodes, virtual ones of this host: where their ranks lie, and what becomes of them. The same file runs under
Open MPI and under MPICH."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

import numpy as np

import hpc_ray as ray
from hpc_ray.exceptions import GangError, LaunchError, TaskCancelledError
from hpc_ray.launcher import world

try:
    MPIRUN = world.find_mpirun()
except LaunchError:
    pytest.skip("no mpirun is installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def session(no_leaks_in_module):
    """Two nodes of two CPUs and two GPUs that are none."""
    ray.init(num_nodes=2, num_cpus=2, num_gpus=2, log_to_driver=False)
    yield ray
    ray.shutdown()


@ray.remote(mpi_ranks=4)
def spread(array):
    comm = ray.mpi_comm()
    return ray.get_runtime_context().get_node_id(), float(comm.allreduce(array.sum())), np.full(100_000, comm.rank)


def free_cpus():
    return ray.available_resources().get("CPU", 0)


def test_a_gang_that_is_larger_than_a_node(session, eventually):
    array = np.ones(200_000)  # comes to the other node's ranks through their node's arena
    first = ray.get(spread.remote(ray.put(array)))
    nodes = [node for node, _, _ in first]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    for rank, (_, total, made) in enumerate(first):
        assert total == 800_000
        assert (made == rank).all()
    assert [total for _, total, _ in ray.get(spread.remote(np.ones(2)))] == [8.0] * 4
    eventually(lambda: free_cpus() == 4, "what the gang had is free")


@pytest.mark.each_mpi
def test_ranks_on_each_node(session):
    @ray.remote(mpi_ranks=2)
    def where():
        return ray.get_runtime_context().get_node_id()

    assert len(set(ray.get(where.remote()))) == 1
    assert len(set(ray.get(where.options(mpi_ranks_per_node=1).remote()))) == 2
    assert len(set(ray.get(where.options(mpi_ranks_per_node=1, num_cpus=0).remote()))) == 2
    three = ray.get(where.options(mpi_ranks=3, mpi_ranks_per_node=2).remote())
    assert three[0] == three[1] != three[2]
    a, b = where.options(mpi_ranks_per_node=1, num_returns="per_rank").remote()
    assert ray.get(a) != ray.get(b)


def test_what_cannot_lie_so(session):
    def f():
        pass

    with pytest.raises(ValueError, match="give mpi_ranks as well"):
        ray.remote(mpi_ranks_per_node=2)(f)
    with pytest.raises(ValueError, match="at least 1"):
        ray.remote(mpi_ranks=2, mpi_ranks_per_node=0)(f)
    with pytest.raises(ValueError, match="2 ranks of a node makes"):
        ray.remote(mpi_ranks=4, mpi_ranks_per_node=2, num_gpus=0.25)(f)
    with pytest.raises(ValueError, match=r"room for 4: 2, 2 on 2 nodes"):
        spread.options(mpi_ranks=5).remote(1)
    with pytest.raises(ValueError, match="1 on each node"):
        spread.options(mpi_ranks=3, mpi_ranks_per_node=1).remote(1)


def test_each_rank_has_its_gpus(session):
    @ray.remote(mpi_ranks=4, num_gpus=1)
    def gpus():
        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"], ray.get_gpu_ids()

    found = ray.get(gpus.remote())
    assert len({(node, visible) for node, visible, _ in found}) == 4
    assert [int(visible) for _, visible, _ in found] == [ids[0] for _, _, ids in found]
    halves = ray.get(gpus.options(num_gpus=0.5, mpi_ranks_per_node=2).remote())
    assert len({(node, visible) for node, visible, _ in halves}) == 2


def test_all_or_nothing(session, gate, eventually):
    @ray.remote
    def holds():
        gate.wait("holder")

    @ray.remote(mpi_ranks=4)
    def runs():
        gate.arrive("gang")

    holder = holds.remote()
    gate.await_arrivals(1, "holder")
    gang = runs.remote()
    assert ray.wait([gang], timeout=0.3)[0] == []
    assert (gate.arrived("gang"), free_cpus()) == (0, 3)  # what it waits for it does not hold
    other = ray.remote(lambda: "past it").remote()
    assert ray.get(other) == "past it"
    gate.open("holder")
    ray.get([holder, gang])
    assert gate.arrived("gang") == 4


def test_one_that_waits_for_room_can_be_cancelled(session, gate, eventually):
    @ray.remote(num_cpus=2)
    def holds():
        gate.wait("holder")

    holder = holds.remote()
    gate.await_arrivals(1, "holder")
    gang = spread.remote(np.ones(1))
    eventually(lambda: any(row["state"] == "PENDING" for row in ray.util.placement_group_table().values()), "it waits")
    ray.cancel(gang)
    with pytest.raises(TaskCancelledError):
        ray.get(gang)
    eventually(lambda: not ray.util.placement_group_table(), "it waits no more")
    gate.open("holder")
    ray.get(holder)


def test_two_at_once_and_a_failure_of_one(session, gate):
    @ray.remote(mpi_ranks=2, mpi_ranks_per_node=1)
    def stays(name, dies):
        comm = ray.mpi_comm()
        gate.arrive(name)
        if comm.rank == 0:
            gate.wait(f"{name} may go")
        if dies and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.barrier()
        return os.getpid()

    good, bad = stays.remote("good", False), stays.remote("bad", True)
    gate.await_arrivals(2, "good")
    gate.await_arrivals(2, "bad")
    gate.open("bad may go")
    with pytest.raises(GangError, match=r"rank \d of 2"):
        ray.get(bad)
    gate.open("good may go")
    assert sorted(ray.get(good)) == sorted(gate.pids("good"))


def test_a_leader_that_is_killed_takes_ranks_and_room_along(session, gate, eventually):
    @ray.remote(mpi_ranks=2, mpi_ranks_per_node=1, max_retries=0)
    def waits():
        gate.arrive("rank")
        gate.wait("never")

    reference = waits.remote()
    gate.await_arrivals(2, "rank")
    ranks = gate.pids("rank")
    (leader,) = {int(Path(f"/proc/{pid}/environ").read_bytes().partition(b"HPC_RAY_WORKER=")[2].split(b"\0")[0]) for pid in ranks}
    os.kill(leader, signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(reference)
    for pid in ranks:
        eventually(lambda pid=pid: gone(pid), "a rank ends with its leader")
    eventually(lambda: free_cpus() == 4, "what the gang had is free")


def gone(pid):
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@ray.remote(mpi_ranks=4)
class Sum:
    def __init__(self, start):
        self.value = start * ray.mpi_comm().rank

    def total(self):
        return ray.mpi_comm().allreduce(self.value)

    def where(self):
        return ray.get_runtime_context().get_node_id()


def test_an_actor(session, eventually):
    actor = Sum.remote(10)
    assert ray.get(actor.total.remote()) == [60] * 4
    assert len(set(ray.get(actor.where.remote()))) == 2
    assert free_cpus() == 0  # for its life
    del actor
    eventually(lambda: free_cpus() == 4, "what it had is free")


def test_programs(session):
    found = ray.mpi_run([sys.executable, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1))"], ranks=4)
    assert (found.returncode, sorted(found.stdout)) == (0, ["\n"] * 4 + ["4"] * 4), found.stderr  # lines may be written in pieces
    each = ray.mpi_run(["sh", "-c", "echo $OF_MINE"], ranks=2, ranks_per_node=1, env={"OF_MINE": "yes"})
    assert each.stdout.split() == ["yes", "yes"]
    with pytest.raises(ValueError, match="room for 4"):
        ray.mpi_run(["ls"], ranks=5)

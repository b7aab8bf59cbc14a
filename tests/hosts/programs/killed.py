"""Gangs over all hosts that end badly, in a session that goes on: on which hosts MPI had files in shared memory, and which are left."""

import os
import socket
import time

import hpc_ray as ray
from hpc_ray.exceptions import RayError
from hpc_ray.launcher import mpi_files
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

IN_TIME_S = 15.0

ray.init()
ranks = 2 * len(ray.nodes())


def files():
    return {name for name in os.listdir(mpi_files.SHARED_MEMORY) if not name.startswith("hpc_ray")}


@ray.remote(num_cpus=0)
def left():
    """What is still there in the end."""
    deadline = time.monotonic() + IN_TIME_S
    while (found := files()) and time.monotonic() < deadline:
        time.sleep(0.1)  # nobody tells of files that go
    return found


@ray.remote(mpi_ranks=ranks, mpi_ranks_per_node=2, num_cpus=0.25)
class Gang:
    def files(self):
        return socket.gethostname() if files() else ""

    def ends(self, rank):
        if ray.mpi_comm().rank == rank:
            os._exit(1)
        sum(range(10**11))  # does not listen


had = set()
for rank in (None, 0, ranks - 1):
    gang = Gang.remote()
    had.update(filter(None, ray.get(gang.files.remote())))
    call = gang.ends.remote(-1 if rank is None else rank)
    if rank is None:
        ray.kill(gang)
    try:
        ray.get(call)
    except RayError as error:
        print("ended", type(error).__name__)
print("had", *sorted(had))
nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
print("left", *set().union(*ray.get([left.options(scheduling_strategy=node).remote() for node in nodes])))

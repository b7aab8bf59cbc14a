"""A gang over all hosts, called from a task on each of them; an actor that loses a rank; a program. Says RIGHT if all is as it must be."""

import os
import socket

import numpy as np
import pytest

import hpc_ray as ray
from hpc_ray.exceptions import ActorDiedError
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init()
names = sorted(node["NodeManagerHostname"] for node in ray.nodes())
size = len(names)


@ray.remote(mpi_ranks=2 * size, mpi_ranks_per_node=2, num_cpus=0.25)
def summed(array):
    return socket.gethostname(), float(ray.mpi_comm().allreduce(array.sum())), np.full(50_000, ray.mpi_comm().rank)


@ray.remote(num_cpus=0)
def calls():
    parts = ray.get(summed.remote(np.ones(100_000)))
    hosts = [part[0] for part in parts]
    assert sorted(hosts) == sorted(2 * names) and hosts[::2] == hosts[1::2], hosts
    assert all(total == 200_000 * size and (array == rank).all() for rank, (_, total, array) in enumerate(parts))
    return socket.gethostname()


@ray.remote(mpi_ranks=size, mpi_ranks_per_node=1, num_cpus=0.25, runtime_env={"env_vars": {"OF_THE_GANG": "yes"}})
class Gang:
    def where(self):
        return socket.gethostname(), os.environ["OF_THE_GANG"]

    def dies_on(self, rank):
        if ray.mpi_comm().rank == rank:
            os._exit(1)
        ray.mpi_comm().barrier()


nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
assert sorted(ray.get(calls.options(scheduling_strategy=node).remote()) for node in nodes) == names  # one gang at a time
gang = Gang.remote()
assert sorted(ray.get(gang.where.remote())) == [(name, "yes") for name in names]
with pytest.raises(ActorDiedError, match=f"of {size} of Gang"):
    ray.get(gang.dies_on.remote(size - 1))
done = ray.mpi_run(["hostname"], ranks=size, ranks_per_node=1, num_cpus=0.25)
assert sorted(done.stdout.split()) == names, done
print("RIGHT", *names)

"""Ends while ranks of a step ("gang" or "program"), which another host has started, are busy on all hosts and do not listen."""

import os
import socket
import sys

import hpc_ray as ray
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HERE, UP = socket.gethostname(), "/tmp/up"
BUSY = """
from mpi4py import MPI
import contextlib, os, socket
if socket.gethostname() == here:
    with contextlib.suppress(FileNotFoundError):  # the other rank of this host has told already
        os.close(os.open(up, os.O_WRONLY))
sum(range(10**11))  # holds the interpreter's lock
"""

ray.init()
ranks = {"mpi_ranks": 2 * len(ray.nodes()), "mpi_ranks_per_node": 2, "num_cpus": 0.25}
other = next(node for node in ray.nodes() if node["NodeManagerHostname"] != HERE)


@ray.remote(**ranks)
def gang():
    exec(BUSY, {"here": HERE, "up": UP})


@ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(other["NodeID"], soft=False))
def starts(how):
    if how == "gang":
        ray.get(gang.remote())
    else:
        code = f"here, up = {HERE!r}, {UP!r}\n{BUSY}"
        ray.mpi_run([sys.executable, "-c", code], **{name.removeprefix("mpi_"): value for name, value in ranks.items()})


os.mkfifo(UP)
call = starts.remote(sys.argv[1])
open(UP).close()  # a rank of this host is up, and so all are
os.unlink(UP)
print("READY")

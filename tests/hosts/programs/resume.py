"""The first launch leaves a detached actor and waits for the session's end; the second one finds the actor, on the hosts that are left."""

import os
import sys
import time

import hpc_ray as ray

ray.init(namespace="kept")
before = int(os.environ["HPC_RAY_RELAUNCHED"])


@ray.remote(num_cpus=0)
class Keeper:
    def ping(self):
        return "pong"


if before == 0:
    keeper = Keeper.options(name="keeper", lifetime="detached").remote()
    assert ray.get(keeper.ping.remote()) == "pong"
    print("READY", flush=True)
    while True:
        ray.get(keeper.ping.remote(), timeout=60)
        time.sleep(0.05)
assert ray.get(ray.get_actor("keeper").ping.remote(), timeout=60) == "pong"
print("resumed on", *sorted(node["NodeManagerHostname"] for node in ray.nodes()), *sys.argv[1:], flush=True)

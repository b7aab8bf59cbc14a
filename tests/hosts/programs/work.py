"""Says READY once objects lie on all nodes; has work for a while, and, with "watch", goes on until a node is lost. All results are
checked; the last line is "right", with the hosts that have worked."""

import os
import socket
import sys
import time

import numpy as np

import hpc_ray as ray

ray.init()


@ray.remote(num_cpus=1, max_retries=5, scheduling_strategy="SPREAD")
def make(number):
    return np.full(200_000, number)


@ray.remote(num_cpus=1, max_retries=5, scheduling_strategy="SPREAD")
def work(number):
    time.sleep(0.2)
    return number, socket.gethostname()


@ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)
class Counter:
    def __init__(self):
        self.number = 0

    def where(self):
        return socket.gethostname()


def alive():
    return sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])


count = len(alive())
print("nodes", *alive(), flush=True)
data = [make.remote(number) for number in range(4 * count)]
ray.wait(data, num_returns=len(data), fetch_local=False)
nodes = [node["NodeID"] for node in ray.nodes()]
strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
actors = [Counter.options(scheduling_strategy=strategy(node, soft=True)).remote() for node in nodes]
assert len(set(ray.get([actor.where.remote() for actor in actors]))) == len(set(alive()))
session = ray.get_runtime_context().gcs_address
print("READY", session, os.getpid(), os.getppid(), flush=True)
hosts = set()
deadline = time.monotonic() + 60
watch = "watch" in sys.argv
while True:
    done = ray.get([work.remote(number) for number in range(6 * count)], timeout=60)
    assert [number for number, _ in done] == list(range(6 * count))
    hosts |= {host for _, host in done}
    if not watch or len(alive()) < count:
        break
    assert time.monotonic() < deadline, "no node was lost"
assert [int(array[0]) for array in ray.get(data, timeout=60)] == list(range(4 * count))
places = ray.get([actor.where.remote() for actor in actors], timeout=60)
assert set(places) <= set(alive()), places
print("right", *sorted(hosts), "alive", *alive(), flush=True)
if "stay" in sys.argv:
    sys.stdin.read()

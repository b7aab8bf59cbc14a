"""A program of a cluster that runs already: waits until it has as many nodes as the first argument says, and works on all of them."""

import socket
import sys
import time

import hpc_ray as ray

ray.init(address="auto")
wanted = int(sys.argv[1])
deadline = time.monotonic() + 30


def alive():
    return sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])


while len(alive()) != wanted:
    assert time.monotonic() < deadline, alive()
    time.sleep(0.02)


@ray.remote(num_cpus=1)
def where():
    time.sleep(0.1)
    return socket.gethostname()


hosts = set()
while len(hosts) < wanted:
    hosts |= set(ray.get([where.options(scheduling_strategy="SPREAD").remote() for _ in range(4 * wanted)], timeout=30))
    assert time.monotonic() < deadline, hosts
print("worked on", *sorted(hosts), "deaths", *[node["NodeManagerHostname"] for node in ray.nodes() if not node["Alive"]])

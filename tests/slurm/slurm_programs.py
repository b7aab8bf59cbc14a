"""Scripts that the jobs of these tests run."""

# Says on how many hosts it is, and ends with 3.
HOSTS = """
import os, socket, sys
import hpc_ray as ray
ray.init(object_store_memory=100 << 20)
@ray.remote
class Host:
    def name(self): return socket.gethostname()
count = int(os.environ["SLURM_JOB_NUM_NODES"])
hosts = [Host.options(num_cpus=1, scheduling_strategy="SPREAD").remote() for _ in range(count)]
print("hosts", len(set(ray.get([host.name.remote() for host in hosts]))), "CPUs", int(ray.cluster_resources()["CPU"]), flush=True)
sys.exit(3)
"""

# Fetches once more from an actor when it is told to end.
DRAINS = """
import hpc_ray as ray, time
ray.init(object_store_memory=100 << 20)
@ray.remote
class Model:
    def save(self): return "saved"
model = Model.remote()
ray.get(model.save.remote())
try:
    print("ready", flush=True)
    time.sleep(1000)
finally:
    print(ray.get(model.save.remote()), flush=True)
"""

# Actors, objects and children of actors on all hosts; does not end by itself, and with "stubborn" not by a signal either.
BUSY = """
import subprocess, sys, time
import numpy as np
import hpc_ray as ray
ray.init(object_store_memory=100 << 20)
@ray.remote
class Busy:
    def make(self):
        self.child = subprocess.Popen(["sleep", "1000"])
        return ray.put(np.ones(2_000_000))
    def work(self): time.sleep(1000)
actors = [Busy.options(num_cpus=1, scheduling_strategy="SPREAD").remote() for _ in range(2)]
refs = ray.get([actor.make.remote() for actor in actors])
print("ready", flush=True)
while True:
    try:
        ray.get([actor.work.remote() for actor in actors])
    except SystemExit:
        if "stubborn" not in sys.argv:
            raise
"""

# Counts on from where an earlier run of the same job was ended.
RESUMES = """
import os, sys, time
import hpc_ray as ray
path = sys.argv[1]
ray.init(object_store_memory=100 << 20)
@ray.remote
class Counter:
    def __init__(self, start): self.n = start
    def add(self):
        self.n += 1
        return self.n
first = not os.path.exists(path)
counter = Counter.remote(0 if first else int(open(path).read()))
try:
    print("begins" if first else "resumes", "at", ray.get(counter.add.remote()), flush=True)
    while first:
        time.sleep(0.1)
finally:
    with open(path, "w") as file:
        file.write(str(ray.get(counter.add.remote())))
print("done", flush=True)
"""

# Session after session, always with the same names, beside others that do the same.
CYCLES = """
import os, sys
import hpc_ray as ray
me, count = sys.argv[1], int(sys.argv[2])
@ray.remote(num_cpus=0.5)
class Keeper:
    def who(self): return me
@ray.remote(num_cpus=0.5)
def who(): return me
for cycle in range(count):
    ray.init(num_cpus=1, object_store_memory=64 << 20, namespace="shared")
    keeper = Keeper.options(name="keeper").remote()
    assert ray.get([who.remote(), ray.get_actor("keeper").who.remote()]) == [me, me]
    assert len(ray.nodes()) == 1
    ray.shutdown()
print(me, "did", count, flush=True)
"""

# Works on all hosts of the job until a file says that it is enough, and says on which it was in the end.
SURVIVES = """
import os, socket, sys, time
import hpc_ray as ray
ray.init(object_store_memory=100 << 20)
while len(ray.nodes()) < int(os.environ["SLURM_JOB_NUM_NODES"]): time.sleep(0.05)
@ray.remote(num_cpus=0.5, max_retries=-1, scheduling_strategy="SPREAD")
def where(seconds):
    time.sleep(seconds)
    return socket.gethostname()
print("begins on", *sorted(set(ray.get([where.remote(0.3) for _ in range(12)]))), flush=True)
under_way = [where.remote(0.3) for _ in range(20)]
while not os.path.exists(sys.argv[1]):
    under_way.append(where.remote(0.1))
    time.sleep(0.1)
found = ray.get(under_way)
print("ends on", *sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]), flush=True)
"""

# The script and a task each start a program that has a cluster of its own.
INNER = """
import os, subprocess, sys
import hpc_ray as ray
ray.init(object_store_memory=100 << 20)
def inner():
    text = "import hpc_ray as ray; ray.init(num_cpus=1, object_store_memory=64 << 20); print(len(ray.nodes()), end='')"
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50).stdout
print("inner", inner(), ray.get(ray.remote(inner).remote()), "outer", len(ray.nodes()), flush=True)
"""

# Works on both hosts, and once more after it has stood still for at least as many seconds as it is told.
STANDS_STILL = """
import sys, time
import numpy as np
import hpc_ray as ray

ray.init()
nodes = [ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]

@ray.remote(num_cpus=0)
class Counter:
    def __init__(self):
        self.count = 0
    def add(self, array):
        self.count += 1
        return array + self.count

counters = [Counter.options(scheduling_strategy=node).remote() for node in nodes]
data = ray.put(np.arange(100_000))
rounds = 0

def round():
    global rounds
    rounds += 1
    for sums in ray.get([counter.add.remote(data) for counter in counters]):
        assert (sums == np.arange(100_000) + rounds).all()

print("ready", len(nodes), flush=True)
before = time.monotonic()
while time.monotonic() < before + float(sys.argv[1]):
    before = time.monotonic()
    round()
for _ in range(100):
    round()
print("went on")
"""

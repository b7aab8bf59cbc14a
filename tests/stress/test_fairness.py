"""Nobody starves: other submitters, short tasks behind long ones, other actors, a driver that does not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import workloads
from workloads import PATIENCE_S

import hpc_ray as ray
from hpc_ray.client import context
from hpc_ray.interpreter import python_command


def test_short_queues_do_not_wait_for_a_long_one(cluster):
    """Two who come late with few tasks are done long before the one with many (LEASE-3, LEASE-5)."""

    @ray.remote
    def work():
        time.sleep(0.01)

    @ray.remote(num_cpus=0)
    class Submitter:
        def run(self, count):
            ray.get([work.remote() for _ in range(count)])
            return time.monotonic()

    long, *short = [Submitter.remote() for _ in range(3)]
    first = long.run.remote(600)
    workloads.eventually(lambda: workloads.node_holdings().get("leases", 0) >= 7, True)  # 3 actors, 4 CPUs
    later = [submitter.run.remote(40) for submitter in short]
    assert ray.wait([first, *later], num_returns=2, timeout=PATIENCE_S)[0] == later
    assert max(ray.get(later)) < ray.get(first, timeout=PATIENCE_S)


def test_a_long_task_holds_nothing_back(cluster):
    """What was sent ahead to a worker whose task turns out long is taken back (TASK-2)."""

    @ray.remote
    def work(path):
        while path and not os.path.exists(path):
            time.sleep(0.005)

    ray.get([work.remote("") for _ in range(200)])  # "it is a short one"
    gate = f"{context.client.config.session_dir}/gate"
    references = [work.remote(gate if i == 50 else "") for i in range(550)]
    _, left = ray.wait(references, num_returns=549, timeout=PATIENCE_S)
    assert left == [references[50]]
    with open(gate, "w"):
        ray.get(left[0], timeout=PATIENCE_S)


def test_a_slow_actor_blocks_itself_only(cluster):
    @ray.remote(num_cpus=0)
    class Actor:
        def wait_for(self, path):
            while not os.path.exists(path):
                time.sleep(0.005)

        def quick(self):
            return 1

    slow, other = Actor.remote(), Actor.remote()
    gate = f"{context.client.config.session_dir}/gate"
    waiting = slow.wait_for.remote(gate)
    behind = slow.quick.remote()
    assert ray.get([other.quick.remote() for _ in range(1000)], timeout=PATIENCE_S) == [1] * 1000
    assert ray.wait([waiting, behind], timeout=0)[0] == []
    with open(gate, "w"):
        ray.get([waiting, behind], timeout=PATIENCE_S)


def test_a_flood_works_off_while_the_driver_sleeps(cluster):
    """100,000 tasks go on though no thread of the driver waits; the arena and the lanes hold them."""

    @ray.remote
    def increment(x):
        return x + 1

    references = [increment.remote(i) for i in range(100_000)]
    workloads.eventually(lambda: len(context.client.tasks.tasks), 0)
    assert ray.get(references) == list(range(1, 100_001))


def _stopped(pid: int, stop: bool) -> None:
    os.kill(pid, signal.SIGSTOP if stop else signal.SIGCONT)


def test_a_stopped_receiver(cluster):
    """90 MB for an actor that does not run: the sender goes on, and all arrives when it runs again (LANE-1)."""

    @ray.remote(num_cpus=0, max_restarts=1, max_task_retries=-1)
    class Actor:
        def pid(self):
            return os.getpid()

        def length(self, data):
            return len(data)

    @ray.remote
    def increment(x):
        return x + 1

    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    _stopped(pid, True)
    references = [actor.length.remote(bytes(30_000)) for _ in range(3000)]
    assert ray.get(increment.remote(1), timeout=PATIENCE_S) == 2
    _stopped(pid, False)
    assert ray.get(references, timeout=PATIENCE_S) == [30_000] * 3000
    _stopped(pid, True)  # and once more, but it dies with its lane full
    references = [actor.length.remote(bytes(30_000)) for _ in range(1000)]
    os.kill(pid, signal.SIGKILL)
    assert ray.get(references, timeout=PATIENCE_S) == [30_000] * 1000
    assert ray.get(actor.pid.remote()) != pid


STOPPED_DRIVER = """
import hpc_ray as ray
ray.init(num_cpus=4)
@ray.remote
def reply(): return bytes(50_000)
references = [reply.remote() for _ in range(5000)]
print("sent", flush=True)
assert [len(data) for data in ray.get(references, timeout=60)] == [50_000] * 5000
print("right", flush=True)
"""


def test_a_stopped_driver():
    """Workers whose replies find no room wait for it, and lose none."""
    process = subprocess.Popen(python_command("-c", STOPPED_DRIVER), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "sent\n"
    _stopped(process.pid, True)
    time.sleep(0.5)
    _stopped(process.pid, False)
    assert process.communicate(timeout=PATIENCE_S)[0] == "right\n"
    assert process.returncode == 0

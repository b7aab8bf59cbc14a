"""A cluster that grows by jobs of its own and shrinks again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from slurm_site import HPC_RAY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

# The head has no CPU. Tasks, then an actor whose object keeps its node, then a group on two nodes.
GROWS = """
import time
import hpc_ray as ray
from hpc_ray.util import placement_group
ray.init(address="auto", log_to_driver=False)
@ray.remote
def where(): time.sleep(1); return ray.get_runtime_context().get_node_id()
@ray.remote
class Keeper:
    def put(self): return [ray.put(bytes(1 << 20))]
print("tasks on", len(set(ray.get([where.remote() for _ in range(20)]))), flush=True)
keeper = Keeper.remote()
[kept] = ray.get(keeper.put.remote())
group = placement_group([{"CPU": 2}] * 2, strategy="STRICT_SPREAD")
ray.get(group.ready())
print("group placed, kept", len(ray.get(kept)), flush=True)
"""

ONE_TASK = """
import hpc_ray as ray
ray.init(address="auto", log_to_driver=False)
print(ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.fixture
def cluster(slurm) -> Iterator[str]:
    """A head with no CPUs on the host that submits; its join file."""
    file = str(slurm.folder / "join")
    started = slurm.run(HPC_RAY, "start", "--join-file", file, "--num-cpus", "0", "--object-store-memory", "100000000")
    assert started.returncode == 0, started.stderr
    yield file
    slurm.run(HPC_RAY, "stop")
    slurm.await_nothing_left(30)


@contextlib.contextmanager
def autoscaled(slurm, file: str, *options: str):
    words = [HPC_RAY, "autoscale", "--join-file", file, "-c", "2", "--output", f"{slurm.folder}/node-%j.out", *options]
    with slurm.start(*words) as child:
        try:
            yield child
        finally:
            end(slurm, child)


def end(slurm, child) -> int:
    """SIGTERM to the command itself: what runs it on the box's host passes none on. Its exit code."""
    slurm.run("pkill", "-TERM", "-f", "hpc-ray autoscale")
    return child.wait(30)


def await_words(child, pattern: str, count: int = 1) -> list[str]:
    """What it says until ``count`` lines match."""
    said: list[str] = []
    while sum(re.search(pattern, line) is not None for line in said) < count:
        line = child.stderr.readline()
        assert line, "".join(said)
        said.append(line)
    return said


def test_grows_and_shrinks(slurm, cluster):
    with autoscaled(slurm, cluster, "--max", "2", "--wait-s", "0.5", "--idle-s", "3") as child:
        done = slurm.run("python", "-c", GROWS, timeout_s=100)
        assert done.stdout == "tasks on 2\ngroup placed, kept 1048576\n", done.stdout + done.stderr
        said = await_words(child, "had nothing to do and goes", 2)
        jobs = re.findall(r"submitted job (\d+)", "".join(said))
        assert 2 <= len(jobs) <= 4, said  # a node may go between tasks and group
        for job in jobs:
            assert slurm.run(HPC_RAY, "logs", "-f", job).returncode == 0
        slurm.run(HPC_RAY, "stop")
        assert "the session is over" in await_words(child, "the session is over")[-1]
        assert child.wait(30) == 0


def test_the_least_and_the_end_of_the_command(slurm, cluster):
    """Nodes of --min come without work; the command ends, they stay; another one takes them over."""
    with autoscaled(slurm, cluster, "--min", "1", "--max", "1") as child:
        await_words(child, "submitted job")
        up = slurm.run("python", "-c", ONE_TASK)
        assert up.stdout == "7\n", up.stderr
        assert end(slurm, child) == 0
    assert len(slurm.run("squeue", "--noheader").stdout.splitlines()) == 1
    with autoscaled(slurm, cluster, "--max", "1", "--idle-s", "1") as child:
        said = await_words(child, "had nothing to do and goes")
        assert "submitted" not in "".join(said)


def test_nodes_that_do_not_come_up(slurm, cluster):
    with autoscaled(slurm, cluster, "--min", "1", "--max", "1", "--setup", "exit 3") as child:
        await_words(child, "has ended before its node was up; its output says why")
    refused = slurm.run(HPC_RAY, "autoscale", "--join-file", cluster, "--min", "3", "--max", "2")
    assert refused.returncode == 2 and "--min is 3, which is more than --max, 2" in refused.stderr

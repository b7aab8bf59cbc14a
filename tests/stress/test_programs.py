"""Programs with one right answer, again and again (issue "The spine", last point)."""

from __future__ import annotations

import pytest
import workloads

import hpc_ray as ray

pytestmark = pytest.mark.stress


def test_nested_submitters(cluster):
    """10,000 tasks from 4 tasks that submit and get them."""
    for _ in workloads.rounds(20):
        workloads.nested_submitters()


def test_callers(cluster):
    """1,000 calls from each of 8 threads, tasks and actors, each caller's in order (ACTOR-1)."""
    for _ in workloads.rounds(20):
        workloads.callers()


def test_objects(cluster):
    """500 objects of 1 MB through three processes each."""
    for _ in workloads.rounds(5):
        workloads.objects()


def test_references(cluster):
    """Random holds, hand-overs and drops in four processes (OBJ-1, OBJ-2, OBJ-3)."""
    for seed in workloads.rounds(20):
        workloads.references(seed)


@pytest.mark.links
@pytest.mark.timeout(600)
def test_on_three_nodes():
    """The same between nodes that share nothing but MPI; afterwards no node holds a thing."""
    ray.init(num_nodes=3, num_cpus=2)
    for seed in workloads.rounds(2):
        workloads.objects(nodes=3)
        workloads.nested_submitters()
        workloads.callers()
        workloads.references(seed)
    workloads.assert_all_released()
    for node in range(3):
        workloads.eventually(lambda node=node: workloads.node_holdings(node), {})

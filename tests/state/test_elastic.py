"""What ``hpc-ray autoscale`` decides: nodes for what waits, none for what cannot fit, idle ones back."""

from __future__ import annotations

import itertools

import pytest

from hpc_ray.launcher.autoscaling import expected_shape
from hpc_ray.launcher.elastic import MOST_FAILURES, Autoscaler, Demand, Limits, Node, Seen, nodes_wanted
from hpc_ray.protocol import UNIT, NodeInfo
from hpc_ray.slurm import job

SHAPE = {"CPU": 4 * UNIT, "GPU": UNIT, "memory": 100 * UNIT}


def need(cpus: float, **others: float) -> dict[str, int]:
    return {name: round(amount * UNIT) for name, amount in {"CPU": cpus, **others}.items()}


def seen(waiting: int = 0, nodes=(), jobs=None, tasks=None) -> Seen:
    """``waiting``: tasks of one CPU; ``nodes``: (index, job, needed_for, granted)."""
    demand = Demand(tasks if tasks is not None else [(need(1), waiting)] if waiting else [])
    return Seen(demand, [Node(*node) for node in nodes], dict(jobs or {}), SHAPE)


@pytest.mark.parametrize(
    ("tasks", "wanted", "too_large"),
    [
        ([], 0, []),
        ([(need(1), 1)], 1, []),
        ([(need(1), 4)], 1, []),
        ([(need(1), 5)], 2, []),
        ([(need(3), 2), (need(1), 2)], 2, []),  # small ones beside large ones
        ([(need(0), 1000)], 1, []),
        ([(need(1, GPU=0.5), 5)], 3, []),
        ([(need(1), 1_000_000)], 8, []),  # the most
        ([(need(5), 3)], 0, [need(5)]),
        ([(need(1, disk=1), 3), (need(1), 1)], 1, [need(1, disk=1)]),
    ],
)
def test_nodes_wanted(tasks, wanted, too_large):
    assert nodes_wanted(Demand(tasks), SHAPE, 8) == (wanted, too_large)


@pytest.mark.parametrize(
    ("strategy", "bundles", "wanted"),
    [("STRICT_SPREAD", 3, 2), ("SPREAD", 3, 0), ("PACK", 9, 2), ("STRICT_PACK", 4, 0), ("STRICT_PACK", 5, None)],
)
def test_nodes_for_a_group(strategy, bundles, wanted):
    """Beside one node that is free."""
    there = NodeInfo(b"", 0, "", "", 0, SHAPE, SHAPE, {})
    group = {"bundles": [need(1)] * bundles, "strategy": strategy, "labels": [{}] * bundles, "occupied": []}
    found, too_large = nodes_wanted(Demand(groups=[group]), SHAPE, 4, [there])
    assert (found, bool(too_large)) == (wanted or 0, wanted is None)


def test_what_is_expected_of_a_node():
    head = {"CPU": 2 * UNIT, "GPU": UNIT, "memory": 5, "object_store_memory": 6, "disk": UNIT, "node:1": UNIT}
    rest = {"memory": 5, "object_store_memory": 6}
    wanted = job.Job(script="", cpus_per_task=8, gpus_per_node="a100:4")
    assert expected_shape(wanted, {"disk": 2}, head) == {**rest, "CPU": 8 * UNIT, "GPU": 4 * UNIT, "disk": 2 * UNIT}
    assert expected_shape(job.Job(script=""), None, head) == {**rest, "CPU": UNIT}
    assert expected_shape(job.Job(script="", exclusive=True), None, head) == {**rest, "CPU": 2 * UNIT}


def test_asks_only_for_what_has_waited():
    scaler = Autoscaler(Limits(0, 3, wait_s=3))
    assert scaler.decide(0, seen(9)).submit == 0
    assert scaler.decide(2, seen(0)).submit == 0  # it was over before
    assert scaler.decide(2.5, seen(9)).submit == 0
    assert scaler.decide(5, seen(9)).submit == 0
    assert scaler.decide(5.6, seen(9)).submit == 3
    for number in "123":
        scaler.submitted(number)
    jobs = {"1": "PENDING", "2": "RUNNING", "3": "RUNNING"}
    assert [scaler.decide(now, seen(9, jobs=jobs)).submit for now in range(6, 40)] == [0] * 34, "they come already"


def test_never_more_than_the_most():
    scaler = Autoscaler(Limits(0, 3, wait_s=0))
    nodes = [(1, "1", "tasks", 5), (2, "2", "tasks", 5)]
    assert scaler.decide(0, seen(100, nodes, {"1": "RUNNING", "2": "RUNNING"})).submit == 1
    assert scaler.decide(1, seen(100, nodes, {"1": "RUNNING", "2": "RUNNING", "3": "PENDING"})).submit == 0


def test_the_least_comes_at_once_and_stays():
    scaler = Autoscaler(Limits(2, 4, idle_s=10))
    assert scaler.decide(0, seen()).submit == 2
    nodes = [(1, "1", "", 0), (2, "2", "", 0), (3, "3", "", 0)]
    jobs = dict.fromkeys("123", "RUNNING")
    asked = [len(scaler.decide(now, seen(0, nodes, jobs)).drain) for now in range(1, 60)]
    assert max(asked) == 1, "one of three at a time, since none goes"
    assert not any(scaler.decide(now, seen(0, nodes[1:], {"2": "RUNNING", "3": "RUNNING"})).drain for now in range(60, 90))


def test_idle_means_that_nothing_was_granted():
    scaler = Autoscaler(Limits(0, 4, idle_s=10))
    jobs = {"1": "RUNNING"}
    for now in range(30):
        assert not scaler.decide(now, seen(0, [(1, "1", "", now // 9)], jobs)).drain, "a task every nine seconds"
    for now in range(30, 40):
        assert not scaler.decide(now, seen(0, [(1, "1", "objects" if now == 35 else "", 3)], jobs)).drain
    assert [now for now in range(40, 60) if scaler.decide(now, seen(0, [(1, "1", "", 3)], jobs)).drain] == [46, 56]


def test_a_node_that_leaves_is_no_failure():
    scaler = Autoscaler(Limits(0, 4, wait_s=0))
    scaler.decide(0, seen(0, [(1, "1", "", 0)], {"1": "RUNNING"}))
    assert scaler.decide(1, seen(4, [], {"1": "RUNNING"})).submit == 1, "its job is at its end and brings no node"
    steps = scaler.decide(2, seen(0, [], {}))
    assert not steps.say and not steps.over


def test_jobs_that_are_not_needed_any_more():
    """Those that wait, the youngest first; not those of the least."""
    scaler = Autoscaler(Limits(1, 4, wait_s=0, idle_s=10))
    jobs = {"1": "PENDING", "2": "PENDING", "3": "PENDING"}
    assert scaler.decide(0, seen(4, jobs=jobs)).cancel == []
    assert scaler.decide(10, seen(4, jobs=jobs)).cancel == ["2", "3"]
    assert all(scaler.decide(now, seen(0, jobs={"1": "PENDING"})).cancel == [] for now in range(11, 40))


def test_jobs_that_fail_become_rarer_and_then_it_is_over():
    scaler = Autoscaler(Limits(0, 2, wait_s=0))
    times, overs, number = [], [], 0
    jobs: dict[str, str] = {}
    for now in range(400):
        steps = scaler.decide(now, seen(4, jobs=jobs))
        jobs = {}
        overs.append(bool(steps.over))
        if steps.over:
            break
        if steps.submit:
            times.append(now)
            number += 1
            scaler.submitted(str(number))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses) and pauses[-1] >= 5 * pauses[0] and len(times) == MOST_FAILURES and overs[-1]


def test_what_does_not_fit_is_said_once():
    scaler = Autoscaler(Limits(0, 2, wait_s=0))
    said = [line for now in range(5) for line in scaler.decide(now, seen(tasks=[(need(9), 1)])).say]
    assert said == ["no node of such a job can hold what asks for {CPU: 9}; it has {CPU: 4, GPU: 1, memory: 100}"]

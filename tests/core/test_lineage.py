"""Results that are lost with a node are made again, with all that is needed for it; what is remembered for that, and how long."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpc_ray import exceptions
from hpc_ray.client import context
from hpc_ray.client.objects import State
from hpc_ray.protocol import PullFailed, Result, ResultKind

LARGE = 200_000  # bytes; beyond what travels in messages


@pytest.fixture
def ray(no_leaks):
    import hpc_ray

    yield hpc_ray
    hpc_ray.shutdown()


def remembered() -> int:
    packer = context.client.tasks.packer
    assert (packer.lineage_bytes == 0) == (not packer.lineage)
    return len(packer.lineage)


def make_tasks(ray, **options):
    @ray.remote(num_cpus=0, **options)
    def first(seed):
        return np.full(LARGE, seed, np.uint8)

    @ray.remote(num_cpus=0, **options)
    def add(array, number):
        return array + np.uint8(number)

    @ray.remote(num_cpus=0)
    def small(number):
        return number

    return first, add, small


# ------------------------------------------------------------------ what is remembered


def test_what_cannot_be_wanted_again_is_forgotten(ray, eventually):
    ray.init(num_cpus=2)
    first, add, small = make_tasks(ray)
    last = first.remote(1)
    for _ in range(20):
        last = add.remote(last, small.remote(1))
    assert ray.get(last)[0] == 21
    eventually(lambda: remembered() == 21, "the chain is remembered; what is small is not")
    del last
    gc.collect()
    eventually(lambda: remembered() == 0, "all is forgotten")


def test_one_of_several_results_keeps_the_task(ray, eventually):
    ray.init(num_cpus=2)
    first, _, _ = make_tasks(ray)

    @ray.remote(num_returns=3)
    def three(array):
        return array, array + 1, 5

    one, two, number = three.remote(first.remote(1))
    assert ray.get([one, two, number])[1][0] == 2
    eventually(lambda: remembered() == 2, "both tasks")
    del one, number
    gc.collect()
    context.client.work_off_released()
    assert remembered() == 2
    del two
    gc.collect()
    eventually(lambda: remembered() == 0, "none")


def test_records_are_bounded(ray, eventually):
    ray.init(num_cpus=2, _system_config={"max_lineage_bytes": 20_000})
    first, add, _ = make_tasks(ray)
    last = first.remote(0)
    for i in range(100):
        last = add.remote(last, 1)
        if i % 10 == 0:
            ray.wait([last])
    assert ray.get(last)[0] == 100
    packer = context.client.tasks.packer
    eventually(lambda: 0 < packer.lineage_bytes <= 20_000, "old records are dropped")
    assert 3 <= remembered() <= 13


def test_what_must_not_be_repeated_is_not_remembered(ray):
    ray.init(num_cpus=2)
    first, add, _ = make_tasks(ray, max_retries=0)

    @ray.remote
    class Actor:
        def give(self, array):
            return array + 1

    actor = Actor.remote()
    result = actor.give.remote(add.remote(first.remote(1), 1))
    assert ray.get(result)[0] == 3 and remembered() == 0


# ------------------------------------------------------------------ made again


@pytest.fixture
def far(ray):
    """Makes a cluster whose second node has the resource ``far``; its value takes that node away, calls ``between``, brings another."""
    from hpc_ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}, connect=True)
    nodes = [cluster.add_node(num_cpus=2, resources={"far": 10})]

    def replace(between=lambda: None):
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        between()
        nodes.append(cluster.add_node(num_cpus=2, resources={"far": 10}))

    yield replace
    ray.shutdown()
    cluster.shutdown()


def test_a_task_that_may_not_be_repeated_says_that_its_node_is_gone(ray, far, gate, eventually):
    @ray.remote(resources={"far": 1}, max_retries=0)
    def waits():
        gate.wait()

    reference = waits.remote()
    eventually(gate.arrived, "it runs")
    far()
    with pytest.raises(exceptions.NodeDiedError):
        ray.get(reference, timeout=60)


def test_a_chain_is_made_again(ray, far):
    """Its first links were freed long ago, one argument was small."""
    first, add, small = make_tasks(ray, resources={"far": 1})
    last = add.remote(add.remote(first.remote(1), small.remote(2)), 3)
    ray.wait([last], fetch_local=False)
    far()
    assert ray.get(last, timeout=60)[0] == 6


def test_the_death_of_a_node_is_heard_of_before_the_end_of_a_fetch(ray, far, eventually, monkeypatch):
    """OBJ-4: whoever waits for the copy is woken all the same, and waits for what is made again."""
    first, _, _ = make_tasks(ray, resources={"far": 1})
    reference = first.remote(1)
    ray.wait([reference], fetch_local=False)
    client, entry = context.client, reference._entry
    node, asked = entry.places[0][0], threading.Event()

    def ask(entry):
        entry.pulling = True
        asked.set()

    monkeypatch.setattr(client.objects, "pull", ask)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(ray.get, reference, timeout=60)
        assert asked.wait(30)
        monkeypatch.undo()

        def fetch_fails():
            eventually(lambda: entry.state == State.PENDING, "the driver knows that the node is gone")
            with client.lock:
                client.objects.on_pull_failed(client.raylet, PullFailed(entry.id, node, "gone"))

        far(fetch_fails)
        assert got.result()[0] == 1
    again = client.packer.lineage[entry.task.id].attempt
    error = Result(ResultKind.ERROR, b"what it ended with when it was made again")
    entry.result, entry.places = error, None
    with client.lock:
        client.objects.on_pull_failed(client.raylet, PullFailed(entry.id, node, "gone"))
    assert entry.state == State.READY and entry.result is error and client.packer.lineage[entry.task.id].attempt == again


def test_why_a_result_cannot_be_made_again(ray, far):
    first, add, _ = make_tasks(ray, resources={"far": 1})
    once = first.options(max_retries=0).remote(1)
    of_put = add.remote(ray.put(np.zeros(LARGE, np.uint8)), 1)
    of_once = add.remote(first.options(max_retries=0).remote(1), 1)
    references = [once, of_put, of_once]
    ray.wait(references, num_returns=3, fetch_local=False)
    far()
    for reference, reason in zip(references, ["RETRIES_DISABLED", "PUT", "RETRIES_DISABLED"], strict=True):
        with pytest.raises(exceptions.ObjectReconstructionFailedError) as caught:
            ray.get(reference, timeout=60)
        assert caught.value.reason == "OBJECT_UNRECONSTRUCTABLE_" + reason
    assert not context.client.tasks.tasks


def test_a_call_of_an_actor_is_made_again(ray, far):
    """By the actor that was restarted, if it may: with max_task_retries."""

    @ray.remote(num_cpus=0, resources={"far": 1}, max_restarts=-1)
    class Counter:
        def __init__(self):
            self.count = 0

        def add(self, number):
            self.count += number
            return np.full(LARGE, self.count, np.uint8)

    _, _, small = make_tasks(ray)
    counter = Counter.options(max_task_retries=1).remote()
    once = Counter.remote()
    references = [counter.add.remote(small.remote(3)), once.add.remote(3)]
    ray.wait(references, num_returns=2, fetch_local=False)
    far()
    assert ray.get(references[0], timeout=60)[0] == 3
    with pytest.raises(exceptions.ObjectReconstructionFailedError, match="max_task_retries"):
        ray.get(references[1], timeout=60)
    assert ray.get(once.add.remote(4), timeout=60)[0] == 4

"""Placement groups: a bundle and its group are one room, whichever of them a program names. See RES-5."""

from __future__ import annotations

import pytest

import hpc_ray
from hpc_ray import exceptions, util
from hpc_ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup


@pytest.fixture(params=[1, 2], ids=["one node", "two nodes"])
def group(request, no_leaks):
    """A CPU and a GPU in each of two bundles, and nothing besides."""
    each = 2 // request.param
    hpc_ray.init(num_nodes=request.param, num_cpus=each, num_gpus=each, log_to_driver=False)
    made = util.placement_group([{"CPU": 1, "GPU": 1}] * 2)
    hpc_ray.get(made.ready(), timeout=60)
    yield made
    hpc_ray.shutdown()


@hpc_ray.remote(num_cpus=0, num_gpus=1)
class Actor:
    def where(self):
        context = hpc_ray.get_runtime_context()
        return context.get_node_id(), *hpc_ray.get_gpu_ids()


@pytest.mark.parametrize("order", [(0, 1, -1), (-1, -1, 0), (0, -1, -1)])
def test_no_gpu_is_given_twice(group, order):
    actors = [Actor.options(scheduling_strategy=InGroup(group, index)).remote() for index in order[:2]]
    places = hpc_ray.get([actor.where.remote() for actor in actors], timeout=60)
    assert len(set(places)) == 2
    late = Actor.options(scheduling_strategy=InGroup(group, order[2])).remote()
    answer = late.where.remote()
    with pytest.raises(exceptions.GetTimeoutError):
        hpc_ray.get(answer, timeout=1.5)
    for actor in actors:
        hpc_ray.kill(actor)
    assert hpc_ray.get(answer, timeout=60) in places


@pytest.mark.parametrize("index", [0, -1])
def test_what_is_left_of_a_group(group, eventually, gate, index):
    @hpc_ray.remote(num_cpus=1)
    def hold(gate):
        gate.wait("hold")

    name = f"_group_{group.id.hex()}"
    running = hold.options(scheduling_strategy=InGroup(group, index)).remote(gate)

    def left():
        return {n.removesuffix(name): n_left for n, n_left in hpc_ray.available_resources().items() if n.endswith(name)}

    eventually(lambda: left() == {"CPU": 1.0, "GPU": 2.0, "bundle": 1999.999}, "the task takes from the group")
    gate.open("hold")
    hpc_ray.get(running, timeout=60)
    eventually(lambda: left() == {"CPU": 2.0, "GPU": 2.0, "bundle": 2000.0}, "the group has all again")

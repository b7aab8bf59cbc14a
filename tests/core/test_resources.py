"""Resources: what tasks and actors ask for is set aside, waited for, and given back."""

from __future__ import annotations

import os

import pytest

from hpc_ray import exceptions


def test_cluster_resources(ray):
    total = ray.cluster_resources()
    assert total["CPU"] == 4 and total["slot"] == 2
    assert total["memory"] > 0 and total["object_store_memory"] > 0
    assert ray.available_resources() == total


def test_nodes(ray):
    (node,) = ray.nodes()
    assert node["Alive"] and node["Resources"]["CPU"] == 4
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, {"CPU": 1}),
        ({"num_cpus": 2}, {"CPU": 2}),
        ({"num_cpus": 0.5}, {"CPU": 0.5}),
        ({"num_cpus": 0}, {}),
        ({"num_cpus": 0, "resources": {"slot": 1.5}}, {"slot": 1.5}),
        ({"memory": 1 << 20}, {"CPU": 1, "memory": 1 << 20}),
    ],
    ids=str,
)
def test_what_a_task_uses(ray, gate, eventually, options, used):
    @ray.remote
    def work(gate):
        gate.wait()
        return ray.get_runtime_context().get_assigned_resources()

    total = ray.cluster_resources()
    running = work.options(**options).remote(gate)
    gate.await_arrivals(1)
    expected = {**total, **{name: total[name] - amount for name, amount in used.items()}}
    eventually(lambda: ray.available_resources() == expected, f"{used} are in use")
    gate.open()
    assert ray.get(running) == used
    eventually(lambda: ray.available_resources() == total, "everything is free again")


def test_an_actor_uses_none_by_default_and_one_cpu_to_be_placed(ray, eventually):
    @ray.remote
    class Actor:
        def resources(self):
            return ray.get_runtime_context().get_assigned_resources()

    actors = [Actor.remote() for _ in range(6)]
    assert ray.get([actor.resources.remote() for actor in actors]) == [{}] * 6


def test_an_actor_uses_what_it_asked_for(ray, eventually):
    @ray.remote(num_cpus=2, resources={"slot": 1})
    class Actor:
        def resources(self):
            return ray.get_runtime_context().get_assigned_resources()

    actor = Actor.remote()
    assert ray.get(actor.resources.remote()) == {"CPU": 2, "slot": 1}
    eventually(lambda: ray.available_resources()["CPU"] == 2 and ray.available_resources()["slot"] == 1, "in use")
    del actor


def test_resources_of_a_killed_actor_are_free(ray, eventually):
    actor = ray.remote(type("Empty", (), {})).options(num_cpus=3).remote()
    eventually(lambda: ray.available_resources().get("CPU", 0) == 1, "in use")
    ray.kill(actor)
    eventually(lambda: ray.available_resources()["CPU"] == 4, "free")


def test_resources_of_a_crashed_task_are_free(ray):
    """The fixture that looks after each test proves it."""

    @ray.remote(num_cpus=2, max_retries=0)
    def crash():
        os._exit(1)

    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(crash.remote())


@pytest.mark.parametrize(("cpus", "most"), [(1, 4), (2, 2), (0.5, 8), (4, 1)])
def test_no_more_at_once_than_there_is(ray, gate, cpus, most):
    @ray.remote(num_cpus=cpus)
    def work(gate):
        return gate.wait()

    references = [work.remote(gate) for _ in range(most + 2)]
    gate.await_arrivals(most)
    ready, _ = ray.wait(references, timeout=0.1)
    assert not ready and gate.arrived() == most
    gate.open()
    assert ray.get(references) == ["passed"] * (most + 2)
    assert gate.arrived() == most + 2


def test_custom_resource_limits(ray, gate):
    @ray.remote(num_cpus=0, resources={"slot": 1})
    def work(gate):
        return gate.wait()

    references = [work.remote(gate) for _ in range(4)]
    gate.await_arrivals(2)
    assert ray.wait(references, timeout=0.1)[0] == [] and gate.arrived() == 2
    gate.open()
    ray.get(references)


def test_infeasible_task_waits_and_can_be_cancelled(ray):
    """More may come; until then it waits, and does not disturb the others."""

    @ray.remote
    def fine():
        return 1

    for options in ({"num_cpus": 100}, {"resources": {"unheard of": 1}}, {"num_gpus": 8}):
        waiting = fine.options(**options).remote()
        assert ray.get(fine.remote(), timeout=30) == 1
        assert ray.wait([waiting], timeout=0.1) == ([], [waiting])
        ray.cancel(waiting)
        with pytest.raises(exceptions.TaskCancelledError):
            ray.get(waiting, timeout=30)


def test_infeasible_actor_waits_and_can_be_killed(ray):
    @ray.remote(num_cpus=100)
    class Huge:
        def method(self):
            return 1

    huge = Huge.remote()
    called = huge.method.remote()
    assert ray.wait([called], timeout=0.1) == ([], [called])
    ray.kill(huge)
    with pytest.raises(exceptions.RayActorError):
        ray.get(called, timeout=30)


def test_a_blocked_task_gives_its_cpu_back(ray, gate):
    """Tasks that wait for their children, more than there are CPUs."""

    @ray.remote(num_cpus=1)
    def child(i):
        return i

    @ray.remote(num_cpus=1)
    def parent(gate, i):
        gate.wait()
        return ray.get(child.remote(i))

    references = [parent.remote(gate, i) for i in range(8)]
    gate.await_arrivals(4)
    gate.open()
    assert ray.get(references, timeout=60) == list(range(8))


def test_options_of_the_call_win(ray):
    @ray.remote(num_cpus=2)
    def resources():
        return ray.get_runtime_context().get_assigned_resources()

    assert ray.get(resources.remote()) == {"CPU": 2}
    assert ray.get(resources.options(num_cpus=1, resources={"slot": 1}).remote()) == {"CPU": 1, "slot": 1}

"""Listing what there is."""

from __future__ import annotations

import pytest

from hpc_ray import util
from hpc_ray.util import state
from hpc_ray.util.state.common import ActorState


class Listed:
    def pid(self):
        return 1


def test_actors(ray, eventually):
    kind = ray.remote(num_cpus=0)(Listed)
    actors = [kind.options(name=f"row {i}").remote() for i in range(3)]
    ray.get([actor.pid.remote() for actor in actors])
    alive = [("class_name", "=", "Listed"), ("state", "=", "alive")]
    rows = state.list_actors(filters=alive)
    assert {row.name for row in rows} == {"row 0", "row 1", "row 2"}
    assert rows[0]["state"] == "ALIVE" and rows[0].death_cause is None and rows[0].required_resources is None
    assert len(state.list_actors(filters=[*alive, ("name", "!=", "row 1")])) == 2
    assert len(state.list_actors(filters=[*alive, ("pid", "=", str(rows[0].pid))])) == 1
    assert len(state.list_actors(filters=alive, limit=2)) == 2
    assert state.get_actor(actors[0]._actor_id.hex()).name == "row 0"
    assert state.get_actor("ab" * 16) is None
    assert state.summarize_actors()["cluster"]["summary"]["Listed"]["state_counts"]["ALIVE"] == 3
    ray.kill(actors[0])
    dead = eventually(lambda: state.list_actors(filters=[("name", "=", "row 0"), ("state", "=", "DEAD")], detail=True))
    assert dead[0].death_cause["actor_died_error_context"]["reason"] == "RAY_KILL"


def test_nodes_jobs_workers_groups(ray):
    context = ray.get_runtime_context()
    (node,) = state.list_nodes()
    assert (node.node_id, node.state, node.is_head_node) == (context.get_node_id(), "ALIVE", True)
    assert node.resources_total["CPU"] == 4.0
    job = state.get_job(context.get_job_id())
    assert job.status == "RUNNING" and job.start_time > 0
    ray.get(ray.remote(lambda: 1).remote())
    assert {worker.worker_type for worker in state.list_workers()} == {"DRIVER", "WORKER"}
    assert state.get_worker(context.get_worker_id()).worker_type == "DRIVER"
    group = util.placement_group([{"slot": 1}], name="listed")
    ray.get(group.ready())
    (row,) = state.list_placement_groups(filters=[("name", "=", "listed")], detail=True)
    assert row.state == "CREATED" and row.bundles[0]["unit_resources"] == {"slot": 1.0}
    util.remove_placement_group(group)
    assert state.get_placement_group(group.id.hex()).state == "REMOVED"
    assert state.list_runtime_envs() == []


def test_tasks_and_objects_of_this_process(ray, gate):
    held = ray.remote(gate.wait.__func__).options(name="held one").remote(gate, "held")
    after = ray.remote(lambda x: x).remote(held)
    gate.await_arrivals(1, "held")
    (row,) = state.list_tasks(filters=[("name", "=", "held one")])
    assert (row.state, row.type, row.task_id) == ("SUBMITTED_TO_WORKER", "NORMAL_TASK", held.task_id().hex())
    assert state.get_task(after).state == "PENDING_ARGS_AVAIL"
    assert state.summarize_tasks()["cluster"]["total_tasks"] == 2
    gate.open("held")
    ray.get(after)
    big = ray.put(b"x" * 500_000)
    (row,) = state.get_objects(big.hex())
    assert row.object_size >= 500_000 and row.type == "DRIVER" and row.reference_type == "LOCAL_REFERENCE"
    assert state.summarize_objects()["cluster"]["total_objects"] >= 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"filters": [("no such column", "=", "x")]}, state.RayStateApiException),
        ({"filters": [("death_cause", "=", "x")]}, state.RayStateApiException),
        ({"filters": [("state", "=", "NO")]}, state.RayStateApiException),
        ({"filters": [("actor_id", "=", "zz")]}, state.RayStateApiException),
        ({"limit": 10_001}, state.RayStateApiException),
        ({"filters": [("state", "<", "ALIVE")]}, ValueError),
        ({"filters": [("state", "=")]}, ValueError),
        ({"filters": "state"}, ValueError),
    ],
)
def test_questions_that_cannot_be(ray, options, error):
    with pytest.raises(error):
        state.list_actors(**options)


def test_columns():
    assert "death_cause" in ActorState.columns() - ActorState.base_columns() - ActorState.filterable_columns()
    assert "placement_group_id" in ActorState.filterable_columns()

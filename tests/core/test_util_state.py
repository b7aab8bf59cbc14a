"""Listing what there is."""

from __future__ import annotations

import os
import sys

import pytest

from hpc_ray import exceptions, util
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


def rows_of(task):
    """All attempts of a task."""
    return state.list_tasks(filters=[("task_id", "=", task.task_id().hex())], detail=True)


def test_tasks_under_way(ray, gate):
    held = ray.remote(gate.wait.__func__).options(name="held one").remote(gate, "held")
    after = ray.remote(lambda x: x).remote(held)
    gate.await_arrivals(1, "held")
    (row,) = state.list_tasks(filters=[("name", "=", "Held ONE"), ("state", "=", "running")])
    assert (row.type, row.task_id, row.attempt_number) == ("NORMAL_TASK", held.task_id().hex(), 0)
    assert row.worker_pid == gate.pids("held")[0] and row.node_id == ray.get_runtime_context().get_node_id()
    assert state.get_task(after).state == "PENDING_ARGS_AVAIL"
    assert state.summarize_tasks()["cluster"]["summary"]["held one"]["state_counts"] == {"RUNNING": 1}
    assert [row.reference_type for row in state.get_objects(held.hex())] == ["USED_BY_PENDING_TASK"]
    gate.open("held")
    ray.get(after)
    row = state.get_task(held)
    assert row.state == "FINISHED" and row.creation_time_ms <= row.start_time_ms <= row.end_time_ms
    names = [event["state"] for event in row.events]
    assert names == ["PENDING_ARGS_AVAIL", "SUBMITTED_TO_WORKER", "RUNNING", "FINISHED"]


def test_a_task_that_waits(ray, gate, eventually):
    @ray.remote
    def waits(gate, name, wait):
        inner = ray.remote(gate.wait.__func__).options(name="inner").remote(gate, name)
        return len(ray.wait([inner])[0]) if wait else ray.get(inner)

    for wait, expected in ((False, "RUNNING_IN_RAY_GET"), (True, "RUNNING_IN_RAY_WAIT")):
        outer = waits.remote(gate, expected, wait)
        gate.await_arrivals(1, expected)
        (row,) = eventually(lambda: [row for row in rows_of(outer) if row.state != "RUNNING"])  # noqa: B023
        assert row.state == expected
        inner = state.list_tasks(filters=[("parent_task_id", "=", row.task_id)])
        assert [row.name for row in inner] == ["inner"]
        gate.open(expected)
        ray.get(outer)


def test_attempts_and_errors(ray, gate, eventually):
    @ray.remote(max_retries=1, retry_exceptions=True)
    def twice():
        raise ValueError("both times")

    @ray.remote(max_retries=0)
    def crashes():
        os._exit(7)

    @ray.remote
    class Fails:
        def method(self):
            raise KeyError("a key")

        def waits(self, gate):
            gate.wait()

    reference = twice.remote()
    with pytest.raises(ValueError, match="both times"):
        ray.get(reference)
    rows = state.get_task(reference)
    assert [(row.attempt_number, row.state, row.error_type) for row in rows] == [
        (0, "FAILED", "TASK_EXECUTION_EXCEPTION"),
        (1, "FAILED", "TASK_EXECUTION_EXCEPTION"),
    ]
    assert all("both times" in row.error_message for row in rows)
    reference = crashes.remote()
    with pytest.raises(exceptions.WorkerCrashedError):
        ray.get(reference)
    assert [(row.state, row.error_type, row.start_time_ms) for row in rows_of(reference)] == [("FAILED", "WORKER_DIED", None)]
    assert eventually(lambda: state.list_workers(filters=[("is_alive", "=", "false"), ("exit_type", "=", "SYSTEM_ERROR")]))
    actor = Fails.options(name="failing").remote()
    reference = actor.method.remote()
    with pytest.raises(KeyError):
        ray.get(reference)
    (row,) = rows_of(reference)
    assert (row.name, row.type, row.actor_id) == ("Fails.method", "ACTOR_TASK", actor._actor_id.hex())
    reference = actor.waits.remote(gate)
    gate.await_arrivals(1)
    cancelled = ray.remote(gate.wait.__func__).options(name="cancelled").remote(gate)
    gate.await_arrivals(2)
    ray.kill(actor)
    ray.cancel(cancelled)
    for failed, error in ((reference, "ACTOR_DIED"), (cancelled, "TASK_CANCELLED")):
        with pytest.raises(exceptions.RayError):
            ray.get(failed)
        assert [(row.state, row.error_type) for row in rows_of(failed)] == [("FAILED", error)]
    (row,) = state.list_tasks(filters=[("name", "=", "failing:Fails.__init__")])
    assert (row.type, row.state, row.func_or_class_name) == ("ACTOR_CREATION_TASK", "FINISHED", "Fails.__init__")


def test_a_constructor_that_fails(ray):
    @ray.remote
    class Unmade:
        def __init__(self):
            raise RuntimeError("not today")

        def method(self):
            pass

    actor = Unmade.remote()
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(actor.method.remote())
    (row,) = state.list_tasks(filters=[("name", "=", "Unmade.__init__")], detail=True)
    assert (row.state, row.error_type) == ("FAILED", "TASK_EXECUTION_EXCEPTION") and "not today" in row.error_message
    (actor_row,) = state.list_actors(filters=[("class_name", "=", "test_a_constructor_that_fails.<locals>.Unmade")], detail=True)
    assert "not today" in actor_row.death_cause["creation_task_failure_context"]["formatted_exception_string"]


def test_what_an_ended_worker_leaves(ray, eventually):
    """Its own tasks are still known, though who made them is gone."""

    @ray.remote
    class Leaves:
        def call(self):
            return ray.get(ray.remote(lambda: 1).options(name="of one that left").remote())

    actor = Leaves.remote()
    assert ray.get(actor.call.remote()) == 1
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(actor.__ray_terminate__.remote())
    (row,) = eventually(lambda: state.list_tasks(filters=[("name", "=", "of one that left")], detail=True))
    assert (row.state, row.required_resources) == ("FINISHED", {"CPU": 1.0})
    (call,) = state.list_tasks(filters=[("name", "=", "Leaves.call")])
    assert call.task_id == row.parent_task_id


def test_objects(ray):
    big = ray.put(b"x" * 500_000)
    held = ray.put([big])
    (row,) = state.get_objects(big.hex())
    assert row.object_size >= 500_000 and row.type == "DRIVER" and row.reference_type == "CAPTURED_IN_OBJECT"
    assert [row.reference_type for row in state.get_objects(held.hex())] == ["LOCAL_REFERENCE"]

    @ray.remote
    class Keeps:
        def keep(self, references):
            self.references = references

    keeper = Keeps.remote()
    ray.get(keeper.keep.remote([held]))
    rows = state.get_objects(held.hex())
    assert {row.type for row in rows} == {"DRIVER", "WORKER"}
    assert state.get_objects("ab" * 28) == []
    summary = state.summarize_objects()["cluster"]
    assert summary["total_size_mb"] >= 0.4 and summary["summary"]["disabled"]["total_num_workers"] >= 2


def test_logs(ray, eventually):
    @ray.remote
    class Prints:
        def print(self, text):
            print(text)
            print("an error", file=sys.stderr)
            return os.getpid()

    actor = Prints.remote()
    pid = ray.get(actor.print.remote("first\nsecond"))
    node = ray.get_runtime_context().get_node_id()
    eventually(lambda: f"worker-{pid}.out" in state.list_logs(node_id=node).get("worker_out", []))
    assert state.list_logs(node_id=node, glob_filter="gcs*") == {"gcs_server": ["gcs.log"]}
    identity = actor._actor_id.hex()
    for choice in ({"actor_id": identity}, {"node_id": node, "pid": pid}, {"node_id": node, "filename": f"worker-{pid}.out"}):
        assert "".join(state.get_log(**choice)) == "first\nsecond\n"
    assert list(state.get_log(actor_id=identity, tail=1, encoding=None)) == [b"second\n"]
    eventually(lambda: "".join(state.get_log(actor_id=identity, suffix="err")) == "an error\n")
    following = state.get_log(actor_id=identity, follow=True, _interval=0.01)
    assert next(following) == "first\nsecond\n"
    ray.get(actor.print.remote("third"))
    assert next(following) == "third\n"
    task = actor.print.remote("fourth")
    ray.get(task)
    eventually(lambda: "fourth\n" in "".join(state.get_log(task_id=task.task_id().hex())))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"node_id": "ab" * 28}, ValueError),
        ({"node_id": "ab" * 28, "node_ip": "1.2.3.4", "pid": 1}, ValueError),
        ({"node_id": "ab" * 28, "pid": 1}, state.RayStateApiException),
        ({"actor_id": "ab" * 16}, state.RayStateApiException),
        ({"task_id": "ab" * 24}, state.RayStateApiException),
        ({"actor_id": "ab" * 16, "suffix": "no"}, ValueError),
        ({"submission_id": "x"}, state.RayStateApiException),
    ],
)
def test_logs_that_cannot_be(ray, options, error):
    with pytest.raises(error):
        next(state.get_log(**options))
    with pytest.raises(state.RayStateApiException):
        next(state.get_log(node_id=ray.get_runtime_context().get_node_id(), filename="../config.json"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"filters": [("no such column", "=", "x")]}, state.RayStateApiException),
        ({"filters": [("death_cause", "=", "x")]}, state.RayStateApiException),
        ({"filters": [("state", "=", "NO")]}, state.RayStateApiException),
        ({"filters": [("actor_id", "=", "zz")]}, state.RayStateApiException),
        ({"limit": 10_001}, state.RayStateApiException),
        ({"limit": -1}, state.RayStateApiException),
        ({"filters": [("pid", "=", "many")]}, state.RayStateApiException),
        ({"filters": [("state", "=", ["ALIVE"])]}, ValueError),
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


def test_filters_that_contradict(ray):
    with pytest.warns(UserWarning, match="both"):
        assert state.list_nodes(filters=[("state", "=", "ALIVE"), ("state", "=", "DEAD")]) == []

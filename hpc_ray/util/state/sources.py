"""Where the rows of each kind come from."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_ray.observation import ENDED, Activity, Asking, Attempt
from hpc_ray.protocol import UNIT, ObjectRow
from hpc_ray.util.state.common import (
    ActorState,
    ClusterEventState,
    DriverInfo,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    Row,
    RuntimeEnvState,
    TaskState,
    WorkerState,
)
from hpc_ray.util.state.exception import RayStateApiException


def _hex(data: bytes | None) -> str | None:
    return bytes(data).hex() if data else None


def _floats(amounts: dict[str, int]) -> dict[str, float]:
    return {name: amount / UNIT for name, amount in amounts.items()}


def _ago_ms(seconds: float) -> int:
    return int((time.time() - seconds) * 1000)


def _actors(asking: Asking) -> list[ActorState]:
    return [
        ActorState(
            actor_id=bytes(row["actor_id"]).hex(),
            class_name=row["class_name"],
            state=row["state"],
            job_id=_hex(row["job_id"]),
            name=row["name"],
            node_id=_hex(row["node_id"]),
            pid=row["pid"],
            ray_namespace=row["namespace"],
            serialized_runtime_env=row["runtime_env"] or "{}",
            required_resources=_floats(row["resources"]),
            death_cause=_death(row),
            is_detached=row["detached"],
            placement_group_id=_hex(row["group_id"]),
            repr_name="",
            num_restarts=row["restarts"],
            num_restarts_due_to_lineage_reconstruction=0,
            num_restarts_due_to_node_preemption=0,
            call_site=row["call_site"] or None,
        )
        for row in asking.gcs("list_actors")
    ]


_REASONS = {
    "KILLED": "RAY_KILL",
    "OUT_OF_SCOPE": "OUT_OF_SCOPE",
    "CRASHED": "WORKER_DIED",
    "NODE_DIED": "NODE_DIED",
    "OWNER_DIED": "OWNER_DIED",
}


def _death(row: dict[str, Any]) -> dict[str, Any] | None:
    if not row["death_kind"]:
        return None
    if row["death_kind"] == "INIT_FAILED":
        return {"creation_task_failure_context": {"formatted_exception_string": row["death_text"]}}
    text = {"error_message": row["death_text"], "reason": _REASONS.get(row["death_kind"], row["death_kind"])}
    described = {
        "actor_id": bytes(row["actor_id"]).hex(),
        "class_name": row["class_name"],
        "name": row["name"],
        "ray_namespace": row["namespace"],
        "pid": row["pid"],
    }
    return {"actor_died_error_context": {**text, **described}}


def _groups(asking: Asking) -> list[PlacementGroupState]:
    found = []
    for row in asking.gcs("placement_group_table"):
        group_id = bytes(row["group_id"]).hex()
        bundles = [
            {
                "bundle_id": {"placement_group_id": group_id, "bundle_index": i},
                "unit_resources": _floats(bundle),
                "node_id": _hex(node),
            }
            for i, (bundle, node) in enumerate(zip(row["bundles"], row["nodes"], strict=True))
        ]
        stats = {"scheduling_attempt": row["attempts"]}
        found.append(
            PlacementGroupState(group_id, row["name"], _hex(row["job_id"]), row["state"], bundles, row["detached"], stats)
        )
    return found


def _nodes(asking: Asking) -> list[NodeState]:
    return [
        NodeState(
            node_id=bytes(row["node_id"]).hex(),
            node_ip=row["ip"],
            is_head_node=row["is_head"],
            state="ALIVE" if row["alive"] else "DEAD",
            state_message=row["death"] or None,
            node_name=row["hostname"],
            resources_total={name: amount for name, amount in _floats(row["total"]).items() if "_group_" not in name},
            labels=row["labels"],
            start_time_ms=int(row["start_time"] * 1000),
            end_time_ms=int(row["end_time"] * 1000),
        )
        for row in asking.nodes
    ]


def _jobs(asking: Asking) -> list[JobState]:
    addresses = {row["index"]: row["ip"] for row in asking.nodes}
    return [
        JobState(
            type="DRIVER",
            job_id=bytes(row["job_id"]).hex(),
            driver_info=DriverInfo(bytes(row["job_id"]).hex(), addresses.get(row["driver"] >> 48, ""), str(row["pid"])),
            status="SUCCEEDED" if row["state"] == "FINISHED" else row["state"],
            entrypoint=row["entrypoint"],
            message=row["reason"] or None,
            start_time=int(row["start_time"] * 1000),
            end_time=int(row["end_time"] * 1000),
            metadata=row["config"].get("metadata", {}),
            runtime_env=row["config"].get("runtime_env", {}),
        )
        for row in asking.gcs("list_jobs")
    ]


def _events(asking: Asking) -> list[ClusterEventState]:
    """Made from what is known of nodes and jobs: when they came, when and why they went."""
    found: list[tuple[float, str, str, str, dict[str, Any]]] = []
    for row in asking.nodes:
        node_id = bytes(row["node_id"]).hex()
        named = f"node {node_id} ({row['hostname']}, {row['ip']})"
        found.append((row["start_time"], "INFO", f"{node_id}:1", f"The {named} has joined.", {"node_id": node_id}))
        if not row["alive"]:
            text = f"The {named} is gone: {row['death']}"
            found.append((row["end_time"], "ERROR", f"{node_id}:2", text, {"node_id": node_id}))
    for row in asking.gcs("list_jobs"):
        job_id = bytes(row["job_id"]).hex()
        text = f"The job {job_id} has started: {row['entrypoint']}"
        found.append((row["start_time"], "INFO", f"{job_id}:1", text, {"job_id": job_id}))
        if row["end_time"]:
            severity = "ERROR" if row["state"] == "FAILED" else "INFO"
            text = f"The job {job_id} is over: {row['reason'] or row['state']}"
            found.append((row["end_time"], severity, f"{job_id}:2", text, {"job_id": job_id}))
    return [
        ClusterEventState(severity, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)), "GCS", text, event_id, fields)
        for moment, severity, event_id, text, fields in sorted(found, key=lambda event: event[0])
    ]


def _workers(asking: Asking) -> list[WorkerState]:
    found = []
    for question, alive in (("workers", True), ("dead_workers", False)):
        for node, rows in asking.raylets(question):
            found += [
                WorkerState(
                    worker_id=bytes(row["worker_id"]).hex(),
                    is_alive=alive,
                    worker_type="WORKER" if row["kind"] == "RANK" else row["kind"],
                    exit_type=None if alive else _exit_type(row["cause"], row["text"]),
                    node_id=bytes(node["node_id"]).hex(),
                    ip=node["ip"],
                    pid=row["pid"],
                    exit_detail=None if alive else row["text"],
                    worker_launch_time_ms=_ago_ms(row["asked_s"]) if row["asked_s"] else -1,
                    worker_launched_time_ms=_ago_ms(row["started_s"]),
                    start_time_ms=_ago_ms(row["started_s"]),
                    end_time_ms=0 if alive else _ago_ms(row["died_s"]),
                )
                for row in rows
                if row["kind"] in ("WORKER", "DRIVER", "RANK") and row["worker_id"]
            ]
    return found


def _exit_type(cause: str, text: str) -> str:
    if cause == "OOM":
        return "NODE_OUT_OF_MEMORY"
    if cause == "CRASHED":
        return "SYSTEM_ERROR"
    if cause == "EXITED" and text == "the constructor failed":
        return "USER_ERROR"
    if cause == "EXITED" and (text.startswith("sys.exit") or text in ("exit_actor", "__ray_terminate__", "max_calls", "shutdown")):
        return "INTENDED_USER_EXIT"
    return "INTENDED_SYSTEM_EXIT"


def _runtime_envs(asking: Asking) -> list[RuntimeEnvState]:
    found = []
    for node, rows in asking.raylets("workers"):
        counts = Counter(row["runtime_env"] for row in rows if row["runtime_env"])
        found += [
            RuntimeEnvState(json.loads(text), True, node_id=_hex(node["node_id"]), ref_cnt=count) for text, count in counts.items()
        ]
    return found


def _tasks(asking: Asking) -> list[TaskState]:
    return [_task(attempt) for attempt in Activity(asking).attempts]


def _task(attempt: Attempt) -> TaskState:
    job_id = attempt.task_id[-4:].hex()
    where = attempt.where
    ended = attempt.ended if attempt.state in ENDED else 0
    times = {
        "PENDING_ARGS_AVAIL": attempt.created,
        "SUBMITTED_TO_WORKER": attempt.sent,
        "RUNNING": attempt.started,
        attempt.state: ended or attempt.started or attempt.sent or attempt.created,
    }
    return TaskState(
        task_id=attempt.task_id.hex(),
        attempt_number=attempt.number,
        name=attempt.name,
        state=attempt.state,
        job_id=job_id,
        actor_id=_hex(attempt.actor_id),
        type=attempt.kind,
        func_or_class_name=attempt.function,
        parent_task_id=_hex(attempt.parent) or "f" * 40 + job_id,  # the driver's
        node_id=where.node_id if where is not None else None,
        worker_id=where.worker_id if where is not None else None,
        worker_pid=where.pid if where is not None else None,
        error_type=attempt.error_type or None,
        language="PYTHON",
        required_resources=_floats(attempt.resources),
        runtime_env_info={"serialized_runtime_env": attempt.runtime_env or "{}"},
        placement_group_id=_hex(attempt.group_id),
        events=[{"state": state, "created_ms": float(_ms(at))} for state, at in times.items() if at],
        profiling_data=_spans_of(attempt),
        creation_time_ms=_ms(attempt.created) or None,
        start_time_ms=_ms(attempt.started) or None,
        end_time_ms=_ms(ended) or None,
        error_message=attempt.error_text or None,
    )


def _ms(nanoseconds: int) -> int:
    return nanoseconds // 1_000_000


def _spans_of(attempt: Attempt) -> dict[str, Any]:
    """What the timeline shows within a task."""
    where = attempt.where
    if where is None or not (attempt.started and attempt.ended):
        return {}
    return {
        "component_type": "worker",
        "component_id": where.worker_id,
        "node_ip_address": where.ip,
        "events": [
            {"event_name": name, "start_time": start / 1e6, "end_time": end / 1e6, "extra_data": {}}
            for name, start, end in attempt.parts()
        ],
    }


def _objects(asking: Asking) -> list[ObjectState]:
    processes = {process.address: process for process in asking.processes()}
    found = []
    for address, answer in asking.each(processes.values(), "objects").items():
        process = processes.get(address)
        if process is None:
            continue
        for row in msgspec.convert(answer, list[ObjectRow]):
            found.append(
                ObjectState(
                    object_id=row.object_id.hex(),
                    object_size=row.size,
                    task_status=row.task_status,
                    attempt_number=row.attempt,
                    reference_type=row.reference,
                    call_site="disabled",
                    type="DRIVER" if process.is_driver else "WORKER",
                    pid=process.pid,
                    ip=process.ip,
                )
            )
    return found


SOURCES: dict[str, tuple[type[Row], Callable[[Asking], list[Any]]]] = {
    "actors": (ActorState, _actors),
    "placement_groups": (PlacementGroupState, _groups),
    "nodes": (NodeState, _nodes),
    "jobs": (JobState, _jobs),
    "workers": (WorkerState, _workers),
    "tasks": (TaskState, _tasks),
    "objects": (ObjectState, _objects),
    "runtime_envs": (RuntimeEnvState, _runtime_envs),
    "cluster_events": (ClusterEventState, _events),
}


def rows_of(resource: str, asking: Asking) -> tuple[type[Any], list[Any]]:
    """The class of a kind ("actors", "nodes" …), and all its rows, in the order of their ids. Blocks.

    Raises:
        RayStateApiException: there is no such kind.
        GetTimeoutError: who knows did not answer.
    """
    found = SOURCES.get(resource)
    if found is None:
        raise RayStateApiException(f"there are no {resource!r}; there are {', '.join(SOURCES)}")
    kind, source = found
    rows = source(asking)
    if kind._key:
        rows.sort(key=lambda row: row[kind._key])
    return kind, rows

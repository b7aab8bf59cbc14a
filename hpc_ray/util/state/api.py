"""Listing what the cluster has: asks the GCS and the raylets when it is called, and keeps nothing.

Tasks and objects are those of the process that asks: an owner keeps no account of its tasks beyond what it needs to finish them,
and nobody else knows about them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import GetTimeoutError, RpcError
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import UNIT
from hpc_ray.protocol import ActorState as ActorLife
from hpc_ray.session import init
from hpc_ray.util.state.common import (
    DEFAULT_LIMIT,
    DEFAULT_TIMEOUT_S,
    MAX_LIMIT,
    ActorState,
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
from hpc_ray.util.state.exception import RayStateApiException, ServerUnavailable

Filters = list[tuple[str, str, Any]]
R = TypeVar("R", bound=Row)


# ------------------------------------------------------------------ asking


def _client(address: str | None) -> Client:
    """The session's; joins a running one where this process has none."""
    if context.client is None:
        init(address or "auto")
    client = context.client
    assert client is not None
    return client


class _Asking:
    """One question to the runtime."""

    def __init__(self, address: str | None, timeout: float):
        self.client = _client(address)
        self.timeout = timeout

    def gcs(self, name: str, **arguments: Any) -> Any:
        return self.ask(GCS_ADDRESS, name, **arguments)

    def ask(self, destination: int, name: str, **arguments: Any) -> Any:
        try:
            return self.client.query(destination, name, self.timeout, **arguments)
        except GetTimeoutError as error:
            raise ServerUnavailable(str(error)) from error

    def raylets(self, name: str) -> Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(node, rows) of all nodes that live; one that dies meanwhile is left out."""
        for node in self.gcs("nodes"):
            if node["alive"]:
                try:
                    yield node, self.ask(node["raylet"], name)
                except RpcError:
                    continue


def _hex(data: bytes | None) -> str | None:
    return bytes(data).hex() if data else None


def _floats(amounts: dict[str, int]) -> dict[str, float]:
    return {name: amount / UNIT for name, amount in amounts.items()}


# ------------------------------------------------------------------ rows


def _actors(asking: _Asking) -> list[ActorState]:
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
    text = {"error_message": row["death_text"], "reason": _REASONS.get(row["death_kind"], row["death_kind"])}
    described = {
        "actor_id": bytes(row["actor_id"]).hex(),
        "class_name": row["class_name"],
        "name": row["name"],
        "ray_namespace": row["namespace"],
        "pid": row["pid"],
    }
    return {"actor_died_error_context": {**text, **described}}


def _groups(asking: _Asking) -> list[PlacementGroupState]:
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


def _nodes(asking: _Asking) -> list[NodeState]:
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
        )
        for row in asking.gcs("nodes")
    ]


def _jobs(asking: _Asking) -> list[JobState]:
    addresses = {row["index"]: row["ip"] for row in asking.gcs("nodes")}
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


def _workers(asking: _Asking) -> list[WorkerState]:
    return [
        WorkerState(
            worker_id=bytes(row["worker_id"]).hex(),
            is_alive=True,
            worker_type=row["kind"],
            node_id=bytes(node["node_id"]).hex(),
            ip=node["ip"],
            pid=row["pid"],
        )
        for node, rows in asking.raylets("workers")
        for row in rows
        if row["kind"] in ("WORKER", "DRIVER") and row["worker_id"]
    ]


def _runtime_envs(asking: _Asking) -> list[RuntimeEnvState]:
    found = []
    for node, rows in asking.raylets("workers"):
        counts = Counter(row["runtime_env"] for row in rows if row["runtime_env"])
        found += [RuntimeEnvState(json.loads(text), True, _hex(node["node_id"]), count) for text, count in counts.items()]
    return found


def _tasks(asking: _Asking) -> list[TaskState]:
    """Calls of this process that are not done."""
    client = asking.client
    with client.lock:
        calls = [*client.tasks.tasks.values(), *client.actors.calls.values()]
        return [_task(client, call) for call in calls]


def _task(client: Client, task: Any) -> TaskState:
    template, shape, lane = task.template, task.template.shape, task.lane
    if lane is not None and task.id in lane.inflight:
        state = "SUBMITTED_TO_WORKER"
    else:
        state = "PENDING_ARGS_AVAIL" if task.unresolved else "PENDING_NODE_ASSIGNMENT"
    name = template.name if shape is not None or lane is None else f"{lane.class_name}.{template.name}"
    return TaskState(
        task_id=task.id.hex(),
        attempt_number=task.attempt,
        name=name,
        state=state,
        job_id=client.job_id.hex(),
        actor_id=lane.id.hex() if shape is None and lane is not None else None,
        type="ACTOR_TASK" if shape is None else "NORMAL_TASK",
        func_or_class_name=template.function.name or name,
        parent_task_id=_hex(task.parent),
        worker_pid=getattr(lane, "pid", None),
        required_resources=_floats(shape.resources) if shape is not None else {},
        placement_group_id=_hex(shape.group_id) if shape is not None else None,
    )


def _objects(asking: _Asking) -> list[ObjectState]:
    """Objects that this process refers to."""
    client = asking.client
    welcome = client.welcome
    kind = "WORKER" if context.is_worker else "DRIVER"
    found = []
    with client.lock:
        scopes = {link.scope for link in client.actors.links.values()}
        for entry in client.objects.entries.values():
            result = entry.result
            size = -1 if result is None else result.size or len(result.payload)
            status = "FINISHED" if result is not None else "SUBMITTED_TO_WORKER" if entry.owned else "NIL"
            held = "LOCAL_REFERENCE" if entry.count > 0 else "PINNED_IN_MEMORY"
            if entry in scopes:  # what an actor's life hangs on
                size, status, held = -1, "NIL", "ACTOR_HANDLE"
            where = welcome.ip if welcome is not None else ""
            found.append(ObjectState(entry.id.hex(), size, status, 1, held, "disabled", kind, client.pid, where))
    return found


# ------------------------------------------------------------------ filters


def _chosen(rows: list[R], kind: type[R], filters: Filters | None, limit: int, detail: bool) -> list[R]:
    checks = [_check(kind, *_parts(item)) for item in _listed(filters)]
    if limit > MAX_LIMIT:
        raise RayStateApiException(f"a list has at most {MAX_LIMIT} rows; the limit given is {limit}")
    found = [row for row in rows if all(check(row) for check in checks)][:limit]
    if not detail:
        more = kind.columns() - kind.base_columns()
        for row in found:
            for name in more:
                setattr(row, name, None)
    return found


def _listed(filters: Any) -> list[Any]:
    if filters is not None and not isinstance(filters, (list, tuple)):
        raise ValueError(f"filters must be a list of (column, predicate, value), not {filters!r}")
    return list(filters or ())


def _parts(item: Any) -> tuple[str, str, Any]:
    if not isinstance(item, (list, tuple)) or len(item) != 3:
        raise ValueError(f"a filter is (column, predicate, value), not {item!r}")
    if item[1] not in ("=", "!="):
        raise ValueError(f"Unsupported filter predicate {item[1]} is given. Available predicates: =, !=.")
    return item[0], item[1], item[2]


def _check(kind: type[Row], column: str, predicate: str, value: Any) -> Callable[[Row], bool]:
    if column not in kind.filterable_columns():
        raise RayStateApiException(
            f"The given filter column {column} is not supported. Supported filter columns: {sorted(kind.filterable_columns())}"
        )
    if column == "state":
        value = str(value).upper()
        if kind is ActorState and value not in ActorLife.__members__:
            raise RayStateApiException(
                f"Invalid actor state for filtering: {value}; there are {', '.join(ActorLife.__members__)}"
            )
    if kind is ActorState and column in ("actor_id", "job_id"):
        try:
            bytes.fromhex(str(value))
        except ValueError:
            raise RayStateApiException(f"{column} is hexadecimal, unlike {value!r}") from None
    equal = predicate == "="
    return lambda row: _same(row[column], value) is equal


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and isinstance(found, bool):
        return wanted.lower() in (("true", "1") if found else ("false", "0"))
    if isinstance(wanted, str) and isinstance(found, (int, float)):
        return str(found) == wanted
    return found == wanted


# ------------------------------------------------------------------ the public functions


class StateApiClient:
    """The same questions with the address given once."""

    def __init__(self, address: str | None = None, cookies: Any = None, headers: Any = None):
        self.address = address

    def list(
        self,
        resource: str,
        filters: Filters | None = None,
        limit: int = DEFAULT_LIMIT,
        timeout: float = DEFAULT_TIMEOUT_S,
        detail: bool = False,
    ) -> list[Any]:
        """Rows of a kind ("actors", "nodes" …). Blocks.

        Raises:
            RayStateApiException: no such kind or column, or too many rows.
            ServerUnavailable: no answer within ``timeout`` seconds.
            ValueError: filters that are none.
            ConnectionError: there is no session.
        """
        kind, rows = _source(resource)
        return _chosen(rows(_Asking(self.address, timeout)), kind, filters, limit, detail)

    def get(self, resource: str, id: str, timeout: float = DEFAULT_TIMEOUT_S) -> Any:
        """One row by its id, with all details; None if there is none. Blocks; raises as ``list`` does."""
        kind, rows = _source(resource)
        return next((row for row in rows(_Asking(self.address, timeout)) if row[kind._key] == id), None)

    def summary(self, resource: str, timeout: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """Counts of actors, tasks or objects. Blocks; raises as ``list`` does."""
        _, rows = _source(resource)
        if resource not in _SUMMARIES:
            raise RayStateApiException(f"there is no summary of {resource!r}; there are {', '.join(_SUMMARIES)}")
        return {"cluster": _SUMMARIES[resource](rows(_Asking(self.address, timeout)))}


def _source(resource: str) -> tuple[type[Any], Callable[[_Asking], list[Any]]]:
    found = _SOURCES.get(resource)
    if found is None:
        raise RayStateApiException(f"there are no {resource!r}; there are {', '.join(_SOURCES)}")
    return found


_SOURCES: dict[str, tuple[type[Row], Callable[[_Asking], list[Any]]]] = {
    "actors": (ActorState, _actors),
    "placement_groups": (PlacementGroupState, _groups),
    "nodes": (NodeState, _nodes),
    "jobs": (JobState, _jobs),
    "workers": (WorkerState, _workers),
    "tasks": (TaskState, _tasks),
    "objects": (ObjectState, _objects),
    "runtime_envs": (RuntimeEnvState, _runtime_envs),
}


def _summary_of_actors(rows: list[ActorState]) -> dict[str, Any]:
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(str(row.class_name), Counter())[row.state] += 1
    summary = {name: {"class_name": name, "state_counts": dict(states)} for name, states in counts.items()}
    return {"summary": summary, "total_actors": len(rows), "summary_by": "class"}


def _summary_of_tasks(rows: list[TaskState]) -> dict[str, Any]:
    counts: dict[str, tuple[str | None, Counter]] = {}
    for row in rows:
        counts.setdefault(str(row.func_or_class_name), (row.type, Counter()))[1][row.state] += 1
    summary = {
        name: {"func_or_class_name": name, "type": kind, "state_counts": dict(states)} for name, (kind, states) in counts.items()
    }
    return {
        "summary": summary,
        "total_tasks": sum(row.type == "NORMAL_TASK" for row in rows),
        "total_actor_tasks": sum(row.type == "ACTOR_TASK" for row in rows),
        "total_actor_scheduled": 0,
        "summary_by": "func_name",
    }


def _summary_of_objects(rows: list[ObjectState]) -> dict[str, Any]:
    size = sum(row.object_size for row in rows if row.object_size and row.object_size > 0) / 2**20
    one = {
        "total_objects": len(rows),
        "total_size_mb": size,
        "total_num_workers": 1,
        "total_num_nodes": 1,
        "task_state_counts": dict(Counter(row.task_status for row in rows)),
        "task_attempt_number_counts": {"1": len(rows)},
        "ref_type_counts": dict(Counter(row.reference_type for row in rows)),
    }
    return {
        "summary": {"disabled": one} if rows else {},
        "total_objects": len(rows),
        "total_size_mb": size,
        "callsite_enabled": False,
        "summary_by": "callsite",
    }


_SUMMARIES: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "actors": _summary_of_actors,
    "tasks": _summary_of_tasks,
    "objects": _summary_of_objects,
}


def list_actors(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ActorState]:
    """Actors, dead ones too. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("actors", filters, limit, timeout, detail)


def list_placement_groups(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[PlacementGroupState]:
    """Placement groups, removed ones too. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("placement_groups", filters, limit, timeout, detail)


def list_nodes(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[NodeState]:
    """Nodes, dead ones too. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("nodes", filters, limit, timeout, detail)


def list_jobs(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[JobState]:
    """Programs, those that are over too. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("jobs", filters, limit, timeout, detail)


def list_workers(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[WorkerState]:
    """Workers and drivers that live. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("workers", filters, limit, timeout, detail)


def list_tasks(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[TaskState]:
    """Calls of this process that are not done. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("tasks", filters, limit, timeout, detail)


def list_objects(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ObjectState]:
    """Objects that this process refers to. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("objects", filters, limit, timeout, detail)


def list_runtime_envs(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[RuntimeEnvState]:
    """Runtime environments that workers have. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("runtime_envs", filters, limit, timeout, detail)


def get_actor(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> ActorState | None:
    """One actor with all details; None for an id that nobody has. Blocks."""
    return StateApiClient(address).get("actors", id, timeout)


def get_job(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> JobState | None:
    return StateApiClient(address).get("jobs", id, timeout)


def get_placement_group(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> PlacementGroupState | None:
    return StateApiClient(address).get("placement_groups", id, timeout)


def get_node(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> NodeState | None:
    return StateApiClient(address).get("nodes", id, timeout)


def get_worker(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> WorkerState | None:
    return StateApiClient(address).get("workers", id, timeout)


def get_task(
    id: str | ObjectRef, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> TaskState | None:
    """One task by its id or by the reference of its result; None if this process has none of this id under way."""
    text = id.task_id().hex() if isinstance(id, ObjectRef) else id
    return StateApiClient(address).get("tasks", text, timeout)


def get_objects(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> list[ObjectState]:
    """What this process knows of an object: one row or none."""
    found = StateApiClient(address).get("objects", id, timeout)
    return [] if found is None else [found]


def summarize_actors(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many actors of each class are in which state."""
    return StateApiClient(address).summary("actors", timeout)


def summarize_tasks(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many tasks of this process, of each function, are in which state."""
    return StateApiClient(address).summary("tasks", timeout)


def summarize_objects(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many objects this process refers to, and their size."""
    return StateApiClient(address).summary("objects", timeout)

"""The public functions that list what the cluster has. Whoever knows is asked when they are called."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from typing import Any

from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import GetTimeoutError
from hpc_ray.observation import Asking
from hpc_ray.util.state.common import (
    DEFAULT_LIMIT,
    DEFAULT_TIMEOUT_S,
    ActorState,
    ClusterEventState,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    RuntimeEnvState,
    TaskState,
    WorkerState,
)
from hpc_ray.util.state.exception import RayStateApiException, ServerUnavailable
from hpc_ray.util.state.filters import Filters, chosen
from hpc_ray.util.state.sources import rows_of


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
        raise_on_missing_output: bool = True,
        _explain: bool = False,
    ) -> list[Any]:
        """Rows of a kind ("actors", "nodes" …) in the order of their ids; ``_explain`` prints how many there were, who did not
        answer, and how long it took. Blocks.

        Raises:
            RayStateApiException: no such kind or column, too many rows, or with ``raise_on_missing_output`` a process that did
                not say what it knows (otherwise a warning).
            ServerUnavailable: no answer within ``timeout`` seconds.
            ValueError: filters that are none.
            ConnectionError: there is no session.
        """
        kind, rows = self._rows(resource, timeout, raise_on_missing_output, _explain)
        return chosen(rows, kind, filters, limit, detail)

    def get(self, resource: str, id: str, timeout: float = DEFAULT_TIMEOUT_S, _explain: bool = False) -> Any:
        """One row by its id, with all details; None if there is none. A task with several attempts, and an object, has a list
        of rows. Blocks; raises as ``list`` does."""
        kind, rows = self._rows(resource, timeout, False, _explain)
        if not kind._key:
            raise ValueError(f"{resource} have no ids")
        found = chosen(rows, kind, [(kind._key, "=", id)], len(rows), True)
        if resource == "objects" or len(found) > 1:
            return found
        return found[0] if found else None

    def summary(
        self, resource: str, timeout: float = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
    ) -> dict[str, Any]:
        """Counts of actors, tasks or objects. Blocks; raises as ``list`` does."""
        if resource not in _SUMMARIES:
            raise RayStateApiException(f"there is no summary of {resource!r}; there are {', '.join(_SUMMARIES)}")
        return {"cluster": _SUMMARIES[resource](self._rows(resource, timeout, raise_on_missing_output, _explain)[1])}

    def _rows(self, resource: str, timeout: float, all_of_them: bool, explain: bool) -> tuple[type[Any], Any]:
        started = time.monotonic()
        asking = Asking(self.address, timeout)
        try:
            kind, rows = rows_of(resource, asking)
        except GetTimeoutError as error:
            raise ServerUnavailable(str(error)) from error
        if explain:
            milliseconds = (time.monotonic() - started) * 1000
            print(f"{resource}: {len(rows)} rows in {milliseconds:.1f} ms; {asking.missing} did not answer", file=sys.stderr)
        if asking.missing:
            text = f"{asking.missing} processes or nodes did not answer within {timeout:g} s; what they know is missing"
            if all_of_them:
                raise RayStateApiException(f"{text}. With raise_on_missing_output=False you get the rest")
            warnings.warn(text, stacklevel=4)
        return kind, rows


def _summary_of_actors(rows: list[ActorState]) -> dict[str, Any]:
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(str(row.class_name), Counter())[row.state] += 1
    summary = {name: {"class_name": name, "state_counts": dict(states)} for name, states in counts.items()}
    return {"summary": summary, "total_actors": len(rows), "summary_by": "class"}


def _summary_of_tasks(rows: list[TaskState]) -> dict[str, Any]:
    counts: dict[str, tuple[str | None, Counter]] = {}
    for row in rows:
        counts.setdefault(str(row.name or row.func_or_class_name), (row.type, Counter()))[1][row.state] += 1
    summary = {
        name: {"func_or_class_name": name, "type": kind, "state_counts": dict(states)} for name, (kind, states) in counts.items()
    }
    kinds = Counter(row.type for row in rows)
    return {
        "summary": summary,
        "total_tasks": kinds["NORMAL_TASK"],
        "total_actor_tasks": kinds["ACTOR_TASK"],
        "total_actor_scheduled": kinds["ACTOR_CREATION_TASK"],
        "summary_by": "func_name",
    }


def _summary_of_objects(rows: list[ObjectState]) -> dict[str, Any]:
    size = sum(row.object_size for row in rows if row.object_size and row.object_size > 0) / 2**20
    one = {
        "total_objects": len(rows),
        "total_size_mb": size,
        "total_num_workers": len({(row.ip, row.pid) for row in rows}),
        "total_num_nodes": len({row.ip for row in rows}),
        "task_state_counts": dict(Counter(row.task_status for row in rows)),
        "task_attempt_number_counts": dict(Counter(str(row.attempt_number) for row in rows)),
        "ref_type_counts": dict(Counter(row.reference_type for row in rows)),
    }
    return {
        "summary": {"disabled": one} if rows else {},
        "total_objects": len(rows),
        "total_size_mb": size,
        "callsite_enabled": False,
        "summary_by": "callsite",
    }


_SUMMARIES: dict[str, Any] = {
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
    return StateApiClient(address).list("actors", filters, limit, timeout, detail, raise_on_missing_output, _explain)


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
    return StateApiClient(address).list("placement_groups", filters, limit, timeout, detail, raise_on_missing_output, _explain)


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
    return StateApiClient(address).list("nodes", filters, limit, timeout, detail, raise_on_missing_output, _explain)


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
    return StateApiClient(address).list("jobs", filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_workers(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[WorkerState]:
    """Workers and drivers, also those that are gone. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("workers", filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_tasks(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[TaskState]:
    """Attempts of tasks, calls and actors' makings: those under way, and the latest that have ended (each process remembers
    10,000, setting ``task_history``). For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("tasks", filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_objects(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ObjectState]:
    """Objects, one row for each process that refers to one. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("objects", filters, limit, timeout, detail, raise_on_missing_output, _explain)


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
    return StateApiClient(address).list("runtime_envs", filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_cluster_events(
    address: str | None = None,
    filters: Filters | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_TIMEOUT_S,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ClusterEventState]:
    """Nodes and programs that came and went, in that order. For arguments and errors see ``StateApiClient.list``."""
    return StateApiClient(address).list("cluster_events", filters, limit, timeout, detail, raise_on_missing_output, _explain)


def get_actor(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> ActorState | None:
    """One actor with all details; None for an id that nobody has. Blocks."""
    return StateApiClient(address).get("actors", id, timeout, _explain)


def get_job(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> JobState | None:
    """One program by its hexadecimal id, with all details; None for an unknown id. Blocks. Errors: see ``StateApiClient.list``."""
    return StateApiClient(address).get("jobs", id, timeout, _explain)


def get_placement_group(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> PlacementGroupState | None:
    """One placement group by its hexadecimal id, with all details; None for an unknown id. Blocks. Errors: see ``StateApiClient.list``."""
    return StateApiClient(address).get("placement_groups", id, timeout, _explain)


def get_node(id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False) -> NodeState | None:
    """One node by its hexadecimal id, with all details; None for an unknown id. Blocks. Errors: see ``StateApiClient.list``."""
    return StateApiClient(address).get("nodes", id, timeout, _explain)


def get_worker(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> WorkerState | None:
    """One worker or driver by its hexadecimal id, with all details; None for an unknown id. Blocks. Errors: see ``StateApiClient.list``."""
    return StateApiClient(address).get("workers", id, timeout, _explain)


def get_task(
    id: str | ObjectRef, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> TaskState | list[TaskState] | None:
    """One task by its id or by the reference of its result: its attempt, or a list of them if there were several; None if nobody
    remembers it."""
    text = id.task_id().hex() if isinstance(id, ObjectRef) else id
    return StateApiClient(address).get("tasks", text, timeout, _explain)


def get_objects(
    id: str, address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, _explain: bool = False
) -> list[ObjectState]:
    """An object by its id: a row for each process that refers to it. Blocks."""
    return StateApiClient(address).get("objects", id, timeout, _explain)


def summarize_actors(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many actors of each class are in which state: ``["cluster"]["summary"][class]["state_counts"]``. Blocks."""
    return StateApiClient(address).summary("actors", timeout, raise_on_missing_output, _explain)


def summarize_tasks(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many attempts of each task are in which state: ``["cluster"]["summary"][name]["state_counts"]``. Blocks."""
    return StateApiClient(address).summary("tasks", timeout, raise_on_missing_output, _explain)


def summarize_objects(
    address: str | None = None, timeout: int = DEFAULT_TIMEOUT_S, raise_on_missing_output: bool = True, _explain: bool = False
) -> dict[str, Any]:
    """How many objects there are, and their size. Blocks."""
    return StateApiClient(address).summary("objects", timeout, raise_on_missing_output, _explain)

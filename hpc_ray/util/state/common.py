"""The rows that ``util.state`` gives, one class for each kind. Fields that are not asked for, or not known, are None."""

# ruff: noqa: RUF009 - _detail() and _unfilterable() return dataclasses.field()

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

DEFAULT_LIMIT = 100
MAX_LIMIT = 10_000
DEFAULT_TIMEOUT_S = 30


def _detail(*, filterable: bool = False) -> Any:
    """A field that is filled with ``detail`` only."""
    return field(default=None, metadata={"detail": True, "filterable": filterable})


def _unfilterable() -> Any:
    return field(default=None, metadata={"filterable": False})


class Row:
    """What the rows share. Fields are also found by ``row["name"]``."""

    _key: ClassVar[str] = ""

    def asdict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    @classmethod
    def columns(cls) -> set[str]:
        return {item.name for item in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def base_columns(cls) -> set[str]:
        """Those that are filled without ``detail``."""
        return {item.name for item in fields(cls) if not item.metadata.get("detail")}  # type: ignore[arg-type]

    @classmethod
    def filterable_columns(cls) -> set[str]:
        return {
            item.name
            for item in fields(cls)  # type: ignore[arg-type]
            if item.metadata.get("filterable", not item.metadata.get("detail"))
        }


@dataclass
class ActorState(Row):
    """An actor."""

    _key: ClassVar[str] = "actor_id"

    actor_id: str
    class_name: str | None = None
    state: str | None = None  # DEPENDENCIES_UNREADY, PENDING_CREATION, ALIVE, RESTARTING, DEAD
    job_id: str | None = None
    name: str | None = None
    node_id: str | None = None
    pid: int | None = None
    ray_namespace: str | None = None
    serialized_runtime_env: str | None = _detail()
    required_resources: dict | None = _detail()
    death_cause: dict | None = _detail()
    is_detached: bool | None = _detail()
    placement_group_id: str | None = _detail(filterable=True)
    repr_name: str | None = _detail(filterable=True)
    num_restarts: int | None = _detail()
    num_restarts_due_to_lineage_reconstruction: int | None = _detail()
    num_restarts_due_to_node_preemption: int | None = _detail()
    call_site: str | None = _detail()


@dataclass
class PlacementGroupState(Row):
    """A placement group."""

    _key: ClassVar[str] = "placement_group_id"

    placement_group_id: str
    name: str | None = None
    creator_job_id: str | None = None
    state: str | None = None  # PENDING, CREATED, RESCHEDULING, REMOVED
    bundles: list[dict] | None = _detail()
    is_detached: bool | None = _detail(filterable=True)
    stats: dict | None = _detail()


@dataclass
class NodeState(Row):
    """A node."""

    _key: ClassVar[str] = "node_id"

    node_id: str
    node_ip: str | None = None
    is_head_node: bool | None = None
    state: str | None = None  # ALIVE, DEAD
    state_message: str | None = _unfilterable()
    node_name: str | None = None
    resources_total: dict | None = _unfilterable()
    labels: dict | None = _unfilterable()
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()


@dataclass
class DriverInfo:
    """The process of a job."""

    id: str
    node_ip_address: str
    pid: str


@dataclass
class JobState(Row):
    """A job: a program that is or was connected."""

    _key: ClassVar[str] = "job_id"

    type: str
    job_id: str
    submission_id: str | None = None
    driver_info: DriverInfo | None = _unfilterable()
    status: str | None = None  # RUNNING, SUCCEEDED
    entrypoint: str | None = _unfilterable()
    message: str | None = _unfilterable()
    error_type: str | None = _unfilterable()
    start_time: int | None = _detail()  # ms of the epoch
    end_time: int | None = _detail()
    metadata: dict | None = _detail()
    runtime_env: dict | None = _detail()


@dataclass
class WorkerState(Row):
    """A process that runs tasks, or a program."""

    _key: ClassVar[str] = "worker_id"

    worker_id: str
    is_alive: bool | None = None
    worker_type: str | None = None  # WORKER, DRIVER
    exit_type: str | None = None
    node_id: str | None = None
    ip: str | None = None
    pid: int | None = None
    exit_detail: str | None = _detail()
    worker_launch_time_ms: int | None = _detail()  # asked for; -1: by nobody here
    worker_launched_time_ms: int | None = _detail()
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()  # 0: lives


@dataclass
class TaskState(Row):
    """One attempt of a task, of a call of an actor, or of an actor's making."""

    _key: ClassVar[str] = "task_id"

    task_id: str
    attempt_number: int | None = None
    name: str | None = None
    # PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, SUBMITTED_TO_WORKER, PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY, RUNNING,
    # RUNNING_IN_RAY_GET, RUNNING_IN_RAY_WAIT, FINISHED, FAILED
    state: str | None = None
    job_id: str | None = None
    actor_id: str | None = None
    type: str | None = None  # NORMAL_TASK, ACTOR_CREATION_TASK, ACTOR_TASK
    func_or_class_name: str | None = None
    parent_task_id: str | None = None
    node_id: str | None = None
    worker_id: str | None = None
    worker_pid: int | None = None
    error_type: str | None = None
    language: str | None = _detail(filterable=True)
    required_resources: dict | None = _detail()
    runtime_env_info: dict | None = _detail()
    placement_group_id: str | None = _detail(filterable=True)
    events: list[dict] | None = _detail()
    profiling_data: dict | None = _detail()
    creation_time_ms: int | None = _detail()
    start_time_ms: int | None = _detail()
    end_time_ms: int | None = _detail()
    error_message: str | None = _detail()


@dataclass
class ObjectState(Row):
    """An object that a process refers to."""

    _key: ClassVar[str] = "object_id"

    object_id: str
    object_size: int | None = None  # bytes; -1: not known
    task_status: str | None = None
    attempt_number: int | None = None
    reference_type: str | None = None
    call_site: str | None = None
    type: str | None = None  # of the process
    pid: int | None = None
    ip: str | None = None


@dataclass
class RuntimeEnvState(Row):
    """A runtime environment that workers have."""

    runtime_env: dict
    success: bool | None = None
    creation_time_ms: float | None = _unfilterable()
    node_id: str | None = None
    ref_cnt: int | None = _detail()
    error: str | None = _detail(filterable=True)


@dataclass
class ClusterEventState(Row):
    """Something that has happened to the cluster."""

    severity: str  # INFO, ERROR
    time: str = _unfilterable()  # of the day, in words
    source_type: str | None = None  # GCS
    message: str | None = _unfilterable()
    event_id: str | None = None
    custom_fields: dict | None = _detail()

"""What the calling code can know about itself: job, node, task, actor, resources."""

from __future__ import annotations

from typing import Any

from hpc_ray import actor as actors
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.ids import ActorID, JobID, NodeID, PlacementGroupID, TaskID, WorkerID
from hpc_ray.protocol import UNIT
from hpc_ray.runtime_env import RuntimeEnv
from hpc_ray.session import ensure_connected


class RuntimeContext:
    """See ``get_runtime_context``. There is one in a process; its answers depend on who asks."""

    @property
    def _client(self) -> Client:
        return ensure_connected()

    def get_job_id(self) -> str:
        return self._client.job_id.hex()

    def get_node_id(self) -> str:
        welcome = self._client.welcome
        assert welcome is not None
        return welcome.node_id.hex()

    def get_worker_id(self) -> str:
        return self._client.worker_id.hex()

    def get_task_id(self) -> str | None:
        """None in a driver."""
        task = context.task.get()
        return task.task_id.hex() if task is not None else None

    def get_task_name(self) -> str | None:
        task = context.task.get()
        return task.name if task is not None else None

    def get_task_function_name(self) -> str | None:
        """The name of the function or method itself, with its module or script, whatever the call is named; None in a driver."""
        task = context.task.get()
        return task.full_name if task is not None else None

    def get_node_labels(self) -> dict[str, str]:
        return dict(self._client.config.labels)

    def get_session_name(self) -> str:
        """The same in all processes of the session."""
        return self._client.config.session

    def get_temp_dir(self) -> str:
        """The folder of this node's part of the session; it goes with the session."""
        return self._client.config.session_dir

    @property
    def runtime_env(self) -> RuntimeEnv:
        """The runtime environment of the calling task, actor or program, with what it inherited; packages as URIs."""
        return RuntimeEnv.deserialize(self.get_runtime_env_string())

    def get_runtime_env_string(self) -> str:
        """The runtime environment as JSON."""
        return context.runtime_env or "{}"

    def is_canceled(self) -> bool:
        """Whether somebody has cancelled the calling task. Methods of actors ask this, since they are not interrupted.

        Raises:
            RuntimeError: the driver, or a coroutine of an actor, which is cancelled like any coroutine, asks.
        """
        task = context.task.get()
        if task is None:
            raise RuntimeError("is_canceled() is for tasks; this code runs in none.")
        if context.actor is not None and context.actor.spec.is_async:
            raise RuntimeError("is_canceled() is not for async actors: their coroutines get asyncio.CancelledError.")
        return task.task_id in context.cancelled

    def get_actor_id(self) -> str | None:
        """None outside actors."""
        return context.actor.spec.actor_id.hex() if context.actor is not None else None

    def get_actor_name(self) -> str | None:
        """None outside actors, "" for one without a name."""
        return context.actor.spec.name if context.actor is not None else None

    @property
    def namespace(self) -> str:
        return context.namespace

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor has been restarted."""
        return context.actor is not None and context.actor.attempt > 0

    @property
    def current_actor(self) -> Any:
        """A handle on the actor that asks.

        Raises:
            RuntimeError: the caller is no actor.
        """
        if context.actor is None:
            raise RuntimeError("This method is only available in an actor.")
        return actors.handle_of_current_actor()

    def get_mpi_rank(self) -> int | None:
        """Of the calling code in its gang; None outside of one."""
        return context.gang.rank if context.gang is not None else None

    def get_mpi_size(self) -> int | None:
        """How many ranks the gang of the calling code has; None outside of one."""
        return context.gang.size if context.gang is not None else None

    def get_placement_group_id(self) -> str | None:
        shape = _shape()
        return shape.group_id.hex() if shape is not None and shape.group_id else None

    @property
    def current_placement_group_id(self) -> PlacementGroupID:
        """The nil id outside groups."""
        found = self.get_placement_group_id()
        return PlacementGroupID.from_hex(found) if found else PlacementGroupID.nil()

    @property
    def gcs_address(self) -> str:
        """The name of the session, which ``init(address=...)`` takes: the GCS has no port."""
        return self._client.config.session

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        shape = _shape()
        return bool(shape is not None and shape.capture_children)

    def get_assigned_resources(self) -> dict[str, float]:
        """What was set aside for this task or actor.

        Raises:
            AssertionError: asked in a driver.
        """
        assert context.is_worker, "get_assigned_resources() is for tasks and actors; this is a driver"
        shape = _shape()
        if shape is None:
            return {}
        found = {name.partition("_group_")[0]: amount / UNIT for name, amount in shape.resources.items()}
        found.pop("bundle", None)  # the mark of a placement group's bundle
        return found

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """The GPUs of this task or actor, and the other accelerators that Ray knows."""
        found = context.instances if context.is_worker else {}
        return {kind: [str(index) for index, _ in found.get(kind, ())] for kind in _ACCELERATORS}

    def get_resource_ids(self) -> dict[str, list[str]]:
        """The older name of ``get_accelerator_ids``."""
        return self.get_accelerator_ids()

    def get(self) -> dict[str, Any]:
        """The older form: a dict of some of the fields."""
        found: dict[str, Any] = {"job_id": self.job_id, "node_id": self.node_id, "namespace": self.namespace}
        if context.is_worker:
            if context.task.get() is not None:
                found["task_id"] = self.task_id
            if context.actor is not None:
                found["actor_id"] = self.actor_id
        return found

    @property
    def job_id(self) -> JobID:
        return JobID(self._client.job_id)

    @property
    def node_id(self) -> NodeID:
        return NodeID(bytes.fromhex(self.get_node_id()))

    @property
    def worker_id(self) -> WorkerID:
        return WorkerID(self._client.worker_id)

    @property
    def task_id(self) -> TaskID | None:
        task = context.task.get()
        return TaskID(task.task_id) if task is not None else None

    @property
    def actor_id(self) -> ActorID | None:
        return ActorID(context.actor.spec.actor_id) if context.actor is not None else None


def _shape() -> Any:
    if context.actor is not None:
        return context.actor.spec.shape
    task = context.task.get()
    return task.shape if task is not None else None


_ACCELERATORS = ("GPU", "TPU", "NPU", "HPU", "neuron_cores", "RBLN", "FURIOSA", "TTNPU", "MBLT")


def gpu_ids() -> list[int]:
    """Indices of the GPUs that the calling task or actor has."""
    instances = context.instances.get("GPU", []) if context.is_worker else []
    return [index for index, _ in instances]


_context = RuntimeContext()


def get_runtime_context() -> RuntimeContext:
    """The context of the calling code; starts a session if there is none."""
    ensure_connected()
    return _context

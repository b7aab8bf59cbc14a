"""The public functions, Ray's names with Ray's meaning."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import NoneType
from typing import Any

from hpc_ray.actor import ActorClass, ActorHandle, weak_handle
from hpc_ray.client import context
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.streams import ObjectRefGenerator
from hpc_ray.exceptions import ActorHandleNotFoundError
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import UNIT, GetNamedActor
from hpc_ray.remote_function import RemoteFunction
from hpc_ray.runtime_context import gpu_ids
from hpc_ray.session import ensure_connected


def remote(*args: Any, **options: Any) -> Any:
    """Make a function remote, or a class an actor: ``@remote``, ``@remote(num_cpus=2)`` or ``remote(f)``.

    Besides Ray's options a function or a class can have ``mpi_ranks``. Then each call runs on so many MPI ranks at once, each with the
    arguments of the call and the CPUs (1, if nothing is said) and GPUs that the options ask for, and ``mpi_comm()`` is their
    communicator. The value is the list of what they return, by rank; with ``num_returns="per_rank"``, or their number, there is a
    reference for each. The ranks lie on one node if one is large enough, else on as few as have room, and all start or none;
    ``mpi_ranks_per_node=2`` puts two on each. A class has an instance on each rank. A call that fails on a rank fails; its actor goes
    on if all ranks come back from the call within ``gang_grace_s`` (1 s), and has crashed if not, or if a rank dies.

    Raises:
        TypeError: neither a Python function nor a class, or an option of the wrong type.
        ValueError: an option that is unknown or out of range, or a coroutine function.
        AssertionError: positional arguments beside the function.
    """
    if len(args) == 1 and not options and callable(args[0]):
        return _make(args[0], {})
    assert not args and options, (
        "The @ray.remote decorator must be applied either with no arguments and no parentheses, for example '@ray.remote', or "
        "with keyword arguments, for example '@remote(num_returns=2, resources={\"slot\": 1})'."
    )
    return lambda target: _make(target, options)


def _make(target: Any, options: dict[str, Any]) -> Any:
    if inspect.isclass(target):
        return ActorClass._wrap(target, options)
    if inspect.iscoroutinefunction(target):
        raise ValueError(
            f"'async def' should not be used for remote tasks, and '{target.__name__}' is one; only methods of actors can be. "
            "Wrap it in a function that runs it: `def wrapper(): return asyncio.run(coroutine())`."
        )
    if inspect.isfunction(target):
        return RemoteFunction(target, options)
    raise TypeError(
        f"The @ray.remote decorator must be applied to either a function or a class, not to a {type(target).__name__}: {_short(target)}"
    )


def get(
    object_refs: ObjectRef | Sequence[ObjectRef], *, timeout: float | None = None, _use_object_store: bool = False
) -> Any:
    """The value of a reference, or the values of a list of them. Blocks until they are there.

    Arrays in the values are read-only views on the object store, which is where all objects are: ``_use_object_store`` says so.

    Raises:
        RayTaskError: the task failed; it is also an instance of the class that was raised.
        GetTimeoutError: not there within ``timeout`` seconds (0 only looks, a negative one waits for ever).
        ObjectLostError, WorkerCrashedError, ActorDiedError …: why there will be no value.
        ValueError, TypeError: not a reference, or not a list of them.
    """
    client = context.client or ensure_connected()
    if timeout is not None:
        _check_seconds("get", timeout)
        if timeout < 0:  # as Ray has it
            timeout = None
    if type(object_refs) is ObjectRef:
        return client.values.get_one(object_refs, timeout)
    if isinstance(object_refs, ObjectRefGenerator):  # it is what a task has given, and no reference
        return object_refs
    if hasattr(object_refs, "_get_for_api"):
        return object_refs._get_for_api(timeout)
    if isinstance(object_refs, list) and object_refs and hasattr(object_refs[0], "_get_for_api"):
        return [get(item, timeout=timeout) for item in object_refs]
    if not isinstance(object_refs, list):
        raise ValueError(
            f"get takes an ObjectRef or a list of ObjectRefs, not {type(object_refs).__name__}: {_short(object_refs)}"
        )
    for item in object_refs:
        if not isinstance(item, ObjectRef):
            raise TypeError(f"get takes a list of ObjectRefs; one of them is a {type(item).__name__}: {_short(item)}")
    return client.values.get_many(object_refs, timeout)


def put(value: Any, *, _owner: Any = None, _tensor_transport: str | None = None) -> ObjectRef:
    """Store a value (a copy of it); its reference. Blocks while it is copied, and while other objects make room for it.

    Raises:
        TypeError: the value is a reference, or cannot be pickled.
        ValueError: another owner, or a transport that there is not.
        ObjectStoreFullError: no room.
    """
    if isinstance(value, ObjectRef):
        raise TypeError(
            "Calling 'put' on an ObjectRef is not allowed. If you really want to store a reference, put it in a list: "
            "put([ref])."
        )
    if _tensor_transport not in (None, "object_store"):
        raise ValueError(f"put(_tensor_transport={_tensor_transport!r}): objects travel through the object store; leave it out")
    if _owner is not None:
        raise ValueError("put(_owner=...) is not offered: an object belongs to the process that puts it. Put it in that actor.")
    return ensure_connected().values.put(value)


def wait(
    ray_waitables: list[Any], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[Any], list[Any]]:
    """Wait until ``num_returns`` of the references are ready (of generators: their next items), or ``timeout`` seconds have
    passed. Blocks.

    Returns:
        (ready, not ready), each in the order given; at most ``num_returns`` in the first.

    Raises:
        TypeError, ValueError: not a list of distinct references, or ``num_returns`` out of range.
    """
    client = ensure_connected()
    if isinstance(ray_waitables, ObjectRef):
        raise TypeError("wait() expected a list of ObjectRef, got a single ObjectRef")
    if not isinstance(ray_waitables, list):
        raise TypeError(f"wait() expected a list of ObjectRef, got {type(ray_waitables)}")
    if timeout is not None:
        _check_seconds("wait", timeout)
    if not hasattr(num_returns, "__int__"):
        raise TypeError(f"wait(num_returns=...) takes an integer, not {type(num_returns).__name__}")
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    if not ray_waitables:
        return [], []
    if not 0 < num_returns <= len(ray_waitables):
        _check_waitables(ray_waitables)
        if num_returns <= 0:
            raise ValueError(f"Invalid number of objects to return {num_returns}.")
        raise ValueError(f"num_returns cannot be greater than the number of object refs ({num_returns} > {len(ray_waitables)})")
    try:
        ready = client.values.wait(ray_waitables, int(num_returns), timeout, fetch_local)
    except AttributeError:  # only then does it take the time to look at each
        _check_waitables(ray_waitables)
        raise
    rest = ray_waitables.copy()
    if len(ready) == 1:  # the usual loop: one by one out of many
        return [rest.pop(ready[0])], rest
    chosen = set(ready)
    return [rest[i] for i in ready], [item for i, item in enumerate(rest) if i not in chosen]


def _check_waitables(items: list[Any]) -> None:
    for kind in set(map(type, items)):
        if not issubclass(kind, (ObjectRef, ObjectRefGenerator)):
            raise TypeError(f"wait() expected a list of ObjectRef, got a list containing {kind}")


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor at once; its running and waiting calls fail. Does not wait for that. With ``no_restart=False`` it
    comes back if it may.

    Raises:
        ValueError: not an actor handle, or one of another session.
    """
    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() only supports actors. For tasks, try cancel(). Got: {type(actor)}.")
    client = ensure_connected()
    if actor._client is not client:
        raise ActorHandleNotFoundError(
            f"The handle on actor {actor._actor_id.hex()} belongs to a session that is over; it cannot be killed in this one."
        )
    with client.lock:
        client.actors.kill(actor._actor_id.binary(), no_restart)


def cancel(ray_waitable: ObjectRef, *, force: bool = False, recursive: bool = True) -> None:
    """Stop a task: one that waits is dropped, one that runs gets KeyboardInterrupt (``force``: its process ends).
    ``get`` then raises TaskCancelledError. Does not wait for that. No effect on a task that is done. Whoever has a reference may
    cancel its task, also when another process has submitted it.

    Raises:
        TypeError: not a reference.
        ValueError: ``force`` for an actor's task.
    """
    if not isinstance(ray_waitable, (ObjectRef, ObjectRefGenerator)):
        raise TypeError(
            f"ray.cancel() only supported for object refs. For actors, try ray.kill(). Got: {type(ray_waitable)}."
        )
    client = ensure_connected()
    with client.lock:
        client.tasks.cancel_by_id(ray_waitable.task_id().binary(), force, recursive)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """A handle on a named actor. It is not counted: it does not keep the actor alive. Blocks for one question
    to the GCS.

    Raises:
        ValueError: there is no actor of this name in the namespace (default: the program's), or the name is empty.
        TypeError: the name or the namespace is not a str.
    """
    if not name:
        raise ValueError("Please supply a non-empty value to get_actor")
    if not isinstance(name, str) or not isinstance(namespace, (str, NoneType)):
        raise TypeError(f"get_actor takes a name and a namespace, both str, not {_short(name)} and {_short(namespace)}")
    client = ensure_connected()
    where = context.namespace if namespace is None else namespace
    answer = client.request(GCS_ADDRESS, lambda request_id: GetNamedActor(request_id, name, where))
    if not answer.handle:
        raise ValueError(
            f"Failed to look up actor with name '{name}'. This could because 1. You are trying to look up a named actor you "
            "didn't create. 2. The named actor died. 3. You did not use a namespace matching the namespace of the actor."
        )
    return weak_handle(answer.handle)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, dead ones too, each a dict (NodeID, Alive, Resources, Labels, NodeManagerHostname …).
    Blocks for one question to the GCS."""
    found = ensure_connected().query(GCS_ADDRESS, "nodes")
    return [
        {
            "NodeID": bytes(node["node_id"]).hex(),
            "Alive": node["alive"],
            "NodeManagerAddress": node["ip"],
            "NodeManagerHostname": node["hostname"],
            "NodeManagerPort": 0,  # nodes have no ports
            "ObjectManagerPort": 0,
            "ObjectStoreSocketName": "",
            "RayletSocketName": "",
            "MetricsExportPort": 0,
            "MetricsAgentPort": 0,
            "DashboardAgentListenPort": 0,
            "NodeName": node["hostname"],
            "RuntimeEnvAgentPort": 0,
            "DeathReason": 0 if node["alive"] else 1,
            "DeathReasonMessage": node["death"],
            "alive": node["alive"],
            "Resources": _floats(_without_groups(node["total"])) if node["alive"] else {},
            "Labels": node["labels"],
        }
        for node in found
    ]


def _without_groups(amounts: dict[str, int]) -> dict[str, int]:
    """A node's own resources: those of placement groups are the same ones under other names."""
    return {name: amount for name, amount in amounts.items() if "_group_" not in name}


def cluster_resources() -> dict[str, float]:
    """What all nodes have, by name ("CPU", "GPU", "memory" in bytes, those of ``init`` …). Blocks for one question to the GCS."""
    return _floats(ensure_connected().query(GCS_ADDRESS, "cluster_resources"))


def available_resources() -> dict[str, float]:
    """What is free, by name, as the nodes reported last; without what is all taken. Blocks for one question to the GCS."""
    free = ensure_connected().query(GCS_ADDRESS, "available_resources")
    return _floats({name: amount for name, amount in free.items() if amount})


def get_gpu_ids() -> list[int]:
    """Indices of the GPUs that the calling task or actor has; [] in a driver. Does not block."""
    return gpu_ids()


def _check_seconds(function: str, timeout: Any) -> None:
    if not hasattr(timeout, "__float__"):
        raise TypeError(f"{function}(timeout=...) takes a number of seconds or None, not {type(timeout).__name__}")
    if timeout != timeout:
        raise ValueError(f"{function}(timeout=nan): that is no number of seconds")


def _floats(resources: dict[str, int]) -> dict[str, float]:
    return {name: amount / UNIT for name, amount in resources.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."

"""A scheduler for dask that runs its graphs as tasks: ``dask.compute(..., scheduler=ray_dask_get)``, or
``enable_dask_on_ray()`` for all.

DASK-1 (by reference): what one node of a graph makes and another uses goes from worker to worker, not through the caller.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from hpc_ray.api import get, put, remote
from hpc_ray.client.refs import ObjectRef

try:
    import dask  # type: ignore[import-not-found, unused-ignore]
    from dask._task_spec import DataNode, convert_legacy_graph  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # optional, and the graphs of old versions are not read
    dask = None


def _run_node(node: Any, keys: list[Hashable], *values: Any) -> Any:
    return node(dict(zip(keys, values, strict=True)))


_task = remote(_run_node)


def ray_dask_get(dsk: Mapping, keys: Any, **kwargs: Any) -> Any:
    """The values of ``keys`` in the graph ``dsk``; lists of keys give tuples. Blocks.

    Args:
        ray_remote_args (keyword): options for all tasks; an annotation ``ray_remote_args`` of a node goes before it.
        ray_persist (keyword): give references instead of values.
        The rest is dask's, for its other schedulers.

    Raises:
        ImportError: no dask, or one before 2024.12.
        RayTaskError …: a node failed.
    """
    if dask is None:
        raise ImportError("ray_dask_get needs the package dask, version 2024.12 or later")
    annotations = _annotations(dsk)
    graph = convert_legacy_graph(dict(dsk.__dask_graph__() if hasattr(dsk, "__dask_graph__") else dsk))
    options = kwargs.get("ray_remote_args") or {}
    made: dict[Hashable, ObjectRef] = {}
    for key in _ordered(graph, _leaves(keys)):
        made[key] = _submit(graph[key], made, {**options, **annotations.get(key, {})})
    found = {key: made[key] for key in _leaves(keys)}
    if not kwargs.get("ray_persist"):
        names = list(found)
        found = dict(zip(names, get([found[name] for name in names]), strict=True))
    return _nested(keys, found)


def _submit(node: Any, made: dict[Hashable, ObjectRef], options: dict[str, Any]) -> ObjectRef:
    if isinstance(node, DataNode):
        return put(node())
    needed = list(node.dependencies)
    task = _task.options(**options) if options else _task
    return task.remote(node, needed, *(made[key] for key in needed))


def _annotations(dsk: Any) -> Mapping[Hashable, dict[str, Any]]:
    """Options that nodes of a graph are annotated with."""
    found: dict[str, Any] = getattr(dsk, "__dask_annotations__", dict)()
    return found.get("ray_remote_args", {})


def _leaves(keys: Any) -> list[Hashable]:
    return [leaf for item in keys for leaf in _leaves(item)] if isinstance(keys, list) else [keys]


def _nested(keys: Any, found: Mapping) -> Any:
    return tuple(_nested(item, found) for item in keys) if isinstance(keys, list) else found[keys]


def _ordered(graph: Mapping, wanted: list[Hashable]) -> list[Hashable]:
    """What is needed for ``wanted``, everything after what it depends on."""
    order: dict[Hashable, None] = {}
    stack = list(reversed(wanted))
    while stack:
        key = stack[-1]
        missing = [name for name in graph[key].dependencies if name not in order]
        if missing:
            stack.extend(missing)
        else:
            order[stack.pop()] = None
    return list(order)


def enable_dask_on_ray(**options: Any) -> Any:
    """Make ``ray_dask_get`` dask's scheduler, for good or as a context manager.

    Raises:
        ImportError: no dask.
    """
    if dask is None:
        raise ImportError("enable_dask_on_ray() needs the package dask, version 2024.12 or later")
    return dask.config.set(scheduler=ray_dask_get, **options)


def disable_dask_on_ray() -> Any:
    """Back to dask's own scheduler."""
    if dask is None:
        raise ImportError("disable_dask_on_ray() needs the package dask")
    return dask.config.set(scheduler=None)


__all__ = ["disable_dask_on_ray", "enable_dask_on_ray", "ray_dask_get"]

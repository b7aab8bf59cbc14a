"""A node of a task graph: something that ``execute`` will call, with arguments of which some are other nodes.

``bind`` makes nodes, and nothing runs. ``execute`` runs what its node needs, each node once, as ordinary tasks and actor calls.
``experimental_compile`` prepares a graph of actor calls to be run many times (see ``compiled_dag_node``).

DAG-1 (order): a node is made after the nodes in its arguments, so the order in which nodes were made is an order in which they can
run; nothing here recurses over the graph.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from hpc_ray.dag.compiled_dag_node import CompiledDAG, Plan

_numbers = itertools.count()


class DAGNode:
    """Base of all nodes; ``bind`` of remote functions, actor classes and methods makes them."""

    _number: int
    _compiled = False  # the output of a compiled graph

    def __init__(
        self, args: Iterable[Any], kwargs: dict[str, Any], options: dict[str, Any], other_args_to_resolve: dict[str, Any]
    ):
        self._bound_args = tuple(args)
        self._bound_kwargs = dict(kwargs)
        self._bound_options = dict(options)
        self._bound_other_args_to_resolve = dict(other_args_to_resolve)
        self._stable_uuid = uuid.uuid4().hex
        self._number = next(_numbers)
        self._downstream_nodes: list[DAGNode] = []
        self._upstream_nodes = _distinct(nodes_in((self._bound_args, self._bound_kwargs, self._bound_other_args_to_resolve)))
        for node in self._upstream_nodes:
            node._downstream_nodes.append(self)

    def get_args(self) -> tuple[Any, ...]:
        """The positional arguments it is bound to."""
        return self._bound_args

    def get_kwargs(self) -> dict[str, Any]:
        """The keyword arguments it is bound to."""
        return dict(self._bound_kwargs)

    def get_options(self) -> dict[str, Any]:
        """The options of its task, actor or call."""
        return dict(self._bound_options)

    def get_other_args_to_resolve(self) -> dict[str, Any]:
        """What belongs to it beside the arguments, such as the actor of a call."""
        return dict(self._bound_other_args_to_resolve)

    def get_stable_uuid(self) -> str:
        """Its name, also after pickling."""
        return self._stable_uuid

    def with_tensor_transport(
        self, transport: str | None = "auto", device: str = "default", _static_shape: bool = False, _direct_return: bool = False
    ) -> DAGNode:
        """Say how tensors that it gives travel: through shared memory ("auto" or "shm"), which they do anyway.

        Raises:
            ValueError: another transport or device; GPU tensors are sent as bytes here, not by NCCL.
        """
        if transport not in ("auto", "shm"):
            raise ValueError(
                f'with_tensor_transport({transport!r}): there is no GPU transport here; "auto" and "shm" use shared memory. '
                "Move tensors with torch.distributed or NCCL inside the actors where that is too slow."
            )
        if device not in ("default", "cpu"):
            raise ValueError(f"with_tensor_transport(device={device!r}): tensors arrive on the device they were on; call .to() there")
        return self

    def execute(self, *args: Any, _ray_cache_refs: bool = False, **kwargs: Any) -> Any:
        """Run what this node needs, and the node: an ObjectRef, an actor's handle, or a list of such for a MultiOutputNode.

        ``args`` and ``kwargs`` are what the InputNode stands for. Does not wait for the tasks.

        Raises:
            AssertionError: there is more than one InputNode, or it was not made by ``with``.
            What ``remote`` raises.
        """
        values: dict[DAGNode, Any] = {}
        source = None
        for node in self._needed():
            if node._is_input():
                assert source is None, "Each DAG should only have one unique InputNode."
                source = node
            values[node] = node._run(lambda value: replace(value, values), args, kwargs)
        if _ray_cache_refs:
            self._last = {node._stable_uuid: value for node, value in values.items()}
        return values[self]

    async def get_object_refs_from_last_execute(self) -> dict[str, Any]:
        """By node: what the last ``execute(_ray_cache_refs=True)`` gave for it."""
        return dict(self.__dict__.get("_last", {}))

    def clear_cache(self) -> None:
        """Forget what ``get_object_refs_from_last_execute`` gives."""
        self.__dict__.pop("_last", None)

    def experimental_compile(
        self,
        _submit_timeout: float | None = None,
        _buffer_size_bytes: int | None = None,
        enable_asyncio: bool = False,
        _max_inflight_executions: int | None = None,
        _max_buffered_results: int | None = None,
        _overlap_gpu_communication: bool | None = None,
        _default_communicator: Any = "create",
    ) -> CompiledDAG:
        """Prepare this node and what it needs to be run many times by the actors themselves. Blocks until all of them are ready.

        Args:
            _submit_timeout: seconds that ``execute`` may wait; -1: for ever.
            _buffer_size_bytes: for compatibility with Ray, where buffers have a size; here values take what they need.
            enable_asyncio: it will be run by ``execute_async``.
            _max_inflight_executions: so many may be under way before a result must be fetched.
            _max_buffered_results: so many results may wait for their ``get``.
            _overlap_gpu_communication, _default_communicator: of GPU transports, which are not offered.

        Raises:
            ValueError: the graph has something other than methods of existing actors, a node whose value nobody uses, a method
                without a node among its arguments; or it was compiled before.
            ActorDiedError: one of the actors is dead.
        """
        if _buffer_size_bytes is not None and (not isinstance(_buffer_size_bytes, int) or _buffer_size_bytes <= 0):
            raise ValueError(f"`buffer_size_bytes` must be a positive integer, found {_buffer_size_bytes}")
        if _overlap_gpu_communication or _default_communicator not in ("create", None):
            raise ValueError("there is no GPU transport here, so it has no communicator and nothing to overlap; leave these out")
        if self._compiled:
            raise ValueError(
                "It is not allowed to call `experimental_compile` on the same DAG object multiple times, whether `teardown` was "
                "called or not. Use the compiled graph again, or build another one."
            )
        plan = Plan()
        for node in self._connected():
            if node._compiled:
                raise ValueError(f"The DAG was compiled more than once: by {node} and now by {self}")
            plan.add(node, node._upstream_nodes, node is self or bool(node._downstream_nodes))
            node._plan(plan)
        plan.finish(self, list(self._bound_args) if self._is_output_list() else None)
        compiled = CompiledDAG(plan, _submit_timeout, enable_asyncio, _max_inflight_executions, _max_buffered_results)
        self._compiled = True
        return compiled

    # -------------------------------------------------------------- what kinds of nodes say about themselves

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run it; ``resolve`` puts values in the place of nodes. ``args`` and ``kwargs`` are the input of the graph."""
        raise TypeError(f"{type(self).__name__} cannot be run")

    def _plan(self, plan: Plan) -> None:
        """Take part in a compiled graph."""
        raise ValueError(f"Found unsupported node of type {type(self)}")

    def _is_input(self) -> bool:
        return False

    def _is_output_list(self) -> bool:
        return False

    # -------------------------------------------------------------- the graph

    def _needed(self) -> list[DAGNode]:
        """This node and all that it needs, in order (DAG-1)."""
        return _reachable(self, lambda node: node._upstream_nodes)

    def _connected(self) -> list[DAGNode]:
        """All nodes that have to do with this one, in order (DAG-1)."""
        return _reachable(self, lambda node: node._upstream_nodes + node._downstream_nodes)

    def __getattr__(self, name: str) -> Any:
        if name == "bind":
            raise AttributeError(f".bind() cannot be used again on {type(self)}")
        if name == "remote":
            raise AttributeError(f".remote() cannot be used on {type(self)}. To run the graph that ends in this node, use .execute().")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._label()})"

    def _label(self) -> str:
        return ""


def _reachable(start: DAGNode, neighbours: Any) -> list[DAGNode]:
    found = {start}
    waiting = [start]
    while waiting:
        for node in neighbours(waiting.pop()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return sorted(found, key=lambda node: node._number)


def _distinct(nodes: Iterable[DAGNode]) -> list[DAGNode]:
    return list(dict.fromkeys(nodes))


def nodes_in(value: Any) -> Iterator[DAGNode]:
    """The nodes in a value, also in lists, tuples, sets and dicts inside it."""
    if isinstance(value, DAGNode):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from nodes_in(key)
            yield from nodes_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from nodes_in(item)


def replace(value: Any, values: dict[DAGNode, Any]) -> Any:
    """The same with what nodes stand for instead of the nodes; what has no nodes inside is the same object."""
    if isinstance(value, DAGNode):
        return values[value]
    if next(nodes_in(value), None) is None:
        return value
    if isinstance(value, dict):
        return type(value)((replace(key, values), replace(item, values)) for key, item in value.items())
    items = [replace(item, values) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

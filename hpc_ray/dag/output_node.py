"""Several ends of a graph."""

from __future__ import annotations

from typing import Any

from hpc_ray.dag.compiled_dag_node import Plan
from hpc_ray.dag.dag_node import DAGNode


class MultiOutputNode(DAGNode):
    """The end of a graph that gives several values: ``execute`` gives a list.

    Raises:
        ValueError: not a list or tuple of nodes.
    """

    def __init__(self, args: list[DAGNode] | tuple[DAGNode, ...], other_args_to_resolve: dict[str, Any] | None = None):
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"Invalid input type for `args`, {type(args)}.")
        super().__init__(args, {}, {}, other_args_to_resolve or {})

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return list(resolve(self._bound_args))

    def _plan(self, plan: Plan) -> None:
        pass  # the end is said by Plan.finish

    def _is_output_list(self) -> bool:
        return True

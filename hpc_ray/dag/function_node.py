"""A task as a node."""

from __future__ import annotations

from typing import Any

from hpc_ray.dag.compiled_dag_node import Plan
from hpc_ray.dag.dag_node import DAGNode


class FunctionNode(DAGNode):
    """A call of a remote function; made by ``f.bind(...)``."""

    def __init__(self, function: Any, args: tuple, kwargs: dict[str, Any], options: dict[str, Any]):
        super().__init__(args, kwargs, options, {})
        self._body = function

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self._body.remote(*resolve(self._bound_args), **resolve(self._bound_kwargs))

    def _plan(self, plan: Plan) -> None:
        raise ValueError(f"Compiled DAGs only support actor method nodes, not {self}: put the function into an actor.")

    def _label(self) -> str:
        return getattr(self._body, "__name__", "")

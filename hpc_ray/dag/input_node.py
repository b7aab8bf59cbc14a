"""What stands for the arguments of ``execute``."""

from __future__ import annotations

from typing import Any

from hpc_ray.dag.compiled_dag_node import Plan
from hpc_ray.dag.dag_node import DAGNode


class InputNode(DAGNode):
    """The input of a graph, of which there is one; made by ``with InputNode() as x``.

    ``x`` is the only argument of ``execute``; ``x[0]``, ``x["key"]`` and ``x.name`` are some of several, or parts of the only one.

    Raises:
        ValueError: it was given arguments.
    """

    def __init__(self, *args: Any, input_type: Any = None, _other_args_to_resolve: dict[str, Any] | None = None, **kwargs: Any):
        if args or kwargs:
            raise ValueError("InputNode should not take any args or kwargs.")
        self.input_attribute_nodes: dict[Any, InputAttributeNode] = {}
        self.input_type = input_type
        self._in_context_manager = False
        super().__init__((), {}, {}, _other_args_to_resolve or {})

    def __enter__(self) -> InputNode:
        self._in_context_manager = True
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or "input_attribute_nodes" not in self.__dict__:
            raise AttributeError(key)
        return self._part(key, "__getattr__")

    def __getitem__(self, key: int | str) -> InputAttributeNode:
        assert isinstance(key, (str, int)), "Please only use int index or str as first-level key to access fields of dag input."
        return self._part(key, "__getitem__")

    def _part(self, key: int | str, accessor: str) -> InputAttributeNode:
        part = self.input_attribute_nodes.get(key)
        if part is None:
            part = self.input_attribute_nodes[key] = InputAttributeNode(self, key, accessor)
        return part

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        assert self._in_context_manager, "InputNode should only be used in a context manager: `with InputNode() as x:`."
        return args[0] if len(args) == 1 and not kwargs else DAGInputData(*args, **kwargs)

    def _plan(self, plan: Plan) -> None:
        plan.add_input(self, list(self.input_attribute_nodes.values()))

    def _is_input(self) -> bool:
        return True


class InputAttributeNode(DAGNode):
    """A part of the input."""

    def __init__(self, dag_input_node: InputNode, key: int | str, accessor_method: str, input_type: str | None = None):
        self._key = key
        self._accessor_method = accessor_method
        super().__init__((dag_input_node,), {}, {}, {"dag_input_node": dag_input_node, "key": key, "accessor_method": accessor_method})

    @property
    def key(self) -> int | str:
        """Its index or name."""
        return self._key

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        (given,) = resolve(self._bound_args)
        by_name = self._accessor_method == "__getattr__" and not isinstance(given, DAGInputData)
        return getattr(given, str(self._key)) if by_name else given[self._key]

    def _plan(self, plan: Plan) -> None:
        plan.add_attribute(self, self._key)

    def _label(self) -> str:
        return repr(self._key)


class DAGInputData:
    """Several arguments of ``execute`` as one value: by position or by name."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._args = args
        self._kwargs = kwargs

    def __getitem__(self, key: int | str) -> Any:
        return self._args[key] if isinstance(key, int) else self._kwargs[key]

"""Actors and calls of their methods as nodes."""

from __future__ import annotations

from typing import Any

from hpc_ray.dag.compiled_dag_node import Plan
from hpc_ray.dag.constants import (
    BIND_INDEX_KEY,
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
)
from hpc_ray.dag.dag_node import DAGNode


class ClassNode(DAGNode):
    """An actor that ``execute`` will make, a new one each time; made by ``Class.bind(...)``.

    Raises:
        ValueError: the InputNode is among the arguments: there is no input yet when the actor is made.
    """

    def __init__(self, actor_class: Any, plain_class: type, args: tuple, kwargs: dict[str, Any], options: dict[str, Any]):
        super().__init__(args, kwargs, options, {})
        self._body = actor_class
        self._plain_class = plain_class
        self._last_call: ClassMethodNode | None = None
        if any(node._is_input() for node in self._needed()):
            raise ValueError("InputNode cannot be among the arguments of an actor's constructor: it stands for input of execute().")

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self._body.remote(*resolve(self._bound_args), **resolve(self._bound_kwargs))

    def _plan(self, plan: Plan) -> None:
        raise ValueError("Compiled DAGs can only bind methods to an actor that is already created with Actor.remote()")

    def __getattr__(self, name: str) -> Any:
        plain = self.__dict__.get("_plain_class")
        if plain is None or name.startswith("__") or not hasattr(plain, name):
            return super().__getattr__(name)
        return _UnboundMethod(self, name, {})

    def _label(self) -> str:
        return self._plain_class.__name__


class _UnboundMethod:
    """``node.method``, of which ``bind`` makes a node."""

    def __init__(self, actor: ClassNode, name: str, options: dict[str, Any]):
        self._actor, self._name, self._options = actor, name, options

    def options(self, **options: Any) -> _UnboundMethod:
        return _UnboundMethod(self._actor, self._name, options)

    def bind(self, *args: Any, **kwargs: Any) -> ClassMethodNode:
        """A call; it runs after those that were bound before it to the same actor."""
        actor = self._actor
        others = {PARENT_CLASS_NODE_KEY: actor, PREV_CLASS_METHOD_CALL_KEY: actor._last_call}
        node = actor._last_call = ClassMethodNode(self._name, args, kwargs, self._options, others)
        return node

    def __getattr__(self, name: str) -> Any:
        if name == "remote":
            raise AttributeError(".remote() cannot be used on ClassMethodNodes. Use .bind() instead.")
        raise AttributeError(f"a method of a node has bind and options, not {name!r}")


class ClassMethodNode(DAGNode):
    """A call of an actor's method, or one of the values of a call that gives several; made by ``actor.method.bind(...)``."""

    def __init__(
        self,
        method_name: str,
        method_args: tuple,
        method_kwargs: dict[str, Any],
        method_options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
        num_returns: int = 1,
    ):
        super().__init__(method_args, method_kwargs, method_options, other_args_to_resolve)
        self._method_name = method_name
        self._num_returns = num_returns

    @property
    def is_class_method_output(self) -> bool:
        """Whether it is one of several values of a call."""
        return bool(self._bound_other_args_to_resolve.get(IS_CLASS_METHOD_OUTPUT_KEY))

    @property
    def is_class_method_call(self) -> bool:
        return not self.is_class_method_output

    @property
    def class_method_call(self) -> ClassMethodNode | None:
        """The call whose value it is; None for a call."""
        return self._bound_args[0] if self.is_class_method_output else None

    @property
    def output_idx(self) -> int | None:
        """Which value of the call it is; None for a call."""
        return self._bound_args[1] if self.is_class_method_output else None

    @property
    def num_returns(self) -> int:
        """Of the call."""
        return self._num_returns

    def get_method_name(self) -> str:
        return self._method_name

    def _run(self, resolve: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        values = resolve(self._bound_args)
        if self.is_class_method_output:
            return values[0][values[1]]
        actor = resolve(self._bound_other_args_to_resolve)[PARENT_CLASS_NODE_KEY]
        method = getattr(actor, self._method_name)
        return method.options(**self._bound_options).remote(*values, **resolve(self._bound_kwargs))

    def _plan(self, plan: Plan) -> None:
        if self.is_class_method_output:
            plan.add_item(self, *self._bound_args)
            return
        actor = self._bound_other_args_to_resolve[PARENT_CLASS_NODE_KEY]
        if isinstance(actor, DAGNode):
            raise ValueError("Compiled DAGs can only bind methods to an actor that is already created with Actor.remote()")
        plan.add_call(self, actor, self._method_name, self._bound_args, self._bound_kwargs, self._num_returns)

    def _label(self) -> str:
        return f"{self._method_name}()"


def bind_method(
    actor: Any, name: str, args: tuple, kwargs: dict[str, Any], options: dict[str, Any], num_returns: int
) -> ClassMethodNode | tuple[ClassMethodNode, ...]:
    """A call of a method of an actor that exists; with several return values, a node for each of them."""
    node = ClassMethodNode(name, args, kwargs, options, {PARENT_CLASS_NODE_KEY: actor}, num_returns)
    node._bound_other_args_to_resolve[BIND_INDEX_KEY] = node._number
    if num_returns <= 1:
        return node
    others = {PARENT_CLASS_NODE_KEY: actor, IS_CLASS_METHOD_OUTPUT_KEY: True}
    return tuple(ClassMethodNode(f"return_idx_{i}", (node, i), {}, {}, others, num_returns) for i in range(num_returns))

"""Task graphs: ``bind`` builds them, ``execute`` runs them, ``experimental_compile`` prepares them to be run many times."""

from typing import NoReturn

from hpc_ray.dag.class_node import ClassMethodNode, ClassNode
from hpc_ray.dag.compiled_dag_node import CompiledDAG
from hpc_ray.dag.constants import (
    BIND_INDEX_KEY,
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
)
from hpc_ray.dag.context import DAGContext
from hpc_ray.dag.dag_node import DAGNode
from hpc_ray.dag.function_node import FunctionNode
from hpc_ray.dag.input_node import DAGInputData, InputAttributeNode, InputNode
from hpc_ray.dag.output_node import MultiOutputNode

_LEFT_OUT = {
    "CollectiveOutputNode": "call hpc_ray.util.collective in the actors' methods",
    "COLLECTIVE_OPERATION_KEY": "call hpc_ray.util.collective in the actors' methods",
    "DAGOperationFuture": "it belongs to GPU transports, which hpc_ray has not",
    "GPUFuture": "it belongs to GPU transports, which hpc_ray has not",
    "DAGNODE_TYPE_KEY": "graphs are pickled, not written as JSON",
    "plot": "graphs are not drawn; get_args() and get_kwargs() of a node tell what it needs",
}


def __getattr__(name: str) -> NoReturn:
    """What Ray has and hpc_ray has not, with the reason."""
    why = f": {_LEFT_OUT[name]}" if name in _LEFT_OUT else ""
    raise AttributeError(f"module 'hpc_ray.dag' has no attribute {name!r}{why}")


__all__ = [
    "BIND_INDEX_KEY",
    "IS_CLASS_METHOD_OUTPUT_KEY",
    "PARENT_CLASS_NODE_KEY",
    "PREV_CLASS_METHOD_CALL_KEY",
    "ClassMethodNode",
    "ClassNode",
    "CompiledDAG",
    "DAGContext",
    "DAGInputData",
    "DAGNode",
    "FunctionNode",
    "InputAttributeNode",
    "InputNode",
    "MultiOutputNode",
]

"""What refers to the results of compiled graphs."""

from hpc_ray.dag.compiled_dag_node import CompiledDAGFuture, CompiledDAGRef

__all__ = ["CompiledDAGFuture", "CompiledDAGRef"]

"""hpc_ray: Ray's programming model as a native of MPI and Slurm machines.

``import hpc_ray as ray`` and a Ray Core program runs: with plain ``python``, under ``mpirun``, inside ``srun``.
"""

from hpc_ray import exceptions, util
from hpc_ray.actor import method
from hpc_ray.api import (
    available_resources,
    cancel,
    cluster_resources,
    get,
    get_actor,
    get_gpu_ids,
    kill,
    nodes,
    put,
    remote,
    wait,
)
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.streams import DynamicObjectRefGenerator, ObjectRefGenerator
from hpc_ray.ids import ActorID, JobID, NodeID, PlacementGroupID, TaskID, UniqueID, WorkerID
from hpc_ray.observation import timeline
from hpc_ray.runtime_context import get_runtime_context
from hpc_ray.session import init, install_as_ray, is_initialized, shutdown
from hpc_ray.version import __version__

ObjectID = ObjectRef  # the older name

__all__ = [
    "ActorID",
    "DynamicObjectRefGenerator",
    "JobID",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
    "__version__",
    "available_resources",
    "cancel",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "install_as_ray",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "util",
    "wait",
]

"""hpc_ray: Ray's programming model as a native of MPI and Slurm machines.

``import hpc_ray as ray`` and a Ray Core program runs: with plain ``python``, under ``mpirun``, inside ``srun``.
"""

from typing import NoReturn

from hpc_ray import cloudpickle as cloudpickle
from hpc_ray import cross_language as cross_language
from hpc_ray import exceptions, util
from hpc_ray import experimental as experimental
from hpc_ray import job_config as job_config
from hpc_ray import runtime_env as runtime_env
from hpc_ray import types as types
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
from hpc_ray.client.logging_config import LoggingConfig
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.streams import DynamicObjectRefGenerator, ObjectRefGenerator
from hpc_ray.client_builder import ClientBuilder, client
from hpc_ray.cross_language import Language, cpp_function, java_actor_class, java_function
from hpc_ray.ids import (
    ActorClassID,
    ActorID,
    FunctionID,
    JobID,
    NodeID,
    PlacementGroupID,
    TaskID,
    UniqueID,
    WorkerID,
)
from hpc_ray.ids import ClusterID as ClusterID
from hpc_ray.mpi import mpi_comm, mpi_run
from hpc_ray.observation import timeline
from hpc_ray.runtime_context import get_runtime_context
from hpc_ray.session import init, install_as_ray, is_initialized, shutdown
from hpc_ray.version import __commit__ as __commit__
from hpc_ray.version import __version__

ObjectID = ObjectRef  # the older name
SCRIPT_MODE, WORKER_MODE, SPILL_WORKER_MODE, RESTORE_WORKER_MODE = range(4)

_LEFT_OUT = {
    "_config": "settings are given by init(_system_config=...) or by environment variables HPC_RAY_*, see hpc_ray.config.Settings",
    "autoscaler": "`hpc-ray autoscale` adds nodes by Slurm jobs while work waits for them",
    "data": "hpc_ray has Ray Core; read files in tasks, or use a library on top of joblib or Dask with hpc_ray.util",
    "internal": "it has no public names in Ray either",
    "widgets": "they draw Ray's tables in notebooks; init(include_dashboard=True) serves a page",
    "workflow": "it was removed from Ray; keep results of tasks in files, or use a workflow engine around the program",
}


def __getattr__(name: str) -> NoReturn:
    """What Ray has and hpc_ray has not, with the reason."""
    why = f": {_LEFT_OUT[name]}" if name in _LEFT_OUT else ""
    raise AttributeError(f"module 'hpc_ray' has no attribute {name!r}{why}")


__all__ = [
    "SCRIPT_MODE",
    "WORKER_MODE",
    "ActorClassID",
    "ActorID",
    "ClientBuilder",
    "DynamicObjectRefGenerator",
    "FunctionID",
    "JobID",
    "Language",
    "LoggingConfig",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "client",
    "cluster_resources",
    "cpp_function",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "install_as_ray",
    "is_initialized",
    "java_actor_class",
    "java_function",
    "kill",
    "method",
    "mpi_comm",
    "mpi_run",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "util",
    "wait",
]

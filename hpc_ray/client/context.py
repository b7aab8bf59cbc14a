"""Which client this process has, and which task the calling code belongs to.

The two process-wide facts of the runtime. Set by ``init`` and by the worker; read by the public API.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

class LeaveProcess(BaseException):
    """Raised through user code by ``exit_actor``: the process ends in order after its reply."""


client: Client | None = None
namespace: str = ""
runtime_env: str = ""  # JSON: of the program in a driver, of this process in a worker; what is started here inherits it
detached: bool | None = None  # whether actors that do not say are detached; None: not asked for yet
logging: str = ""  # of the job: a LoggingConfig as JSON
is_worker: bool = False
leaving: str = ""  # why this process, an actor, ends after its reply: user code wants it, be it that it catches LeaveProcess
actor: ActorContext | None = None  # in a process that is an actor
gang: Gang | None = None  # in a rank, while a call runs


class TaskContext:
    """The task that is running."""

    __slots__ = ("attempt", "full_name", "function_name", "leaves", "name", "recorded", "shape", "task_id")

    def __init__(self, task_id: bytes, name: str, function_name: str, full_name: str, attempt: int, shape: Any = None):
        self.task_id = task_id
        self.name = name
        self.function_name = function_name
        self.full_name = full_name  # with the module, or the name of the script
        self.attempt = attempt
        self.shape = shape  # of the lease
        self.recorded = True  # in what list_tasks and timeline show
        self.leaves = False  # it has called exit_actor


class Gang(NamedTuple):
    """The gang that this process is a rank of."""

    rank: int
    size: int
    communicator: Any  # mpi4py's


class ActorContext:
    """The actor that this process is."""

    def __init__(self, spec: Any, attempt: int, address: int):
        self.spec = spec
        self.attempt = attempt
        self.address = address
        self.instance: Any = None


task: contextvars.ContextVar[TaskContext | None] = contextvars.ContextVar("hpc_ray_task", default=None)
captured: bytes = b""  # worker: the placement group that what is started here inherits
cancelled: set[bytes] = set()  # worker: running tasks that somebody has cancelled
questions: dict[str, Callable[..., Any]] = {}  # what modules above answer to a Query, besides ``Records.questions``
instances: dict[str, list[list[int]]] = {}  # worker: the accelerators it was given, GPU → [[index, amount], …]


def set_client(new: Client | None) -> None:
    global client
    client = new


def set_actor(new: ActorContext | None) -> None:
    global actor
    actor = new

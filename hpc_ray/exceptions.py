"""Every error of hpc_ray, under one root, split by who must act.

Names and relations are Ray's, so ``except ray.exceptions.X`` keeps working; ours come last. All pickle (tested), carry
their data in fields, and say in words what happened, to whom, and what to do next.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar, cast

if sys.version_info >= (3, 11):
    _GROUPS: tuple[type, ...] = (BaseExceptionGroup,)  # noqa: F821
else:
    _GROUPS = ()


class RayError(Exception):
    """Root of all errors of the runtime."""


# ------------------------------------------------------------------ the user's task failed


def _rebuild_task_error(state: dict[str, Any]) -> RayTaskError:
    error = RayTaskError.__new__(RayTaskError)
    Exception.__init__(error, state["cause"])
    error.__dict__.update(state)
    return error


class RayTaskError(RayError):
    """User code raised. ``cause`` is the original exception (or, where that cannot travel, a text of it);
    ``str()`` shows the remote traceback. What ``get`` raises is at the same time an instance of the cause's class."""

    cause: BaseException

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException,
        proctitle: str | None = None,
        pid: int | None = None,
        ip: str | None = None,
        actor_repr: str | None = None,
        actor_id: str | None = None,
    ):
        if isinstance(cause, RayTaskError):  # it came out of a nested task: the root is what callers look for
            cause = cause.cause
        super().__init__(cause)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause: BaseException = cause
        self.proctitle = proctitle or "hpc_ray::" + function_name
        self.pid = pid if pid is not None else os.getpid()
        self.ip = ip or "127.0.0.1"
        self.actor_repr = actor_repr
        self.actor_id = actor_id

    def __reduce__(self) -> Any:
        return _rebuild_task_error, ({k: v for k, v in self.__dict__.items() if k != "__notes__"},)

    def __str__(self) -> str:
        return self.traceback_str

    def as_instanceof_cause(self) -> RayError:
        """The same error, but also an instance of the cause's class where that class can be a base."""
        cause = self.cause
        cause_class = type(cause)
        if issubclass(RayTaskError, cause_class):
            return self
        try:
            return _make_dual(self, cause, cause_class)
        except Exception:  # a class that refuses to be a base; the cause stays reachable
            return self


def _rebuild_dual(error: RayTaskError) -> RayError:
    return error.as_instanceof_cause()


def _make_dual(error: RayTaskError, cause: BaseException, cause_class: type) -> RayError:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def getattribute(self: Any, name: str) -> Any:
        return getattr(object.__getattribute__(self, "cause"), name)

    members = {
        "__init__": init,
        "__getattr__": getattribute,
        "__str__": lambda self: error.traceback_str,
        "__reduce__": lambda self: (_rebuild_dual, (error,)),
    }
    name = f"RayTaskError({cause_class.__name__})"
    dual: Any = type(name, (RayTaskError, cause_class), members)
    dual.__qualname__ = name
    dual.__module__ = RayTaskError.__module__
    instance = dual(*cause.args) if issubclass(cause_class, _GROUPS) else dual()
    instance.args = cause.args
    for key, value in error.__dict__.items():
        object.__setattr__(instance, key, value)
    return cast("RayError", instance)


class GangError(RayError):
    """A process of a gang ended, and the gang with it. ``rank`` of ``size``, its ``pid`` and ``hostname`` say which was the first.

    It is the failure of a task, so ``retry_exceptions=[GangError]`` starts the gang again."""

    def __init__(self, function_name: str = "", rank: int = -1, size: int = 0, pid: int = 0, hostname: str = "", reason: str = ""):
        super().__init__(function_name, rank, size, pid, hostname, reason)
        self.function_name = function_name
        self.rank = rank
        self.size = size
        self.pid = pid
        self.hostname = hostname
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.size} of {self.function_name}() ended before it had returned (pid {self.pid} on "
            f"{self.hostname}): {self.reason}. The other ranks have been ended, as MPI cannot go on without it."
        )


class MPIError(RayError, RuntimeError):
    """An MPI call failed in a rank of a gang: what mpi4py's exception said, for processes in which importing mpi4py would start MPI.

    ``error_class`` is the class of the MPI standard, as of ``MPI.Exception.Get_error_class()``. With ``peer_failed`` it says no more than
    that another rank has ended."""

    def __init__(self, text: str = "", error_class: int = 0, peer_failed: bool = False):
        super().__init__(text, error_class, peer_failed)
        self.error_class = error_class
        self.peer_failed = peer_failed

    def __str__(self) -> str:
        return str(self.args[0])


class UserCodeException(RayError):
    """User code outside of a task raised, for instance a callback."""


class CrossLanguageError(RayError):
    """An exception of another language; hpc_ray runs Python only, so nothing raises it."""


class UnserializableException(RayError):
    """The remote exception cannot be rebuilt here; its text is all there is."""

    def __init__(self, original_stack_trace: str):
        self._original_stack_trace = original_stack_trace
        super().__init__(
            "The remote exception cannot be rebuilt here (its class cannot be pickled or its constructor takes other "
            f"arguments than those it kept). Its text:\n{original_stack_trace}"
        )

    def __reduce__(self) -> Any:
        return type(self), (self._original_stack_trace,)


class TaskCancelledError(RayError):
    """The task was cancelled before it gave a result."""

    def __init__(self, task_id: Any = None, error_message: str | None = None):
        self.task_id = task_id
        self.error_message = error_message
        super().__init__(task_id, error_message)

    def __str__(self) -> str:
        if self.error_message:
            return self.error_message
        which = f"Task: {self.task_id}" if self.task_id is not None else "This task or its dependency"
        return f"{which} was cancelled."


class AsyncioActorExit(RayError):
    """Raised inside an asyncio actor by ``exit_actor``."""


# ------------------------------------------------------------------ the caller misused it


class GetTimeoutError(RayError, TimeoutError):
    """``get`` with a timeout ended before the objects were there."""


class PendingCallsLimitExceeded(RayError):
    """The actor has ``max_pending_calls`` waiting already."""


class ActorAlreadyExistsError(ValueError, RayError):
    """The actor's name is taken in this namespace."""


class ActorHandleNotFoundError(ValueError, RayError):
    """The handle belongs to another session."""


class ConfigurationError(ValueError, RayError):
    """Options, settings or the environment contradict one another; the text says which and what to do."""


class RuntimeEnvSetupError(RayError):
    """The runtime environment of a task or actor could not be made."""

    def __init__(self, error_message: str | None = None):
        self.error_message = error_message
        super().__init__(error_message)

    def __str__(self) -> str:
        return "Failed to set up runtime environment." + (f"\n{self.error_message}" if self.error_message else "")


class TaskUnschedulableError(RayError):
    """The task can never run where it asked to."""

    def __init__(self, error_message: str = ""):
        self.error_message = error_message
        super().__init__(error_message)

    def __str__(self) -> str:
        return f"The task is not schedulable: {self.error_message}"


class ActorUnschedulableError(RayError):
    """The actor can never run where it asked to."""

    def __init__(self, error_message: str = ""):
        self.error_message = error_message
        super().__init__(error_message)

    def __str__(self) -> str:
        return f"The actor is not schedulable: {self.error_message}"


class TaskPlacementGroupRemoved(RayError):
    """The task's placement group was removed."""

    def __str__(self) -> str:
        return "The placement group corresponding to this task has been removed."


class ActorPlacementGroupRemoved(RayError):
    """The actor's placement group was removed."""

    def __str__(self) -> str:
        return "The placement group corresponding to this Actor has been removed."


# ------------------------------------------------------------------ a peer died


class WorkerCrashedError(RayError):
    """The worker died while it ran the task."""

    def __init__(self, error_message: str = ""):
        self.error_message = error_message
        super().__init__(error_message)

    def __str__(self) -> str:
        return "The worker died unexpectedly while executing this task." + (
            f" {self.error_message}" if self.error_message else ""
        )


class LocalRayletDiedError(RayError):
    """The raylet of this node is gone; the session on this node is over."""

    def __str__(self) -> str:
        return self.args[0] if self.args else "The raylet of this node died; the session on this node is over."


class NodeDiedError(RayError):
    """The node is gone."""


class RayActorError(RayError):
    """The actor cannot take the call."""

    def __init__(
        self,
        actor_id: str | None = None,
        error_msg: str = "The actor died unexpectedly before finishing this task.",
        actor_init_failed: bool = False,
        preempted: bool = False,
    ):
        self.actor_id = actor_id
        self.error_msg = error_msg
        self._actor_init_failed = actor_init_failed
        self._preempted = preempted
        super().__init__(actor_id, error_msg, actor_init_failed, preempted)

    def __reduce__(self) -> Any:
        return type(self), self.args

    def __str__(self) -> str:
        return self.error_msg

    @property
    def actor_init_failed(self) -> bool:
        return self._actor_init_failed

    @property
    def preempted(self) -> bool:
        return self._preempted


class ActorDiedError(RayActorError):
    """The actor is dead for good."""


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now; it may come back. Whether the call ran is unknown."""

    def __init__(self, error_message: str = "", actor_id: bytes | None = None):
        self._arguments = (error_message, actor_id)
        identity = actor_id.hex() if isinstance(actor_id, bytes) else actor_id
        super().__init__(
            identity,
            f"The actor {identity} is unavailable: {error_message}. The task may or may not have been executed on the actor.",
        )

    def __reduce__(self) -> Any:
        return type(self), self._arguments


class ObjectLostError(RayError):
    """All copies of the object are gone and it cannot be made again."""

    def __init__(self, object_ref_hex: str = "", owner_address: Any = None, call_site: str = "", detail: str = ""):
        self.object_ref_hex = object_ref_hex
        self.owner_address = owner_address
        self.call_site = call_site
        self.detail = detail
        super().__init__(object_ref_hex, owner_address, call_site, detail)

    _what = "All copies of it have been lost because nodes failed or the object was freed"

    def __str__(self) -> str:
        return f"Failed to retrieve object {self.object_ref_hex}. {self.detail or self._what}."


class ObjectFetchTimedOutError(ObjectLostError):
    """No copy of the object answered in time."""

    _what = "Fetching it timed out"


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was deleted while a reference was still in use; a reference that left the system (pickled by hand)."""

    _what = "It was deleted already, though a reference to it was still in use"


class ObjectFreedError(ObjectLostError):
    """The object was freed on request."""

    _what = "It was freed with the `free` API"


class OwnerDiedError(ObjectLostError):
    """The process that owned the object (made the reference) is gone, and the object with it."""

    _what = "Its owner, the process that created the reference, has exited or died"


class ObjectReconstructionFailedError(ObjectLostError):
    """All copies of the object are gone, and what made it cannot be done again; ``reason`` (a key of ``REASON_MESSAGES``) says
    why, ``reason_message`` in words."""

    _what = "All copies of it have been lost, and it cannot be made again"
    REASON_MESSAGES: ClassVar[dict[str, str]] = {
        "OBJECT_UNRECONSTRUCTABLE_MAX_ATTEMPTS_EXCEEDED": "its task has no retries left; allow more with max_retries",
        "OBJECT_UNRECONSTRUCTABLE_LINEAGE_EVICTED": "the record of how it was made was dropped, since such records had taken more "
        "than max_lineage_bytes (a setting: HPC_RAY_MAX_LINEAGE_BYTES)",
        "OBJECT_UNRECONSTRUCTABLE_PUT": "it was stored by put(), which cannot be repeated; a value that a task returns can",
        "OBJECT_UNRECONSTRUCTABLE_RETRIES_DISABLED": "what made it must not be repeated (max_retries=0 for a task, "
        "max_task_retries=0 for an actor)",
        "OBJECT_UNRECONSTRUCTABLE_TASK_CANCELLED": "the task that would make it was cancelled",
    }

    def __init__(
        self,
        object_ref_hex: str = "",
        reason: str | None = None,
        reason_message: str | None = None,
        owner_address: Any = None,
        call_site: str = "",
    ):
        super().__init__(object_ref_hex, owner_address, call_site)
        self.args = (object_ref_hex, reason, reason_message, owner_address, call_site)
        self.reason = reason
        self.reason_message = reason_message or self.REASON_MESSAGES.get(reason or "", "")

    def __str__(self) -> str:
        return super().__str__() + (f" [{self.reason or 'UNKNOWN'}] {self.reason_message}." if self.reason_message else "")


# ------------------------------------------------------------------ the machine failed


class ObjectStoreFullError(RayError):
    """The object store has no room and nothing can be moved out."""


class OutOfDiskError(RayError):
    """There is no room for spilled objects."""


class OutOfMemoryError(RayError):
    """The worker was ended because the node ran out of memory."""


class RpcError(RayError):
    """A message to another process could not be delivered."""

    def __init__(self, message: str, rpc_code: Any = None):
        self.message = message
        self.rpc_code = rpc_code
        super().__init__(message, rpc_code)

    def __str__(self) -> str:
        return self.message


# ------------------------------------------------------------------ a bug in hpc_ray, or the system as such


class RaySystemError(RayError):
    """The runtime itself failed."""

    def __init__(self, client_exc: Any, traceback_str: str | None = None):
        self.client_exc = client_exc
        self.traceback_str = traceback_str
        super().__init__(client_exc, traceback_str)

    def __str__(self) -> str:
        text = f"System error: {self.client_exc}"
        return text + (f"\ntraceback: {self.traceback_str}" if self.traceback_str else "")


class RayChannelError(RaySystemError):
    """A channel of a compiled graph broke."""


class RayChannelTimeoutError(RayChannelError, TimeoutError):
    """A compiled graph did not take an input, or did not give a result, in time."""


class RayCgraphCapacityExceeded(RaySystemError):
    """Too many executions of a compiled graph are in flight, or too many of its results wait for ``get``."""


class RayDirectTransportError(RaySystemError):
    """A tensor that was to travel outside the object store did not arrive."""


class StreamingGeneratorReplayInconsistentError(RaySystemError):
    """A generator that was run again gave another number of items."""


class AuthenticationError(RayError):
    """Whoever asked may not."""


class PlasmaObjectNotAvailable(RayError):
    """The object store does not have the object."""


class OufOfBandObjectRefSerializationException(RayError):
    """A reference was pickled outside of the runtime where that is not allowed. (The name is Ray's.)"""


class ObjectRefStreamEndOfStreamError(RayError):
    """Internal: a streaming task has no further items."""


class LaunchError(RayError):
    """The session could not be brought up; the text says which part failed, and what to do."""


class IllegalTransition(RayError):
    """A state machine was asked for a step that its table does not have: a bug. Carries the history of the id."""

    def __init__(self, identity: str, start: str, event: str, history: list[str] | None = None):
        self.identity = identity
        self.start = start
        self.event = event
        self.history = history or []
        super().__init__(identity, start, event, self.history)

    def __str__(self) -> str:
        story = "\n  ".join(self.history)
        return f"{self.identity}: no step from {self.start} on {self.event}; its history:\n  {story}"


__all__ = [name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, BaseException)]

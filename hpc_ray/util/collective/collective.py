"""Collective calls: each member of a group calls the same function, and the tensors are changed in place.

The algorithms are ``hpc_ray.collectives``; this is their face with Ray's names. Members may be actors, tasks and the driver.
"""

from __future__ import annotations

import threading
from typing import Any

from hpc_ray.api import get
from hpc_ray.client import context
from hpc_ray.collectives import Group, ReduceOp, flat_array
from hpc_ray.util.collective.members import Members
from hpc_ray.util.collective.types import Backend, cupy_available


class CollectiveGroup:
    """What one process knows of a group that it belongs to."""

    def __init__(self, name: str, size: int, rank: int, backend: str, timeout_s: float):
        self.group_name = name
        self.world_size = size
        self.rank = rank
        self.backend = backend
        self.members = Members(name, size, rank, timeout_s)
        self.calls = Group(rank, size, self.members)


_groups: dict[str, CollectiveGroup] = {}
_lock = threading.Lock()


def nccl_available() -> bool:
    """Whether groups of GPUs can be made: not here."""
    return False


def gloo_available() -> bool:
    """Whether groups in host memory can be made: always."""
    return True


def is_backend_available(backend: str) -> bool:
    """Whether groups of this backend can be made."""
    return backend.upper() in ("GLOO", "MPI")


def is_group_initialized(group_name: str) -> bool:
    """Whether this process is in the group."""
    return _find(group_name) is not None


def init_collective_group(
    world_size: int, rank: int, backend: str = "NCCL", group_name: str = "default", gloo_timeout: int = 30000
) -> None:
    """Join a group, as each of its members does. Blocks until all have come.

    Args:
        world_size: how many members there are.
        rank: which of them this process is, from 0.
        backend: "gloo" or "mpi"; see ``types.Backend``.
        group_name: the same at all members; of the job.
        gloo_timeout: milliseconds that this and each later call may wait for the others.

    Raises:
        RuntimeError: this process is in the group already, or the backend is not available.
        ValueError: the name is empty, the rank is taken, or the members do not agree on the size.
        AssertionError: a rank or size that cannot be.
        GetTimeoutError: the others did not come in time.
    """
    if not group_name or not isinstance(group_name, str):
        raise ValueError(f"group_name {group_name!r} needs to be a string.")
    assert world_size > 0, f"world_size is {world_size}; a group has at least one member"
    assert 0 <= rank < world_size, f"rank is {rank}; it must be from 0 to {world_size - 1}"
    name = _check_backend(backend)
    if is_group_initialized(group_name):
        raise RuntimeError(f"Trying to initialize the group {group_name!r} a second time.")
    group = CollectiveGroup(group_name, world_size, rank, name, gloo_timeout / 1000)
    with _lock:
        _groups[group_name] = group


def create_collective_group(
    actors: list[Any],
    world_size: int,
    ranks: list[int],
    backend: str = "NCCL",
    group_name: str = "default",
    gloo_timeout: int = 30000,
) -> None:
    """Make actors the members of a group. Blocks until all are.

    Raises:
        RuntimeError: not one rank for each actor, ranks that cannot be, or the backend is not available.
        What ``init_collective_group`` raises in the actors.
    """
    if len(ranks) != len(actors):
        raise RuntimeError(f"Each actor should correspond to one rank. Got '{len(ranks)}' ranks but '{len(actors)}' actors")
    if set(ranks) != set(range(len(ranks))):
        raise RuntimeError(f"Ranks must be a permutation from 0 to '{len(ranks)}'. Got '{ranks}'.")
    if world_size != len(ranks):
        raise RuntimeError(f"world_size is {world_size}, but there are {len(ranks)} actors")
    _check_backend(backend)
    arguments = world_size, backend, group_name, gloo_timeout
    get([actor.__ray_call__.remote(_join, rank, *arguments) for actor, rank in zip(actors, ranks, strict=True)])


def _join(instance: Any, rank: int, world_size: int, backend: str, group_name: str, gloo_timeout: int) -> None:
    init_collective_group(world_size, rank, backend, group_name, gloo_timeout)


def destroy_collective_group(group_name: str = "default") -> None:
    """Leave a group; its other members leave it too, each by itself. Harmless if this process is not in it."""
    group = _find(group_name)
    if group is not None:
        with _lock:
            del _groups[group_name]
        group.members.close()


def get_rank(group_name: str = "default") -> int:
    """The rank of this process; -1 in a task or actor that is not in the group.

    Raises:
        RuntimeError: the driver is not in the group.
    """
    group = _find_here(group_name)
    return -1 if group is None else group.rank


def get_collective_group_size(group_name: str = "default") -> int:
    """The number of members; -1 in a task or actor that is not one.

    Raises:
        RuntimeError: the driver is not in the group.
    """
    group = _find_here(group_name)
    return -1 if group is None else group.world_size


def get_group_handle(group_name: str = "default") -> CollectiveGroup:
    """The group; has ``rank``, ``world_size``, ``group_name`` and ``backend``.

    Raises:
        RuntimeError: this process is not in it.
    """
    group = _find(group_name)
    if group is None:
        raise RuntimeError(f"The collective group {group_name!r} is not initialized in the process.")
    return group


def _find_here(name: str) -> CollectiveGroup | None:
    group = _find(name)
    if group is None and not context.is_worker:
        raise RuntimeError(f"the driver is not in the collective group {name!r}; ask in its tasks or actors, or join it")
    return group


def _find(name: str) -> CollectiveGroup | None:
    with _lock:
        group = _groups.get(name)
        if group is not None and group.members.client is not context.client:  # of a session that is over
            del _groups[name]
            return None
        return group


def _check_backend(backend: str) -> str:
    name = str(Backend(backend))
    if name == "NCCL":
        missing = "hpc_ray's groups are in host memory" if cupy_available() else "CuPy is not installed"
        raise RuntimeError(
            f"The backend NCCL is not available: {missing}. Use backend='gloo' with tensors in host memory, or torch.distributed in "
            "the actors for tensors on GPUs."
        )
    return name


def _check_rank(group: CollectiveGroup, rank: int) -> None:
    if not 0 <= rank < group.world_size:
        raise ValueError(f"rank {rank} is not from 0 to {group.world_size - 1}")


# ------------------------------------------------------------------ calls


def allreduce(tensor: Any, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Join the tensors of all members, element by element; each gets the result in ``tensor``. Blocks.

    Raises (as all of these calls):
        RuntimeError: this process is not in the group, or a member has left it.
        TypeError, ValueError: not a contiguous, writable numpy array or torch tensor in host memory; not the same at all members.
        GetTimeoutError: a member did not come in time.
        ActorDiedError, WorkerCrashedError: a member died.
    """
    get_group_handle(group_name).calls.allreduce(flat_array(tensor, writable=True), op)


def barrier(group_name: str = "default") -> None:
    """Returns when all members have called it. Blocks."""
    get_group_handle(group_name).calls.barrier()


def reduce(tensor: Any, dst_rank: int = 0, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Join the tensors of all members; only ``dst_rank``'s is changed. Blocks."""
    group = get_group_handle(group_name)
    _check_rank(group, dst_rank)
    group.calls.reduce(flat_array(tensor, writable=group.rank == dst_rank), dst_rank, op)


def broadcast(tensor: Any, src_rank: int = 0, group_name: str = "default") -> None:
    """``src_rank``'s tensor to all. Blocks."""
    group = get_group_handle(group_name)
    _check_rank(group, src_rank)
    group.calls.broadcast(flat_array(tensor, writable=group.rank != src_rank), src_rank)


def allgather(tensor_list: list, tensor: Any, group_name: str = "default") -> None:
    """The tensors of all members, by rank, into ``tensor_list``. Blocks."""
    group = get_group_handle(group_name)
    _check_list(group, tensor_list)
    group.calls.allgather([flat_array(one, writable=True) for one in tensor_list], flat_array(tensor))


def reducescatter(tensor: Any, tensor_list: list, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Join the tensors at each place of the members' lists; rank r gets place r in ``tensor``. Blocks."""
    group = get_group_handle(group_name)
    _check_list(group, tensor_list)
    group.calls.reduce_scatter(flat_array(tensor, writable=True), [flat_array(one) for one in tensor_list], op)


def send(tensor: Any, dst_rank: int, group_name: str = "default") -> None:
    """To one other member, which calls ``recv``. Blocks until a large tensor has been read."""
    group = get_group_handle(group_name)
    _check_rank(group, dst_rank)
    if dst_rank == group.rank:
        raise RuntimeError(f"The destination rank '{dst_rank}' is self.")
    group.calls.send(flat_array(tensor), dst_rank)


def recv(tensor: Any, src_rank: int, group_name: str = "default") -> None:
    """Into ``tensor`` what another member sends. Blocks."""
    group = get_group_handle(group_name)
    _check_rank(group, src_rank)
    if src_rank == group.rank:
        raise RuntimeError(f"The source rank '{src_rank}' is self.")
    group.calls.receive(flat_array(tensor, writable=True), src_rank)


def _check_list(group: CollectiveGroup, tensor_list: Any) -> None:
    if not isinstance(tensor_list, list) or len(tensor_list) != group.world_size:
        raise RuntimeError(f"The tensor list must be a list of {group.world_size} tensors, one for each member of the group.")

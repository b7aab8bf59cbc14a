"""What a raylet's server does besides sending, and the facts it hands back. Messages are in ``protocol``.

Each action with an answer names the event that answers it; the server hands that in before it takes the next message.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_ray.machine import Action
from hpc_ray.protocol import Query

# ------------------------------------------------------------------ actions


class AskForkServer(Action, frozen=True, gc=False):
    """Write the message (StartWorker, KillProcess, FollowLogs, Shutdown) to the fork server's socket."""

    message: Any


class MarkDead(Action, frozen=True, gc=False):
    """From now on nothing can be sent to this local address."""

    address: int


class Reclaim(Action, frozen=True, gc=False):
    """Free what the dead process held. Answer: Reclaimed."""

    address: int


class DeleteObject(Action, frozen=True, gc=False):
    """Remove an object of the arena; readers keep their pins."""

    handle: int


class LimitStore(Action, frozen=True, gc=False):
    """Objects may fill so many bytes of the arena from now on."""

    size: int


class DeleteOwned(Action, frozen=True, gc=False):
    """Remove the copies of objects whose owner, of another node, is gone; lane 0xFFFF: all of that node."""

    owner: int


class AllocateCopy(Action, frozen=True, gc=False):
    """Make room for a copy. Answer: CopyAllocated."""

    transfer_id: int
    object_id: bytes
    size: int
    on_disk: bool = False  # in a file, as the arena has no room


class SpillObjects(Action, frozen=True, gc=False):
    """Move objects that nobody reads to files, the least recently used first, until ``total`` bytes are freed and an object of
    ``largest`` fits, or nothing more can go. Answer, later: ObjectsSpilled."""

    total: int
    largest: int


class SealCopy(Action, frozen=True, gc=False):
    """The bytes are complete."""

    handle: int


class AbortCopy(Action, frozen=True, gc=False):
    """The bytes will not come; give the room back."""

    handle: int


class FindCopy(Action, frozen=True, gc=False):
    """Is there a sealed object with this handle and id? Answer: CopyFound."""

    object_id: bytes
    handle: int


class ListObjects(Action, frozen=True, gc=False):
    """What lies in the arena? Answer: ObjectsListed."""


class AnswerFromLogs(Action, frozen=True, gc=False):
    """Answer a Query about the files of the node's log folder."""

    asker: int
    query: Query


# ------------------------------------------------------------------ events


class Reclaimed(msgspec.Struct, frozen=True, tag=1101, array_like=True, gc=False):
    """Objects that the dead process had sealed and nobody had claimed: [object id, handle, owner]."""

    address: int
    objects: list[tuple[bytes, int, int]]


class CopyAllocated(msgspec.Struct, frozen=True, tag=1102, array_like=True, gc=False):
    """``handle`` 0: the arena is full, or, with ``error``, the file cannot be made."""

    transfer_id: int
    handle: int
    error: str = ""


class ObjectsSpilled(msgspec.Struct, frozen=True, tag=1104, array_like=True, gc=False):
    """``largest_free``: bytes of the largest object that fits now; ``error``: why no file can be written, and its class."""

    freed: int
    largest_free: int
    error: str = ""
    error_kind: str = ""


class CopyFound(msgspec.Struct, frozen=True, tag=1103, array_like=True, gc=False):
    object_id: bytes
    handle: int
    present: bool


class ObjectsListed(msgspec.Struct, frozen=True, tag=1105, array_like=True, gc=False):
    handles: list[int]

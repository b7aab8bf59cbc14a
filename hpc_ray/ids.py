"""Names of things: sizes, layout and the Python types that carry them.

Relied on by every layer; relies on nothing. Sizes and hexadecimal forms are those of Ray, so programs that look at
the length of an id see what they expect. What the bytes mean is ours:

IDS-1 (owner inside): a task id holds the address of the process that minted it, and an object id starts with its
task id, so whoever has an object id knows its owner without asking anyone.
IDS-2 (no coordination): an address (node, lane, incarnation) is never used twice in a session, therefore a
counter private to the process makes an id unique.

Layout of a task id (24 bytes): counter 8 · owner address 8 · zero 4 · job 4. An object id (28) appends a 4-byte index: 0 … for
returns, ``PUT_INDEX`` upwards for puts and streamed items.
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import Any, ClassVar

PUT_INDEX = 0x8000_0000  # object indices from here on were not declared as returns of a task

# Lanes with a fixed index on every node (the GCS only on node 0).
RAYLET_LANE = 0
LINK_LANE = 1
GCS_LANE = 2
FORK_SERVER_LANE = 3

_TASK = struct.Struct("<QQII")
_INDEX = struct.Struct("<I")
OBJECT_ID_BYTES = 28
_OBJECT = struct.Struct(f"{OBJECT_ID_BYTES}s")


def address_of(node: int, lane: int, incarnation: int = 0) -> int:
    """The 64-bit address of a process; incarnation 0 names whoever holds a well-known lane."""
    return node << 48 | lane << 32 | incarnation


def node_of(address: int) -> int:
    return address >> 48


def lane_of(address: int) -> int:
    return (address >> 32) & 0xFFFF


def raylet_address(node: int) -> int:
    return address_of(node, RAYLET_LANE)


GCS_ADDRESS = address_of(0, GCS_LANE)
_ROLES = {RAYLET_LANE: "raylet", LINK_LANE: "link", FORK_SERVER_LANE: "fork server"}


def name_of(address: int) -> str:
    """Who it is, for people."""
    if lane_of(address) == GCS_LANE:
        return "the GCS"
    role = _ROLES.get(lane_of(address))
    return f"the {role} of node {node_of(address)}" if role else f"process {address:#x} of node {node_of(address)}"


def owner_of(object_or_task_id: bytes) -> int:
    """The address of the process that owns an object or submitted a task (IDS-1)."""
    return int.from_bytes(object_or_task_id[8:16], "little")


def object_id_of(task_id: bytes, index: int) -> bytes:
    return task_id + _INDEX.pack(index)


def object_ids_of(task_id: bytes, count: int) -> list[bytes]:
    """Of the first results."""
    pack = _INDEX.pack
    return [task_id + pack(index) for index in range(count)]


def split_object_ids(joined: Any) -> list[bytes]:
    """Of ids one after the other, in bytes or a buffer."""
    return [object_id for (object_id,) in _OBJECT.iter_unpack(joined)]


def index_of(object_id: bytes) -> int:
    return int(_INDEX.unpack_from(object_id, 24)[0])


class IdMinter:
    """Makes the ids of one process (IDS-2). Thread-safe: ``itertools.count`` is."""

    def __init__(self, address: int, job_id: bytes):
        self.address = address
        self._tasks = itertools.count(1)
        self._objects = itertools.count(1)
        self.set_job(job_id)

    def set_job(self, job_id: bytes) -> None:
        self._job = int.from_bytes(job_id, "little")  # so that the bytes come out as they were

    def task_id(self) -> bytes:
        return _TASK.pack(next(self._tasks), self.address, 0, self._job)

    def put_id(self) -> bytes:
        count = next(self._objects)
        return _TASK.pack(count >> 31, self.address, 0, self._job) + _INDEX.pack(PUT_INDEX | (count & 0x7FFF_FFFF))


class BaseID:
    """Bytes with a name. Immutable, hashable, ordered by nothing."""

    SIZE: ClassVar[int] = 28
    __slots__ = ("_bytes",)

    def __init__(self, data: bytes):
        if not isinstance(data, bytes):
            raise TypeError(f"{type(self).__name__} is made from bytes, not {type(data).__name__}")
        if len(data) != self.SIZE:
            raise ValueError(f"{type(self).__name__} has {self.SIZE} bytes, got {len(data)}")
        self._bytes = data

    @classmethod
    def size(cls) -> int:
        return cls.SIZE

    @classmethod
    def nil(cls) -> Any:
        return cls(b"\xff" * cls.SIZE)

    @classmethod
    def from_random(cls) -> Any:
        return cls(os.urandom(cls.SIZE))

    @classmethod
    def from_binary(cls, id_bytes: bytes) -> Any:
        return cls(id_bytes)

    @classmethod
    def from_hex(cls, hex_id: str) -> Any:
        return cls(bytes.fromhex(hex_id))

    def binary(self) -> bytes:
        return self._bytes

    def hex(self) -> str:
        return self._bytes.hex()

    def is_nil(self) -> bool:
        return self._bytes == b"\xff" * self.SIZE

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._bytes.hex()})"

    def __reduce__(self) -> Any:
        return type(self), (self._bytes,)


class UniqueID(BaseID):
    """28 random bytes."""

    __slots__ = ()


class NodeID(UniqueID):
    """Of a node."""

    __slots__ = ()


class WorkerID(UniqueID):
    """Of a process: a worker or a driver."""

    __slots__ = ()


class ClusterID(UniqueID):
    """Of a cluster."""

    __slots__ = ()


class FunctionID(UniqueID):
    """Of a remote function."""

    __slots__ = ()


class ActorClassID(UniqueID):
    """Of an actor's class."""

    __slots__ = ()


class JobID(BaseID):
    """4 bytes: of a program that called ``init``."""

    SIZE = 4
    __slots__ = ()

    @classmethod
    def from_int(cls, value: int) -> JobID:
        return cls(value.to_bytes(4, "big"))

    def int(self) -> int:
        return int.from_bytes(self._bytes, "big")


class ActorID(BaseID):
    """16 bytes: 12 that are unique in the session, then the job."""

    SIZE = 16
    __slots__ = ()

    @property
    def job_id(self) -> JobID:
        return JobID(self._bytes[12:])


class TaskID(BaseID):
    """24 bytes, of which the last four are the job."""

    SIZE = 24
    __slots__ = ()

    def job_id(self) -> JobID:
        return JobID(self._bytes[20:])


class PlacementGroupID(BaseID):
    """18 bytes, of which the last four are the job."""

    SIZE = 18
    __slots__ = ()

    @classmethod
    def of(cls, job_id: JobID) -> PlacementGroupID:
        """A new one in a job."""
        return cls(os.urandom(cls.SIZE - JobID.SIZE) + job_id.binary())

"""Between nodes: the interface that a link drives.

A transport moves messages (source and destination address, payload) and objects (arena to arena) between the nodes of a
session. ``mpi`` is the one for worlds that end together, ``tcp`` the one for nodes that come and are lost. It belongs to one thread,
never blocks except in ``close``, and does its work in ``turn``. What many messages need is done in C++ (``native/frames.h``): from
lane to transport and back they are frames, one after the other.

TRANSPORT-1 (order): messages to one node arrive in the order of ``send``, each once.
TRANSPORT-2 (bounded): what a slow peer has not taken yet waits at the sender, as ``backlog_bytes``.
TRANSPORT-3 (loss): a lost peer is reported once, by PeerLost; its transfers end with an error, and sends to it are dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Union

from hpc_ray._core import Lane, pack_frame, split_frames

Deliver = Callable[[int, int, int, bytes], None]
"""``deliver(node, source, destination, payload)``."""

class PeerLost(NamedTuple):
    """The node cannot be reached any more."""

    node: int
    text: str


class TransferEnded(NamedTuple):
    """An object is here, or, with ``error``, will not come."""

    transfer_id: int
    error: str


class Joining(NamedTuple):
    """``tcp``: somebody who knows the session's secret wants to be a node; ``admit`` or ``refuse`` it."""

    door: int
    facts: dict[str, Any]


class Expelled(NamedTuple):
    """``tcp``: a peer says that it goes on without this node, or, to the head, that it ends since it has lost sight of it."""

    node: int
    text: str


Event = Union[PeerLost, TransferEnded, Joining, Expelled]  # noqa: UP007 (3.10 evaluates it)


class Objects(Protocol):
    """The node's arena, as a transport needs it; ``_core.Store`` is one."""

    def get(self, handle: int) -> Any:
        """A read-only buffer that stays valid while it is referred to; None when the object is gone."""

    def write_buffer(self, handle: int) -> Any:
        """The memory of an object that is being created."""

    def prepare(self, handle: int, offset: int, size: int) -> None:
        """So many bytes of that memory are about to be written: it may be made ready, which pays before large ones."""


class Turn(NamedTuple):
    """What has come of one."""

    moved: bool
    here: list[bytes]  # messages of the own node for the link itself
    events: list[Event]


class Transport(ABC):
    """One node's end."""

    node: int
    nodes: int  # the highest number there has been, plus one

    def __init__(self, objects: Objects, deliver: Deliver):
        """``deliver`` gets what is for no lane of ``local``."""
        self._objects = objects
        self._deliver = deliver
        self.local: Lane | None = None  # the link's, by which messages from other nodes go to the lanes of this one
        self.arrived_bytes = 0  # from other nodes, in the last turn
        self.forsaken: set[int] = set()

    def others(self) -> list[int]:
        """The other nodes, as far as they are not known to be lost."""
        return [node for node in range(self.nodes) if node != self.node]

    def reaches(self, node: int) -> bool:
        """Whether there is such a node, or may be soon."""
        return 0 <= node < self.nodes

    @abstractmethod
    def send_frames(self, node: int, frames: bytes) -> None:
        """Queues messages; they leave with the next ``poll``."""

    def send(self, node: int, source: int, destination: int, payload: bytes) -> None:
        """Queues one message."""
        self.send_frames(node, pack_frame(source, destination, payload))

    @abstractmethod
    def transfer(self, transfer_id: int, source_node: int, source_handle: int, handle: int, size: int) -> None:
        """Fetches an object of another node into a block of ours; ends with TransferEnded."""

    def forsake(self, node: int) -> None:
        """The node has no life any more, whether its link lives or not: what lanes have for it is dropped from now on."""
        self.forsaken.add(node)

    @abstractmethod
    def poll(self) -> list[Event]:
        """Sends, receives, delivers; returns what else happened."""

    def turn(self, inbox: Lane | None, spin_s: float) -> Turn:
        """Takes along what the inbox has for other nodes, and polls; a transport that has to look for what comes does so again and
        again for so long, until something moves."""
        here: list[bytes] = []
        received = () if inbox is None else inbox.receive_frames(0.0, spin=False)
        for node, frames in received:
            here += self.pass_on(node, frames)
        self.arrived_bytes = 0
        events = self.poll()
        return Turn(bool(received or events or self.arrived_bytes), here, events)

    def pass_on(self, node: int, frames: bytes) -> list[bytes]:
        """Queues what a lane has for a node; the messages themselves if that is this one."""
        if node == self.node:
            return [payload for _, _, payload in split_frames(frames)[1]]
        if node not in self.forsaken and self.reaches(node):
            self.send_frames(node, frames)
        return []

    def _forward(self, frames: Any) -> tuple[int, list[tuple[int, int, bytes]]]:
        """What has come from another node goes to its lanes: how many bytes were whole frames, and those that are to be delivered."""
        self.arrived_bytes += len(frames)
        return split_frames(frames) if self.local is None else self.local.forward_frames(frames)

    def fileno(self) -> int:
        """A descriptor that is readable when ``poll`` has something to do, or soon will; -1: there is none, one has to look."""
        return -1

    def sleep_s(self) -> float:
        """With a ``fileno``: ``poll`` need not be called before that, unless it is readable; 0: just now one has to look all the same."""
        return 0.0

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Something is in flight that wants ``poll`` again at once."""

    @property
    @abstractmethod
    def backlog_bytes(self) -> int:
        """Bytes of messages that wait for slow peers (TRANSPORT-2)."""

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """Sends what is queued, waits for the others to close as well; False when that took too long."""

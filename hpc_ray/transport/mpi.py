"""MPI point-to-point between links, through mpi4py. Only a link's main thread touches it, after ``MPI_Init``.

Messages are carried by ``_core.MpiStream``, in C++, which looks at the lane and at MPI by turns (MPI-1 to MPI-3 are there). An object is
asked for with a frame of its own and comes as ``PIECE_BYTES`` pieces under a tag of its own, from arena memory into arena memory. Where
all are quiet and bells ring (``bells``), ``SLEEP_S`` may pass between two looks.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections import deque
from typing import Any

from mpi4py import MPI

from hpc_ray._core import MpiStream
from hpc_ray.transport import Deliver, Event, Objects, PeerLost, TransferEnded, Transport, Turn
from hpc_ray.transport.bells import LIVELY_S, QUIET_S, Bells

CHUNK_BYTES = 256 * 1024
RING_SLOTS = 8
WINDOW = 4
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 4
SLEEP_S = 0.2
RUNG_S = 4 * LIVELY_S  # who was not rung for before it slept has been rung for again by then (BELLS-2)

_FETCH = struct.Struct("<BIQQ")  # code, tag, handle, size
_REFUSE = struct.Struct("<BI")  # code, tag; a text follows
_CODE_FETCH, _CODE_REFUSE = 1, 2
_OWN = (1 << 64) - 1  # destination of frames between transports

_TAG_STREAM = 1
_TAG_OBJECT = 16  # and up: one per transfer


class _Peer:
    """What we know of one other node."""

    __slots__ = ("lost", "node", "rank")

    def __init__(self, node: int, rank: int):
        self.node = node
        self.rank = rank
        self.lost = False


class _Incoming:
    __slots__ = ("handle", "next", "pending", "size", "source", "tag", "transfer_id", "view")

    def __init__(self, transfer_id: int, source: _Peer, tag: int, handle: int, view: memoryview):
        self.transfer_id = transfer_id
        self.source = source
        self.tag = tag
        self.handle = handle
        self.view = view
        self.size = len(view)
        self.next = 0  # first byte without a posted receive
        self.pending: deque[MPI.Request] = deque()


class _Outgoing:
    __slots__ = ("next", "peer", "pending", "pin", "tag", "view")

    def __init__(self, peer: _Peer, tag: int, pin: Any):
        self.peer = peer
        self.tag = tag
        self.pin = pin
        self.view = memoryview(pin).cast("B")
        self.next = 0
        self.pending: deque[MPI.Request] = deque()


class MPITransport(Transport):
    """One node's end; ``ranks[i]`` is the rank of node i's link in ``communicator``, which is duplicated. Without ``bells``, and
    where they do not ring, one has to look at short intervals."""

    def __init__(self, communicator: MPI.Intracomm, ranks: list[int], objects: Objects, deliver: Deliver, bells: Bells | None = None):
        super().__init__(objects, deliver)
        self._comm = communicator.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.node = ranks.index(communicator.Get_rank())
        self.nodes = len(ranks)
        self._peers = [_Peer(node, rank) for node, rank in enumerate(ranks)]
        self._by_rank = {peer.rank: peer for peer in self._peers}
        self._incoming: dict[int, _Incoming] = {}  # by tag
        self._outgoing: deque[_Outgoing] = deque()
        self._events: list[Event] = []
        upper = self._comm.Get_attr(MPI.TAG_UB)
        self._tags = min(int(upper or 32767), 1 << 28) - _TAG_OBJECT
        self._next_tag = 0
        self._bells = bells
        self._asleep = False  # the last ``sleep_s`` allowed it
        self._stream = MpiStream(
            _calls(self._comm),
            ranks,
            self.node,
            chunk_bytes=CHUNK_BYTES,
            slots=RING_SLOTS,
            window=WINDOW,
            tag=_TAG_STREAM,
            quiet_s=QUIET_S,
            ring=None if bells is None else bells.ring,
        )

    # -- messages

    def send_frames(self, node: int, frames: bytes) -> None:
        self._stream.queue(node, frames)

    def forsake(self, node: int) -> None:
        super().forsake(node)
        self._stream.forsake(node)

    def _on_own(self, peer: _Peer, payload: bytes) -> None:
        if payload[0] == _CODE_FETCH:
            _, tag, handle, size = _FETCH.unpack(payload)
            pin = self._objects.get(handle)
            problem = ""
            if pin is None:
                problem = "the object is not there any more"
            elif len(memoryview(pin).cast("B")) != size:
                problem = f"the object has {len(memoryview(pin).cast('B'))} bytes, not {size}"
            if problem:
                self.send(peer.node, 0, _OWN, _REFUSE.pack(_CODE_REFUSE, tag) + problem.encode())
            else:
                self._outgoing.append(_Outgoing(peer, tag, pin))
        else:
            _, tag = _REFUSE.unpack_from(payload)
            incoming = self._incoming.pop(tag, None)
            if incoming is not None:
                self._abandon(incoming, payload[_REFUSE.size :].decode())

    # -- objects

    def transfer(self, transfer_id: int, source_node: int, source_handle: int, handle: int, size: int) -> None:
        peer = self._peers[source_node]
        if peer.lost:
            self._events.append(TransferEnded(transfer_id, f"node {source_node} is gone"))
            return
        try:
            view = memoryview(self._objects.write_buffer(handle)).cast("B")
            if len(view) != size:
                raise ValueError(f"the block has {len(view)} bytes, the object {size}")
        except (ValueError, RuntimeError, OSError) as error:
            self._events.append(TransferEnded(transfer_id, f"cannot write into the block: {error}"))
            return
        if size == 0:
            self._events.append(TransferEnded(transfer_id, ""))
            return
        while True:
            tag = _TAG_OBJECT + self._next_tag
            self._next_tag = (self._next_tag + 1) % self._tags
            if tag not in self._incoming:
                break
        incoming = self._incoming[tag] = _Incoming(transfer_id, peer, tag, handle, view)
        self._post_pieces(incoming)
        self.send(source_node, 0, _OWN, _FETCH.pack(_CODE_FETCH, tag, source_handle, size))

    def _post_pieces(self, incoming: _Incoming) -> None:
        while incoming.next < incoming.size and len(incoming.pending) < PIECES_AHEAD:
            piece = incoming.view[incoming.next : incoming.next + PIECE_BYTES]
            self._objects.prepare(incoming.handle, incoming.next, len(piece))
            incoming.pending.append(self._comm.Irecv([piece, MPI.BYTE], incoming.source.rank, incoming.tag))
            incoming.next += len(piece)

    def _abandon(self, incoming: _Incoming, text: str) -> None:
        for request in incoming.pending:
            try:
                request.Cancel()
                request.Wait()
            except MPI.Exception:
                pass
        self._events.append(TransferEnded(incoming.transfer_id, text))

    def _move_objects(self) -> bool:
        moved = False
        for incoming in list(self._incoming.values()):
            try:
                while incoming.pending and incoming.pending[0].Test():
                    incoming.pending.popleft()
                    moved = True
                    self._post_pieces(incoming)
            except MPI.Exception as error:
                self._on_error(error, incoming.source)
                continue
            if not incoming.pending and incoming.tag in self._incoming:
                del self._incoming[incoming.tag]
                self._events.append(TransferEnded(incoming.transfer_id, ""))
        for _ in range(len(self._outgoing)):  # round-robin: each gives a piece in its turn
            outgoing = self._outgoing.popleft()
            try:
                while outgoing.pending and outgoing.pending[0].Test():
                    outgoing.pending.popleft()
                    moved = True
                if outgoing.next < len(outgoing.view) and len(outgoing.pending) < PIECES_AHEAD:
                    piece = outgoing.view[outgoing.next : outgoing.next + PIECE_BYTES]
                    outgoing.pending.append(self._comm.Isend([piece, MPI.BYTE], outgoing.peer.rank, outgoing.tag))
                    outgoing.next += len(piece)
                    moved = True
            except MPI.Exception as error:
                self._on_error(error, outgoing.peer)
                continue
            if outgoing.pending or outgoing.next < len(outgoing.view):
                self._outgoing.append(outgoing)
        return moved

    # -- failures

    def _on_error(self, error: MPI.Exception, peer: _Peer | None) -> None:
        """Finds out who is lost (TRANSPORT-3); raises what is no loss of a peer."""
        kind = error.Get_error_class()
        if kind not in _LOSSES:
            raise error
        try:
            group = self._comm.Get_failed()
            mine = self._comm.Get_group()
            ranks = MPI.Group.Translate_ranks(group, list(range(group.Get_size())), mine)
            self._comm.Ack_failed(group.Get_size())
        except (MPI.Exception, NotImplementedError):
            ranks = []
        if peer is not None and peer.rank not in ranks and kind == MPI.ERR_PROC_FAILED:
            ranks = [*ranks, peer.rank]
        for rank in ranks:
            lost = self._by_rank.get(rank)  # others are MPI workers: not ours to report
            if lost is not None and not lost.lost:
                self.lose(lost.node, f"its link (MPI rank {rank}) died")

    def lose(self, node: int, text: str) -> None:
        """Drops all that has to do with a peer."""
        peer = self._peers[node]
        if peer.lost:
            return
        peer.lost = True
        self._stream.lose(node)
        self._outgoing = deque(o for o in self._outgoing if o.peer is not peer)
        self._events.append(PeerLost(node, text))
        for tag, incoming in list(self._incoming.items()):
            if incoming.source is peer:
                del self._incoming[tag]
                self._abandon(incoming, f"node {node} is gone: {text}")

    # -- driving

    def fileno(self) -> int:
        return -1 if self._bells is None else self._bells.fileno()

    def sleep_s(self) -> float:
        self._asleep = (
            self._bells is not None
            and self._bells.believed
            and not self._stream.sending  # until the peers know of a message they may answer without a ring
            and self._stream.silent_s > LIVELY_S  # so we have looked since
        )
        return SLEEP_S if self._asleep else 0.0

    def poll(self) -> list[Event]:
        return self.turn(None, 0.0).events

    def turn(self, inbox: Any, spin_s: float) -> Turn:
        stream, bells, slept = self._stream, self._bells, self._asleep
        if slept and bells is not None:
            self._asleep = False
            before, rung = stream.looked_s, bells.heard()
            if rung:
                stream.has_moved()
            moved, messages, failures = stream.turn(inbox, self.local, 0.0, True)
            if rung or stream.looked_s - before > RUNG_S:  # else a ring may still be under way, and somebody of our own node has woken us
                bells.judge(stream.arrived_bytes > 0, rung)
        else:
            moved, messages, failures = stream.turn(inbox, self.local, 0.0 if self._incoming or self._outgoing else spin_s, False)
        self.arrived_bytes = stream.arrived_bytes
        here: list[bytes] = []
        for node, source, destination, payload in messages:
            if node == self.node:
                here.append(payload)
            elif destination == _OWN:
                self._on_own(self._peers[node], payload)
            else:
                self._deliver(node, source, destination, payload)
        for node, code in failures:
            self._on_error(MPI.Exception(code), None if node < 0 else self._peers[node])
        if (self._incoming or self._outgoing) and self._move_objects():
            stream.has_moved()
            moved = True
        events, self._events = self._events, []
        return Turn(moved or bool(events), here, events)

    @property
    def busy(self) -> bool:
        """Objects move, or messages wait for room. Sends that wait for their match alone do not count: the peer sleeps."""
        return bool(self._incoming or self._outgoing or self._stream.queued_bytes)

    @property
    def backlog_bytes(self) -> int:
        return self._stream.queued_bytes

    def close(self, timeout_s: float) -> bool:
        """Drain, then a barrier of those that live; with a lost peer the barrier is left out."""
        deadline = time.monotonic() + timeout_s
        barrier = None
        done = False
        try:
            while time.monotonic() < deadline:
                self.turn(None, 0.0)
                if barrier is None and not self.busy and not self._stream.sending:
                    if any(peer.lost for peer in self._peers):
                        done = True
                        break
                    barrier = self._comm.Ibarrier()
                if barrier is not None and barrier.Test():
                    done = True
                    break
                time.sleep(0.0005)
        except MPI.Exception:
            pass
        self._stream.close()
        if self._bells is not None:
            self._bells.close()
        return done


_LOSSES = {getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)}

_FUNCTIONS = ("MPI_Issend", "MPI_Irecv", "MPI_Test", "MPI_Wait", "MPI_Cancel", "MPI_Request_free", "MPI_Get_count")
_MARK = 0x5A17C0DE


def _calls(communicator: MPI.Comm) -> dict[str, int]:
    """How ``MpiStream`` reaches the MPI that mpi4py has loaded: functions by their addresses, handles as the integers that they are."""
    library = ctypes.CDLL(MPI.__file__)  # mpi4py's module: a symbol is looked for there and in what it is linked with
    found = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS}
    status = MPI.Status()
    status.Set_source(_MARK)
    size = MPI._sizeof(MPI.Status)
    return found | {
        "comm": MPI._handleof(communicator),
        "byte": MPI._handleof(MPI.BYTE),
        "request_null": MPI._handleof(MPI.REQUEST_NULL),
        "request_bytes": MPI._sizeof(MPI.Request),
        "status_bytes": size,
        "source_at": ctypes.string_at(MPI._addressof(status), size).index(struct.pack("i", _MARK)),
        "any_source": MPI.ANY_SOURCE,
    }

"""MPI point-to-point between links, through mpi4py. Only a link's main thread touches it, after ``MPI_Init``.

Messages to a peer are one stream of frames (``native/frames.h``), cut into chunks of at most ``CHUNK_BYTES`` wherever it happens; so
coalescing and splitting are the same thing. Chunks go out by *synchronous* sends, which complete when the receiver has matched them:
``WINDOW`` unfinished ones per peer are the whole flow control, and bound what MPI ever has to buffer. Receives are a ring of preposted
buffers for any source. An object is asked for with a frame of its own and comes as ``PIECE_BYTES`` pieces under a tag of its own, from
arena memory into arena memory.

MPI-1 (no probe): every message meets a posted receive, or waits as one of ``WINDOW`` per peer.
MPI-2 (order): receives of the ring are looked at in the order they were posted, so a peer's chunks are too. Those that have been
used are posted again by the next ``poll``: whom a message was for comes first.
MPI-3 (progress): each ``poll`` tests the pending receive at the head of the ring, which drives MPI's progress engine; without
that neither data nor news of failures move. Where all are quiet and bells ring (``bells``), ``SLEEP_S`` may pass between two.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import Any

from mpi4py import MPI

from hpc_ray._core import split_frames
from hpc_ray.transport import Deliver, Event, Forward, Objects, PeerLost, TransferEnded, Transport
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

    __slots__ = ("bytes_out", "last", "lost", "node", "out", "partial", "patience_s", "rank", "ring_at", "sends")

    def __init__(self, node: int, rank: int):
        self.node = node
        self.rank = rank
        self.lost = False
        self.last = 0.0  # when we sent it something or received something of it, at the earliest (BELLS-1)
        self.out: deque[Any] = deque()  # pieces of the stream
        self.bytes_out = 0
        self.sends: deque[tuple[MPI.Request, Any]] = deque()  # with their memory
        self.ring_at = 0.0  # when it shall be woken, if it has not taken the first of them by then
        self.patience_s = LIVELY_S  # and how long to wait after that
        self.partial = bytearray()  # start of a frame whose rest comes with the next chunk


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

    def __init__(
        self,
        communicator: MPI.Intracomm,
        ranks: list[int],
        objects: Objects,
        deliver: Deliver,
        bells: Bells | None = None,
        forward: Forward = split_frames,
    ):
        self._comm = communicator.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.node = ranks.index(communicator.Get_rank())
        self.nodes = len(ranks)
        self._objects = objects
        self._deliver = deliver
        self._forward = forward
        self._peers = [_Peer(node, rank) for node, rank in enumerate(ranks)]
        self._by_rank = {peer.rank: peer for peer in self._peers}
        self._sending: set[_Peer] = set()  # have something queued or unfinished
        self._incoming: dict[int, _Incoming] = {}  # by tag
        self._outgoing: deque[_Outgoing] = deque()
        self._events: list[Event] = []
        self._status = MPI.Status()
        upper = self._comm.Get_attr(MPI.TAG_UB)
        self._tags = min(int(upper or 32767), 1 << 28) - _TAG_OBJECT
        self._next_tag = 0
        self._bells = bells
        self._last = time.monotonic()  # when anything moved, or somebody rang
        self._asleep = False  # the last ``sleep_s`` allowed it
        self._polled = self._since = self._last  # when ``poll`` began; and since when MPI may have taken what it finds now
        self._ring: deque[tuple[MPI.Request, memoryview]] = deque()
        self._used = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(RING_SLOTS)] if self.nodes > 1 else []  # not in the ring
        self._post()

    def _post(self) -> None:
        for buffer in self._used:
            self._ring.append((self._comm.Irecv([buffer, MPI.BYTE], source=MPI.ANY_SOURCE, tag=_TAG_STREAM), buffer))
        self._used.clear()

    # -- messages out

    def send_frames(self, node: int, frames: bytes) -> None:
        peer = self._peers[node]
        if not peer.lost:
            peer.out.append(frames)
            peer.bytes_out += len(frames)
            self._sending.add(peer)

    def _next_chunk(self, peer: _Peer) -> bytes:
        out = peer.out
        if peer.bytes_out <= CHUNK_BYTES:
            chunk = b"".join(out)
            out.clear()
            peer.bytes_out = 0
            return chunk
        pieces, room = [], CHUNK_BYTES
        while room:
            piece = out.popleft()
            if len(piece) > room:
                view = memoryview(piece)
                out.appendleft(view[room:])
                piece = view[:room]
            pieces.append(piece)
            room -= len(piece)
        peer.bytes_out -= CHUNK_BYTES
        return b"".join(pieces)

    def _push(self) -> bool:
        moved = False
        for peer in list(self._sending):
            try:
                before = len(peer.sends)
                while peer.sends and peer.sends[0][0].Test():
                    peer.sends.popleft()
                if len(peer.sends) < before:
                    moved = True
                    self._be_patient(peer)
                elif before and self._polled > peer.ring_at:
                    self._ring_again(peer)
                while peer.bytes_out and len(peer.sends) < WINDOW:
                    now = self._ring_if_quiet(peer)
                    chunk = self._next_chunk(peer)
                    if not peer.sends:
                        self._be_patient(peer)
                    peer.sends.append((self._comm.Issend([chunk, MPI.BYTE], peer.rank, _TAG_STREAM), chunk))
                    self._ring_if_quiet(peer)  # somebody else may have had our core since
                    peer.last = max(peer.last, now)
                    moved = True
            except MPI.Exception as error:
                self._on_error(error, peer)
                continue
            if not peer.bytes_out and not peer.sends:
                self._sending.discard(peer)
        return moved

    def _ring_if_quiet(self, peer: _Peer) -> float:
        """The time."""
        now = time.monotonic()
        if now - peer.last > QUIET_S and self._bells is not None:
            self._bells.ring(peer.node)
            peer.last = now
        return now

    def _be_patient(self, peer: _Peer) -> None:
        """With a peer that has just taken something, or is just sent something."""
        peer.patience_s = LIVELY_S
        peer.ring_at = self._polled + LIVELY_S

    def _ring_again(self, peer: _Peer) -> None:
        """It may have gone to sleep while our message was under way (BELLS-2). More and more rarely, for it may be just slow."""
        if self._bells is not None:
            self._bells.ring(peer.node)
        peer.patience_s *= 2
        peer.ring_at = self._polled + peer.patience_s

    # -- messages in

    def _pull(self) -> bool:
        if self._used:
            self._post()
        ring, status, moved = self._ring, self._status, False
        while ring:
            request, buffer = ring[0]
            try:
                if not request.Test(status):
                    break
            except MPI.Exception as error:
                self._on_error(error, None)
                if request != MPI.REQUEST_NULL:
                    break
                ring.popleft()  # ended by the failure
                self._used.append(buffer)
                continue
            ring.popleft()
            self._used.append(buffer)
            moved = True
            peer = self._by_rank[status.Get_source()]
            peer.last = max(peer.last, self._since)
            self._take(peer, buffer[: status.Get_count(MPI.BYTE)])
        return moved

    def _take(self, peer: _Peer, data: Any) -> None:
        partial = peer.partial
        if partial:
            partial += data
            data = partial
        taken, others = self._forward(data)
        if data is partial:
            del partial[:taken]
        elif taken < len(data):
            partial += data[taken:]
        for source, destination, payload in others:
            if destination == _OWN:
                self._on_own(peer, payload)
            else:
                self._deliver(peer.node, source, destination, payload)

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
        peer.out.clear()
        peer.bytes_out = 0
        peer.partial = bytearray()
        for request, _ in peer.sends:
            _free(request)
        peer.sends.clear()
        self._sending.discard(peer)
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
            and not self._sending  # until the peers know of a message they may answer without a ring
            and self._polled - self._last > LIVELY_S  # so we have looked since
        )
        return SLEEP_S if self._asleep else 0.0

    def poll(self) -> list[Event]:
        rung = pushed = False
        before, self._polled = self._polled, time.monotonic()
        self._since = self._polled if self._asleep else before
        if self._sending:
            pushed = self._push()  # an answer of our node does not wait for what comes next
        if self._asleep and self._bells is not None:
            rung = self._bells.heard()
            moved = self._pull()
            if rung or self._polled - before > RUNG_S:  # else a ring may still be under way, and somebody of our own node has woken us
                self._bells.judge(moved, rung)
            self._asleep = False
        else:
            moved = self._pull()
        moved |= pushed
        if self._incoming or self._outgoing:
            moved |= self._move_objects()
        if moved or rung:
            self._last = time.monotonic()
        if not self._events:
            return _NOTHING
        events, self._events = self._events, []
        return events

    @property
    def busy(self) -> bool:
        """Objects move, or messages wait for room. Sends that wait for their match alone do not count: the peer sleeps."""
        return bool(self._incoming or self._outgoing or (self._sending and any(peer.bytes_out for peer in self._sending)))

    @property
    def backlog_bytes(self) -> int:
        return sum(peer.bytes_out for peer in self._sending) if self._sending else 0

    def close(self, timeout_s: float) -> bool:
        """Drain, then a barrier of those that live; with a lost peer the barrier is left out."""
        deadline = time.monotonic() + timeout_s
        barrier = None
        done = False
        try:
            while time.monotonic() < deadline:
                self.poll()
                if barrier is None and not self.busy and not self._sending:
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
        for request, _ in self._ring:
            try:
                request.Cancel()
                request.Wait()
            except MPI.Exception:
                pass
        self._ring.clear()
        if self._bells is not None:
            self._bells.close()
        return done


_NOTHING: list[Event] = []
_LOSSES = {getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)}


def _free(request: MPI.Request) -> None:
    try:
        if request != MPI.REQUEST_NULL:
            request.Free()
    except MPI.Exception:
        pass

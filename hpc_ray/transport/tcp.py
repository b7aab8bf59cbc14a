"""TCP between links: for nodes that may be lost without the end of the others, and for nodes that come later. Only a link's main
thread touches it.

Each pair of nodes has one connection, which the node with the higher number opens; so a newcomer connects to all who are there, and
nobody has to be told of it first. A connection carries frames: messages, and pieces of objects between them, from arena memory into
arena memory. ``fileno`` is readable when ``poll`` has something to do; so a link need not look in between.

TCP-1 (both prove it): a connection counts when both ends have proved that they know the session's secret, which itself never
travels; who cannot is closed without a word. Nothing is encrypted.
TCP-2 (signs of life): the head and each node send one another something every ``heartbeat_s``, and the one from which nothing has
come for ``timeout_s`` is lost. Who was held up itself, and so read nothing, blames nobody for that time: between two looks at most
``heartbeat_s`` counts, however long the machine stood still. Connections of other nodes, of
which there are many, have the kernel's own probes with the same time-out: a process that hangs there is the head's to find.
TCP-3 (no ghosts): a lost peer is told so as far as it can be, its connection is closed, and its number is refused for good.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import itertools
import json
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from hpc_ray.transport import Deliver, Event, Expelled, Joining, Objects, PeerLost, TransferEnded, Transport

BUFFER_BYTES = 256 << 10
AHEAD_BYTES = 4 << 10  # read beyond the end of a piece, which is then copied
PIECE_BYTES = 1 << 20  # a message waits behind at most one of these
BODY_BYTES = 64 << 10  # frames from this size on are read to where they belong, rather than copied
ROUND_BYTES = 8 << 20  # for one peer before the others have their turn
GREET_S = 10.0  # to prove who one is
DOORS = 128  # connections at once that have not proved it yet
HELLO_BYTES = 64 << 10
_CLOSE_LOOK_S = 0.05
SECRET_BYTES = 32

_FRAME = struct.Struct("<BxxxIQQ")  # kind, bytes that follow, and two numbers
_FRAMES, _FETCH, _PIECE, _REFUSE, _BEAT, _WELCOME, _BYE, _EXPELLED = range(1, 9)
_SIZE = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")
_MAGIC = b"hpc_ray\x02"
_PROOF_BYTES = hashlib.sha256().digest_size
_BUFFERS = 256  # in one system call

Address = tuple[str, int]
Hello = dict[str, Any]


class Refused(ConnectionError):
    """A connection that did not come about, and why."""


# ------------------------------------------------------------------ greetings

# Both sides are generators, so that they need not know how bytes come and go: they yield bytes to send, or how many they want.
Greeting = Generator[bytes | int, bytes, Hello]


def _proof(secret: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, b"".join(parts), hashlib.sha256).digest()


def call(secret: bytes, hello: Hello) -> Greeting:
    """The side that connects (TCP-1)."""
    mine = os.urandom(_PROOF_BYTES)
    yield _MAGIC + mine
    answer = yield 2 * _PROOF_BYTES
    theirs, proof = answer[:_PROOF_BYTES], answer[_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"listener", mine, theirs)):
        raise Refused("another session answers there")
    text = json.dumps(hello).encode()
    yield _proof(secret, b"caller", theirs, mine, text) + _LENGTH.pack(len(text)) + text
    return hello


def listen(secret: bytes) -> Greeting:
    """The side that was connected to; what the caller says of itself."""
    opening = yield len(_MAGIC) + _PROOF_BYTES
    if opening[: len(_MAGIC)] != _MAGIC:
        raise Refused("it does not speak our protocol")
    theirs, mine = opening[len(_MAGIC) :], os.urandom(_PROOF_BYTES)
    yield mine + _proof(secret, b"listener", theirs, mine)
    head = yield _PROOF_BYTES + _LENGTH.size
    size = _LENGTH.unpack_from(head, _PROOF_BYTES)[0]
    if size > HELLO_BYTES:
        raise Refused("it says too much")
    text = yield size
    if not hmac.compare_digest(head[:_PROOF_BYTES], _proof(secret, b"caller", mine, theirs, text)):
        raise Refused("it does not know the secret of this session")
    hello = json.loads(text)
    if not isinstance(hello, dict):
        raise Refused("it says something else than who it is")
    return hello


# ------------------------------------------------------------------ sockets


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def open_listener(host: str) -> socket.socket:
    """At a free port of one address of this host. Raises OSError."""
    listener = socket.socket(family_of(host), socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind((host, 0))
        listener.listen(512)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def source_towards(host: str) -> str:
    """The address of this host on the way to another one, given by its address; "" where no way leads there. Nothing is sent."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def address_towards(hosts: list[str]) -> str:
    """This host's address on the way to the first of these that is elsewhere; without any, on the way out of here; "" if there is none.

    Raises:
        OSError: a host is not known.
    """
    for host in hosts:
        for *_, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            mine = source_towards(str(target[0]))
            if mine and mine != target[0]:
                return mine
    return source_towards("10.255.255.255") or source_towards("2001:db8::1")


def join(addresses: list[Address], secret: bytes, facts: Hello, timeout_s: float) -> tuple[socket.socket, Hello]:
    """Asks the head to be let in; the connection, which is the one to the head from here on, and what it says. Blocks.

    Raises:
        Refused: it does not want us, with its words; or nobody answers, or somebody else.
    """
    deadline = time.monotonic() + timeout_s
    problems = []
    for host, port in addresses:
        try:
            connection = socket.create_connection((host, port), max(0.1, min(GREET_S, deadline - time.monotonic())))
        except OSError as error:
            problems.append(f"{host} port {port}: {error.strerror or error}")
            continue
        try:
            _greet(connection, call(secret, {"join": facts}))
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            kind, size, _, _ = _FRAME.unpack(_read_exactly(connection, _FRAME.size))
            text = _read_exactly(connection, size).decode()
        except (OSError, EOFError) as error:
            connection.close()
            if isinstance(error, Refused):
                raise
            said = "it closed the connection" if isinstance(error, EOFError) else str(error)
            raise Refused(f"{host} port {port} did not let us in: {said}; is this another session's secret?") from None
        if kind != _WELCOME:
            connection.close()
            raise Refused(text)
        return connection, json.loads(text)
    raise Refused("the head of the session cannot be reached at " + "; ".join(problems))


def _greet(connection: socket.socket, greeting: Greeting) -> Hello:
    got: Any = None
    try:
        while True:
            wish = greeting.send(got)
            got = None
            if isinstance(wish, bytes):
                connection.sendall(wish)
            else:
                got = _read_exactly(connection, wish)
    except StopIteration as done:
        hello: Hello = done.value
        return hello


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


class _Door:
    """A connection whose other end has not proved itself yet."""

    def __init__(self, connection: socket.socket, greeting: Greeting, node: int, deadline: float):
        self.connection = connection
        self.greeting = greeting
        self.node = node  # whom we call; -1: we were called
        self.deadline = deadline
        self.out = b""
        self.got = b""
        self.wanted = 0
        self.hello: Hello | None = None

    def step(self) -> bool:
        """As far as it goes without waiting; True when it is done. Raises OSError (Refused too), ValueError."""
        connection = self.connection
        try:
            while True:
                if self.out:
                    self.out = self.out[connection.send(self.out) :]
                elif len(self.got) < self.wanted:
                    data = connection.recv(self.wanted - len(self.got))  # not more: what follows is the transport's
                    if not data:
                        raise Refused("it closed the connection: is it of another session?")
                    self.got += data
                else:
                    got, self.got, self.wanted = self.got, b"", 0
                    wish = self.greeting.send(got) if got else next(self.greeting)
                    if isinstance(wish, bytes):
                        self.out = wish
                    else:
                        self.wanted = wish
        except BlockingIOError:
            return False
        except StopIteration as done:
            self.hello = done.value
            return True


# ------------------------------------------------------------------ peers


class _Peer:
    """What we know of one other node."""

    __slots__ = (
        "addresses", "blocked", "body", "bytes_out", "connection", "deadline", "ended", "farewell", "frame", "lost", "node", "objects",
        "out", "partial", "sent_at",
    )  # fmt: skip

    def __init__(self, node: int, deadline: float):
        self.node = node
        self.connection: socket.socket | None = None  # None: not up yet, or lost
        self.addresses: list[Address] = []  # to be tried yet
        self.lost = False
        self.farewell = False  # it has said goodbye
        self.ended = False  # and closed its side, while we are closing
        self.deadline = deadline  # for its next sign of life
        self.sent_at = 0.0
        self.out: deque[Any] = deque()  # buffers
        self.bytes_out = 0
        self.blocked = False  # until its socket has room
        self.objects: deque[_Outgoing] = deque()
        self.partial = b""  # start of a frame
        self.frame: tuple[int, int, int, Any] | None = None  # whose body is being read
        self.body = memoryview(b"")  # where its rest goes


class _Incoming:
    __slots__ = ("handle", "left", "source", "transfer_id", "view")

    def __init__(self, transfer_id: int, source: _Peer, handle: int, view: memoryview):
        self.transfer_id = transfer_id
        self.source = source
        self.handle = handle
        self.view = view
        self.left = len(view)


class _Outgoing:
    __slots__ = ("next", "tag", "view")

    def __init__(self, tag: int, pin: Any):
        self.tag = tag
        self.view = memoryview(pin).cast("B")  # holds the pin
        self.next = 0


class TCPTransport(Transport):
    """One node's end.

    Args:
        listener: see ``open_listener``; ours from now on.
        session: its name; callers that mean another one are refused.
        connect_timeout_s: for nodes that have been let in, until their first sign of life.
    """

    def __init__(
        self,
        node: int,
        session: str,
        secret: bytes,
        listener: socket.socket,
        objects: Objects,
        deliver: Deliver,
        *,
        heartbeat_s: float,
        timeout_s: float,
        connect_timeout_s: float,
        now: Callable[[], float] = time.monotonic,
    ):
        super().__init__(objects, deliver)
        self.node = node
        self.session = session
        self.heartbeat_s = heartbeat_s
        self.timeout_s = timeout_s
        self.connect_timeout_s = connect_timeout_s
        self._secret = secret
        self._listener = listener
        self._now = now
        self._peers: dict[int, _Peer] = {}
        self._by_fd: dict[int, _Peer] = {}
        self._doors: dict[int, _Door] = {}  # by descriptor
        self._sending: set[_Peer] = set()  # have something queued, and room for it
        self._incoming: dict[int, _Incoming] = {}  # by tag
        self._tags = itertools.count(1)
        self._events: list[Event] = []
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._looked = now()
        self._closing = False
        self._socket_options = (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_USER_TIMEOUT, max(1000, round(timeout_s * 1000))),
            (socket.TCP_KEEPIDLE, max(1, round(timeout_s / 3))),
            (socket.TCP_KEEPINTVL, 1),
        )
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    @property
    def nodes(self) -> int:  # type: ignore[override]
        return max([self.node, *self._peers]) + 1

    @property
    def address(self) -> Address:
        """Where others can connect to this node."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def sleep_s(self) -> float:
        return max(0.0, self._looked + self.heartbeat_s / 2 - self._now())

    def others(self) -> list[int]:
        return [peer.node for peer in self._peers.values() if not peer.lost]

    def reaches(self, node: int) -> bool:
        return self._peer(node) is not None

    # -- who is there

    def expect(self, node: int, addresses: list[Address] | None = None) -> None:
        """A node that we are to be connected with: by us, if it has a lower number, at one of these addresses, else by it."""
        peer = self._peers[node] = _Peer(node, self._now() + self.connect_timeout_s)
        if addresses is not None:
            peer.addresses = list(addresses)
            self._call(peer)

    def adopt(self, node: int, connection: socket.socket) -> None:
        """A connection that both ends have agreed on already."""
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = _Peer(node, 0.0)
        peer.deadline = self._now() + self.connect_timeout_s
        self._connect(peer, connection)

    def admit(self, door: int, node: int, welcome: Hello) -> None:
        """Who asked to join is this node from here on."""
        peer = self._peers[node] = _Peer(node, self._now() + self.connect_timeout_s)
        opened = self._doors.pop(door, None)
        if opened is None:  # it has gone meanwhile
            self.lose(node, "it did not wait for the answer")
            return
        text = json.dumps(welcome).encode()
        peer.out.appendleft(_FRAME.pack(_WELCOME, len(text), 0, 0) + text)
        peer.bytes_out += _FRAME.size + len(text)
        self._connect(peer, opened.connection)

    def refuse(self, door: int, text: str) -> None:
        """Who asked to join is told why not."""
        opened = self._doors.pop(door, None)
        if opened is not None:
            self._turn_away(opened.connection, _REFUSE, text)

    def _turn_away(self, connection: socket.socket, kind: int, text: str) -> None:
        data = text.encode()
        try:
            connection.send(_FRAME.pack(kind, len(data), 0, 0) + data)  # a fresh connection has room for it
        except OSError:
            pass
        connection.close()

    def _peer(self, node: int) -> _Peer | None:
        """None: it is gone, or never was. Those with higher numbers may be on their way to us."""
        peer = self._peers.get(node)
        if peer is None and node > self.node:
            self.expect(node)
            peer = self._peers[node]
        return None if peer is None or peer.lost else peer

    def _call(self, peer: _Peer) -> None:
        """Connects to the next of its addresses."""
        problem = "it has no address"
        while peer.addresses:
            host, port = peer.addresses.pop(0)
            connection = socket.socket(family_of(host), socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            code = connection.connect_ex((host, port))
            if code in (0, errno.EINPROGRESS):
                hello = {"session": self.session, "node": self.node}
                door = _Door(connection, call(self._secret, hello), peer.node, self._now() + self.connect_timeout_s)
                self._doors[connection.fileno()] = door
                self._epoll.register(connection.fileno(), select.EPOLLOUT)
                return
            connection.close()
            problem = f"{host} port {port}: {os.strerror(code)}"
        self.lose(peer.node, f"it cannot be reached: {problem}")

    def _accept(self) -> None:
        for _ in range(DOORS):
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if len(self._doors) >= DOORS or self._closing:
                connection.close()
                continue
            connection.setblocking(False)
            self._doors[connection.fileno()] = _Door(connection, listen(self._secret), -1, self._now() + GREET_S)
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _on_door(self, fd: int) -> None:
        door = self._doors[fd]
        try:
            problem = door.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                raise OSError(problem, os.strerror(problem))
            if not door.step():
                self._epoll.modify(fd, select.EPOLLOUT if door.out else select.EPOLLIN)
                return
        except (OSError, ValueError) as error:
            self._close_door(door, error)
            return
        self._epoll.unregister(fd)
        hello = door.hello or {}
        if door.node >= 0:
            del self._doors[fd]
            peer = self._peers[door.node]
            if peer.lost:
                self._turn_away(door.connection, _EXPELLED, "this node was given up")
            else:
                self._connect(peer, door.connection)
        elif "join" in hello:
            self._events.append(Joining(fd, hello["join"]))
        else:
            del self._doors[fd]
            self._on_caller(door.connection, hello)

    def _on_caller(self, connection: socket.socket, hello: Hello) -> None:
        node = hello.get("node", -1)
        if hello.get("session") != self.session or not isinstance(node, int) or node <= self.node:
            self._turn_away(connection, _EXPELLED, f"there is no place for node {node} of {hello.get('session')}")
            return
        peer = self._peer(node)
        if peer is None or peer.connection is not None:  # TCP-3
            self._turn_away(connection, _EXPELLED, f"node {node} was lost, and its number is not given again")
            return
        self._connect(peer, connection)

    def _close_door(self, door: _Door, error: Exception) -> None:
        """It leads nowhere. Who has called us hears nothing (TCP-1); whom we have called may be found elsewhere."""
        self._doors.pop(door.connection.fileno(), None)
        door.connection.close()
        if door.node >= 0:
            peer = self._peers[door.node]
            if peer.lost:
                return
            if peer.addresses:
                self._call(peer)
            else:
                self.lose(door.node, f"it cannot be reached: {getattr(error, 'strerror', None) or error}")

    def _connect(self, peer: _Peer, connection: socket.socket) -> None:
        connection.setblocking(False)
        for option, value in self._socket_options:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.connection = connection
        peer.sent_at = self._now()
        self._by_fd[connection.fileno()] = peer
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        if peer.out:
            self._sending.add(peer)

    # -- messages out

    def send_frames(self, node: int, frames: bytes) -> None:
        peer = self._peer(node)
        if peer is not None:
            self._put(peer, _FRAMES, 0, 0, frames)

    def _put(self, peer: _Peer, kind: int, a: int, b: int, payload: Any = b"") -> None:
        size = len(payload)
        peer.out.append(_FRAME.pack(kind, size, a, b))
        if size:
            peer.out.append(payload)
        peer.bytes_out += _FRAME.size + size
        if peer.connection is not None and not peer.blocked:
            self._sending.add(peer)

    def _write(self, peer: _Peer) -> None:
        connection, out = peer.connection, peer.out
        assert connection is not None
        room = ROUND_BYTES
        try:
            while room > 0:
                if not out and not self._next_piece(peer):
                    self._sending.discard(peer)
                    break
                sent = connection.sendmsg(out if len(out) <= _BUFFERS else itertools.islice(out, _BUFFERS))
                peer.bytes_out -= sent
                room -= sent
                while sent:
                    first = len(out[0])
                    if sent < first:
                        out[0] = memoryview(out[0])[sent:]
                        break
                    out.popleft()
                    sent -= first
        except BlockingIOError:
            peer.blocked = True
            self._sending.discard(peer)
            self._epoll.modify(connection.fileno(), select.EPOLLOUT | (0 if peer.ended else select.EPOLLIN))
        except OSError as error:
            self._on_end(peer, error)
            return
        peer.sent_at = self._now()

    def _next_piece(self, peer: _Peer) -> bool:
        """Queues a piece of one of its objects, each in its turn."""
        if not peer.objects:
            return False
        outgoing = peer.objects.popleft()
        piece = outgoing.view[outgoing.next : outgoing.next + PIECE_BYTES]
        self._put(peer, _PIECE, outgoing.tag, outgoing.next, piece)
        outgoing.next += len(piece)
        if outgoing.next < len(outgoing.view):
            peer.objects.append(outgoing)
        return True

    # -- messages in

    def _read(self, peer: _Peer) -> None:
        view, room = self._view, ROUND_BYTES
        try:
            while room > 0 and peer.connection is not None:
                start = len(peer.partial)
                if peer.body:
                    wanted = len(peer.body) + AHEAD_BYTES
                    count = peer.connection.recvmsg_into([peer.body, view[:AHEAD_BYTES]])[0]
                else:
                    view[:start] = peer.partial
                    wanted = BUFFER_BYTES - start
                    count = peer.connection.recv_into(view[start:])
                if not count:
                    self._on_end(peer, None)
                    return
                room -= count
                end = start + count
                if peer.body:
                    into = min(count, len(peer.body))
                    peer.body = peer.body[into:]
                    end = count - into
                    if not peer.body:
                        self._end_body(peer)
                if not peer.body:
                    self._take(peer, end)
                if count < wanted:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self._on_end(peer, error)
            return
        peer.deadline = self._now() + self.timeout_s

    def _take(self, peer: _Peer, end: int) -> None:
        """Frames in the first bytes of the buffer."""
        position = 0
        peer.partial = b""
        while end - position >= _FRAME.size:
            kind, size, a, b = _FRAME.unpack_from(self._buffer, position)
            start = position + _FRAME.size
            if start + size <= end:
                self._on_frame(peer, kind, a, b, self._view[start : start + size])
                if peer.connection is None:
                    return
                position = start + size
            elif size >= BODY_BYTES:
                target = self._target(kind, a, b, size)
                have = end - start
                target[:have] = self._view[start:end]
                peer.frame = (kind, a, b, target)
                peer.body = target[have:]
                return
            else:
                break
        if position < end:
            peer.partial = bytes(self._view[position:end])

    def _target(self, kind: int, tag: int, offset: int, size: int) -> memoryview:
        incoming = self._incoming.get(tag) if kind == _PIECE else None
        if incoming is not None:
            self._objects.prepare(incoming.handle, offset, size)
            return incoming.view[offset : offset + size]
        return memoryview(bytearray(size))

    def _end_body(self, peer: _Peer) -> None:
        assert peer.frame is not None
        kind, a, b, target = peer.frame
        peer.frame = None
        if kind == _PIECE:
            self._on_piece(a, len(target))
        else:
            self._on_frame(peer, kind, a, b, target)

    def _on_frame(self, peer: _Peer, kind: int, a: int, b: int, payload: memoryview) -> None:
        if kind == _FRAMES:
            for source, destination, message in self._forward(payload)[1]:
                self._deliver(peer.node, source, destination, message)
        elif kind == _PIECE:
            incoming = self._incoming.get(a)
            if incoming is not None:
                incoming.view[b : b + len(payload)] = payload
                self._on_piece(a, len(payload))
        elif kind == _FETCH:
            self._on_fetch(peer, a, b, _SIZE.unpack(payload)[0])
        elif kind == _REFUSE:
            refused = self._incoming.pop(a, None)
            if refused is not None:
                self._events.append(TransferEnded(refused.transfer_id, bytes(payload).decode()))
        elif kind == _BYE:
            peer.farewell = True
        elif kind == _EXPELLED:
            self._events.append(Expelled(peer.node, bytes(payload).decode()))

    # -- objects

    def transfer(self, transfer_id: int, source_node: int, source_handle: int, handle: int, size: int) -> None:
        peer = self._peer(source_node)
        if peer is None:
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
        tag = next(self._tags)
        self._incoming[tag] = _Incoming(transfer_id, peer, handle, view)
        self._put(peer, _FETCH, tag, source_handle, _SIZE.pack(size))

    def _on_fetch(self, peer: _Peer, tag: int, handle: int, size: int) -> None:
        pin = self._objects.get(handle)
        if pin is None:
            problem = "the object is not there any more"
        elif len(memoryview(pin).cast("B")) != size:
            problem = f"the object has {len(memoryview(pin).cast('B'))} bytes, not {size}"
        else:
            peer.objects.append(_Outgoing(tag, pin))
            if not peer.blocked:
                self._sending.add(peer)
            return
        self._put(peer, _REFUSE, tag, 0, problem.encode())

    def _on_piece(self, tag: int, size: int) -> None:
        incoming = self._incoming.get(tag)
        if incoming is not None:
            incoming.left -= size
            if not incoming.left:
                del self._incoming[tag]
                self._events.append(TransferEnded(incoming.transfer_id, ""))

    # -- losses

    def _on_end(self, peer: _Peer, error: OSError | None) -> None:
        if self._closing and error is None:  # it has nothing more to say, and may still listen
            peer.ended = True
            assert peer.connection is not None
            self._epoll.modify(peer.connection.fileno(), select.EPOLLOUT if peer.blocked else 0)
            return
        if peer.farewell:
            text = "it has left"
        else:
            text = f"its connection broke: {error.strerror or error}" if error is not None else "its connection was closed"
        self.lose(peer.node, text)

    def _disconnect(self, peer: _Peer) -> None:
        self._sending.discard(peer)
        peer.out.clear()
        peer.bytes_out = 0
        peer.objects.clear()
        peer.partial, peer.frame, peer.body = b"", None, memoryview(b"")
        connection, peer.connection = peer.connection, None
        if connection is not None:
            del self._by_fd[connection.fileno()]
            connection.close()

    def lose(self, node: int, text: str) -> None:
        """Drops all that has to do with a peer, and tells it so as far as that goes (TCP-3)."""
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = _Peer(node, 0.0)
        if peer.lost:
            return
        peer.lost = True
        if peer.connection is not None:
            if not peer.out:  # else it could take our words for a part of a frame
                data = text.encode()
                try:
                    peer.connection.send(_FRAME.pack(_EXPELLED, len(data), 0, 0) + data)
                except OSError:
                    pass
            self._disconnect(peer)
        self._events.append(PeerLost(node, text))
        for tag, incoming in list(self._incoming.items()):
            if incoming.source is peer:
                del self._incoming[tag]
                self._events.append(TransferEnded(incoming.transfer_id, f"node {node} is gone: {text}"))

    def _look(self, now: float) -> None:
        """Who is alive (TCP-2), and that we are."""
        held_up = now - self._looked - self.heartbeat_s
        self._looked = now
        for peer in list(self._peers.values()):
            if peer.lost:
                continue
            if held_up > 0:  # but who has been heard of just now, or is not due before, needs no more time
                peer.deadline = max(peer.deadline, min(peer.deadline + held_up, now + self.timeout_s))
            if peer.connection is None:
                if now > peer.deadline:
                    self.lose(peer.node, f"it was not connected within {self.connect_timeout_s:g} s")
            elif self.node and peer.node:
                continue
            elif now > peer.deadline:
                self.lose(peer.node, f"no sign of life for {self.timeout_s:g} s")
            elif not peer.out and now - peer.sent_at >= self.heartbeat_s / 2:
                self._put(peer, _BEAT, 0, 0)
        for door in list(self._doors.values()):
            if now > door.deadline:
                self._close_door(door, TimeoutError("it does not answer"))

    # -- driving

    def poll(self) -> list[Event]:
        for fd, mask in self._epoll.poll(0):
            peer = self._by_fd.get(fd)
            if peer is not None:
                if mask & select.EPOLLOUT:
                    peer.blocked = False
                    self._epoll.modify(fd, 0 if peer.ended else select.EPOLLIN)
                    self._sending.add(peer)
                if mask & ~select.EPOLLOUT and not peer.ended:
                    self._read(peer)
            elif fd in self._doors:
                self._on_door(fd)
            elif fd == self._listener.fileno():
                self._accept()
        now = self._now()
        if now >= self._looked + self.heartbeat_s / 2:
            self._look(now)
        if self._sending:
            for peer in list(self._sending):
                self._write(peer)
        if not self._events:
            return _NOTHING
        events, self._events = self._events, []
        return events

    @property
    def busy(self) -> bool:
        return bool(self._sending or self._events)

    @property
    def backlog_bytes(self) -> int:
        return sum(peer.bytes_out for peer in self._peers.values())

    def close(self, timeout_s: float) -> bool:
        """Says goodbye after what is queued, and waits for the others to say so, those that are there."""
        self._closing = True
        deadline = time.monotonic() + timeout_s
        for peer in self._peers.values():
            if peer.connection is not None:
                self._put(peer, _BYE, 0, 0)
        done = False
        shut: set[int] = set()
        while time.monotonic() < deadline and not done:
            self.poll()
            for peer in self._peers.values():
                if peer.connection is None or peer.out:
                    continue
                if peer.ended:
                    self._disconnect(peer)
                elif peer.node not in shut:
                    shut.add(peer.node)
                    try:
                        peer.connection.shutdown(socket.SHUT_WR)
                    except OSError:
                        pass
            done = all(peer.connection is None for peer in self._peers.values())
            if not done:
                select.select([self._epoll.fileno()], [], [], _CLOSE_LOOK_S)
        for peer in self._peers.values():
            self._disconnect(peer)
        for door in self._doors.values():
            door.connection.close()
        self._doors.clear()
        self._listener.close()
        self._epoll.close()
        return done


_NOTHING: list[Event] = []

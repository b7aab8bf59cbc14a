"""Small JSON notes, with file descriptors, over a Unix SOCK_SEQPACKET socket.

Between whoever starts a node and the node (``control``), and between the node and those who attach. Blocking; a note of
any size travels as several packets.
"""

from __future__ import annotations

import array
import json
import os
import socket
import weakref
from typing import Any

_PIECE = 60_000
_MORE, _LAST = b"\x01", b"\x00"


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_note(connection: socket.socket, note: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Raises OSError when the peer is gone."""
    text = json.dumps(note).encode()
    pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)] or [b""]
    for i, piece in enumerate(pieces):
        flag = _MORE if i + 1 < len(pieces) else _LAST
        ancillary = []
        if i == 0 and descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        connection.sendmsg([flag + piece], ancillary, socket.MSG_NOSIGNAL)


def receive_note(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next note and its descriptors (the caller's now, close-on-exec); None when the peer is gone."""
    text = bytearray()
    descriptors: list[int] = []
    while True:
        try:
            data, ancillary, _, _ = _receive(connection)
        except ConnectionError:
            # The peer closed before it had read all of ours. Linux tells that once, ahead of what the peer had sent.
            try:
                data, ancillary, _, _ = _receive(connection)
            except ConnectionError:
                data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                descriptors.extend(fds)
        if not data:
            return None, descriptors
        text += data[1:]
        if data[:1] == _LAST:
            return json.loads(bytes(text)), descriptors


def _receive(connection: socket.socket) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
    return connection.recvmsg(_PIECE + 1, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)


def peer_user(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = array.array("i", raw)
    return pid, uid


_held: weakref.WeakSet[Any] = weakref.WeakSet()  # sockets that a fork of this process must not keep open


def _let_go() -> None:
    for connection in list(_held):
        connection.close()


os.register_at_fork(after_in_child=_let_go)


def let_go_in_forks(connection: socket.socket) -> None:
    """Forks of this process close it at once: the other end must see our death."""
    _held.add(connection)

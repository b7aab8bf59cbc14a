"""A process on a node that did not fork it: a driver, or the link.

ATTACH-1 (told): when the node goes, ``on_node_death`` is called once with the reason, from the attachment's own thread.
ATTACH-2 (missed): the node sees our end by the connection's, and tells the raylet.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_ray import _core
from hpc_ray.config import NodeConfig, decode_config
from hpc_ray.exceptions import LaunchError
from hpc_ray.ids import raylet_address
from hpc_ray.launcher import channel
from hpc_ray.protocol import Answer, DrainNode, ProcessKind, ProcessLeaving, ProcessStarted, Query, Welcome, decode, encode


class Attachment:
    """This process on a node: segment, lane, config, and the connection whose end tells of ours.

    Attributes:
        segment, lane: shared memory, and our inbox in it.
        config: the node's.
        worker_id: our 28 random bytes, as registered at the raylet.
        welcome: the raylet's answer.
        early: messages that came before it, [(source, bytes)].
        on_node_death: called with a text when the node is gone; set it at once after you got this.
    """

    def __init__(
        self,
        connection: socket.socket,
        segment: _core.Segment,
        config: NodeConfig,
        *,
        kind: ProcessKind,
        owned: Any = None,
        detached: bool = False,
        lane_index: int = -1,
        keeper: int = -1,
    ):
        """``keeper``: a pipe that tells the node how this process ends (``worker.rank``)."""
        self.connection = connection
        self.segment = segment
        self.config = config
        self.kind = kind
        self.detached = detached
        self.worker_id = os.urandom(28)
        self.welcome: Welcome | None = None
        self.early: list[tuple[int, bytes]] = []
        self.node_death: str | None = None
        self._owned = owned  # has close(): the node, or the whole cluster, that lives for us
        self._closing = False
        self._asked = 0
        self._callback: Callable[[str], None] | None = None
        self._mutex = threading.Lock()
        channel.let_go_in_forks(connection)
        self.lane = segment.open_lane(lane_index)
        try:
            note = {"address": self.lane.address, "pid": os.getpid(), "kind": int(kind)}
            channel.send_note(connection, note, (keeper,) if keeper >= 0 else ())
        except OSError:
            pass  # the node has just died; whoever reads the connection next finds why

    def handshake(self, timeout_s: float, build: str = "") -> None:
        """ProcessStarted to the raylet, and its Welcome.

        Raises:
            LaunchError: it refused, died, or took too long.
        """
        target = raylet_address(self.config.node)
        hello = encode(ProcessStarted(int(self.kind), self.worker_id, os.getpid(), 0, build=build))
        deadline = time.monotonic() + timeout_s
        pause = 0.0005
        said = False
        while True:
            if not said and self.segment.is_open(target):
                said = self.lane.send(target, hello) >= 0
            for source, data in self.lane.receive(pause):
                message = decode(data)
                if isinstance(message, Welcome):
                    if message.refusal:
                        raise LaunchError(f"the node refused this process: {message.refusal}")
                    self.welcome = message
                else:
                    self.early.append((source, data))
            if self.welcome is not None:
                return
            pause = min(pause * 2, 0.05) if said else 0.001
            self.connection.setblocking(False)
            try:
                note, _ = channel.receive_note(self.connection)
                raise LaunchError((note or {}).get("died") or "the node ended while it was starting")
            except BlockingIOError:
                pass
            finally:
                self.connection.setblocking(True)
            if time.monotonic() > deadline:
                raise LaunchError(f"the raylet did not answer within {timeout_s:g} s")

    def watch(self) -> None:
        """Starts the thread that waits for the node's end (LOCAL-2)."""
        self._thread = threading.Thread(target=self._wait_for_the_end, name="hpc_ray-node-watch", daemon=True)
        self._thread.start()

    def _wait_for_the_end(self) -> None:
        text = None
        try:
            while True:
                note, _ = channel.receive_note(self.connection)
                if note is None:
                    break
                text = note.get("died") or note.get("ended") or text
        except (OSError, ValueError):
            pass
        with self._mutex:
            if self._closing:
                return
            self.node_death = self.explain(text or "the node process of this host was killed")
            callback = self._callback
        if callback is not None:
            callback(self.node_death)

    def explain(self, text: str) -> str:
        """Why the cluster has ended, which is said to be ``text``: of what lives for us, somebody may have been killed."""
        return (self._owned.death() if self._owned is not None else "") or text

    @property
    def on_node_death(self) -> Callable[[str], None] | None:
        return self._callback

    @on_node_death.setter
    def on_node_death(self, callback: Callable[[str], None] | None) -> None:
        with self._mutex:
            self._callback = callback
            late = self.node_death
        if callback is not None and late is not None:
            callback(late)

    def ask(self, questions: list[tuple[int, str, dict[str, Any]]], timeout_s: float = 10.0) -> list[Answer | None]:
        """The answers to Queries (address, name, arguments), in their order; None where none has come in time. For commands, which have
        no client: other messages are dropped. Blocks; returns early when the node has gone."""
        first = self._asked + 1
        for destination, name, arguments in questions:
            self._asked += 1
            message = DrainNode(self._asked, **arguments) if name == "drain" else Query(self._asked, name, arguments)
            self.lane.send(destination, encode(message))
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(questions) and time.monotonic() < deadline and self.node_death is None:
            for _, data in self.lane.receive(0.2):
                message = decode(data)
                if isinstance(message, Answer):
                    answers[message.request_id] = message
        return [answers.get(number) for number in range(first, self._asked + 1)]

    def leave(self) -> None:
        """Says goodbye, and closes."""
        self.lane.send(raylet_address(self.config.node), encode(ProcessLeaving("the command is done")))
        self.close()

    def close(self) -> None:
        """Leaves the node, and ends it if it lives for us. Blocks until it has ended. May be called twice."""
        with self._mutex:
            if self._closing:
                return
            self._closing = True
        try:
            self.lane.close(1.0)
        except RuntimeError:
            pass
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if self._owned is not None:
            self._owned.close()
        thread = getattr(self, "_thread", None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)
        self.connection.close()


def connect(
    session_name: str,
    node: int = 0,
    *,
    kind: ProcessKind = ProcessKind.DRIVER,
    owned: Any = None,
    lane_index: int = -1,
    handshake: bool = True,
    build: str = "",
    keeper: int = -1,
) -> Attachment:
    """Attaches to a node of this host.

    Raises:
        LaunchError: there is no such node, or it did not let us in.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"\0hpc_ray/{os.getuid()}/{session_name}/{node}")
        if channel.peer_user(connection)[1] not in (os.getuid(), 0):
            raise LaunchError(f"the socket of session {session_name} belongs to another user")
        connection.settimeout(60)
        note, descriptors = channel.receive_note(connection)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise LaunchError(f"no node {node} of session {session_name!r} on this host: {error.strerror or error}") from None
    if note is None or not descriptors:
        connection.close()
        raise LaunchError(f"node {node} of session {session_name!r} ended while we attached")
    try:
        config = decode_config(note["config"])
        segment = _core.Segment.attach(descriptors[0])
    except (msgspec.ValidationError, ValueError, TypeError, KeyError) as error:
        connection.close()
        raise LaunchError(f"session {session_name!r} was made by another version of hpc_ray ({error})") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)  # the segment keeps a duplicate
    attachment = Attachment(
        connection,
        segment,
        config,
        kind=kind,
        owned=owned,
        detached=bool(note.get("detached")),
        lane_index=lane_index,
        keeper=keeper,
    )
    if handshake:
        try:
            attachment.handshake(config.settings.start_timeout_s, build)
        except BaseException:
            attachment._owned = None
            attachment.close()
            raise
        attachment.watch()
    return attachment

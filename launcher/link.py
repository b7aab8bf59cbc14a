"""The link: what a rank that leads a node becomes (``rank``), and what a node over TCP has (``member``).

It carries messages and objects between its node's shared memory and the other nodes.

LINK-1 (low idle cost): after traffic it looks without a pause, for as long as that lately was worth it, and lets everybody else have its
core first; at most ``SPIN_S``, which is longer than a call to another node and its answer take. Then it sleeps on its lane and looks at MPI
at growing intervals, from ``FIRST_PARK_S`` to ``PARKS_S``. Where it need not look any more, it sleeps until its doorbell is rung, which TCP
does by itself and MPI with a datagram beside it (``transport.bells``).
LINK-2 (back-pressure): it does not drain its lane while more than ``BACKLOG_BYTES`` wait for slow peers; it always receives.
LINK-3 (silent hosts): MPI does not tell of a host that has lost power or network. So the links of node 0 and of other hosts give signs
of life; when they stay away the session ends, as MPI cannot go on without a host. Over TCP the transport sees to it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from hpc_ray import _core
from hpc_ray.ids import GCS_ADDRESS, LINK_LANE, address_of, raylet_address
from hpc_ray.launcher import channel, mpi_files, relay
from hpc_ray.launcher.attachment import Attachment
from hpc_ray.launcher.doorbell import Doorbell
from hpc_ray.protocol import (
    DeathCause,
    ProcessDied,
    ProcessKind,
    ProcessStarted,
    Shutdown,
    TransferDone,
    TransferObject,
    Welcome,
    decode,
    encode,
)
from hpc_ray.slurm import signals
from hpc_ray.spilling import ObjectFiles
from hpc_ray.transport import Event, PeerLost, TransferEnded, Transport
from hpc_ray.transport.bells import FIRST_PARK_S, next_spin_s
from hpc_ray.version import __version__

if TYPE_CHECKING:
    from hpc_ray.launcher.rank import Rank

PARK_S = 1e-3  # over TCP, while something is still to be sent
PARKS_S = ((1.0, PARK_S), (5.0, 4e-3), (float("inf"), 8e-3))  # silent for less than this: the longest interval
SLACK_NS = 1_000  # by how much the kernel may prolong a sleep; else as long as FIRST_PARK_S
STANDBY_PARK_S = 0.01
WATCH_S = 0.02  # between looks at the driver, the node and the control channel
BACKLOG_BYTES = 64 << 20
LITTLE_BYTES = 1 << 10  # a single call or answer: whom it is for goes before our next look
FINALIZE_S = 5.0
LOST_S = 0.5  # for MPI to end, when a host is lost and it cannot

# Payloads between links; what follows the first byte is a text or JSON.
_NODE_GONE = b"\x01"  # → all: my node is gone, and why
_STOP = b"\x02"  # node 0 → all: the end has begun
_START_NODE = b"\x03"  # node 0 → a standby: start your node, with these amounts
NODE_UP = b"\x04"  # standby → node 0: it is up, or why it is not
_END_NODE = b"\x05"  # node 0 → a link: end your node
_ALIVE = b"\x06"  # between node 0 and the others of other hosts (LINK-3)
_PR_SET_TIMERSLACK = 29  # of prctl
ORDERLY = "ended in order: "


class SignsOfLife:
    """Who has been heard of lately (LINK-3). The clock is an argument. Who was held up itself blames nobody for that time."""

    def __init__(self, nodes: list[int], interval_s: float, timeout_s: float):
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self._last: dict[int, float] = dict.fromkeys(nodes, 0.0)  # 0: not yet; then MPI is still starting there
        self._due = 0.0
        self._looked: float | None = None

    def heard(self, node: int, now: float) -> None:
        self._last[node] = now

    def due(self, now: float) -> list[int]:
        """Who is to hear of us now."""
        if now < self._due:
            return []
        self._due = now + self.interval_s
        return list(self._last)

    def silent(self, now: float) -> list[int]:
        """Who has not been heard of for too long."""
        away, self._looked = now - (now if self._looked is None else self._looked), now
        if away > self.interval_s:
            for node, last in self._last.items():
                if last:
                    self._last[node] = last + away
        return [node for node, last in self._last.items() if last and now - last > self.timeout_s]


class Link:
    """One node's bridge."""

    def __init__(self, rank: Rank, attachment: Attachment | None, make_transport: Callable[[Link], Transport]):
        """``attachment`` None: a standby, whose node starts when node 0 says so."""
        self.rank = rank
        self.node = rank.node
        self.address = address_of(self.node, LINK_LANE)
        self.attachment: Attachment | None = None
        self.lane: Any = None
        self.files: ObjectFiles | None = None
        self.transport = make_transport(self)
        self.stopping = False
        self.node_alive = False
        self.parting = False  # our node is gone, and we have yet to part from it
        self.code = 0
        self.standby = list(range(rank.nodes, len(rank.leaders)))  # node 0: who can still be told to start
        self.awaited: dict[int, tuple[str, int]] = {}  # node 0: node → (what is awaited of it, the request's number)
        self.drains = signals.in_job()  # the end comes with the driver's (SIGNAL-1)
        self.doorbell: Doorbell | None = None  # where the transport tells that something has come
        if self.transport.fileno() >= 0:
            self.doorbell = Doorbell(self.wake)
            self.doorbell.add(self.transport.fileno())
            if rank.driver:
                self.doorbell.add(os.pidfd_open(rank.driver))
        if rank.control is not None:
            rank.control.setblocking(False)
            if self.doorbell is not None:
                self.doorbell.add(rank.control.fileno())
        self.signalled = 0  # the signal that has come
        self.life = self.signs_of_life()
        for number in signals.DRAINING if self.drains else (signal.SIGTERM,):
            signal.signal(number, self.on_signal)
        if rank.early_signal:
            self.signalled = rank.early_signal
        if attachment is not None:
            self.adopt(attachment)

    def adopt(self, attachment: Attachment) -> None:
        """Our node is up: from here on its messages are ours to carry."""
        self.attachment = attachment
        self.lane = attachment.lane
        self.files = ObjectFiles(_core.Store(attachment.segment, attachment.lane), attachment.config.spill_dir)
        self.node_alive = True
        self.transport.local = self.lane
        files = mpi_files.of_rank(self.rank.place.rank, everything=self.rank.place.local_rank == 0)
        channel.send_note(attachment.connection, {"remove": files})
        attachment.connection.setblocking(False)
        if self.doorbell is not None:
            self.doorbell.add(attachment.connection.fileno())
        hello = ProcessStarted(int(ProcessKind.LINK), attachment.worker_id, os.getpid(), 0, build=__version__)
        self.lane.send(raylet_address(self.node), encode(hello))

    def get(self, handle: int) -> Any:
        """The arena, as the transport needs it (``transport.Objects``)."""
        return self.files.read(handle) if self.files is not None else None

    def write_buffer(self, handle: int) -> Any:
        assert self.files is not None  # the transfer is our own raylet's wish
        return self.files.write_buffer(handle)

    def prepare(self, handle: int, offset: int, size: int) -> None:
        assert self.files is not None
        self.files.prepare(handle, offset, size)

    # -- the loop

    def run(self) -> int:
        lane, transport, doorbell = self.lane, self.transport, self.doorbell
        park, spin = FIRST_PARK_S, 0.0
        quiet_since = time.monotonic()
        next_watch = 0.0
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS)
        while True:
            slept = False
            received: list[tuple[int, bytes]] = []
            spin_left_s = quiet_since + spin - time.monotonic()
            lively = transport.busy or spin_left_s > 0
            has_room = transport.backlog_bytes < BACKLOG_BYTES
            if lane is None:
                time.sleep(0.0 if transport.busy else STANDBY_PARK_S)
                lane = self.lane
            elif has_room and not lively:
                sleep = 0.0 if self.stopping or doorbell is None else transport.sleep_s()
                if sleep == 0.0 or doorbell is None:
                    received = lane.receive_frames(park, spin=False)
                else:
                    doorbell.arm()
                    received = lane.receive_frames(sleep, spin=False)
                    doorbell.disarm()
                    slept, park = True, FIRST_PARK_S
                for node, frames in received:
                    self.on_local(transport.pass_on(node, frames))
            elif not has_room and doorbell is not None and not transport.busy:
                doorbell.wait(PARK_S)
            moved, here, events = transport.turn(lane if has_room else None, spin_left_s)
            self.on_local(here)
            for event in events:
                self.on_event(event)
            arrived = transport.arrived_bytes
            moved = moved or bool(received)
            if self.parting:
                self.part()  # the others know by now: this takes a while
            now = time.monotonic()
            if moved:
                spin = next_spin_s(spin, now - quiet_since)
                quiet_since, park = now, FIRST_PARK_S
                if 0 < arrived <= LITTLE_BYTES:
                    os.sched_yield()  # to whom it was for
            elif lively:
                os.sched_yield()  # to whom it may carry something next
            else:
                park = min(park * 1.2, next(longest for silence, longest in PARKS_S if now - quiet_since < silence))
            if now >= next_watch or (slept and not moved):  # perhaps somebody else has rung
                next_watch = now + WATCH_S
                self.watch()
                if self.stopping and not self.node_alive:
                    break
        if self.node == 0:
            self.rank.release_workers()
        self.rank.watchdog.set(2 * LOST_S if self.rank.lost else FINALIZE_S + 10, code=self.exit_code())
        self.transport.close(LOST_S if self.rank.lost else FINALIZE_S)
        try:
            if self.lane is not None:
                self.lane.close(0)
        except RuntimeError:
            pass
        if self.rank.driver:
            self.rank.watchdog.set(None)
            self.wait_driver()
        return self.exit_code()

    def exit_code(self) -> int:
        status = self.rank.driver_status
        if status is not None:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        return self.code

    def lose_node(self) -> None:
        """Our node is gone: nothing is carried to its lanes any more."""
        self.node_alive = False
        self.transport.local = None

    def on_local(self, payloads: list[bytes]) -> None:
        """From our own raylet to us."""
        for payload in payloads:
            try:
                self.on_wish(decode(payload))
            except msgspec.ValidationError as error:
                print(f"link {self.node}: {error}", file=sys.stderr)

    def on_wish(self, message: Any) -> None:
        if isinstance(message, TransferObject):
            if message.source_node in self.transport.forsaken or not self.transport.reaches(message.source_node):
                self.on_event(TransferEnded(message.transfer_id, f"node {message.source_node} is gone"))
            else:
                self.transport.transfer(
                    message.transfer_id, message.source_node, message.source_handle, message.handle, message.size
                )
        elif isinstance(message, Welcome) and message.refusal:
            self.stop(f"the raylet refused the link: {message.refusal}", code=1)
        elif isinstance(message, Shutdown) and self.node == 0:
            self.stop(message.reason)

    def on_message(self, node: int, source: int, destination: int, data: bytes) -> None:
        """From the link of another node."""
        if destination != self.address:
            return  # for a node that is gone
        if data[:1] == _STOP:
            self.stop(data[1:].decode())
        elif data[:1] == _ALIVE:
            if self.life is not None:
                self.life.heard(node, time.monotonic())
        elif data[:1] == _NODE_GONE:
            self.on_node_gone(node, data[1:].decode())
        elif data[:1] == _START_NODE:
            self.on_start_node(json.loads(data[1:]))
        elif data[:1] == NODE_UP:
            self.answer(node, json.loads(data[1:]))
        elif data[:1] == _END_NODE:
            self.on_end_node(data[1:] == b"kill")

    def on_event(self, event: Event) -> None:
        if isinstance(event, TransferEnded):
            self.lane.send(raylet_address(self.node), encode(TransferDone(event.transfer_id, event.error)))
        elif isinstance(event, PeerLost):
            self.on_node_gone(event.node, event.text)

    def on_node_gone(self, node: int, text: str) -> None:
        """A node is gone: the GCS is told by the link of its own node; without node 0 there is nothing to go on with."""
        if node in self.transport.forsaken:
            return
        self.transport.forsake(node)
        if node in self.awaited:
            self.answer(node, {"text": text})
        if self.stopping:
            return
        if node == 0:
            self.code = 1
            self.stop(f"the head node is gone: {text}", code=1)
            return
        if self.node == 0:
            cause = DeathCause("NODE_DIED", text)
            died = ProcessDied(address_of(node, LINK_LANE), b"", 0, int(ProcessKind.LINK), cause)
            self.lane.send(GCS_ADDRESS, encode(died))
            relay.say(f"node {node} on {self.rank.host_of(node)} is gone: {text}")

    # -- nodes that come and go

    def on_command(self, note: dict[str, Any]) -> None:
        """Node 0: whoever holds the control channel wants a node more or less; each is answered once, with its number."""
        request = note["request"]
        node = note.get("node", -1)
        if "start" in note:
            if not self.standby:
                self.reply(request, {"error": f"all {len(self.rank.leaders)} ranks of this world have led a node already"})
                return
            node = self.standby.pop(0)
            self.awaited[node] = ("start", request)
            self.tell(node, _START_NODE + json.dumps(note["start"]).encode())
        elif node in self.transport.forsaken:
            self.reply(request, {"text": "it was gone already"})
        else:
            self.awaited[node] = ("end", request)
            self.tell(node, _END_NODE + (b"kill" if note["end"] == "kill" else b""))

    def tell(self, node: int, payload: bytes) -> None:
        self.transport.send(node, self.address, address_of(node, LINK_LANE), payload)

    def tell_all(self, payload: bytes) -> None:
        for node in self.transport.others():
            self.tell(node, payload)

    def answer(self, node: int, note: dict[str, Any]) -> None:
        awaited = self.awaited.pop(node, None)
        if awaited is not None:
            self.reply(awaited[1], {"node": node, **note})

    def reply(self, request: int, note: dict[str, Any]) -> None:
        try:
            if self.rank.control is not None:
                channel.send_note(self.rank.control, {"request": request, **note})
        except OSError:
            pass  # nobody listens any more; watch() sees that

    def on_start_node(self, options: dict[str, Any]) -> None:
        if self.parting:
            self.part()
        try:
            attachment = self.rank.bring_up(1, 0, options)
        except Exception as error:
            self.tell(0, NODE_UP + json.dumps({"error": str(error)}).encode())
            return
        self.adopt(attachment)
        self.tell(0, NODE_UP + json.dumps({"node_id": attachment.config.node_id}).encode())

    def on_end_node(self, at_once: bool) -> None:
        process = self.rank.node_process
        if process is None or self.attachment is None or not self.node_alive:
            return
        if at_once:
            process.kill()
            self.attachment.connection.close()  # its end would ring for ever
        else:
            try:
                channel.send_note(self.attachment.connection, {"remove": []})  # MPI goes on here
            except OSError:
                pass  # it has just died
            self.part()
        self.lose_node()
        self.on_own_node_gone("it was removed")

    # -- the neighbourhood

    def signs_of_life(self) -> SignsOfLife | None:
        """Whom we watch (LINK-3): None where all are on one host."""
        hosts = [self.rank.host_of(node) for node in range(len(self.rank.leaders))]
        far = [node for node, name in enumerate(hosts) if name != hosts[self.node] and 0 in (node, self.node)]
        settings = self.rank.settings
        return SignsOfLife(far, settings.heartbeat_s, settings.heartbeat_timeout_s) if far else None

    def give_signs_of_life(self, life: SignsOfLife, now: float) -> None:
        for node in life.due(now):
            if node not in self.transport.forsaken:
                self.tell(node, _ALIVE)
        for node in life.silent(now):
            if node not in self.transport.forsaken:
                self.on_silent_host(node, f"no sign of life for {life.timeout_s:g} s")

    def on_silent_host(self, node: int, text: str) -> None:
        self.code = 1
        if self.node == 0:
            text = f"node {node} on {self.rank.host_of(node)} is lost: {text}"
            relay.say(f"{text}. Over MPI the session ends with it; with `hpc-ray run --survive-nodes` it would go on")
        else:
            text = f"the head node is gone: {text}"
        self.rank.lost = text
        self.transport.forsake(node)
        self.stop(text, code=1)

    def on_signal(self, number: int, frame: Any) -> None:
        self.signalled = number
        self.wake()

    def wake(self) -> None:
        """Ends its sleep; any thread, also a signal handler."""
        try:
            if self.lane is not None:
                self.lane.wake()
        except RuntimeError:
            pass  # it is closed: we are awake

    def watch(self) -> None:
        if self.life is not None and not self.stopping:
            self.give_signs_of_life(self.life, time.monotonic())
        if self.signalled and not self.stopping:
            number, self.signalled = self.signalled, 0
            if self.rank.driver and self.rank.driver_status is None:
                os.kill(self.rank.driver, number)
            if not self.drains:
                self.rank.ended_by = "mpirun has ended its ranks"
                self.stop("SIGTERM", code=143)
        if self.rank.driver and self.rank.driver_status is None:
            pid, status = os.waitpid(self.rank.driver, os.WNOHANG)
            if pid:
                self.rank.driver_status = status
                self.stop("the driver has ended")
        if self.rank.control is not None and not self.stopping:
            commands: list[dict[str, Any]] = []
            if _closed(self.rank.control, commands)[0]:
                self.on_control_closed()
            for command in commands:
                self.on_command(command)
        if self.node_alive:
            assert self.attachment is not None
            closed, note = _closed(self.attachment.connection)
            if closed:
                self.lose_node()
                self.parting = self.node != 0
                self.on_own_node_gone(note)

    def on_control_closed(self) -> None:
        self.stop("the driver has closed the cluster")

    def on_own_node_gone(self, text: str) -> None:
        if self.stopping:
            return
        text = text or "its node process was killed"
        if self.node == 0:
            self.code = 0 if text.startswith(ORDERLY) else 1
            if self.code:
                relay.say(f"the head node is gone: {text}")
            self.stop(text, code=self.code)
        else:
            self.tell_all(_NODE_GONE + text.encode())

    def part(self) -> None:
        """From our node: what MPI has left in shared memory is the node's to remove, then it ends. Waits for that."""
        self.parting = False
        if self.attachment is not None:
            self.attachment.connection.close()
        if self.rank.node_process is not None:
            self.rank.node_process.close()

    def stop(self, reason: str, code: int = 0) -> None:
        """The end begins: here and, from node 0, everywhere."""
        if self.stopping:
            return
        self.stopping = True
        self.code = self.code or code
        if self.node == 0:
            self.tell_all(_STOP + reason.encode())
        if self.rank.node_process is not None and self.node_alive:
            self.rank.node_process.end(reason)  # its connection tells when it has ended

    def wait_driver(self) -> None:
        """The cluster is gone, but the exit code is the driver's; it may go on without us."""
        if self.rank.control is not None:
            self.rank.control.close()
        while self.rank.driver_status is None:
            try:
                _, self.rank.driver_status = os.waitpid(self.rank.driver, 0)
            except InterruptedError:
                continue


def _closed(connection: socket.socket, commands: list[dict[str, Any]] | None = None) -> tuple[bool, str]:
    """Whether the peer is gone, and its last words; notes that are requests go to ``commands``."""
    words = ""
    try:
        while True:
            note, _ = channel.receive_note(connection)
            if note is None:
                return True, words
            if commands is not None and "request" in note:
                commands.append(note)
            words = note.get("died") or (ORDERLY + note["ended"] if "ended" in note else words)
    except BlockingIOError:
        if words:
            connection.setblocking(True)  # the end follows
            connection.settimeout(10)
            try:
                channel.receive_note(connection)
            except OSError:
                pass
            return True, words
        return False, ""
    except (OSError, ValueError):
        return True, words

"""MPITransport by itself, every rank a node: run by ``mpirun -n N pytest --with-mpi``, with any N and either MPI.

The arena is a dict here; what the transport promises does not depend on it.
"""

from __future__ import annotations

import hashlib
import random
import select
import time

import pytest

mpi4py = pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'hpc-ray[openmpi]'")

pytestmark = pytest.mark.mpi
LIMIT_S = 60.0


class Arena:
    """Objects by handle."""

    def __init__(self):
        self.sealed: dict[int, bytes] = {}
        self.made: dict[int, bytearray] = {}

    def get(self, handle):
        return self.sealed.get(handle)

    def write_buffer(self, handle):
        return self.made[handle]

    def prepare(self, handle, offset, size):
        assert 0 <= offset < offset + size <= len(self.made[handle])


class Node:
    """One rank's end, and what has come to it."""

    def __init__(self, bells=None):
        from mpi4py import MPI

        from hpc_ray.transport.mpi import MPITransport

        self.world = MPI.COMM_WORLD
        self.arena = Arena()
        self.received: dict[int, list[tuple[int, int, bytes]]] = {}
        ranks = list(range(self.world.Get_size()))
        self.transport = MPITransport(self.world, ranks, self.arena, self.deliver, bells)
        self.node, self.nodes = self.transport.node, self.transport.nodes
        self.events: list = []

    def deliver(self, node, source, destination, payload):
        self.received.setdefault(node, []).append((source, destination, bytes(payload)))

    def drive(self, until):
        deadline = time.monotonic() + LIMIT_S
        while not until():
            self.events += self.transport.poll()
            assert time.monotonic() < deadline, f"node {self.node}: not done within {LIMIT_S:g} s"

    def sleep(self):
        """Drives until it may sleep, and sleeps; whether it was woken."""
        self.drive(lambda: self.transport.sleep_s() > 0)
        woken, _, _ = select.select([self.transport.fileno()], [], [], self.transport.sleep_s())
        return bool(woken)

    def meet(self):
        """Wait for all ranks, serving them meanwhile: others may still need what we have."""
        self.drive(self.world.Ibarrier().Test)


@pytest.fixture
def node():
    made = Node()
    yield made
    assert made.transport.close(LIMIT_S)


def messages(source: int, destination: int) -> list[bytes]:
    """What one node sends to another; both can compute it."""
    draw = random.Random(1000 * source + destination)
    sizes = [draw.choice((0, 1, 100, 5_000, 200_000, 262_144, 700_000)) for _ in range(30)] + [draw.randrange(50) for _ in range(500)]
    return [draw.randbytes(size) for size in sizes]


def test_every_message_arrives_once_and_in_order(node):
    """TRANSPORT-1"""
    others = [other for other in range(node.nodes) if other != node.node]
    for other in others:
        for number, payload in enumerate(messages(node.node, other)):
            node.transport.send(other, number, node.node, payload)
    expected = {other: messages(other, node.node) for other in others}
    node.drive(lambda: all(len(node.received.get(other, ())) == len(expected[other]) for other in others))
    for other in others:
        assert [payload for _, _, payload in node.received[other]] == expected[other]
        assert [number for number, _, _ in node.received[other]] == list(range(len(expected[other])))
        assert {destination for _, destination, _ in node.received[other]} == {other}
    node.meet()
    assert node.transport.backlog_bytes == 0


def test_lanes_to_lanes(node):
    """What lanes write to others on other nodes goes there in C++, in order; what is for the link, or for a node without life, does not."""
    from hpc_ray import _core
    from hpc_ray.ids import LINK_LANE, address_of

    segment = _core.Segment(node=node.node, arena_bytes=64 << 20)
    inbox, user = segment.open_lane(LINK_LANE), segment.open_lane(20)
    node.transport.local = inbox
    others = [other for other in range(node.nodes) if other != node.node]
    node.world.Barrier()  # all have their lanes
    for other in others:
        for payload in messages(node.node, other):
            user.send(address_of(other, 20, 1), payload)
    user.send(inbox.address, b"for the link itself")
    received: list[tuple[int, bytes]] = []
    here: list[bytes] = []
    wanted = sum(len(messages(other, node.node)) for other in others)

    def done():
        turn = node.transport.turn(inbox, 0.0005)
        node.events += turn.events
        here.extend(turn.here)
        received.extend(user.receive(0.0))
        return len(received) == wanted and here

    node.drive(done)
    assert here == [b"for the link itself"]
    for other in others:
        assert [payload for source, payload in received if source == address_of(other, 20, 1)] == messages(other, node.node)
    node.meet()
    if node.nodes > 1:
        before, after = (node.node - 1) % node.nodes, (node.node + 1) % node.nodes
        node.transport.forsake(before)
        user.send(address_of(before, 20, 1), b"never")
        user.send(address_of(after, 20, 1), b"if there are three of us")
        node.drive(lambda: node.transport.turn(inbox, 0.0).moved)
        expected = [b"if there are three of us"] if after != before else []
        node.drive(lambda: len(received) >= wanted + len(expected) or not expected or received.extend(user.receive(0.0)))
        node.meet()
        assert [payload for _, payload in (received + user.receive(0.0))[wanted:]] == expected
    user.close(0)
    node.transport.local = None


def content(node: int, handle: int) -> bytes:
    return random.Random(f"{node} {handle}").randbytes([1, 4096, 3_000_000, 4 << 20, (9 << 20) + 7][handle])


def test_objects_move_between_all_pairs(node):
    """Arena to arena, in pieces; several at once."""
    node.arena.sealed = {handle: content(node.node, handle) for handle in range(5)}
    node.world.Barrier()
    wanted = {}
    for other in range(node.nodes):
        if other == node.node:
            continue
        for handle in range(5):
            transfer = 10 * other + handle
            size = len(content(other, handle))
            node.arena.made[transfer] = bytearray(size)
            wanted[transfer] = hashlib.sha256(content(other, handle)).hexdigest()
            node.transport.transfer(transfer, other, handle, transfer, size)
    node.drive(lambda: len(node.events) == len(wanted))
    node.meet()
    assert {(event.transfer_id, event.error) for event in node.events} == {(transfer, "") for transfer in wanted}
    assert {t: hashlib.sha256(node.arena.made[t]).hexdigest() for t in wanted} == wanted
    asked = node.world.allreduce(len(wanted))
    assert asked == 5 * node.nodes * (node.nodes - 1)


def test_an_object_that_is_gone_is_an_error(node):
    """The asker is told, and goes on."""
    if node.nodes == 1:
        return  # there is nobody to ask
    other = (node.node + 1) % node.nodes
    node.arena.made[1] = bytearray(100)
    node.transport.transfer(1, other, 99, 1, 100)
    node.drive(lambda: bool(node.events))
    [ended] = node.events
    assert ended.transfer_id == 1
    assert "not there" in ended.error
    node.meet()


@pytest.fixture
def bells():
    """Of this rank, and a communicator by which ranks can wait for one another beside the transport."""
    from mpi4py import MPI

    from hpc_ray.transport.bells import Bells

    made = Bells("127.0.0.1")
    made.hang(MPI.COMM_WORLD.allgather(made.own))
    return made


def test_who_sleeps_is_woken_by_a_message(bells):
    """Each node's messages wake all others."""
    node = Node(bells)
    for sender in range(node.nodes):
        node.drive(lambda: node.transport.sleep_s() > 0)
        node.world.Barrier()
        node.received.clear()
        if node.node == sender:
            time.sleep(0.005)  # longer than QUIET_S, so it has to ring
            for other in range(node.nodes):
                if other != sender:
                    node.transport.send(other, 0, other, b"wake up")
        else:
            while not node.sleep():  # that one began before the sender came to it
                node.transport.poll()
            node.drive(lambda: bool(node.received))
            assert node.received == {sender: [(0, node.node, b"wake up")]}
        node.meet()
    assert bells.believed
    assert node.transport.close(LIMIT_S)


def test_who_fell_asleep_while_a_message_was_under_way_is_woken(bells):
    """BELLS-2: the sender did not ring, as they had exchanged something just before; it rings when the message is not taken."""
    ring, unrung = bells.ring, []

    def ring_again(other):  # the first ring to each is the one that would not have been
        if other in unrung:
            ring(other)
        unrung.append(other)

    bells.ring = ring_again
    node = Node(bells)
    others = range(1, node.nodes)
    node.drive(lambda: node.transport.sleep_s() > 0)
    node.world.Barrier()
    if node.node == 0:
        for _ in others:  # is out of MPI, and asleep
            select.select([node.transport.fileno()], [], [], LIMIT_S)
            bells._socket.recv(64)
        for other in others:
            node.transport.send(other, 0, other, b"wake up")
        node.drive(lambda: not node.transport._stream.sending)
        assert all(unrung.count(other) > 1 for other in others)
    else:
        ring(0)
        woken, _, _ = select.select([node.transport.fileno()], [], [], LIMIT_S)
        assert woken
        node.drive(lambda: bool(node.received))
    node.meet()
    assert node.transport.close(LIMIT_S)


def test_bells_that_do_not_ring_are_believed_no_longer(bells):
    """Datagrams that are lost: the messages arrive all the same, and their receiver does not sleep any more."""
    node = Node(bells)
    bells.hang([None] * node.nodes)
    count = 20
    if node.node == 0:
        for number in range(count):
            time.sleep(0.02)  # the receiver sleeps again
            for other in range(1, node.nodes):
                node.transport.send(other, number, other, b"")
            node.drive(lambda: not node.transport.busy and not node.transport._stream.sending)
    else:
        while len(node.received.get(0, ())) < count and bells.believed:
            assert not node.sleep()
            node.transport.poll()
        assert not bells.believed
        assert node.transport.sleep_s() == 0.0
        node.drive(lambda: len(node.received[0]) == count)
        assert [number for number, _, _ in node.received[0]] == list(range(count))
    node.meet()
    assert node.transport.close(LIMIT_S)

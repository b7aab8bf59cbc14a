"""The TCP transport alone: several ends in one thread, over real sockets, with a clock of the test's."""

from __future__ import annotations

import random
import select
import socket
import threading
import time

import pytest

from hpc_ray.transport import Expelled, Joining, PeerLost, TransferEnded, tcp

SECRET = b"s" * tcp.SECRET_BYTES
LOOPBACK6 = "::1"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Memory:
    """Objects by handle; what is being fetched is a bytearray."""

    def __init__(self):
        self.objects = {}

    def get(self, handle):
        return self.objects.get(handle)

    def write_buffer(self, handle):
        return self.objects[handle]

    def prepare(self, handle, offset, size):
        assert 0 <= offset < offset + size <= len(self.objects[handle])


class End(tcp.TCPTransport):
    """A node's end that keeps what comes."""

    def __init__(self, node, clock, host="127.0.0.1", secret=SECRET, session="s"):
        self.memory = Memory()
        self.received = []
        self.happened = []
        super().__init__(
            node,
            session,
            secret,
            tcp.open_listener(host),
            self.memory,
            lambda source_node, source, destination, payload: self.received.append((source_node, source, destination, bytes(payload))),
            heartbeat_s=1.0,
            timeout_s=5.0,
            connect_timeout_s=20.0,
            now=clock,
        )

    def poll(self):
        events = super().poll()
        self.happened += events
        return events

    def lost(self):
        return [(event.node, event.text) for event in self.happened if isinstance(event, PeerLost)]


def pump(ends, until, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "it does not come"
        for end in ends:
            end.poll()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    """Ends that are connected with one another."""
    made = []

    def make(count, host="127.0.0.1"):
        ends = [End(node, clock, host) for node in range(count)]
        made.extend(ends)
        for end in ends:
            for other in ends[: end.node]:
                end.expect(other.node, [other.address])
        pump(ends, lambda: all(connected(end, other.node) for end in ends for other in ends if other is not end))
        return ends

    yield make
    for end in made:
        if not end._epoll.closed:
            end.close(0.0)


def connected(end, node):
    peer = end._peers.get(node)
    return peer is not None and peer.connection is not None


def silence(end, clock, seconds, *others):
    """Time goes by in steps in which ``others`` work and ``end`` does not."""
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        for _ in range(3):
            for other in others:
                other.poll()


# ------------------------------------------------------------------ what it carries


@pytest.mark.parametrize("host", ["127.0.0.1", LOOPBACK6])
def test_messages_arrive_whole_and_in_order(make, host):
    """TRANSPORT-1"""
    try:
        socket.create_server((host, 0), family=tcp.family_of(host)).close()
    except OSError:
        pytest.skip(f"this host has no {host}")
    ends = make(3, host)
    chance = random.Random(1)
    sizes = [0, 1, 24, 1000, tcp.BODY_BYTES - 1, tcp.BODY_BYTES, tcp.BODY_BYTES + 1, tcp.BUFFER_BYTES, 3 << 20]
    sent = {(a.node, b.node): [] for a in ends for b in ends if a is not b}
    for number in range(400):
        size = sizes[number] if number < len(sizes) else chance.choice([0, 10, 300, 20_000, 70_000])
        body = chance.randbytes(size)
        for (source, target), bodies in sent.items():
            ends[source].send(target, 7, number, body)
            bodies.append((source, 7, number, body))
    pump(ends, lambda: all(len(end.received) == 800 for end in ends))
    for (source, target), bodies in sent.items():
        assert [message for message in ends[target].received if message[0] == source] == bodies


def test_objects_go_from_memory_to_memory(make):
    a, b, c = make(3)
    chance = random.Random(2)
    piece = tcp.PIECE_BYTES
    sizes = [0, 1, 7, piece - 1, piece, piece + 1, 17 * piece, *(chance.randrange(1, piece) for _ in range(9))]
    wanted = []
    for number, size in enumerate(sizes):
        data = chance.randbytes(size)
        for source, target in ((a, b), (b, a), (c, a)):
            source.memory.objects[number] = data
            handle = 1000 + 100 * source.node + number
            target.memory.objects[handle] = bytearray(size)
            target.transfer(handle, source.node, number, handle, size)
            wanted.append((target, handle, data))
        a.send(b.node, 1, number, b"in between")
    a.transfer(1, b.node, 77, 1000 + 100 * b.node + 1, 1)
    b.memory.objects[78] = b"four"
    a.transfer(2, b.node, 78, 1000 + 100 * b.node + 1, 1)

    def ended(end):
        return [event for event in end.happened if isinstance(event, TransferEnded)]

    pump([a, b, c], lambda: len(ended(a)) == 2 * len(sizes) + 2 and len(ended(b)) == len(sizes))
    for target, handle, data in wanted:
        assert bytes(target.memory.objects[handle]) == data
    errors = {event.transfer_id: event.error for event in ended(a) if event.error}
    assert errors == {1: "the object is not there any more", 2: "the object has 4 bytes, not 1"}
    assert len(b.received) == len(sizes)


def test_a_slow_peer_costs_the_sender_memory_and_no_time(make):
    """TRANSPORT-2; a full socket is no reason to be driven again at once."""
    a, b = make(2)
    block = bytes(1 << 20)
    for number in range(64):
        a.send(1, 1, number, block)
    while a.busy:
        a.poll()
    assert 10 << 20 < a.backlog_bytes < 64 << 20
    assert select.select([a.fileno()], [], [], 0)[0] == []  # nothing to be done
    pump([a, b], lambda: len(b.received) == 64)
    assert a.backlog_bytes == 0 and not a.busy


def test_a_link_can_sleep_on_it(make):
    a, b = make(2)
    while select.select([a.fileno()], [], [], 0)[0]:
        a.poll()
    b.send(0, 1, 2, b"wake up")
    b.poll()
    assert select.select([a.fileno()], [], [], 30)[0]
    pump([a], lambda: a.received)


# ------------------------------------------------------------------ who comes


def joined(head, facts, secret=SECRET):
    """``tcp.join`` in a thread, as it blocks; a list that gets its result."""
    result = []

    def ask():
        try:
            result.append(tcp.join([head.address], secret, facts, 20))
        except ConnectionError as error:
            result.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, result


def test_a_newcomer_is_let_in(make, clock):
    """And messages to it wait until it has come to us too."""
    a, b = make(2)
    thread, result = joined(a, {"host": "x"})
    pump([a, b], lambda: any(isinstance(event, Joining) for event in a.happened))
    joining = a.happened[-1]
    assert joining.facts == {"host": "x"}
    a.admit(joining.door, 2, {"you": "are 2"})
    a.send(2, 1, 1, b"right behind")
    b.send(2, 1, 1, b"before it is there")
    pump([a, b], lambda: result)
    thread.join()
    connection, welcome = result[0]
    assert welcome == {"you": "are 2"}
    c = End(2, clock)
    c.adopt(0, connection)
    c.expect(1, [b.address])
    c.send(1, 1, 1, b"hello")
    pump([a, b, c], lambda: len(c.received) == 2 and b.received)
    assert {message[3] for message in c.received} == {b"right behind", b"before it is there"}
    c.close(0.0)


def test_who_is_not_wanted_hears_why(make):
    (a,) = make(1)
    thread, result = joined(a, {})
    pump([a], lambda: a.happened)
    a.refuse(a.happened[0].door, "we are full")
    thread.join()
    assert isinstance(result[0], tcp.Refused) and str(result[0]) == "we are full"


def test_the_secret_is_proved_by_both(make, clock):
    """TCP-1: who does not know it gets in nowhere, whichever side it is on, and sees nothing of it."""
    (a,) = make(1)
    thread, result = joined(a, {}, secret=b"x" * tcp.SECRET_BYTES)
    pump([a], lambda: result)
    thread.join()
    assert isinstance(result[0], tcp.Refused) and "another session" in str(result[0])
    stranger = End(1, clock, secret=b"x" * tcp.SECRET_BYTES)
    stranger.expect(0, [a.address])
    pump([a, stranger], stranger.lost)
    assert "another session" in stranger.lost()[0][1]
    # A caller that skips the proof of the listener, and guesses its own.
    with socket.create_connection(a.address) as guess:
        guess.setblocking(False)
        guess.send(tcp._MAGIC + bytes(32))
        seen = b""
        while len(seen) < 64:
            a.poll()
            if select.select([guess], [], [], 0.01)[0]:
                seen += guess.recv(64)
        assert SECRET not in seen
        guess.send(bytes(32) + tcp._LENGTH.pack(2) + b"{}")
        pump([a], lambda: not a._doors)
        guess.setblocking(True)
        assert guess.recv(1) == b""
    assert not a.happened
    stranger.close(0.0)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" + bytes(64), tcp._MAGIC + bytes(32) + b"\xff" * 100, b""])
def test_noise_at_the_door(make, noise):
    (a,) = make(1)
    with socket.create_connection(a.address) as caller:
        caller.sendall(noise)
        caller.shutdown(socket.SHUT_WR)
        pump([a], lambda: not a._doors and not a.happened)
        a.poll()
    assert a._peers == {} and a.happened == []


def test_a_caller_that_says_nothing_is_sent_away(make, clock):
    (a,) = make(1)
    with socket.create_connection(a.address) as caller:
        pump([a], lambda: a._doors)
        clock.now += tcp.GREET_S + 1
        a.poll()
        assert not a._doors and caller.recv(1) == b""


def test_a_node_of_another_session(make, clock):
    (a,) = make(1)
    other = End(1, clock, session="another")
    other.expect(0, [a.address])
    pump([a, other], lambda: other.happened)
    assert isinstance(other.happened[0], Expelled) and not a._peers
    other.close(0.0)


# ------------------------------------------------------------------ who goes


def test_a_closed_connection_is_a_lost_peer(make):
    """TRANSPORT-3"""
    a, b, c = make(3)
    a.memory.objects[5] = bytearray(8 << 20)
    a.transfer(5, 1, 5, 5, 8 << 20)
    b._disconnect(b._peers[0])
    pump([a, c], a.lost)
    a.send(1, 1, 1, b"into the void")
    assert a.lost() == [(1, "its connection was closed")] or "broke" in a.lost()[0][1]
    assert next(event.error for event in a.happened if isinstance(event, TransferEnded)).startswith("node 1 is gone")
    assert a.others() == [2] and not a.reaches(1) and a.backlog_bytes == 0


def test_silence_of_the_head_and_of_a_node(make, clock):
    """TCP-2: after the time-out and not before; between two others the kernel watches."""
    a, b, c = make(3)
    silence(None, clock, 2, a, b, c)
    silence(c, clock, 4.5, a, b)
    assert not a.lost()
    silence(c, clock, 1.5, a, b)
    assert a.lost() == [(2, "no sign of life for 5 s")] and b.lost() == []
    silence(a, clock, 6, b)
    assert b.lost() == [(0, "no sign of life for 5 s")]


def test_who_gives_signs_of_life_is_not_lost(make, clock):
    a, b, c = make(3)
    silence(None, clock, 60, a, b, c)
    assert a.lost() == b.lost() == c.lost() == []


def test_who_was_held_up_blames_nobody(make, clock):
    """TCP-2: all were stopped, as a virtual machine is; whoever goes on first must not believe that the others are gone."""
    a, b = make(2)
    clock.now += 1000
    a.poll()
    b.poll()
    silence(None, clock, 10, a, b)
    assert a.lost() == b.lost() == []


def test_silence_counts_only_while_one_looks(make, clock):
    """TCP-2: a machine that stands still again and again, each time for less than the time-out, is not a lost peer."""
    a, b = make(2)
    silence(None, clock, 2, a, b)
    for _ in range(3):
        clock.now += 1.9
        b.poll()
    assert b.lost() == []
    silence(a, clock, 6, b)
    assert b.lost() == [(0, "no sign of life for 5 s")]


def test_a_ghost_is_told_and_kept_out(make, clock):
    """TCP-3: cut off, given up, and back again."""
    a, b = make(2)
    silence(None, clock, 2, a, b)
    silence(b, clock, 6, a)
    assert a.lost()
    pump([a, b], lambda: b.happened)
    assert b.happened[0] == Expelled(0, "no sign of life for 5 s")
    b.lose(0, "it was so")
    again = End(1, clock)
    again.expect(0, [a.address])
    pump([a, again], lambda: again.happened)
    assert isinstance(again.happened[0], Expelled) and "lost" in again.happened[0].text
    assert not a.reaches(1)
    again.close(0.0)


def test_who_never_comes(make, clock):
    (a,) = make(1)
    a.send(3, 1, 1, b"are you there?")
    silence(None, clock, 19, a)
    assert not a.lost()
    silence(None, clock, 2, a)
    assert a.lost() == [(3, "it was not connected within 20 s")]


def test_an_address_where_nobody_listens(clock):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()[:2]
    end = End(1, clock)
    end.expect(0, [address])
    pump([end], end.lost)
    assert "cannot be reached" in end.lost()[0][1]
    end.close(0.0)


def test_the_end_in_order(make):
    """What was sent arrives, and nobody counts as lost."""
    a, b, c = make(3)
    for number in range(20):
        a.send(1, 1, number, bytes(500_000))
    threads = [threading.Thread(target=lambda end=end: end.results.append(end.close(20))) for end in (b, c)]
    for end in (b, c):
        end.results = []
    for thread in threads:
        thread.start()
    assert a.close(20)
    for thread in threads:
        thread.join()
    assert b.results == c.results == [True]
    assert len(b.received) == 20 and a.lost() == b.lost() == c.lost() == []


def test_one_that_leaves(make):
    a, b, c = make(3)
    c.results = []
    thread = threading.Thread(target=lambda: c.results.append(c.close(20)))
    thread.start()
    pump([a, b], lambda: a.lost() and b.lost())
    thread.join()
    assert a.lost() == b.lost() == [(2, "it has left")] and c.results == [True]

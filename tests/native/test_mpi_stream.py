"""Streams of frames over MPI, with an MPI of our own: its functions are Python's, by their addresses, and it fails when it is told to."""

import ctypes
import random
import struct
from collections import deque

import pytest

from hpc_ray import _core
from hpc_ray.ids import LINK_LANE, address_of

HANDLE, INT, POINTER = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
STATUS = struct.Struct("iii")  # something, source, bytes
FAILED = 75
QUIET_S = 200e-6


class World:
    """An MPI whose communicators are ranks (plus one), and whose requests are numbers; 0 is the null one."""

    def __init__(self):
        self.posted: dict[int, deque[int]] = {}  # by rank: receives, in order
        self.sent: dict[int, deque[int]] = {}  # by rank: sends to it that are not matched
        self.requests: dict[int, dict] = {}
        self.failing: set[int] = set()  # communicators
        self.dead: set[int] = set()  # ranks that match nothing, and to which sends fail
        self.freed = 0
        self.count = 0
        send = ctypes.CFUNCTYPE(INT, POINTER, INT, HANDLE, INT, INT, HANDLE, POINTER)
        one = ctypes.CFUNCTYPE(INT, POINTER)
        self.functions = {
            "MPI_Issend": send(self.issend),
            "MPI_Irecv": send(self.irecv),
            "MPI_Test": ctypes.CFUNCTYPE(INT, POINTER, POINTER, POINTER)(self.test),
            "MPI_Wait": ctypes.CFUNCTYPE(INT, POINTER, POINTER)(lambda request, status: 0),
            "MPI_Cancel": one(lambda request: 0),
            "MPI_Request_free": one(self.request_free),
            "MPI_Get_count": ctypes.CFUNCTYPE(INT, POINTER, HANDLE, POINTER)(self.get_count),
        }

    def calls(self, rank):
        found = {name: ctypes.cast(function, POINTER).value for name, function in self.functions.items()}
        return found | {
            "comm": rank + 1,
            "byte": 1,
            "request_null": 0,
            "request_bytes": 4,
            "status_bytes": STATUS.size,
            "source_at": 4,
            "any_source": -1,
        }

    def stream(self, rank, nodes, **options):
        shape = {"chunk_bytes": 256, "slots": 3, "window": 2, "tag": 1, "quiet_s": QUIET_S} | options
        return _core.MpiStream(self.calls(rank), list(range(nodes)), rank, **shape)

    def begin(self, request, **what):
        self.count += 1
        self.requests[self.count] = what
        ctypes.cast(request, ctypes.POINTER(INT))[0] = self.count
        return self.count

    def issend(self, data, count, kind, rank, tag, communicator, request):
        if rank in self.dead:
            return FAILED
        number = self.begin(request, source=communicator - 1, dest=rank, data=ctypes.string_at(data, count), done=False)
        self.sent.setdefault(rank, deque()).append(number)
        return 0

    def irecv(self, data, count, kind, rank, tag, communicator, request):
        number = self.begin(request, at=data, room=count, rank=communicator - 1, done=False)
        self.posted.setdefault(communicator - 1, deque()).append(number)
        return 0

    def match(self, rank):
        posted, sent = self.posted.get(rank, deque()), self.sent.get(rank, deque())
        while posted and sent:
            receive, send = self.requests[posted.popleft()], self.requests[sent.popleft()]
            assert len(send["data"]) <= receive["room"]
            ctypes.memmove(receive["at"], send["data"], len(send["data"]))
            receive.update(done=True, source=send["source"], size=len(send["data"]))
            send["done"] = True

    def test(self, request, flag, status):
        handle = ctypes.cast(request, ctypes.POINTER(INT))
        one = self.requests[handle[0]]
        if "rank" in one:
            if one["rank"] + 1 in self.failing:
                return FAILED
            self.match(one["rank"])
        elif one["dest"] in self.dead:
            return FAILED
        ctypes.cast(flag, ctypes.POINTER(INT))[0] = one["done"]
        if one["done"]:
            if "rank" in one:
                ctypes.memmove(status, STATUS.pack(7, one["source"], one["size"]), STATUS.size)
            del self.requests[handle[0]]
            handle[0] = 0
        return 0

    def request_free(self, request):
        self.freed += 1
        return 0

    def get_count(self, status, kind, count):
        ctypes.cast(count, ctypes.POINTER(INT))[0] = STATUS.unpack(ctypes.string_at(status, STATUS.size))[2]
        return 0


def turn(stream, inbox=None, local=None, spin_s=0.0):
    return stream.turn(inbox, local, spin_s, False)


def frames(payloads, source=1, dest=2):
    return b"".join(_core.pack_frame(source, dest, payload) for payload in payloads)


def test_frames_are_cut_and_put_together():
    """Of all sizes, both ways at once; at most ``window`` messages of MPI wait for one receiver."""
    draw = random.Random(1)
    world = World()
    a, b = world.stream(0, 2), world.stream(1, 2)
    expected = [draw.randbytes(draw.choice((0, 1, 23, 200, 255, 256, 257, 3000))) for _ in range(300)]
    a.queue(1, frames(expected))
    b.queue(0, frames(expected[::-1]))
    assert a.queued_bytes > 256 and a.sending
    got = {0: [], 1: []}
    for _ in range(10_000):
        for node, stream in enumerate((a, b)):
            _, messages, failures = turn(stream)
            assert not failures
            got[node] += [(source, payload) for source, _, _, payload in messages]
            assert len(world.sent.get(1 - node, ())) <= 2
        if not (a.sending or b.sending):
            break
    assert got[1] == [(0, payload) for payload in expected]
    assert got[0] == [(1, payload) for payload in reversed(expected)]
    assert a.queued_bytes == b.queued_bytes == 0


def test_lanes():
    """What a lane has for other nodes goes along, in its order; what comes goes to lanes, and the rest to whoever asks."""
    world = World()
    segments = [_core.Segment(node=node, arena_bytes=1 << 22) for node in range(2)]
    links = [segment.open_lane(LINK_LANE) for segment in segments]
    users = [segment.open_lane(20) for segment in segments]
    streams = [world.stream(node, 2) for node in range(2)]
    for number in range(50):
        users[0].send(address_of(1, 20, 1), b"%d" % number)
    users[0].send(links[0].address, b"for the link")
    users[0].send(address_of(1, LINK_LANE, 1), b"for the other link")
    moved, messages, _ = turn(streams[0], links[0], links[0])
    assert moved
    assert messages == [(0, users[0].address, links[0].address, b"for the link")]
    others = []
    while streams[0].sending:
        others += turn(streams[1], links[1], links[1])[1]
        turn(streams[0], links[0], links[0])
    assert users[1].receive(0) == [(users[0].address, b"%d" % number) for number in range(50)]
    assert others == [(0, users[0].address, address_of(1, LINK_LANE, 1), b"for the other link")]
    streams[0].forsake(1)
    users[0].send(address_of(1, 20, 1), b"nobody lives there")
    assert turn(streams[0], links[0], links[0])[0]
    assert not streams[0].sending


def test_it_looks_again_for_a_while():
    world = World()
    a, b = world.stream(0, 2), world.stream(1, 2)
    before = b.looked_s
    assert turn(b, spin_s=0.01) == (False, [], [])
    assert b.looked_s - before >= 0.01
    assert b.silent_s >= 0.01
    a.queue(1, frames([b"x"]))
    turn(a)
    moved, messages, _ = turn(b, spin_s=3600)
    assert moved and [payload for *_, payload in messages] == [b"x"]
    assert b.arrived_bytes == len(frames([b"x"]))
    assert b.silent_s <= 0


def test_failures_are_told_and_losses_free_what_is_under_way():
    world = World()
    a = world.stream(0, 3)
    a.queue(1, frames([b"x" * 2000]))
    a.queue(2, frames([b"x"]))
    assert turn(a)[2] == []
    world.dead.add(1)
    assert turn(a)[2] == [(1, FAILED)]
    a.lose(1)
    a.lose(1)
    assert world.freed == 2
    assert a.queued_bytes == 0
    a.queue(1, frames([b"to nobody"]))
    assert a.queued_bytes == 0
    assert turn(a)[2] == []
    world.match(2)
    b = world.stream(2, 3)
    assert [payload for *_, payload in turn(b)[1]] == [b"x"]
    world.failing.add(1)
    assert turn(a)[2] == [(-1, FAILED)]
    assert turn(a, spin_s=3600)[2] == [(-1, FAILED)]
    world.failing.clear()
    turn(a)
    assert not a.sending
    a.close()


def test_bells():
    """BELLS-1: after a silence it rings before it sends. BELLS-2: and again, more and more rarely, while the message is not taken."""
    world, rung = World(), []
    a = world.stream(0, 2, ring=rung.append)
    a.queue(1, frames([b"x"]))
    turn(a)
    assert rung == [1]
    a.queue(1, frames([b"y"]))
    turn(a)
    first = a.looked_s
    while len(rung) < 5:
        turn(a, spin_s=2 * QUIET_S)
    assert a.looked_s - first > (2 + 4 + 8) * QUIET_S
    b = world.stream(1, 2)
    while a.sending:
        turn(b)
        turn(a)


def test_an_address_that_cannot_be():
    world = World()
    segment = _core.Segment(node=1, arena_bytes=1 << 22)
    link = segment.open_lane(LINK_LANE)
    a, b = world.stream(0, 2), world.stream(1, 2)
    a.queue(1, frames([b"x"], dest=_core.make_address(1, 40, 0)))
    turn(a)
    with pytest.raises(ValueError, match="incarnation 0"):
        turn(b, link, link)

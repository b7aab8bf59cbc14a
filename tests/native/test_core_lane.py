"""The binding of lanes: what Python sees of frames, waiting, signals, forks and the background thread.

The C++ tests (``meson test``) hold the core's own promises; here it is the GIL, lifetimes and errors.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hpc_ray import _core
from hpc_ray.interpreter import python_command

NODE = 6


@pytest.fixture
def segment() -> Iterator[_core.Segment]:
    made = _core.Segment(node=NODE, arena_bytes=64 << 20)
    yield made
    assert made.validate() == []


def role(index: int) -> int:
    return _core.make_address(NODE, index, 0)


def in_child(body: Callable[[], None]) -> int:
    """Fork; the child runs `body` and exits 0, or 1 with an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def test_addresses() -> None:
    address = _core.make_address(3, 20, 7)
    assert _core.split_address(address) == (3, 20, 7)
    with pytest.raises(ValueError):
        _core.make_address(70000, 1, 1)


def test_frames_of_all_kinds_of_buffers(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    large = os.urandom(1 << 20)
    for payload in (b"bytes", bytearray(b"bytearray"), memoryview(b"view"), b"", large):
        assert lane.send(lane.address, payload) == 0
    frames = lane.receive(0)
    assert [src for src, _ in frames] == [lane.address] * 5
    assert [payload for _, payload in frames] == [b"bytes", b"bytearray", b"view", b"", large]
    assert all(type(payload) is bytes for _, payload in frames)
    with pytest.raises((TypeError, BufferError)):
        lane.send(lane.address, "text")  # type: ignore[arg-type]
    lane.close()
    assert segment.lanes() == []


def test_errors_say_what_is_wrong(segment: _core.Segment) -> None:
    lane = segment.open_lane(3)
    with pytest.raises(RuntimeError, match="lane 3 is open"):
        segment.open_lane(3)
    with pytest.raises(ValueError, match="mark it dead first"):
        segment.reclaim(lane.address)
    with pytest.raises(ValueError, match="no such lane"):
        lane.send(_core.make_address(NODE, 5000, 1), b"")
    with pytest.raises(ValueError, match="power of two"):
        _core.Segment(node=0, arena_bytes=0, ring_bytes=1000)
    with open("/dev/null") as nothing, pytest.raises(ValueError, match="no hpc_ray segment"):
        _core.Segment.attach(nothing.fileno())
    with pytest.raises(ValueError, match="at least 1"):
        lane.receive(None, limit=0)
    lane.close()
    lane.close()
    with pytest.raises(RuntimeError, match="closed"):
        lane.send(lane.address, b"")
    with pytest.raises(RuntimeError, match="closed"):
        lane.receive(0)


def test_backlog_and_death(segment: _core.Segment) -> None:
    a, b = segment.open_lane(), segment.open_lane()
    backlog = [a.send(b.address, bytes(10000)) for _ in range(20)]
    assert backlog[0] == 0 and backlog[-1] > 100_000 and backlog == sorted(backlog)
    assert len(b.receive(0)) < 20
    a.receive(0)  # moves the backlog on
    assert len(b.receive(0)) > 0
    assert segment.mark_dead(b.address)
    assert a.send(b.address, b"x") == -1
    assert segment.reclaim(b.address) == []
    a.receive(0)
    assert a.statistics()["backlog_bytes"] == 0
    a.close()
    assert segment.statistics()["rings_used"] == 0


def test_limit_and_receive_from(segment: _core.Segment) -> None:
    a, b = segment.open_lane(), segment.open_lane()
    for i in range(10):
        a.send(b.address, bytes([i]))
    assert [p[0] for _, p in b.receive(0, limit=4)] == [0, 1, 2, 3]
    assert b.receive_from(a.address) == [bytes([i]) for i in range(4, 10)]
    assert b.receive(0) == []
    assert segment.mark_dead(a.address)
    segment.reclaim(a.address)


def test_what_the_dead_have_sent_is_unread_until_it_is_read(segment: _core.Segment) -> None:
    reader = segment.open_lane()
    index = reader.address >> 32 & 0xFFFF
    writer = segment.open_lane()
    assert not segment.unread(writer.address, index)
    for _ in range(100):  # more than the ring holds, with padding at its end
        writer.send(reader.address, bytes(3_000))
        assert segment.unread(writer.address, index)
        assert len(reader.receive(0, limit=9)) == 1
        assert not segment.unread(writer.address, index)
    writer.send(reader.address, b"last words")
    dead = writer.address
    writer.close()
    successor = segment.open_lane()
    assert successor.address >> 32 == dead >> 32 and successor.address != dead
    successor.send(reader.address, b"first words")
    assert segment.unread(dead, index) and not segment.unread(successor.address, index)
    assert [data for _, data in reader.receive(0, limit=1)] == [b"last words"]
    assert not segment.unread(dead, index) and segment.unread(successor.address, index)
    reader.close()
    assert not segment.unread(successor.address, index)
    with pytest.raises(ValueError, match="not a lane of this node"):
        segment.unread(1 << 48, index)


def test_the_link(segment: _core.Segment) -> None:
    lane, link = segment.open_lane(), segment.open_lane(_core.LINK_LANE)
    far, further = _core.make_address(9, 17, 2), _core.make_address(12, 16, 1)
    for destination, payload in [(far, b"out"), (further, b"other"), (far, b""), (link.address, b"to the link"), (far, bytes(100_000))]:
        lane.send(destination, payload)
    received = link.receive_frames(0)
    assert [node for node, _ in received] == [9, 12, segment.node]
    assert [_core.split_frames(frames)[1] for _, frames in received] == [
        [(lane.address, far, b"out"), (lane.address, far, b""), (lane.address, far, bytes(100_000))],
        [(lane.address, further, b"other")],
        [(lane.address, link.address, b"to the link")],
    ]
    assert link.receive_frames(0) == []


def test_frames_from_other_nodes(segment: _core.Segment) -> None:
    a, b, link = segment.open_lane(), segment.open_lane(), segment.open_lane(_core.LINK_LANE)
    far, mine = _core.make_address(9, 17, 2), b"for the link"
    parts = [(a.address, b"1"), (b.address, b""), (link.address, mine), (a.address, bytes(100_000)), (far, b"passing"), (b.address, b"4")]
    frames = b"".join(_core.pack_frame(far, destination, payload) for destination, payload in parts)
    others = [(far, link.address, mine), (far, far, b"passing")]
    last = len(_core.pack_frame(far, b.address, b"4"))
    for cut in (0, 1, last - 1, last):  # the last one is not whole
        whole = len(frames) - (last if cut else 0)
        assert link.forward_frames(frames[: len(frames) - cut]) == (whole, others)
        assert a.receive(0) == [(far, b"1"), (far, bytes(100_000))]
        assert b.receive(0) == [(far, b"")] + ([] if cut else [(far, b"4")])
    assert link.forward_frames(b"") == link.forward_frames(memoryview(frames)[:10]) == (0, [])
    assert link.forward_frames(memoryview(frames)[:24]) == (0, [])
    with pytest.raises(ValueError, match="incarnation 0"):
        link.forward_frames(_core.pack_frame(far, _core.make_address(segment.node, 40, 0), b"x"))


def test_ping_pong_between_processes(segment: _core.Segment) -> None:
    def echo() -> None:
        lane = segment.open_lane(2)
        while True:
            for src, payload in lane.receive(30):
                if payload == b"end":
                    lane.close()
                    return
                lane.send(src, payload)

    pid = in_child(echo)
    lane = segment.open_lane()
    for i in range(3000):
        payload = bytes([i % 256]) * (100_000 if i % 100 == 0 else 100)
        lane.send(role(2), payload)
        ((_, back),) = lane.receive(30, spin=i % 2 == 0)
        assert back == payload
    lane.send(role(2), b"end")
    assert exit_code(pid) == 0


def test_attach_in_another_process_by_fd(segment: _core.Segment) -> None:
    import subprocess

    lane = segment.open_lane()
    code = (
        "import sys; from hpc_ray import _core; s = _core.Segment.attach(int(sys.argv[1]));"
        "l = s.open_lane(); l.send(int(sys.argv[2]), b'hello'); l.close()"
    )
    subprocess.run(
        python_command("-c", code, str(segment.fd), str(lane.address)), pass_fds=[segment.fd], check=True
    )
    assert lane.receive(10)[0][1] == b"hello"


def test_a_fork_needs_its_own_lane(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    store = _core.Store(segment, lane)

    def child() -> None:
        for call in (
            lambda: lane.send(lane.address, b""),
            lambda: lane.receive(0),
            lambda: lane.receive_background(0),
            lane.close,
            lambda: store.create(bytes(28), 1, 0),
        ):
            with pytest.raises(RuntimeError, match="forked"):
                call()
        own = segment.open_lane()
        own.send(lane.address, b"child")
        own.close()

    assert exit_code(in_child(child)) == 0
    assert lane.receive(10)[0][1] == b"child"


def test_the_gil_is_free_while_waiting(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    counted = 0

    def count() -> None:
        nonlocal counted
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            counted += 1
        lane.wake()

    thread = threading.Thread(target=count)
    thread.start()
    assert lane.receive(30) == []  # ended by wake
    thread.join()
    assert counted > 100


def test_wake_is_kept_for_the_next_wait(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    lane.wake()
    assert lane.receive(None) == []
    lane.wake_background()
    assert lane.receive_background() == []


def test_two_foreground_threads_take_turns(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.extend(p for _, p in lane.receive(30, limit=1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    assert lane.receive(0.01) == []  # its turn does not come in time
    lane.send(lane.address, b"1")
    lane.send(lane.address, b"2")
    for thread in threads:
        thread.join(20)
    assert sorted(got) == [b"1", b"2"]


def test_close_ends_waits_in_other_threads(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(lane.receive(None))),
        threading.Thread(target=lambda: results.append(lane.receive_background())),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    lane.close()
    for thread in threads:
        thread.join(20)
    assert results == [[], []]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("delay_s", [0.0, 0.00001, 0.05])
def test_signal_is_seen(segment: _core.Segment, delay_s: float) -> None:
    """Also when it comes between Python's last look and the system call (bounded by half a second)."""
    lane = segment.open_lane()

    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(3 if delay_s else 1):
            start = time.monotonic()
            with pytest.raises(Interrupted):
                if delay_s:
                    signal.setitimer(signal.ITIMER_REAL, delay_s)
                else:
                    os.kill(os.getpid(), signal.SIGALRM)
                lane.receive(30)
            assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_without_exception_does_not_end_the_wait(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        start = time.monotonic()
        assert lane.receive(0.2) == []
        assert seen and time.monotonic() - start >= 0.2
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_may_receive(segment: _core.Segment) -> None:
    """In the turn of whom it has interrupted, who then looks again: what he waits for may have been among that."""
    lane, other = segment.open_lane(), segment.open_lane()
    taken: list[tuple[int, bytes]] = []

    def handler(*_: object) -> None:
        other.send(lane.address, b"for the handler")
        taken.extend(lane.receive(5))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert lane.receive(30) == []
        assert taken == [(other.address, b"for the handler")]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_parked_waits_use_no_cpu(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    thread = threading.Thread(target=lane.receive_background)
    thread.start()
    lane.receive(0.2)
    before = time.process_time()
    start = time.monotonic()
    lane.receive(1.0)
    used, passed = time.process_time() - before, time.monotonic() - start
    lane.close()
    thread.join()
    assert used < 0.01 * passed


class Io:
    """The io thread, as the worker has one."""

    def __init__(self, lane: _core.Lane) -> None:
        self.got: list[bytes] = []
        self.lane = lane
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.lane.closed:
            try:
                self.got.extend(payload for _, payload in self.lane.receive_background())
            except RuntimeError:
                return

    def stop(self) -> None:
        self.lane.close()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("eager", [0, 1])
def test_background_takes_what_lies_there(segment: _core.Segment, eager: int) -> None:
    a, b = segment.open_lane(), segment.open_lane()
    b.eager = eager
    assert b.eager == eager
    io = Io(b)
    for i in range(30):
        a.send(b.address, b"x")
        wait_until(lambda n=i: len(io.got) == n + 1)  # type: ignore[misc]
        if i % 10 == 0:
            time.sleep(0.07)  # let it park
    io.stop()


def test_background_leaves_frames_to_a_busy_foreground(segment: _core.Segment) -> None:
    a, b = segment.open_lane(), segment.open_lane()
    io = Io(b)
    got = 0
    for _ in range(1000):
        for _ in range(20):
            a.send(b.address, b"x")
        got += len(b.receive(0))
    wait_until(lambda: got + len(io.got) == 20_000)
    statistics = b.statistics()
    io.stop()
    # The foreground came by all the time: hardly a wake-up was spent on the io thread.
    assert a.statistics()["wakes"] < 1000
    assert statistics["received"] == 20_000


def test_background_deadline(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    start = time.monotonic()
    assert lane.receive_background(deadline=0.05) == []
    assert 0.05 <= time.monotonic() - start < 5


def test_many_senders_one_receiver(segment: _core.Segment) -> None:
    receiver = segment.open_lane(2)
    each = 5000

    def sender() -> None:
        lane = segment.open_lane()
        for i in range(each):
            lane.send(role(2), i.to_bytes(4, "little") + bytes(i % 200))
        while lane.flush():
            lane.receive(0.001)
        lane.close(10)

    pids = [in_child(sender) for _ in range(4)]
    following: dict[int, int] = {}
    count = 0
    while count < 4 * each:
        frames = receiver.receive(30)
        assert frames
        for src, payload in frames:
            assert int.from_bytes(payload[:4], "little") == following.get(src, 0)
            following[src] = following.get(src, 0) + 1
            count += 1
    assert [exit_code(pid) for pid in pids] == [0] * 4
    receiver.receive(0)
    receiver.close()
    assert segment.statistics()["rings_used"] == 0


def test_statistics_have_numbers(segment: _core.Segment) -> None:
    lane = segment.open_lane()
    lane.send(lane.address, b"x")
    assert lane.statistics()["sent"] == 1
    statistics = segment.statistics()
    assert statistics["lanes_open"] == 1 and statistics["rings_used"] == 1
    assert segment.lanes() == [(lane.address, _core.LANE_OPEN, os.getpid())]
    assert segment.is_open(lane.address)

"""What workers print: through the splitter alone, and through a real fork server with stand-ins."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ray.config import Settings
from hpc_ray.protocol import Answer, FollowLogs, LogLines, Query, decode, encode
from hpc_ray.worker_log import OutputSplitter, mark

JOB = bytes.fromhex("01000000")
TEXT = st.text(alphabet=st.sampled_from("ab é\n\r\x1f"), max_size=20)


@given(st.lists(st.tuples(st.sampled_from(["f", "Actor.method", ""]), TEXT), max_size=8), st.data())
def test_nothing_is_lost_however_it_is_cut(parts, data):
    whole = b"".join(mark(name, JOB) + text.encode() for name, text in parts)
    splitter = OutputSplitter()
    clean, lines = b"", []
    position = 0
    while position < len(whole):
        step = data.draw(st.integers(1, 40))
        kept, groups = splitter.feed(whole[position : position + step])
        clean += kept
        lines += [(name, line) for name, _, found in groups for line in found]
        position += step
    kept, groups = splitter.feed(b"", end=True)
    clean += kept
    lines += [(name, line) for name, _, found in groups for line in found]
    assert clean == b"".join(text.encode() for _, text in parts)
    expected = []
    for name, text in parts:
        pieces = text.split("\n")
        expected += [(name, piece) for piece in (pieces[:-1] if pieces[-1] == "" else pieces)]
    assert lines == expected


def test_separators_of_the_users_own_are_kept():
    splitter = OutputSplitter()
    out = b"".join(splitter.feed(piece)[0] for piece in (b"a\x1eb", b"c\n\x1e", b"\x1e\x1ex\n"))
    out += splitter.feed(b"", end=True)[0]
    assert out == b"a\x1ebc\n\x1e\x1e\x1ex\n"


@pytest.fixture
def node(no_leaks, monkeypatch):
    from hpc_ray.launcher import local

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import stand_ins

    attachment = local.start_cluster(
        num_cpus=1,
        object_store_memory=64 << 20,
        settings=Settings(prestart_workers=1, kill_on_exit_s=1.0),
        roles=stand_ins.ROLES,
    )
    attachment.lane.send(0, encode(Query(1, "pids", {"workers": 1})))
    assert attachment.lane.receive(20)
    attachment.lane.send(0, encode(FollowLogs(attachment.lane.address, JOB, True)))
    yield attachment
    attachment.close()
    attachment.lane = attachment.segment = None  # pytest keeps the attachment until after no_leaks has looked


def collect(attachment, until, timeout_s=30.0) -> list:
    found: list = []
    deadline = time.monotonic() + timeout_s
    while not until(found):
        assert time.monotonic() < deadline, found[-5:]
        found += [decode(data) for _, data in attachment.lane.receive(0.2)]
    return found


def lines_of(messages, *, error=False) -> list[str]:
    return [line for m in messages if isinstance(m, LogLines) and m.is_error == error for line in m.lines]


def test_lines_are_named_and_complete(node):
    code = "sys.stdout.write('one\\ntw'); sys.stdout.flush(); sys.stdout.write('o\\n'); print('bad', file=sys.stderr)"
    node.lane.send(0, encode(Query(2, "run", {"token": 1, "name": "f", "code": code})))
    found = collect(node, lambda m: len(lines_of(m)) >= 2 and lines_of(m, error=True))
    assert lines_of(found) == ["one", "two"] and lines_of(found, error=True) == ["bad"]
    assert {m.name for m in found if isinstance(m, LogLines)} == {"f"}


def test_large_output_of_a_worker_that_dies_is_whole(node):
    code = "os.write(1, b''.join(b'%07d' % i + b'x' * 92 + b'\\n' for i in range(40000)) + b'rest'); os.kill(os.getpid(), 9)"
    node.lane.send(0, encode(Query(2, "run", {"token": 1, "code": code})))
    found = collect(node, lambda m: "rest" in lines_of(m)[-1:])
    lines = lines_of(found)
    assert [int(line[:7]) for line in lines[:-1]] == list(range(40000))
    log = next(Path(node.config.session_dir, "logs").glob("worker-*.out"))
    assert log.stat().st_size == 40000 * 100 + 4
    node.lane.send(0, encode(Query(3, "exits", {"count": 1})))
    answer = collect(node, lambda m: any(isinstance(x, Answer) for x in m))[-1]
    assert os.WTERMSIG(answer.value[0][1]) == 9

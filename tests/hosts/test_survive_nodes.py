"""Clusters over TCP on several hosts, of which one is lost in every way there is."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).with_name("programs")
WORK = PROGRAMS / "work.py"
ALL = "node1,node2,node3"


def survive(hosts, *command: object, head: int = 1, names: str = ALL) -> subprocess.Popen:
    agent = hosts.tool("agent")
    return hosts.start(head, "hpc-ray", "run", "--survive-nodes", "--hosts", names, "--agent", agent, *command)


def await_line(process: subprocess.Popen, start: str) -> list[str]:
    """The words of the first line that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return line.split()
    raise AssertionError(process.stderr.read())


def finished(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, (out, err)
    return out, err


@pytest.mark.thorough
def test_training_on_three_hosts(hosts):
    """The weights are those of one host to the last bit."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    example = [Path(__file__).parents[2] / "examples" / "train_digits.py", "--workers", 3, "--epochs", 1, "--quiet", "--no-plot"]
    out, err = finished(survive(hosts, "--num-cpus", 1, *example))
    assert "3 workers on 3 nodes" in out, (out, err)
    alone = hosts.run(2, "hpc-ray", "run", "--num-cpus", 3, *example)
    weights = [line for line in out.splitlines() if line.startswith("weights")]
    assert weights and weights[0] in alone.stdout, (out, alone.stdout)
    hosts.await_nothing_left()


@pytest.mark.parametrize(
    "fault", ["kill-node", "partition", *(pytest.param(fault, marks=pytest.mark.thorough) for fault in ("power-off", "unplug"))]
)
def test_a_host_is_lost(fault, hosts):
    """Its work moves, its objects are made again, its actor starts elsewhere; the driver ends well. The host that is only cut off ends
    what it has when it hears nothing, and nothing comes back when it can be reached again."""
    process = survive(hosts, WORK, "watch")
    await_line(process, "READY")
    hosts.tool(fault, 3)
    out, err = finished(process)
    assert out.splitlines()[-1].endswith("alive node1 node2") and err.count("on node3 is gone") == 1, (out, err)
    if fault in ("kill-node", "power-off"):
        hosts.tool("start-node", 3)
    else:
        hosts.await_nothing_left([3])  # still without a network
        hosts.tool("heal")
    hosts.await_nothing_left()


def test_a_host_that_comes_back_is_no_ghost(hosts):
    """Cut off for longer than the others wait, and back before it knows: it is told, and ends."""
    process = survive(hosts, WORK, "watch", "stay")
    await_line(process, "READY")
    link = hosts.run(3, "pgrep", "-f", "hpc_ray.launcher.member").stdout.split()
    hosts.run(3, "kill", "-STOP", *link)
    await_line(process, "right")
    hosts.run(3, "kill", "-CONT", *link)
    hosts.await_nothing_left([3])
    _, err = finished(process)
    assert "on node3 is gone" in err and "on node3 ends" in err, err


def test_two_other_hosts_lose_each_other(hosts):
    """The head sees both, and decides that one of them goes."""
    process = survive(hosts, WORK, "watch")
    await_line(process, "READY")
    blocked = hosts.run(3, "ip", "route", "add", "blackhole", "10.77.0.2/32")
    assert blocked.returncode == 0, blocked.stderr
    out, err = finished(process)
    alive = out.splitlines()[-1].rpartition("alive ")[2].split()
    assert alive in (["node1", "node2"], ["node1", "node3"]) and err.count("is gone") == 1, (out, err)
    hosts.run(3, "ip", "route", "del", "blackhole", "10.77.0.2/32")
    hosts.await_nothing_left()


def test_the_head_is_silent_for_a_while(hosts):
    """MEMBER-2: the others end, as they cannot know better. To the head they are lost nodes, and its program goes on without them."""
    process = survive(hosts, WORK, "watch")
    link = await_line(process, "READY")[3]
    hosts.run(1, "kill", "-STOP", link)
    hosts.await_nothing_left([2, 3])
    hosts.run(1, "kill", "-CONT", link)
    out, err = finished(process)
    assert out.splitlines()[-1].endswith("alive node1") and err.count("is gone: ") == 2, (out, err)
    assert "it had lost the head: no sign of life" in err, err  # the second one may have been the first to see its end
    hosts.await_nothing_left()


def test_the_head_dies(hosts):
    """One clear message, and the end everywhere."""
    process = survive(hosts, WORK, "watch")
    head = await_line(process, "READY")[3]
    hosts.run(1, "kill", "-KILL", head)
    _, err = finished(process, 137)
    assert err.count("the head has ended") == 1, err
    hosts.await_nothing_left()


@pytest.mark.parametrize("fault", ["kill-node", "power-off"])
def test_the_host_of_the_head_is_lost(fault, hosts):
    process = survive(hosts, WORK, "watch")
    await_line(process, "READY")
    hosts.tool(fault, 1)
    hosts.await_nothing_left([2, 3])
    process.communicate(timeout=60)
    hosts.tool("start-node", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_is_ended(number, hosts):
    process = survive(hosts, WORK, "watch")
    driver = await_line(process, "READY")[2]
    supervisor = hosts.run(1, "pgrep", "-f", "hpc-ray run").stdout.split()
    assert driver not in supervisor
    hosts.run(1, "kill", f"-{number}", *supervisor)
    process.communicate(timeout=60)
    hosts.await_nothing_left()


def test_a_host_that_is_not_there(hosts):
    """The start fails as a whole, and says why."""
    process = survive(hosts, WORK, names="node1,node2,node9")
    out, err = finished(process, 1)
    assert "node9" in err and "READY" not in out, err
    hosts.await_nothing_left()


def test_a_node_that_does_not_come_up(hosts):
    process = survive(hosts, "--object-store-memory", 1 << 50, WORK)
    out, err = finished(process, 1)
    assert err.count("was asked for, but the machine") == 1 and "READY" not in out, err
    hosts.await_nothing_left()


def test_the_head_on_a_host_without_a_part(hosts):
    """A login node runs the driver and no task."""
    process = survive(hosts, WORK, head=1, names="node2,node3")
    out, err = finished(process)
    last = out.splitlines()[-1]
    assert last == "right node2 node3 alive node1 node2 node3", (out, err)
    hosts.await_nothing_left()


@pytest.mark.thorough
def test_two_clusters_do_not_see_each_other(hosts):
    """Nor does the end of one touch the other."""
    one = survive(hosts, WORK, "stay")
    other = survive(hosts, WORK, "stay", head=2)
    lines = [await_line(process, "READY") for process in (one, other)]
    assert lines[0][1] != lines[1][1]
    for process in (one, other):
        assert await_line(process, "right")[1:] == [*ALL.split(","), "alive", *ALL.split(",")]
    one.kill()
    one.communicate()
    running = hosts.run(3, "pgrep", "-f", "hpc_ray.launcher.member").stdout.split()
    assert running
    out, err = finished(other)
    assert "is gone" not in err, (out, err)
    hosts.await_nothing_left()


def test_nodes_join_and_leave(hosts):
    file = hosts.folder / "join"
    started = hosts.run(1, "hpc-ray", "start", "--join-file", file, "--num-cpus", 1)
    assert started.returncode == 0, started.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    for host in (2, 3):
        joined = hosts.run(host, "hpc-ray", "start", "--join", file, "--num-cpus", 1)
        assert joined.returncode == 0 and f"node {host - 1} of session" in joined.stdout, joined.stderr
    done = hosts.run(1, "python", PROGRAMS / "attach.py", 3)
    assert done.stdout.split() == ["worked", "on", "node1", "node2", "node3", "deaths"], done
    left = hosts.run(2, "hpc-ray", "stop")
    assert "has ended" in left.stdout, left
    hosts.await_nothing_left([2])
    done = hosts.run(3, "python", PROGRAMS / "attach.py", 2)
    assert done.stdout.split() == ["worked", "on", "node1", "node3", "deaths", "node2"], done
    again = hosts.start(2, "hpc-ray", "start", "--join", file, "--block")
    done = hosts.run(1, "python", PROGRAMS / "attach.py", 3)
    assert "node2" in done.stdout.partition("deaths")[0], done
    again.terminate()
    again.communicate(timeout=60)
    hosts.await_nothing_left([2])
    stopped = hosts.run(1, "hpc-ray", "stop")
    assert stopped.returncode == 0, stopped.stderr
    hosts.await_nothing_left()
    assert not file.exists()


def test_who_may_not_join(hosts):
    file = hosts.folder / "join"
    assert hosts.run(1, "hpc-ray", "start", "--join-file", file, "--num-cpus", 1).returncode == 0
    text = file.read_text()
    forged = hosts.folder / "forged"
    invitation = json.loads(text)
    forged.write_text(json.dumps({**invitation, "secret": "00" * 32}))
    forged.chmod(0o600)
    refused = hosts.run(2, "hpc-ray", "start", "--join", forged)
    assert refused.returncode == 1 and "another session answers there" in refused.stderr, refused
    forged.chmod(0o644)
    refused = hosts.run(2, "hpc-ray", "start", "--join", forged)
    assert refused.returncode == 1 and "readable by nobody else" in refused.stderr, refused
    hosts.run(1, "hpc-ray", "stop")
    late = hosts.folder / "late"
    late.write_text(text)
    late.chmod(0o600)
    refused = hosts.run(2, "hpc-ray", "start", "--join", late)
    assert refused.returncode == 1 and "cannot be reached" in refused.stderr, refused
    hosts.await_nothing_left()

"""What ``hpc-ray run`` is outside of an MPI job: the parent of mpirun, or of the head of a cluster over TCP.

Relied on by ``cli``.

SUPERVISOR-1 (nothing stays): what it starts dies with it, ranks die with mpirun, nodes with their ranks; what a lost host leaves of
them here is ended.
SUPERVISOR-2 (exit code): mpirun's is not believed, as it is 0 when a host is lost; rank 0 reports the script's over a socket of ours, or,
from another host, by its last words (``relay``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hpc_ray import _core
from hpc_ray.launcher import channel, hosts, relay, session, world
from hpc_ray.slurm import signals

RELAUNCHED_VARIABLE = "HPC_RAY_RELAUNCHED"  # in the script's environment: how often it was started before
_END_S = 10.0
_LOOK_S = 0.02
_PROBE_S = 15.0


class Outcome(NamedTuple):
    """How a launch has ended."""

    code: int  # the script's; or another one than 0, where it has none
    lost: str = ""  # what the session was lost with; "": the script has ended, or was ended by the user


def keep_going(
    launch: Callable[[list[str] | None, int], Outcome],
    names: list[str] | None,
    times: int,
    left_of: Callable[[list[str]], list[str]],
) -> int:
    """Launches, and again on the hosts that are left whenever a session is lost, at most ``times`` times; the exit code.

    ``launch(hosts, before)`` gets how many there were before. ``names`` None: all is on this host.
    """
    for before in range(times + 1):
        outcome = launch(names, before)
        if not outcome.lost or before == times:
            break
        where = "this host"
        if names is not None:
            left = left_of(names)
            gone = [name for name in names if name not in left]
            if gone:
                relay.say(f"not to be reached any more: {', '.join(gone)}")
            if not left:
                break
            names, where = left, ", ".join(left)
        relay.say(f"relaunch {before + 1} of {times} on {where}, with what the journal has")
    return outcome.code


def reachable(names: list[str], agent: str | None, environment: dict[str, str]) -> list[str]:
    """Those on which a program can be started in ``_PROBE_S``; this host is one of them. Blocks."""
    probes = {}
    for name in names:
        if not hosts.is_here(name):
            line = probe_command(name, agent, environment)
            null = subprocess.DEVNULL
            probes[name] = subprocess.Popen(line, stdin=null, stdout=null, stderr=null, start_new_session=True)
    deadline = time.monotonic() + _PROBE_S
    for probe in probes.values():
        try:
            probe.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
    return [name for name in names if name not in probes or probes[name].returncode == 0]


def probe_command(name: str, agent: str | None, environment: dict[str, str]) -> list[str]:
    """A pure function."""
    if agent is None and "SLURM_JOB_ID" in environment:
        return ["srun", "--mpi=none", "--overlap", "--input=none", "--nodes", "1", "--ntasks", "1", "--nodelist", name, "true"]
    return [*shlex.split(agent or hosts.DEFAULT_AGENT), name, "true"]


def supervise(command: list[str], plan: dict[str, Any], more: dict[str, str] | None = None) -> Outcome:
    """Runs mpirun, or the head of a cluster over TCP, to its end. Blocks. ``more``: of the environment."""
    listener, plan["report"] = world.listen()
    listener.setblocking(False)
    variables = world.under_root({**os.environ, **(more or {})})
    variables[world.PLAN_VARIABLE] = json.dumps(plan)
    parent = os.getpid()

    def before_exec() -> None:
        _core.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: stopped.append(received))
    warned: list[int] = []  # by Slurm, that the time is nearly over; for the driver to know
    if signals.in_job():
        signal.signal(signal.SIGUSR1, lambda received, frame: warned.append(received))
    ours, theirs = os.pipe()
    child = subprocess.Popen(
        command,
        env=variables,
        stderr=theirs,
        preexec_fn=before_exec,  # noqa: PLW1509  this program has no threads
    )
    os.close(theirs)
    errors = relay.Relay(ours, 2, plan["tag"])
    report: socket.socket | None = None
    note: dict[str, Any] | None = None  # rank 0's
    ended = False  # rank 0 has
    started: dict[int, int] = {}  # by mpirun: pid → start
    deadline = float("inf")
    asked = False
    while True:
        status = child.poll()
        errors.pass_on()
        if report is None:
            try:
                report, _ = listener.accept()
                report.setblocking(False)
                started = _children(child)
            except BlockingIOError:
                pass
        while report is not None and not ended:
            try:
                said, _ = channel.receive_note(report)
            except BlockingIOError:
                break
            if said is None:
                ended = True
            else:
                note = note or said  # the first one counts
        note = note or errors.note
        if note is not None and deadline == float("inf"):
            started |= _children(child)
            deadline = time.monotonic() + _END_S
        if status is not None:
            break
        if warned:
            child.send_signal(warned.pop())
        if stopped and not asked:
            asked = True
            child.send_signal(signal.SIGTERM)
        if note is not None and (stopped or note["lost"] or time.monotonic() > deadline):  # it would wait for what is lost
            world.end_process(child, _END_S / 2 if stopped else 1.0)
        else:
            errors.pass_on(_LOOK_S, *([report] if report is not None and not ended else []))
    errors.close()
    if command != world.MEMBER_COMMAND:  # the head's agents end with it (MEMBER-3), and its other child is the node, which ends in order
        _clear_after(child, started)
    _wait_for_nodes(plan)
    listener.close()
    if stopped:
        return Outcome(128 + stopped[0])
    if note is not None:
        return Outcome(int(note["exit"]) or (1 if note["lost"] else 0), note["lost"])
    if report is None and status:
        return Outcome(status if status > 0 else 128 - status)  # it did not start, and has said why
    who = "the head" if command == world.MEMBER_COMMAND else "rank 0" if report is not None else "mpirun"
    text = f"{who} has ended without a word (exit code {status})"
    relay.say(f"the session is over before the script is: {text}")
    return Outcome(137, text)


def _children(child: subprocess.Popen[bytes]) -> dict[int, int]:
    return {pid: session.process_start(pid) for pid in session.children(child.pid)}


def _clear_after(child: subprocess.Popen[bytes], started: dict[int, int]) -> None:
    """What an mpirun leaves when a host is lost: agents, which wait for an answer of it (by pid and start), and its own folder."""
    for pid, start in started.items():
        if start and session.process_start(pid) == start:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(os.path.join(tempfile.gettempdir(), f"ompi.{child.pid}"), ignore_errors=True)


def _wait_for_nodes(plan: dict[str, Any]) -> None:
    """Nodes on this host end with their links and take their folders away; what one leaves that is killed is swept."""
    deadline = time.monotonic() + _END_S
    base = session.base_dir()
    session.sweep()
    while session.has_folder(base, plan["tag"]) and time.monotonic() < deadline:
        time.sleep(0.02)
        session.sweep()

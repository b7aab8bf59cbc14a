"""Job steps below a worker: MPI programs that a task starts on its node, with the mpirun beside the installed MPI.

Relied on by ``worker.gangs`` (the ranks of a gang) and ``mpi_step`` (programs of the user). A step is an MPI job of its own: it shares
neither launcher nor fate with the job that the session itself may be.

STEP-1 (its death is its own): whatever happens in a step ends at most the step.
STEP-2 (nothing left): the step ends with the worker. ``end`` has mpirun end its ranks; whoever is killed instead leaves processes that
carry the worker's mark, which the fork server ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from typing import Any, NamedTuple

from hpc_ray.config import NodeConfig
from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import channel, session, world

RANK_VARIABLE = "HPC_RAY_RANK"  # JSON for ``worker.rank``
_LOOK_S = 0.1
_END_S = 3.0  # for mpirun to end its ranks, before it is killed


def start(ranks: int, command: list[str], config: NodeConfig, variables: dict[str, str], **options: Any) -> subprocess.Popen:
    """Starts ``mpirun -n ranks command`` on this host, ``options`` as for Popen.

    Raises:
        LaunchError: no MPI is installed, or its mpirun cannot be run.
    """
    world.check_ranks(ranks)
    mpirun = world.find_mpirun()
    environment = world.own_host_environment()
    environment[session.SESSION_VARIABLE] = config.session
    environment[session.NODE_VARIABLE] = str(config.node)
    environment["PRTE_MCA_prte_tmpdir_base"] = config.session_dir  # what Open MPI leaves there when it is killed goes with the session
    environment.update(variables)
    line = world.mpirun_command(mpirun, ranks, command, passed=())
    try:
        return subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, **options)
    except OSError as error:
        raise LaunchError(f"{mpirun.path} cannot be run: {error}") from None


def end(process: subprocess.Popen, began: float) -> None:
    """Ends a step that may be under way since ``began``, and waits for its mpirun."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(_END_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.returncode:
            session.remove_abandoned(began)


class Rank(NamedTuple):
    """A rank of a gang's step, as it has introduced itself."""

    connection: socket.socket  # its end is the rank's
    address: int
    worker_id: bytes
    pid: int
    files: list[str]  # in shared memory, which MPI removes only if it is finalized


class Step:
    """The ranks of a gang: processes that have attached to this node and wait for work.

    Raises:
        LaunchError: they did not come up; says why.
    """

    def __init__(self, size: int, command: list[str], config: NodeConfig, note: dict[str, Any], variables: dict[str, str]):
        self.size = size
        self.calls = 0  # that its ranks were given
        self.ranks: list[Rank] = []
        listener, name = world.listen()
        text = json.dumps({**note, "control": name, "size": size, "session": config.session, "node": config.node})
        self.began = time.time()
        self.process = start(size, command, config, {RANK_VARIABLE: text, **variables})
        try:
            with listener:
                self._gather(listener, config.settings.start_timeout_s)
        except BaseException:
            self.end()
            raise

    def _gather(self, listener: socket.socket, timeout_s: float) -> None:
        """All at once: none gets through MPI_Init before the others have come."""
        deadline = time.monotonic() + timeout_s
        found: dict[int, Rank] = {}
        with contextlib.ExitStack() as opened, selectors.DefaultSelector() as awaited:
            awaited.register(listener, selectors.EVENT_READ)
            while len(found) < self.size:
                ready = awaited.select(_LOOK_S)
                for key, _ in ready:
                    if key.fileobj is listener:
                        connection = opened.enter_context(listener.accept()[0])
                        if channel.peer_user(connection)[1] == os.getuid():
                            awaited.register(connection, selectors.EVENT_READ, connection)
                        continue
                    awaited.unregister(key.fileobj)
                    hello, _ = channel.receive_note(key.data)
                    if hello is None or "error" in hello:
                        raise LaunchError((hello or {}).get("error") or "a rank ended while it started; see what it printed")
                    who = bytes.fromhex(hello["worker_id"]), hello["pid"], hello["files"]
                    found[hello["rank"]] = Rank(key.data, hello["address"], *who)
                if not ready:
                    self._check_start(len(found), deadline, timeout_s)
            opened.pop_all()
        self.ranks = [found[rank] for rank in range(self.size)]

    def _check_start(self, came: int, deadline: float, timeout_s: float) -> None:
        code = self.process.poll()
        if code is not None:
            raise LaunchError(f"mpirun ended with {code} before its {self.size} ranks were up; see what it printed")
        if time.monotonic() > deadline:
            raise LaunchError(f"{came} of {self.size} ranks came up within {timeout_s:g} s (HPC_RAY_START_TIMEOUT_S)")

    def is_up(self) -> bool:
        return self.process.poll() is None

    def leave(self, timeout_s: float) -> None:
        """In order: the ranks finalize MPI and go; what has not gone by then is ended."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                channel.send_note(rank.connection, {"end": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.end()

    def end(self) -> None:
        """At once; mpirun first, so that it has nothing to say about its ranks."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for rank in self.ranks:
            rank.connection.close()  # at which it leaves, unless it never lets go of the interpreter
            if RANK_VARIABLE.encode() in session.environment_of(rank.pid):
                with contextlib.suppress(OSError):
                    os.kill(rank.pid, signal.SIGKILL)
            session.remove_files(rank.files)
        if self.process.returncode:
            session.remove_abandoned(self.began)

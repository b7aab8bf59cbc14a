"""Job steps below a worker: MPI programs that a task starts, with the mpirun beside the installed MPI.

Relied on by ``worker.gangs`` (the ranks of a gang) and ``mpi_run`` (programs of the user). A step is an MPI job of its own: it shares
neither launcher nor fate with the job that the session itself may be.

STEP-1 (its death is its own): whatever happens in a step ends at most the step.
STEP-2 (nothing left): the step ends with the worker. ``end`` has mpirun end its ranks; whoever is killed instead leaves processes that
carry the worker's mark, which the fork server ends. On other hosts ranks end with the daemon that mpirun has there.
STEP-3 (its own share): a step is a session of the kernel, as it is on other hosts under the daemon that mpirun has there. To Linux a
session is one group that is given CPUs (sched_autogroup). Up to 6.18.44 such a group could keep a CPU for itself, for minutes, while one
of its processes was always ready to run and another one fell asleep and woke thousands of times a second (reweight_entity; mended by
101f3498b4bd). Ranks of Open MPI do the one where they wait in a call and the other where they wait in MPI_Init; so two gangs that
started in one session starved all others on their CPUs, among them those whom they waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from hpc_ray.config import NodeConfig
from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import host, mpi_files, session, world

RANK_VARIABLE = "HPC_RAY_RANK"  # JSON for ``worker.rank``
_TAIL_BYTES = 2000  # of what mpirun has printed, in an error
_END_S = 3.0  # for mpirun to end its ranks, before it is killed
# Open MPI 5 loses track of ranks on other hosts that end while it still starts others, and never ends then (5.0.11: one run of hostname
# in six, on three busy hosts; none in two hundred where each lasted half a second).
_LASTING = ["sh", "-c", 'sleep 0.5; exec "$0" "$@"']


def start(
    hosts: list[str],
    command: list[str],
    config: NodeConfig,
    variables: dict[str, str],
    *,
    sharing: bool,
    program: bool = False,
    **options: Any,
) -> subprocess.Popen:
    """Starts ``command`` by mpirun, a rank on each of ``hosts``; ranks on one host stand together. ``sharing``: a rank has not a CPU of
    its own. ``program``: it is a user's, which need not know MPI and may end at once, and which ends as a whole with the first rank that
    fails. ``options`` as for Popen.

    Raises:
        LaunchError: no MPI is installed, or its mpirun cannot be run, or the folder ``cwd`` is not here.
    """
    mpirun = world.find_mpirun()
    if (cwd := options.get("cwd")) is not None and not os.path.isdir(cwd):
        raise LaunchError(f"there is no folder {cwd} on {config.hostname}, where mpirun shall start (cwd)")
    groups = [(name, len(list(ranks))) for name, ranks in groupby(hosts)]
    folder = config.session_dir
    if [name for name, _ in groups] == [config.hostname]:
        world.check_ranks(len(hosts))
        environment = world.own_host_environment()
        if mpirun.family == "openmpi":
            environment = world.one_host_settings(mpirun.version[0] if mpirun.version else 5, alone=False) | environment
        extra: list[str] = []
        passed: tuple[str, ...] = ()
    else:
        environment = world.hosts_environment()
        extra = world.on_hosts(mpirun, groups)
        passed = (session.SESSION_VARIABLE, "SPT_NOENV", *variables)
        if program and mpirun.family == "openmpi":
            command = [*_LASTING, *command]
        folder = session.launchers_dir(config.session)
    if mpirun.family == "openmpi" and (sharing or config.resources.get("CPU", 0) > host.cpu_count()):
        environment = world.SHARED_CPU_SETTINGS | environment
    environment[session.SESSION_VARIABLE] = config.session
    environment[session.NODE_VARIABLE] = str(config.node)
    environment |= session.launcher_variables(folder) | variables
    line = world.mpirun_command(mpirun, len(hosts), command, extra, passed=passed, tolerant=not program)
    try:
        return subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **options)  # STEP-3
    except OSError as error:
        raise LaunchError(f"{mpirun.path} cannot be run: {error}") from None


def progress(hosts: Iterable[str], begun: Iterable[str], up: Iterable[str]) -> str:
    """How far the ranks on each host have come, for people; a pure function. Each argument has the host of every rank: of all, of those
    that have attached to their nodes, of those that are through MPI_Init."""
    come, through = Counter(begun), Counter(up)
    texts = []
    for name, count in Counter(hosts).items():
        stages = ((through[name], "up"), (come[name] - through[name], "in MPI_Init"), (count - come[name], "not begun"))
        texts.append(f"{name}: " + ", ".join(f"{number} {stage}" for number, stage in stages if number > 0))
    return "; ".join(texts)


class Printed:
    """What this worker's stderr gets from now on, its steps' words among it, as the fork server notes it down."""

    def __init__(self, session_dir: str):
        self.path = session.worker_log(session_dir, os.getpid(), "err")
        try:
            self.start = os.stat(self.path).st_size
        except OSError:
            self.start = 0  # nothing was printed yet

    def tail(self) -> str:
        """The end of it; "" for nothing."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self.start, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""


def end(process: subprocess.Popen, began: float) -> None:
    """Ends a step that may be under way since ``began``, and waits for its mpirun."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(_END_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        kill(process)
        if process.returncode:
            mpi_files.Leftovers(began).remove()


def kill(process: subprocess.Popen) -> None:
    """At once."""
    if process.poll() is None:
        process.kill()
        process.wait()


def kill_rank(pid: int, files: list[str]) -> None:
    """Makes sure that a rank of this host is gone, and what MPI would have removed."""
    if RANK_VARIABLE.encode() in session.environment_of(pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    mpi_files.remove(files)

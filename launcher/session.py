"""Sessions as such: their names, folders, environment variables, and what must not outlive them.

SESSION-1 (by session): clean-up knows a session by its folder's lock, by the kernel's session id of its node process, and
by ``HPC_RAY_SESSION`` in the environment; never by the name of a program.
SESSION-2 (who removes): each node removes its own folder; whoever removes the last one of a host removes the session's.
SESSION-3 (steps of other hosts): ranks that a job step has here end with the host's last node, before what MPI leaves is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import mpi_files

SESSION_VARIABLE = "HPC_RAY_SESSION"  # in the environment of every process of a node
NODE_VARIABLE = "HPC_RAY_NODE"
ADDRESS_VARIABLE = "HPC_RAY_ADDRESS"  # which session ``attach`` takes

# What an MPI launcher leaves in the environment. Workers must not see it: a program that they start would believe to
# be a rank of our world.
_LAUNCHER_PREFIXES = (
    "PMI_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL", "MPIR_CVAR_", "HYDRA_", "HYDI_", "PMI2_",
    "MPIEXEC_", "I_MPI_", "MV2_COMM", "HPC_RAY_LAUNCH_",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS", "SLURM_TASK_PID",  # which of srun's tasks; of the job and step it may know
)  # fmt: skip
# How a launcher reaches other hosts here: its job steps over several hosts need that too.
REACH = (
    "PRTE_MCA_plm_ssh_agent", "PRTE_MCA_plm_ssh_args", "OMPI_MCA_plm_rsh_agent", "OMPI_MCA_plm_rsh_args",
    "HYDRA_LAUNCHER", "HYDRA_LAUNCHER_EXEC", "HYDRA_BOOTSTRAP", "HYDRA_BOOTSTRAP_EXEC", "HYDRA_IFACE",
)  # fmt: skip
_KEPT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", *REACH)
_MOMENT = "session_%Y-%m-%d_%H-%M-%S"  # how the names of sessions begin
_MOMENT_ENDS = len("session_2026-01-31_23-59-59")
_GRACE_S = 60.0
_STARTING_S = 3600.0  # for the first node of a session to be there, after its launcher
_INSTANT_S = 0.2  # between a parent's end and that of a child which is killed with it
_KILL_S = 5.0  # for killed processes to be gone, on a busy host
_LAUNCHERS = "launchers"  # beside the nodes' folders: what MPI launchers keep of the session itself, and of steps on other hosts
_RANK_VARIABLES = (b"OMPI_COMM_WORLD_RANK", b"PMIX_RANK", b"PMI_RANK")  # in the environment of what an MPI launcher starts


def scrubbed_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without launcher variables and without another session's."""
    source = dict(os.environ if environment is None else environment)
    for name in list(source):
        if name.startswith(_LAUNCHER_PREFIXES) and name not in _KEPT:
            del source[name]
    for name in (SESSION_VARIABLE, NODE_VARIABLE, "NOTIFY_SOCKET"):
        source.pop(name, None)
    return source


def new_name() -> str:
    """Sorts by time; unique: uid is in the folder and socket name, job and step are here."""
    job = os.environ.get("SLURM_JOB_ID", "")
    step = os.environ.get("SLURM_STEP_ID", "")
    where = f"_job{job}.{step}" if job else ""
    now = time.time()
    moment = time.strftime(_MOMENT, time.localtime(now))
    return f"{moment}_{int(now % 1 * 1e6):06d}{where}_{secrets.token_hex(4)}"


def base_dir() -> str:
    """Node-local folder of all our sessions of this user; made if absent.

    Raises:
        LaunchError: no folder can be written, or it belongs to someone else.
    """
    problems = []
    for parent in (os.environ.get("SLURM_TMPDIR"), os.environ.get("TMPDIR"), "/tmp"):
        if not parent or not os.path.isdir(parent):
            continue
        path = os.path.join(parent, f"hpc_ray-{os.getuid()}")
        try:
            status = _make_base(path)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise LaunchError(f"{path} is not a folder of this user; remove it or set TMPDIR")
            if status.st_mode & 0o077:
                os.chmod(path, 0o700)
            return path
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    raise LaunchError("no folder for session files; set TMPDIR to a writable one. Tried " + "; ".join(problems))


def _make_base(path: str) -> os.stat_result:
    """Others remove it when it is empty, also between our making of it and our look at it."""
    for _ in range(1000):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        with contextlib.suppress(FileNotFoundError):
            return os.lstat(path)
    raise FileNotFoundError(errno.ENOENT, "it is removed as often as it is made", path)


def make_dir(session: str, node: int) -> tuple[str, int]:
    """The folder of one node and the descriptor whose lock says that it is in use."""
    for _ in range(100):
        path = os.path.join(base_dir(), session, f"node-{node}")
        try:
            try:
                os.mkdir(os.path.dirname(path), 0o700)
            except FileExistsError:
                pass
            os.mkdir(path, 0o700)
            os.mkdir(os.path.join(path, "logs"), 0o700)
            lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)  # it is new: none but a ``sweep`` that looks at it holds it, for an instant
            return path, lock
        except FileNotFoundError:  # a node that ended just now took the empty parent away
            continue
    raise LaunchError(f"cannot make the session folder {path}")


def worker_log(folder: str, pid: int, suffix: str) -> str:
    """Where what a worker prints is noted down: ``out`` or ``err``. ``folder``: the node's."""
    return f"{folder}/logs/worker-{pid}.{suffix}"


def launchers_dir(session: str) -> str:
    """What MPI launchers keep for a session's ranks on a host. They make it; the host's last node removes what they leave."""
    return os.path.join(base_dir(), session, _LAUNCHERS)


def remove_launchers(session: str) -> None:
    """What they have left on this host, once they have ended."""
    remove_dir(launchers_dir(session))


def launcher_variables(folder: str) -> dict[str, str]:
    """That have Open MPI's launcher, of version 5 and of 4, keep its files there."""
    return dict.fromkeys(("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base"), folder)


def remove_dir(path: str) -> None:
    """A folder in a session's, and the folders above it that are empty then (SESSION-2)."""
    shutil.rmtree(path, ignore_errors=True)
    for parent in (os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
        try:
            os.rmdir(parent)
        except FileNotFoundError:
            continue
        except OSError:
            break


def remove_node(path: str, since: float) -> None:
    """A node's session folder, and with the last one on this host what job steps have here, which began after ``since``."""
    shutil.rmtree(path, ignore_errors=True)
    above = os.path.dirname(path)
    if not _nodes(above):
        _kill(lambda: _ranks(os.path.basename(above)))
        mpi_files.Leftovers(since).remove()
        shutil.rmtree(os.path.join(above, _LAUNCHERS), ignore_errors=True)
    remove_dir(path)


def has_nodes(session: str) -> bool:
    """Whether it has some on this host, be it at their end."""
    return bool(_nodes(os.path.join(base_dir(), session)))


def _nodes(path: str) -> list[str]:
    """The nodes' folders in a session's."""
    return [name for name in _entries(path) if name.startswith("node-")]


def sweep() -> list[str]:
    """Removes what dead sessions of this user left behind, processes first; the names of those sessions."""
    removed = []
    since = time.time()
    base = base_dir()
    for session in _entries(base):
        for node in _nodes(os.path.join(base, session)):
            path = os.path.join(base, session, node)
            if _is_stale(path):
                since = min(since, _named_at(session))
                try:
                    with open(os.path.join(path, "lock")) as file:
                        note = json.loads(file.read() or "{}")
                except (OSError, ValueError):
                    note = {}
                leader = int(note.get("pid", 0))
                if process_start(leader) not in (0, note.get("start")):
                    leader = 0  # the number is another process's by now
                kill_leftovers(session, node.removeprefix("node-"), leader)
                mpi_files.remove(note.get("files", ()))
                if note.get("folder"):
                    remove_dir(note["folder"])
                remove_node(path, _named_at(session))
                removed.append(session)
        path = os.path.join(base, session)
        try:
            age_s = time.time() - os.stat(path).st_mtime
            if age_s > _STARTING_S and not _nodes(path):
                shutil.rmtree(path, ignore_errors=True)
            elif age_s > _GRACE_S:
                os.rmdir(path)
        except OSError:
            pass
    try:
        os.rmdir(base)
    except OSError:
        pass  # others are in there
    if removed:
        mpi_files.Leftovers(since).remove()
    return removed


def _entries(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _named_at(session: str) -> float:
    """The moment in a session's name."""
    try:
        return time.mktime(time.strptime(session[:_MOMENT_ENDS], _MOMENT))
    except ValueError:
        return time.time()


def _is_stale(path: str) -> bool:
    try:
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        try:  # being made just now, or never finished
            return time.time() - os.stat(path).st_mtime > _GRACE_S
        except OSError:
            return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock).st_nlink > 0 and (os.fstat(lock).st_size > 0 or time.time() - os.fstat(lock).st_mtime > _GRACE_S)
    except OSError:
        return False
    finally:
        os.close(lock)


def note_leader(lock: int, pid: int, files: Iterable[str] = (), folder: str = "") -> None:
    """Writes into the lock file who leads the node, and what outside of its folder goes with it: files in shared memory, and the
    folder of spilled objects. For ``sweep``."""
    text = json.dumps({"pid": pid, "start": process_start(pid), "files": list(files), "folder": folder}).encode()
    os.pwrite(lock, text, 0)
    os.ftruncate(lock, len(text))


# ------------------------------------------------------------------ processes


def _stat_fields(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks, 0 if it is gone."""
    fields = _stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def children(pid: int) -> list[int]:
    """Direct children of our own process ``pid``."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found.extend(map(int, file.read().split()))
        return found
    except OSError:
        return [p for p in _processes() if (f := _stat_fields(p)) and int(f[1]) == pid]


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment_text(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:
        return b""


def environment_of(pid: int) -> dict[bytes, bytes]:
    """What a process of ours was started with; empty if it cannot be read."""
    return _parsed(_environment_text(pid))


def _parsed(text: bytes) -> dict[bytes, bytes]:
    pairs = (item.partition(b"=") for item in text.split(b"\0"))
    return {name: value for name, _, value in pairs if name}


def members(session: str, node: str = "", leader: int = 0) -> list[int]:
    """Processes of a session (of one node of it): by environment, and by the kernel's session of its node process."""
    return [pid for pid, _ in _members(session, node, leader)]


def _members(session: str, node: str = "", leader: int = 0) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """With their environments."""
    wanted = session.encode()
    mark = b"\0%s=%s\0" % (SESSION_VARIABLE.encode(), wanted)
    for pid in _processes():
        if pid == os.getpid():
            continue
        try:
            in_session = leader != 0 and os.getsid(pid) == leader and leader != os.getsid(0)
        except OSError:
            continue  # it is gone
        text = _environment_text(pid)
        if not in_session and mark not in b"\0" + text:
            continue
        fields, variables = _stat_fields(pid), _parsed(text)
        if not fields or fields[0] == "Z":
            continue
        is_marked = variables.get(SESSION_VARIABLE.encode()) == wanted
        if (in_session and _may_be_of(pid, variables, wanted)) or (
            is_marked and (not node or variables.get(NODE_VARIABLE.encode()) == node.encode())
        ):
            yield pid, variables


def _may_be_of(pid: int, variables: dict[bytes, bytes], session: bytes) -> bool:
    """Whether a process in a kernel's session of this number can be of ours: a number that has come again may be another one's by now."""
    try:
        same = os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False  # it is gone, or somebody else's
    return same and variables.get(SESSION_VARIABLE.encode(), session) == session


def _ranks(session: str) -> list[int]:
    """Ranks on this host of job steps below a session (``steps``), whichever of its hosts they were started from."""
    return [pid for pid, variables in _members(session) if any(name in variables for name in _RANK_VARIABLES)]


def kill_leftovers(session: str, node: str = "", leader: int = 0) -> int:
    """SIGKILLs all processes of a session's node until none is left; how many there were."""
    return _kill(lambda: members(session, node, leader))


def _kill(look: Callable[[], list[int]]) -> int:
    """Until all are gone: a process that is killed has its memory and files until it gets a CPU once more."""
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_S
    while (pids := look()) and time.monotonic() < deadline:
        killed.update(pids)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.01)
    return len(killed)


def death_text(name: str, process: subprocess.Popen[bytes]) -> str:
    """Which signal has killed a child of ours; "" where none has, also not within an instant."""
    try:
        code = process.wait(_INSTANT_S)
    except subprocess.TimeoutExpired:
        return ""
    return f"{name} was killed by {signal.Signals(-code).name} (pid {process.pid})" if code < 0 else ""


def of_our_job(names: Iterable[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Those of the sessions that this process may mean without naming them: in a Slurm job the job's own, elsewhere all. Each once, in
    their order. A host may have several jobs of this user, which shall not meet (``new_name`` writes the job into the name)."""
    job = (os.environ if environment is None else environment).get("SLURM_JOB_ID", "")
    return [name for name in dict.fromkeys(names) if not job or f"_job{job}." in name]


def running() -> list[tuple[str, int]]:
    """(session, node) of this user's nodes on this host, oldest first: whose socket listens."""
    prefix = f"@hpc_ray/{os.getuid()}/"
    found = set()
    try:
        with open("/proc/net/unix") as file:
            for line in file:
                words = line.split()
                if len(words) > 7 and words[7].startswith(prefix) and words[3] == "00010000":
                    session, _, node = words[7].removeprefix(prefix).rpartition("/")
                    if session and node.isdigit():
                        found.add((session, int(node)))
    except OSError:
        pass
    return sorted(found)

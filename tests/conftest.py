"""What tests of all tiers use: sessions, and proof that a session left nothing behind.

Nothing of hpc_ray is imported here before a fixture needs it: the pure tests run without the native core.

Processes of ours are known by ``MARK`` in their environment, which everything inherits that is started from here; session
folders by lying in this run's own ``TMPDIR``. So other programs of this user, and other test runs, are not in the way.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cloudpickle
import pytest

# Workers cannot import conftest.py; what it defines travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MARK = "HPC_RAY_TEST_RUN"
GONE_S = 15.0  # how long what a session leaves may take to go


@pytest.fixture(scope="session", autouse=True)
def own_world() -> Iterator[Path]:
    """A folder for this run's session files, and the mark by which its processes are known. Not what ``tmp_path`` uses, as
    names of sockets and sessions should stay short."""
    folder = Path(tempfile.mkdtemp(prefix="hrt-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, f"{os.getpid()}-{time.time_ns()}")
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("HPC_RAY_CONFIG", "")  # no file of this user's or site's
        for name in ("HPC_RAY_ADDRESS", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Process(NamedTuple):
    pid: int
    started: int  # clock ticks since boot: a pid may come again
    state: str
    title: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.state}) {self.title}"


def _process(pid: str) -> Process:
    stat = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(int(pid), int(stat[19]), stat[0], command)


def our_processes() -> set[Process]:
    """All living and dead-but-not-awaited processes that descend from this one, and are not it."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    me = str(os.getpid())
    found = set()
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or pid == me:
            continue
        try:
            parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
            if parent == me or mark in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
                found.add(_process(pid))
        except (OSError, IndexError):  # it is gone, or somebody else's
            continue
    return found


def session_folders() -> set[str]:
    base = Path(os.environ["TMPDIR"], f"hpc_ray-{os.getuid()}")
    return {str(path) for path in base.glob("*/*")} if base.is_dir() else set()


def shared_memory() -> set[str]:
    """Files that an MPI library or we have made there; torch and multiprocessing keep their own."""
    kinds = ("hpc_ray", "sm_segment.", "open_mpi.", "mpich_shm_", "ucx_shm_")
    return {name for name in os.listdir("/dev/shm") if name.startswith(kinds)}


def open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listdir used
    return found


class Traces(NamedTuple):
    """What a session could leave behind."""

    processes: set[Process]
    folders: set[str]
    memory: set[str]
    files: dict[int, str]

    @classmethod
    def now(cls) -> Traces:
        return cls(our_processes(), session_folders(), shared_memory(), open_files())

    def beyond(self, before: Traces) -> list[str]:
        """In words, what is here and was not there. Processes are the same ones when pid and start are."""
        old = {process[:2] for process in before.processes}
        left = [f"process {process}" for process in self.processes if process[:2] not in old]
        left += [f"session folder {folder}" for folder in self.folders - before.folders]
        left += [f"file in /dev/shm: {name}" for name in self.memory - before.memory]
        # The mapped memory of a node stays while anything refers to its session: test_session.py, test_memory_goes_…
        files = {fd: name for fd, name in self.files.items() if "memfd:hpc_ray " not in name}
        left += [f"open file {fd}: {name}" for fd, name in files.items() if before.files.get(fd) != name]
        return left


def await_true(condition: Callable[[], Any], what: str = "", timeout_s: float = 30.0) -> Any:
    """Poll until the condition holds; its value. For what cannot be awaited as an event."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(0.005)
    return value


def _check_no_leaks(before: Traces) -> None:
    gc.collect()
    deadline = time.monotonic() + GONE_S
    while left := Traces.now().beyond(before):
        assert time.monotonic() < deadline, "left behind:\n  " + "\n  ".join(left)
        time.sleep(0.02)


@pytest.fixture
def no_leaks(own_world: Path) -> Iterator[None]:
    """After the test: no process, zombie, session folder, shared memory or open file that was not there before."""
    before = Traces.now()
    yield
    _check_no_leaks(before)


@pytest.fixture(scope="module")
def no_leaks_in_module(own_world: Path) -> Iterator[None]:
    """The same for a file whose tests share a session."""
    before = Traces.now()
    yield
    _check_no_leaks(before)


@pytest.fixture
def cluster(no_leaks: None) -> Iterator[ModuleType]:
    """A session of its own: one node with four CPUs. The value is the module ``hpc_ray``."""
    import hpc_ray

    hpc_ray.init(num_cpus=4, log_to_driver=False)
    yield hpc_ray
    hpc_ray.shutdown()


@pytest.fixture(scope="module")
def shared_cluster(no_leaks_in_module: None) -> Iterator[ModuleType]:
    """The same for all tests of a file, which must leave it as they found it. At the end nothing is held any more."""
    import hpc_ray

    hpc_ray.init(num_cpus=4, resources={"slot": 2}, log_to_driver=False)
    yield hpc_ray
    hpc_ray.shutdown()


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """``eventually(condition, what)``: see ``await_true``."""
    return await_true


class Gate:
    """Holds tasks back until it is opened, and tells who has come. Works between processes by files, so what a process said
    stays said when it is killed. Tasks take it as an argument."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def arrive(self, name: str = "") -> None:
        """Say that this process is here."""
        fd, _ = tempfile.mkstemp(prefix=f"{name}.", suffix=".here", dir=self.folder)
        os.write(fd, str(os.getpid()).encode())
        os.close(fd)

    def arrived(self, name: str = "") -> int:
        return sum(entry.startswith(f"{name}.") and entry.endswith(".here") for entry in os.listdir(self.folder))

    def pids(self, name: str = "") -> list[int]:
        """Of those who came, the earliest first."""
        paths = sorted(Path(self.folder).glob(f"{name}.*.here"), key=lambda path: path.stat().st_mtime_ns)
        return [int(text) for path in paths if (text := path.read_text())]

    def open(self, name: str = "") -> None:
        Path(self.folder, f"{name}.open").touch()

    def is_open(self, name: str = "") -> bool:
        return os.path.exists(os.path.join(self.folder, f"{name}.open"))

    def wait(self, name: str = "", timeout_s: float = 60.0) -> str:
        """Arrive, and stay until the gate is opened."""
        self.arrive(name)
        deadline = time.monotonic() + timeout_s
        while not self.is_open(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate {name!r} was not opened")
            time.sleep(0.002)
        return "passed"

    def await_arrivals(self, count: int, name: str = "") -> None:
        deadline = time.monotonic() + 30.0
        while (here := self.arrived(name)) < count:
            assert time.monotonic() < deadline, f"{here} of {count} came to gate {name!r}"
            time.sleep(0.002)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """See ``Gate``. Opened at the end, so that no task of a failed test stays."""
    made = Gate(tmp_path)
    yield made
    made.open()

"""What MPI leaves in shared memory: found and removed, and never what a process uses."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_ray.exceptions import LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import mpi_files, session, world

pytestmark = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm here")
# Has a file open or mapped, says so, and has it until its input ends.
USER = """
import mmap, sys
how, path = sys.argv[1:]
file = open(path, "r+b")
if how == "mapped":
    kept = mmap.mmap(file.fileno(), 0)
    file.close()
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["/dev/shm/mpich_shm_", "/tmp/hydra_hwloc_xmlfile_"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A file as MPICH makes them."""
    path = Path(f"{request.param}{os.getpid():x}{time.monotonic_ns():x}")
    path.write_bytes(bytes(mmap.PAGESIZE))
    yield str(path)
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["mapped", "open"])
def test_removed_with_its_last_user(how: str, path: str):
    leftovers = mpi_files.Leftovers(os.stat(path).st_ctime)
    with subprocess.Popen([sys.executable, "-S", "-c", USER, how, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout.readline() == b"up\n"
        for _ in range(2):
            assert path not in leftovers.remove() and os.path.exists(path)
        user.communicate()
    assert path in leftovers.remove() and not os.path.exists(path)
    assert path not in leftovers.remove()


def test_the_next_user_is_found(path: str):
    leftovers = mpi_files.Leftovers(os.stat(path).st_ctime)
    command = [sys.executable, "-S", "-c", USER, "mapped", path]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for user in users:
        assert user.stdout.readline() == b"up\n"
    for user in users:
        leftovers.remove()
        assert os.path.exists(path)
        user.communicate()
    leftovers.remove()
    assert not os.path.exists(path)


def test_older_files_and_those_of_others_stay(path: str):
    other = Path(mpi_files.SHARED_MEMORY, f"not_of_mpi_{os.getpid()}")
    other.touch()
    try:
        mpi_files.Leftovers(time.time() + 1).remove()
        assert os.path.exists(path)
        mpi_files.Leftovers(os.stat(path).st_ctime).remove()
        assert not os.path.exists(path) and other.exists()
    finally:
        other.unlink()


@pytest.mark.parametrize("path", ["/dev/shm/mpich_shm_"], indirect=True)
def test_paths_elsewhere_are_not_removed(tmp_path: Path, path: str):
    (tmp_path / "mine").touch()
    mpi_files.remove([str(tmp_path / "mine"), f"{mpi_files.SHARED_MEMORY}..{tmp_path}/mine", path, path])
    assert (tmp_path / "mine").exists() and not os.path.exists(path)


# Removes what it has itself, once it is up.
ROBBED = """
import sys
from mpi4py import MPI
from hpc_ray.launcher import mpi_files
world = MPI.COMM_WORLD
world.barrier()
files = mpi_files.of_rank(world.rank, everything=True)
world.barrier()
mpi_files.remove(files)
world.barrier()
had = world.Dup().gather(len(files))
if world.rank == 0:
    print(min(had) > 0)
"""


def test_a_running_mpi_does_without_the_names():
    """Which is why those of programs that we cannot see may be removed."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    try:
        mpirun = world.find_mpirun()
    except LaunchError:
        pytest.skip("no mpirun is installed")
    line = world.mpirun_command(mpirun, 2, python_command("-c", ROBBED), passed=())
    done = subprocess.run(line, env=world.own_host_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["True"]), done


TOPOLOGIES = "/tmp/hydra_hwloc_xmlfile_"
# Rank 1 is not the launcher's child, as where init() is called in a rank.
UP = f"""
import glob, os, sys
if os.environ.get("PMI_RANK") == "1" and os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
from mpi4py import MPI
from hpc_ray.launcher import mpi_files
world = MPI.COMM_WORLD
world.barrier()
before = set(glob.glob("{TOPOLOGIES}*"))
world.barrier()
if world.rank == 1:
    mpi_files.remove_topology()
    print(*before - set(glob.glob("{TOPOLOGIES}*")))
"""


def test_the_topology_goes_when_all_ranks_are_up():
    """The launcher's own, and no other one, though others are of the same user and time."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    try:
        mpirun = world.find_mpirun()
    except LaunchError:
        pytest.skip("no mpirun is installed")
    if mpirun.family != "mpich":
        pytest.skip("only MPICH's launcher has such a file")
    line = world.mpirun_command(mpirun, 2, python_command("-c", UP), passed=())
    other = Path(f"{TOPOLOGIES}{os.getpid():x}")
    with other.open("w"):
        done = subprocess.run(line, env=world.own_host_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and not done.stderr, done
    removed = done.stdout.split()
    assert removed and str(other) not in removed and other.exists()
    other.unlink()


@pytest.mark.each_mpi
def test_a_session_has_no_topology_to_leave(own_world):
    """Once it is up, so that none stays when everything is killed."""
    import hpc_ray

    hpc_ray.init(num_nodes=2, num_cpus=1)
    try:
        run = os.environ["HPC_RAY_TEST_RUN"].encode()
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if session.environment_of(pid).get(b"HPC_RAY_TEST_RUN") == run:
                assert not [path for path in mpi_files._opened_by(pid) if path.startswith(TOPOLOGIES) and os.path.exists(path)]
    finally:
        hpc_ray.shutdown()

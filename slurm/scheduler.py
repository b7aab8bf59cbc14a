"""Slurm itself, by its own programs: to submit, to ask, to cancel. The one module here that starts processes.

SLURM-1 (Slurm's words): what a program of Slurm complains of is passed on as it is, with what can be done about it.
SLURM-2 (few questions): one question for each look at a job, whatever the number of its nodes.
"""

from __future__ import annotations

import getpass
import os
import subprocess

from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.slurm import commands
from hpc_ray.slurm.commands import JobState

_TIMEOUT_S = 60.0


class SlurmError(LaunchError):
    """A program of Slurm is missing or has refused."""


class Unreachable(SlurmError):
    """slurmctld did not answer; it may, later."""


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Without an outer job's variables: sbatch would take some for its own options. A pure function."""
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SLURMD_")) or name in kept}


def run(command: list[str], *, given: str | None = None, timeout_s: float = _TIMEOUT_S) -> str:
    """What it printed.

    Raises:
        Unreachable: slurmctld does not answer now.
        SlurmError: it is not there, or it failed; with its words.
    """
    try:
        ended = subprocess.run(
            command,
            input=given,
            stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=clean(dict(os.environ)),
        )
    except FileNotFoundError:
        raise SlurmError(
            f"there is no {command[0]} on PATH: this is not a host of a Slurm cluster, or its module is not loaded. Without "
            "Slurm, `hpc-ray run` starts a script here; `hpc-ray submit --dry-run` prints the batch script for another place"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} has not answered within {timeout_s:g} s") from None
    if ended.returncode:
        words = ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}"
        kind = Unreachable if is_transient(words) else SlurmError
        raise kind(f"{command[0]} says: {words}")
    return ended.stdout if command != commands.mpi_list_command() else ended.stdout + ended.stderr


def is_transient(words: str) -> bool:
    """Whether a complaint is one of a busy or restarting slurmctld. A pure function."""
    signs = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes", "temporarily unable")
    return any(sign.lower() in words.lower() for sign in signs)


_ADVICE = (
    ("partition", "sinfo", "These partitions are there (--partition):"),
    ("feature specification", "", "Features of nodes: `sinfo --format='%f %N'` (--constraint)"),
    ("account", "", "Your accounts: `sacctmgr show associations user=$USER format=account,partition,qos` (--account)"),
    ("qos", "", "Your accounts: `sacctmgr show associations user=$USER format=account,partition,qos` (--qos)"),
    ("node count", "sinfo", "These partitions are there; ask for fewer nodes, or others (--nodes, --partition):"),
    ("node configuration is not available", "sinfo", "No node has so much. These partitions are there:"),
    ("time limit", "sinfo", "These partitions are there, each with its longest time (--time):"),
    ("generic resource", "sinfo", "These partitions are there, with their GPUs (--gpus-per-node):"),
    ("memory", "sinfo", "These partitions are there (--mem is for each node):"),
    ("dependency", "", "A dependency reads like afterok:12345 (--dependency)"),
)


def advice_for(words: str) -> tuple[str, str]:
    """For a complaint of sbatch: what to ask Slurm ("" or "sinfo"), and what to say. A pure function."""
    for sign, question, text in _ADVICE:
        if sign in words.lower():
            return question, text
    return "", ""


def submit(script: str) -> str:
    """Gives the script to sbatch; the job's id.

    Raises:
        SlurmError: as ``run``, with what could be asked for instead.
    """
    try:
        printed = run(commands.sbatch_command(), given=script)
    except Unreachable:
        raise
    except SlurmError as error:
        question, text = advice_for(str(error))
        if question:
            try:
                text += "\n" + commands.read_sinfo(run(commands.sinfo_command()))
            except SlurmError:
                pass
        raise SlurmError(f"{error}" + (f"\n{text}" if text else "")) from None
    job = commands.read_sbatch(printed)
    if not job:
        raise SlurmError(f"sbatch has not said the job's id; it printed: {printed.strip()!r}")
    return job


def states(job: str) -> list[JobState]:
    """The job, or each task of an array; what has ended and was forgotten comes from the accounts.

    Raises:
        SlurmError: nobody knows the job; names the jobs of this user that there are.
        Unreachable: as ``run``.
    """
    if not commands.JOB_ID.fullmatch(job):
        raise ConfigurationError(f"{job!r} is not the id of a Slurm job, like 1234 or 1234_5")
    try:
        found = commands.read_scontrol(run(commands.scontrol_command(job)))
    except Unreachable:
        raise
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        found = []
    if found:
        return found
    try:
        found = commands.read_sacct(run(commands.sacct_command(job)))
        why = "it never was, or it is older than what sacct knows"
    except SlurmError as error:
        if "disabled" not in str(error):
            raise
        why = "it never was, or it ended a while ago (this cluster keeps no accounts)"
    if not found:
        try:
            mine = run(commands.squeue_command(getpass.getuser())).split("\n")
        except SlurmError:
            mine = []
        waiting = ", ".join(line.strip() for line in mine if line.strip()) or "none"
        raise SlurmError(f"Slurm does not know the job {job}: {why}. Your jobs now: {waiting}")
    return found


def cancel(job: str) -> None:
    """scancel. Raises SlurmError."""
    if not commands.JOB_ID.fullmatch(job):
        raise ConfigurationError(f"{job!r} is not the id of a Slurm job, like 1234 or 1234_5")
    run(commands.scancel_command(job))


def mpi_types() -> list[str]:
    """What srun's --mpi may be here. Raises SlurmError."""
    return commands.read_mpi_list(run(commands.mpi_list_command()))

"""Command lines of Slurm's programs, and what they print, read. Pure.

One ``scontrol show job`` has state, reason, exit code, nodes and the output file of a job that slurmctld still knows; sacct
knows the older ones where the site keeps accounts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

JOB_ID = re.compile(r"\d+(_\d+)?")

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING",
          "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "REQUEUE_FED")  # fmt: skip
# Why a job waits that will not start by itself, and what to do.
STUCK = {
    "PartitionNodeLimit": "the partition has not so many nodes: cancel it and ask for fewer, or another --partition",
    "PartitionTimeLimit": "the partition's limit is shorter: cancel it and give a shorter --time",
    "PartitionDown": "the partition is down; see sinfo",
    "PartitionInactive": "the partition takes no jobs now; see sinfo",
    "BadConstraints": "no node has all that was asked for: cancel it and ask for less",
    "DependencyNeverSatisfied": "what it waits for has failed: cancel it",
    "AccountNotAllowed": "the partition does not take this --account",
    "JobHeldUser": "it is held; `scontrol release` lets it go",
    "JobHeldAdmin": "it is held by the administrators",
}
SACCT_FIELDS = ("JobID", "State", "ExitCode", "NodeList", "Elapsed", "Timelimit", "WorkDir", "JobName")


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array."""

    job: str  # "12", or "12_3" in an array
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED …
    reason: str = ""
    code: int = 0  # of the batch script
    signal: int = 0  # that ended it
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    start: str = ""  # when Slurm expects a pending job to start
    output: str = ""
    name: str = ""

    @property
    def active(self) -> bool:
        """Whether it still waits, runs or ends."""
        return self.state in ACTIVE

    @property
    def exit_code(self) -> int:
        """What a shell would say of it: 0 only when all is well."""
        if self.code or self.signal:
            return self.code or 128 + self.signal
        return 0 if self.state == "COMPLETED" else 1

    def describe(self) -> str:
        """One line."""
        parts = [f"job {self.job}", self.state]
        if self.reason:
            hint = STUCK.get(self.reason) if self.state == "PENDING" else None
            parts.append(f"({self.reason}: {hint})" if hint else f"({self.reason})")
        if self.state == "PENDING" and self.start:
            parts.append(f"expected to start at {self.start}")
        if self.nodes:
            parts.append(f"on {self.nodes}")
        if self.state not in ("PENDING", "CONFIGURING") and self.elapsed:
            parts.append(f"for {self.elapsed}" + (f" of {self.limit}" if self.limit else ""))
        if not self.active and (self.code or self.signal):
            parts.append(f"signal {self.signal}" if self.signal and not self.code else f"exit code {self.code}")
        return " ".join(parts)


def sbatch_command() -> list[str]:
    """The script comes by stdin. Slurm's variables of an outer job are not wished for: see ``scheduler.clean``."""
    return ["sbatch", "--parsable"]


def scontrol_command(job: str) -> list[str]:
    return ["scontrol", "--oneliner", "show", "job", job]


def sacct_command(job: str) -> list[str]:
    return ["sacct", f"--jobs={job}", "--allocations", "--noheader", "--parsable2", f"--format={','.join(SACCT_FIELDS)}"]


def squeue_command(user: str) -> list[str]:
    """The jobs of a user that wait or run: what could be meant, where a job is not found."""
    return ["squeue", "--noheader", f"--user={user}", "--format=%i %j"]


def jobs_named_command(user: str, name: str) -> list[str]:
    """The jobs of a user with this name that wait or run."""
    return ["squeue", "--noheader", f"--user={user}", f"--name={name}", "--format=%i %T"]


def read_squeue(text: str) -> dict[str, str]:
    """Job → state, of those that are not at their end."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[1] in ACTIVE and row[1] != "COMPLETING"}


def scancel_command(job: str, signal: str = "") -> list[str]:
    return ["scancel", *([f"--signal={signal}"] if signal else []), job]


def sinfo_command() -> list[str]:
    return ["sinfo", "--noheader", "--format=%R|%a|%l|%D|%c|%m|%G"]


def mpi_list_command() -> list[str]:
    return ["srun", "--mpi=list"]


def version_command() -> list[str]:
    return ["scontrol", "--version"]


def config_command() -> list[str]:
    return ["scontrol", "show", "config"]


def one_on_each_node(nodes: int, mpi: str, command: list[str]) -> list[str]:
    """A step with one rank on each node of the job that this is in, beside whatever else runs in it."""
    return ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--mpi={mpi}", *command]


def read_version(text: str) -> str:
    """ "slurm 23.11.4", "slurm-wlm 22.05.8"."""
    found = re.search(r"\d+\.\d+[\w.-]*", text)
    return found.group() if found else ""


def read_config(text: str) -> dict[str, str]:
    """``scontrol show config``: "KillWait                = 30 sec"."""
    return dict(re.findall(r"^(\w+)\s+= (.*\S)", text, re.MULTILINE))


def read_sbatch(text: str) -> str:
    """The job's id; "" where there is none."""
    found = re.search(r"^(\d+)(;.*)?$", text, re.MULTILINE)  # ID;CLUSTER in a federation
    return found.group(1) if found else ""


def read_scontrol(text: str) -> list[JobState]:
    """A line for each task of an array."""
    states = []
    for line in text.splitlines():
        # Values may hold blanks and equal signs; a name starts behind a blank and has neither.
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s[A-Za-z][\w:/]*=|$)", line))
        if "JobId" not in fields:
            continue
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        job = fields["JobId"]
        if fields.get("ArrayJobId") and fields.get("ArrayTaskId"):
            job = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
        states.append(
            JobState(
                job,
                fields.get("JobState", "UNKNOWN"),
                _said(fields.get("Reason", "")),
                int(code or 0),
                int(number or 0),
                _said(fields.get("NodeList", "")),
                _said(fields.get("RunTime", "")),
                "" if fields.get("TimeLimit") in ("UNLIMITED", "Partition_Limit") else _said(fields.get("TimeLimit", "")),
                _said(fields.get("StartTime", "")),
                _said(fields.get("StdOut", "")),
                _said(fields.get("JobName", "")),
            )
        )
    return sorted(states, key=lambda state: [int(number) for number in re.findall(r"\d+", state.job)])


def read_sacct(text: str) -> list[JobState]:
    states = []
    for line in text.splitlines():
        values = line.strip().split("|")
        if len(values) != len(SACCT_FIELDS) or not JOB_ID.match(values[0]):
            continue
        job, state, exit_code, nodes, elapsed, limit, folder, name = values
        code, _, number = exit_code.partition(":")
        states.append(
            JobState(
                job,
                state.split()[0],  # "CANCELLED by 1000"
                code=int(code or 0),
                signal=int(number or 0),
                nodes="" if nodes.startswith("None") else nodes,
                elapsed=elapsed,
                limit="" if limit in ("UNLIMITED", "Partition_Limit") else limit,
                output=f"{folder}/hpc-ray-{job}.out",
                name=name,
            )
        )
    return states


def _said(value: str) -> str:
    return "" if value in ("None", "(null)", "Unknown", "N/A") else value


def read_sinfo(text: str) -> str:
    """Partitions, one line each, for people."""
    lines = []
    for line in text.splitlines():
        values = line.strip().split("|")
        if len(values) == 7:
            name, up, limit, nodes, cpus, memory, gres = values
            gpus = "" if gres in ("(null)", "") else f", {gres}"
            closed = "" if up == "up" else f", {up}"
            lines.append(f"  {name}: {nodes} nodes of {cpus} CPUs and {memory} MB{gpus}, at most {limit}{closed}")
    return "\n".join(lines)


def read_mpi_list(text: str) -> list[str]:
    """Names of what ``srun --mpi=`` takes, from what it prints, which differs between versions."""
    found: list[str] = []
    for line in text.splitlines():
        line = line.removeprefix("srun: ").strip()
        head, colon, tail = line.partition(":")
        if colon:
            found += re.findall(r"\bpmix_v\d+\b", tail)
        elif re.fullmatch(r"[a-z]\w*", head):
            found.append(head)
    return found

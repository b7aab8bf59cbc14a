"""``hpc-ray autoscale``: nodes come as further Slurm jobs that join a running cluster, and go when they are idle.

Looks at the cluster, as a process on one of its nodes, and at Slurm; ``elastic`` decides; what it decides is done here.

AUTOSCALE-1 (no state of its own): which jobs are ours says their name, which node a job has brought says the node's label. So this
command may be ended and started again.
AUTOSCALE-2 (the end): with the session, jobs that still wait are cancelled; the others end by themselves. When this command is ended
before, jobs that wait are cancelled too, and nodes that are there stay.
"""

from __future__ import annotations

import getpass
import os
import signal
import time
from typing import Any

import click

from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.ids import GCS_ADDRESS, raylet_address
from hpc_ray.launcher import local, member, parameters, session
from hpc_ray.launcher.attachment import Attachment
from hpc_ray.launcher.elastic import Autoscaler, Demand, Limits, Node, Seen, Steps
from hpc_ray.launcher.submission import complete
from hpc_ray.protocol import UNIT, NodeInfo, Resources
from hpc_ray.slurm import commands, job, scheduler
from hpc_ray.version import __version__

JOB_LABEL = "hpc-ray/slurm-job"  # of a node: the job that has brought it
_LOOK_S = 1.0
_SLURM_S = 5.0  # between questions to Slurm, while jobs wait or start
_SLURM_IDLE_S = 30.0  # and else
_ANSWER_S = 10.0


class SessionEnded(Exception):
    """Says how."""


class Cluster:
    """The running cluster, asked from one of its nodes."""

    def __init__(self, attachment: Attachment):
        self._attachment = attachment

    def ask(self, questions: list[tuple[int, str, dict[str, Any]]]) -> list[Any]:
        """The answers, in order; None of a node that gives none in ``_ANSWER_S``, or an error. Blocks.

        Raises:
            SessionEnded: our node has gone.
        """
        answers = self._attachment.ask(questions, _ANSWER_S)
        self._check()
        return [None if answer is None or answer.error else answer.value for answer in answers]

    def wait(self, timeout_s: float) -> None:
        """What comes meanwhile was not asked for. Raises SessionEnded."""
        self._attachment.lane.receive(timeout_s)
        self._check()

    def _check(self) -> None:
        if self._attachment.node_death is not None:
            raise SessionEnded(self._attachment.node_death)

    def look(self, jobs: dict[str, str], shape: Resources) -> Seen:
        """Raises SessionEnded."""
        rows, waiting = self.ask([(GCS_ADDRESS, "nodes", {}), (GCS_ADDRESS, "demand", {})])
        if rows is None or waiting is None:
            raise LaunchError(f"the head of the session has not answered within {_ANSWER_S:g} s")
        rows = [row for row in rows if row["alive"]]
        demand = Demand([(need, count) for need, count in waiting["tasks"]], waiting["groups"])
        raylets = [raylet_address(row["index"]) for row in rows]
        answers = self.ask([(raylet, name, {}) for raylet in raylets for name in ("demand", "statistics")])
        nodes = []
        for row, tasks, known in zip(rows, answers[::2], answers[1::2], strict=True):
            demand.tasks += [(need, count) for need, count in tasks or ()]
            number = row["labels"].get(JOB_LABEL)
            if number and known is not None:
                nodes.append(Node(row["index"], number, known["kept_by"], known["granted"]))
                shape = _offered(row["total"])
        others = [NodeInfo(b"", row["index"], "", "", 0, row["total"], row["available"], row["labels"]) for row in rows]
        return Seen(demand, nodes, jobs, shape, others)

    def close(self) -> None:
        self._attachment.leave()


def _offered(total: Resources) -> Resources:
    """What every node like this one has."""
    return {name: amount for name, amount in total.items() if not name.startswith("node:") and "_group_" not in name}


def expected_shape(wanted: job.Job, resources: dict[str, float] | None, head: Resources) -> Resources:
    """What a node of such a job will have, before one is there: what was asked for, and of memory what the head has. A pure function."""
    shape = {name: head.get(name, 0) for name in ("memory", "object_store_memory")}
    shape["CPU"] = head.get("CPU", UNIT) if wanted.exclusive and wanted.cpus_per_task is None else (wanted.cpus_per_task or 1) * UNIT
    gpus = wanted.gpus_per_node.rpartition(":")[2]
    if gpus:
        shape["GPU"] = int(gpus) * UNIT
    return shape | {name: round(amount * UNIT) for name, amount in (resources or {}).items()}


_OPTIONS = (
    click.option("--join-file", required=True, type=click.Path(exists=True, dir_okay=False), help="Of the cluster: its --join-file."),
    click.option("--min", "least", type=click.IntRange(0), default=0, show_default=True, help="Nodes that are there in any case."),
    click.option("--max", "most", type=click.IntRange(1), required=True, help="Nodes at most, not counting those that are there."),
    click.option("--wait-s", type=click.FloatRange(0), default=3.0, show_default=True, help="So long work waits before nodes are added."),
    click.option("--idle-s", type=click.FloatRange(0), default=60.0, show_default=True, help="Nodes without work so long are returned."),
    click.option("-c", "--cpus-per-task", type=int, help="CPUs of each node."),
    *parameters.NODES,
    click.option("-o", "--output", default=job.NODE_OUTPUT, show_default=True, help="File of a node's output."),
    parameters.EXCLUSIVE,
    *parameters.SURROUNDINGS,
    parameters.COMMAND,
    parameters.RESOURCES,
    click.option("--dry-run", is_flag=True, help="Print the batch script of a node, and submit nothing."),
)


@click.command()
@parameters.several(_OPTIONS)
def autoscale(
    join_file: str, least: int, most: int, wait_s: float, idle_s: float, resources: dict[str, float] | None, dry_run: bool, **fields: Any
) -> None:
    """Let a cluster grow and shrink with its work: each node more is a Slurm job that joins it. Runs until the session ends.

    To be started on a host of the session, whose head was started with --join-file by `hpc-ray start` or `hpc-ray run`.
    """
    if least > most:
        raise click.UsageError(f"--min is {least}, which is more than --max, {most}")
    name = member.read_invitation(join_file)["session"]
    fields = complete({**fields, "nodes": 1, "ntasks": None, "ntasks_per_node": None, "survive_nodes": False, "mpi": ""})
    wanted = job.Job(script="", job_name=f"hpc-ray-node-{name.rpartition('_')[2]}", signal_s=0, **fields)
    text = job.join_script(wanted, os.path.abspath(join_file), JOB_LABEL, resources or {})
    if dry_run:
        click.echo(text, nl=False)
        return
    if name not in dict(session.running()):
        raise ConfigurationError(f"session {name} of {join_file} has no node on this host: start this on its head's host")
    cluster = Cluster(local.attach(name, build=__version__))
    _run(cluster, Autoscaler(Limits(least, most, wait_s, idle_s)), wanted, text, resources)


def _run(cluster: Cluster, decider: Autoscaler, wanted: job.Job, text: str, resources: dict[str, float] | None) -> None:
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: stopped.append(received))
    (rows,) = cluster.ask([(GCS_ADDRESS, "nodes", {})])
    head = next(row for row in rows or () if row["is_head"])
    shape = expected_shape(wanted, resources, head["total"])
    jobs: dict[str, str] = {}
    ask_slurm_at = 0.0
    limits = decider.limits
    _say(f"{limits.least} to {limits.most} nodes more for the session, by jobs {wanted.job_name!r}")
    try:
        while not stopped:
            now = time.monotonic()
            if now >= ask_slurm_at:
                jobs = _jobs_named(wanted.job_name, jobs)
                ask_slurm_at = now + _SLURM_IDLE_S
            seen = cluster.look(jobs, shape)
            shape = seen.shape
            _do(decider.decide(time.monotonic(), seen), cluster, decider, text, jobs)
            if jobs.keys() != {node.job for node in seen.nodes}:  # some come or go
                ask_slurm_at = min(ask_slurm_at, now + _SLURM_S)
            pause_until = now + _LOOK_S
            while not stopped and time.monotonic() < pause_until:
                cluster.wait(max(0.0, pause_until - time.monotonic()))
    except SessionEnded as ended:
        _say(f"the session is over: {ended}")
    else:
        cluster.close()
    for job_id, state in _jobs_named(wanted.job_name, jobs).items():
        if state == "PENDING":
            scheduler.cancel(job_id)
            _say(f"cancelled job {job_id}, which still waited")


def _do(steps: Steps, cluster: Cluster, decider: Autoscaler, text: str, jobs: dict[str, str]) -> None:
    for line in steps.say:
        _say(line)
    if steps.over:
        raise LaunchError(steps.over)
    for _ in range(steps.submit):
        number = scheduler.submit(text)
        jobs[number] = "PENDING"
        decider.submitted(number)
        _say(f"one node more: submitted job {number}")
    for number in steps.cancel:
        scheduler.cancel(number)
        jobs.pop(number, None)
        _say(f"cancelled job {number}, whose node is not needed any more")
    if steps.drain:
        answers = cluster.ask([(raylet_address(node.index), "drain", {"reason": "it had nothing to do"}) for node in steps.drain])
        for node, answer in zip(steps.drain, answers, strict=True):
            if answer == "":
                _say(f"node {node.index} had nothing to do and goes; job {node.job} ends")


def _jobs_named(name: str, before: dict[str, str]) -> dict[str, str]:
    """Those of this user that wait or run; what was known, where Slurm does not answer now."""
    try:
        return commands.read_squeue(scheduler.run(commands.jobs_named_command(getpass.getuser(), name)))
    except scheduler.Unreachable:
        return before


def _say(text: str) -> None:
    click.echo(f"hpc-ray autoscale: {text}", err=True)


COMMANDS = {"autoscale": autoscale}

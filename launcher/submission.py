"""``hpc-ray submit`` and ``cancel``, and what ``status`` and ``logs`` say of a Slurm job.

SUBMIT-1 (the job is its own): nothing here is needed for the job to go on. Who follows may leave; Ctrl-C asks what is meant.
SUBMIT-2 (exit code): of a job that was followed to its end, the job's; of an array, the first that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import click

from hpc_ray.config import site_table
from hpc_ray.exceptions import ConfigurationError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import parameters
from hpc_ray.slurm import commands, job, scheduler
from hpc_ray.slurm.commands import JobState
from hpc_ray.slurm.output import Tail

_LOOK_S = 0.25  # between looks at the output
_FIRST_ASK_S, _MOST_ASK_S = 1.0, 15.0  # between questions to Slurm
_PATIENCE_S = 600.0  # with a slurmctld that does not answer
_LATE_S = 3.0  # a file system between us and the job may show its last lines late


# ------------------------------------------------------------------ submit

_OPTIONS = (
    click.option("-N", "--nodes", type=int, default=1, show_default=True, help="Hosts."),
    click.option("-n", "--ntasks", type=int, help="Ranks in all, where not one for each node."),
    click.option("--ntasks-per-node", type=int, help="Ranks on each node; those above one are MPI workers.  [default: 1]"),
    click.option("-c", "--cpus-per-task", type=int, help="CPUs of each rank; with one rank, of each node."),
    *parameters.NODES,
    click.option("-a", "--array", default="", help="Tasks of a job array, like 1-10%4."),
    click.option("-d", "--dependency", default="", help="Like afterok:1234."),
    click.option("-J", "--job-name", default="", help="[default: the script's name]"),
    click.option("-o", "--output", default="", help=f"File of the output.  [default: {job.OUTPUT}]"),
    click.option("-e", "--error", default="", help="File of stderr.  [default: with the output]"),
    parameters.EXCLUSIVE,
    click.option("--survive-nodes", is_flag=True, help="Go on when nodes are lost, but for the first, over TCP: no MPI is needed."),
    click.option("--requeue", is_flag=True, help="Start again after preemption, a lost node, or the end of the time."),
    click.option("--signal-s", type=int, default=60, show_default=True, help="The script gets SIGUSR1 so long before the end; 0: not."),
    *parameters.SURROUNDINGS,
    click.option("--mpi", default="", help="srun's --mpi.  [default: what fits the MPI of this Python]"),
    parameters.COMMAND,
    click.option("--run-option", "run_options", multiple=True, metavar="OPTION", help="For `hpc-ray run`; may be repeated."),
)


def site_defaults() -> dict[str, Any]:
    """Defaults of ``submit``'s options, from the table [submit] of the site's file.

    Raises:
        ConfigurationError: it has a key that is not an option; names file and key.
    """
    path, table = site_table("submit")
    known = sorted(str(parameter.name) for parameter in submit.params if isinstance(parameter, click.Option))
    for key in table:
        if key not in known:
            raise ConfigurationError(f"{path}: [submit] has {key!r}, which is not an option. The options are: {', '.join(known)}")
    return table


@click.command(context_settings={"allow_interspersed_args": False})
@parameters.several(_OPTIONS)
@click.option("--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
@click.option("--follow/--no-follow", default=True, help="Show state and output until the end, or print the job's id and return.")
@click.option("--wait", is_flag=True, help="Wait for the end without showing the output.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(dry_run: bool, follow: bool, wait: bool, script: str, arguments: tuple[str, ...], **fields: Any) -> None:
    """Run SCRIPT as the driver of a cluster in a Slurm job: write the batch script, submit it, follow it.

    Defaults of a site or project: the table [submit] of hpc_ray.toml, with the names of these options.
    """
    if wait and not follow:
        raise click.UsageError("--wait and --no-follow exclude each other")
    if not os.path.isfile(script) and not fields["container"]:
        raise ConfigurationError(f"the script {script!r} does not exist (working directory {os.getcwd()})")
    wanted = job.Job(script=script, arguments=arguments, **complete(fields))
    text = job.batch_script(wanted)
    if dry_run:
        click.echo(text, nl=False)
        return
    number = scheduler.submit(text)
    if not follow:
        click.echo(number)
        return
    click.echo(f"hpc-ray: submitted job {number}", err=True)
    sys.exit(follow_job(number, show_output=not wait))


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """What was not said and this machine knows: hpc-ray's path, srun's --mpi."""
    fields = dict(fields)
    beside = os.path.join(os.path.dirname(sys.executable), "hpc-ray")
    if not fields["command"]:
        plain = fields["container"] or fields["setup"] or not os.path.exists(beside)  # these bring their own
        fields["command"] = "hpc-ray" if plain else beside
    tasks = fields["ntasks"] or fields["nodes"] * (fields["ntasks_per_node"] or 1)
    if not fields["mpi"] and not fields["container"] and not fields["survive_nodes"] and tasks > 1:
        try:
            fields["mpi"] = job.mpi_type(mpi_library(), scheduler.mpi_types())
        except scheduler.SlurmError:
            pass  # a dry run where there is no Slurm
    return fields


def mpi_library() -> str:
    """First line of ``MPI_Get_library_version`` of what mpi4py loads; "" where there is none. MPI is not started."""
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        ended = subprocess.run(python_command("-c", program), capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return ended.stdout.partition("\n")[0].strip("\0 ") if ended.returncode == 0 else ""


# ------------------------------------------------------------------ follow


class _Plain:
    """Output to stdout, states to stderr: for files and pipes."""

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def state(self, states: list[JobState], changed: bool) -> None:
        if changed:
            for state in states:
                click.echo(f"hpc-ray: {state.describe()}", err=True)

    def write(self, text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()


class _Live:
    """For a terminal: the output runs above one line that says how the job is."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._live = Live(Text("hpc-ray: …"), console=Console(), refresh_per_second=4, transient=True)
        self._rest = ""
        self._last: list[JobState] = []

    def __enter__(self) -> _Live:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._rest:
            self._print(self._rest)
            self._rest = ""
        self._live.__exit__(None, None, None)
        for state in self._last:
            click.echo(f"hpc-ray: {state.describe()}", err=True)

    def state(self, states: list[JobState], changed: bool) -> None:
        self._last = states
        self._live.update(self._text("\n".join(f"hpc-ray: {state.describe()}" for state in states), style="bold"))

    def write(self, text: str) -> None:
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._print(whole)

    def _print(self, text: str) -> None:
        self._live.console.print(self._text.from_ansi(text), soft_wrap=True)


def _view() -> _Plain | _Live:
    return _Live() if sys.stdout.isatty() and sys.stderr.isatty() else _Plain()


class Follower:
    """One look after another at a job; what is printed goes through ``view``. Time is an argument."""

    def __init__(self, number: str, view: _Plain | _Live, *, show_output: bool):
        self.number = number
        self.view = view
        self.show_output = show_output
        self.states: list[JobState] = []
        self.tails: dict[str, Tail] = {}
        self._next_ask, self._pause = 0.0, _FIRST_ASK_S
        self._silent_since: float | None = None

    def look(self, now: float) -> bool:
        """Reads what is new; whether all has ended.

        Raises:
            SlurmError: Slurm does not know the job, or has not answered for ``_PATIENCE_S``.
        """
        if now >= self._next_ask:
            self._ask(now)
        self.read()
        return bool(self.states) and not any(state.active for state in self.states)

    def _ask(self, now: float) -> None:
        try:
            found = scheduler.states(self.number)
        except scheduler.Unreachable as error:
            if self._silent_since is None:
                self._silent_since = now
                click.echo(f"hpc-ray: {error}; still asking", err=True)
            if now - self._silent_since > _PATIENCE_S:
                raise
            self._next_ask = now + self._pause
            return
        self._silent_since = None
        before = {(state.job, state.state, state.reason) for state in self.states}
        changed = before != {(state.job, state.state, state.reason) for state in found}
        self._pause = _FIRST_ASK_S if changed else min(self._pause * 1.3, _MOST_ASK_S)
        self._next_ask = now + self._pause
        self.states = found
        self.view.state(found, changed)

    def read(self) -> bool:
        """Whether there was something."""
        any_text = False
        for state in self.states if self.show_output else []:
            if state.output and state.state not in ("PENDING", "CONFIGURING"):
                tail = self.tails.setdefault(state.output, Tail(state.output))
                text = tail.read_all()
                if text:
                    any_text = True
                    self.view.write(_marked(text, state.job) if len(self.states) > 1 else text)
        return any_text

    def exit_code(self) -> int:
        return next((state.exit_code for state in self.states if state.exit_code), 0)


def _marked(text: str, name: str) -> str:
    return "".join(f"({name}) {line}" for line in text.splitlines(keepends=True))


def follow_job(number: str, *, show_output: bool = True) -> int:
    """Shows a job until its end; its exit code (SUBMIT-2). Ctrl-C asks whether to cancel it, leave it or go on."""
    while True:
        view = _view()
        follower = Follower(number, view, show_output=show_output)
        try:
            with view:
                while not follower.look(time.monotonic()):
                    time.sleep(_LOOK_S)
                until = time.monotonic() + (_LATE_S if show_output else 0)
                while time.monotonic() < until and not all(os.path.exists(path) for path in follower.tails):
                    time.sleep(_LOOK_S)
                follower.read()
            return follower.exit_code()
        except KeyboardInterrupt:
            choice = _ask_what(number)
            if choice == "detach":
                click.echo(f"hpc-ray: job {number} goes on; `hpc-ray logs -f {number}` follows it again", err=True)
                return 130
            if choice == "cancel":
                scheduler.cancel(number)
                click.echo(f"hpc-ray: cancelled job {number}", err=True)


def _ask_what(number: str) -> str:
    """ "cancel", "detach" or "go on"; without a terminal the job is left alone."""
    if not sys.stdin.isatty():
        return "detach"
    try:
        answer = click.prompt(
            f"\njob {number}: [c]ancel it, [d]etach and let it run, or [g]o on",
            type=click.Choice(["c", "d", "g"]),
            default="g",
            show_choices=False,
            err=True,
        )
    except (click.Abort, KeyboardInterrupt):
        return "detach"
    return {"c": "cancel", "d": "detach", "g": "go on"}[answer]


# ------------------------------------------------------------------ status, logs, cancel


def is_job(name: str | None) -> bool:
    """Whether an argument of ``status`` or ``logs`` means a Slurm job: names of sessions are never numbers."""
    return name is not None and commands.JOB_ID.fullmatch(name) is not None


def show_status(number: str) -> None:
    for state in scheduler.states(number):
        click.echo(state.describe())
        if state.output:
            click.echo(f"  output: {state.output}")


def show_logs(number: str, *, follow: bool, tail: int = -1) -> int:
    """What a job has printed; with ``follow`` on to its end, and then its exit code.

    Raises:
        ConfigurationError: there is no output yet, or it is elsewhere.
    """
    if follow:
        return follow_job(number)
    states = scheduler.states(number)
    for state in states:
        if not os.path.exists(state.output):
            said = f"{state.output} is not there on this host" if state.output else "Slurm does not say where its output is"
            raise ConfigurationError(f"{state.describe()}: {said}")
        for piece in _last_lines(Tail(state.output).read_all(), tail):
            click.echo(_marked(piece, state.job) if len(states) > 1 else piece, nl=False)
    return 0


def _last_lines(text: str, count: int) -> Iterable[str]:
    lines = text.splitlines(keepends=True)
    return lines if count < 0 else lines[len(lines) - min(count, len(lines)) :]


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB…")
def cancel(jobs: tuple[str, ...]) -> None:
    """Cancel Slurm jobs. Their scripts get SIGTERM and may end in order."""
    for number in jobs:
        scheduler.cancel(number)
        click.echo(f"hpc-ray: cancelled job {number}")

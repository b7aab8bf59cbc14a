"""The command line: ``hpc-ray run``, ``start``, ``stop``, ``status``; and the way to those of ``submission``, ``doctor`` and
``hpc_ray.commands``.

``run`` is two things. Outside of an MPI job it starts one, or a cluster over TCP, and stays as its supervisor; inside of one it is a
rank. The exit code is the script's in both.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from typing import Any, NoReturn

import click

from hpc_ray import as_ray as as_ray_module
from hpc_ray.config import Settings
from hpc_ray.exceptions import RayError
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import hosts, local, member, parameters, session, submission, supervisor, world
from hpc_ray.protocol import UNIT
from hpc_ray.slurm import signals
from hpc_ray.version import __version__

hosts_module = hosts  # an option has its name


def _fail(text: str, code: int = 1) -> NoReturn:
    click.echo(f"hpc-ray: {text}", err=True)
    sys.exit(code)


def _fail_silently(place: world.Rank | None) -> NoReturn:
    """Another rank says why."""
    world.let_rank_zero_speak(place.rank if place is not None else 0)
    sys.exit(2)


_AMOUNTS = (
    click.option("--num-cpus", type=click.FloatRange(min=0), help="CPUs of each node (default: all, divided among virtual nodes)."),
    click.option("--num-gpus", type=click.FloatRange(min=0), help="GPUs of each node (default: all, divided)."),
    parameters.RESOURCES,
    click.option("--memory", type=click.IntRange(min=0), help="Bytes of memory for tasks on each node."),
    click.option("--object-store-memory", type=click.IntRange(min=0), help="Bytes of each node's object store."),
    click.option("--labels", callback=parameters.label_pairs, help="Labels of each node, like zone=a,disk=fast."),
)
# Where nodes over TCP are, and who may come later.
_PLACES = (
    click.option("--hosts", help="Hosts, like node1,node2, each a node that may be lost while the others go on."),
    click.option("--hostfile", type=click.Path(exists=True, dir_okay=False), help="The same, one on a line as for mpirun."),
    click.option("--agent", help=f"Starts nodes on other hosts, as AGENT HOST COMMAND (default: {hosts.DEFAULT_AGENT})."),
    click.option("--join-file", type=click.Path(dir_okay=False), help="Leave here what `hpc-ray start --join` needs."),
)


class _Commands(click.Group):
    """The commands of this module, and those that are loaded when one of them is called: most need a client."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        own = super().get_command(context, name)
        if own is not None or name not in _LATER:
            return own
        return importlib.import_module(_LATER[name]).COMMANDS[name]

    def list_commands(self, context: click.Context) -> list[str]:
        return [*super().list_commands(context), *_LATER]


# By name: the launcher knows nothing of the layers above it.
_LATER = {
    **dict.fromkeys(("list", "get", "summary", "logs", "timeline", "dashboard"), "hpc_ray.commands"),
    "doctor": "hpc_ray.launcher.doctor",
    "autoscale": "hpc_ray.launcher.autoscaling",
}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-ray")
@click.pass_context
def cli(context: click.Context) -> None:
    """Ray's programming model for MPI and Slurm machines."""
    if context.invoked_subcommand == "submit":
        context.default_map = {"submit": submission.site_defaults()}


# ------------------------------------------------------------------ run


@cli.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("-n", "--ranks", type=int, help="Ranks to start with mpirun; the lowest of each host leads its node.")
@click.option("-N", "--nodes", type=int, help="Nodes; on one host these are virtual ones (default: one for each host).")
@click.option(
    "--survive-nodes",
    is_flag=True,
    help="The loss of a node that is not this host is not the end. Nodes are those of the Slurm job, of --hosts, or virtual ones.",
)
@parameters.several(_PLACES)
@parameters.several(_AMOUNTS)
@click.option("--as-ray", is_flag=True, help="`import ray` gives hpc_ray, in the script and in all workers.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print the roster.")
@click.option("--relaunch", type=click.IntRange(0), default=0, help="When a session is lost, start again on the hosts left, so often.")
@click.option("--journal", type=click.Path(dir_okay=False), help="Detached actors, placement groups and keys go on from this file.")
@click.option("--mpirun-option", "mpirun_options", multiple=True, help="Passed to mpirun as it is; may be repeated.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    ranks: int | None,
    nodes: int | None,
    survive_nodes: bool,
    as_ray: bool,
    quiet: bool,
    relaunch: int,
    journal: str | None,
    mpirun_options: tuple[str, ...],
    script: str,
    arguments: tuple[str, ...],
    hosts: str | None,
    hostfile: str | None,
    agent: str | None,
    join_file: str | None,
    **options: Any,
) -> None:
    """Run SCRIPT as the driver of a cluster: on this host, over mpirun, in the ranks of an MPI job, or on hosts that may be lost."""
    place = world.discover()
    if place is not None and place.size > 1:
        signals.hold_back()  # a link comes of this process
    say = place is None or place.rank == 0
    if not os.path.isfile(script):
        what = "is a folder" if os.path.isdir(script) else "does not exist"
        if say:
            _fail(f"the script {script!r} {what} (working directory {os.getcwd()})", 2)
        _fail_silently(place)
    if nodes is not None and nodes < 1:
        if say:
            _fail(f"--nodes must be at least 1, it is {nodes}", 2)
        _fail_silently(place)
    command = [script, *arguments]
    if as_ray:
        os.environ[as_ray_module.VARIABLE] = "1"
        command = [*python_command("-c", "from hpc_ray.as_ray import main; main()")[1:], *command]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    python_path = [os.path.dirname(os.path.realpath(script)), *(path for path in inherited if path)]
    names = _named_hosts(hosts, hostfile, survive_nodes)
    over_tcp = survive_nodes or bool(join_file) or (Settings.from_environment().transport == "tcp" and (ranks or nodes or 1) > 1)
    if place is not None and place.size > 1:
        elsewhere = {"--survive-nodes": over_tcp, "--hosts": names, "--agent": agent, "--relaunch": relaunch}
        problem = next((name for name, given in elsewhere.items() if given), "")
        if problem:
            problem = f"with {problem} nodes are started from here: start this once, without {place.launcher}"
        elif ranks is not None and ranks != place.size:
            problem = (
                f"-n {ranks} was given inside an MPI job of {place.size} ranks ({place.launcher}); leave out -n here, or "
                "start `hpc-ray run -n` without mpirun"
            )
        if problem and say:
            _fail(problem, 2)
        if problem:
            _fail_silently(place)
        world.become_link(_plan(options, nodes, place.size, quiet, command, python_path, journal or ""))
    if agent and names is None:
        _fail("--agent is for nodes on other hosts: name them with --hosts or --hostfile", 2)
    if over_tcp and mpirun_options:
        _fail("--mpirun-option: with --survive-nodes there is no mpirun", 2)
    if names is not None and nodes is not None:
        if nodes > len(names):
            _fail(f"{nodes} nodes were asked for, but there are {len(names)} hosts: {', '.join(names[:8])}", 2)
        names = names[:nodes]
    wanted = ranks or (len(names) if names else nodes or 1)
    if nodes is not None and nodes > wanted:
        _fail(f"{nodes} nodes need at least as many ranks, but -n is {wanted}", 2)
    if wanted == 1 and names is None and not over_tcp:
        if relaunch:
            _fail("--relaunch is for sessions of several nodes; one node ends with this host", 2)
        _exec_script(command, options)
    most = -(-wanted // len(names)) if names else wanted  # ranks of a host
    folder = ""
    if relaunch and not journal:
        if names and not hosts_module.is_here(names[0]):
            _fail(f"--relaunch needs a --journal that all hosts can read and write, as the first one, {names[0]}, is not this one", 2)
        folder = tempfile.mkdtemp(prefix="hpc_ray-journal-")
        journal = os.path.join(folder, "journal")

    def launch(names: list[str] | None, before: int) -> supervisor.Outcome:
        os.environ[supervisor.RELAUNCHED_VARIABLE] = str(before)
        if over_tcp:
            plan = _plan(options, None, 1, quiet, command, python_path, journal or "")
            plan = _with_hosts(plan, names, agent, nodes or ranks, join_file)
            return supervisor.supervise(world.MEMBER_COMMAND, plan)
        mpirun, extra = world.find_mpirun(), list(mpirun_options)
        variables: dict[str, str] = {}
        count = wanted
        if names:
            count = min(wanted, len(names) * most)
            where, variables = world.host_options(mpirun, names, count, agent)
            extra = [*where, *extra]
        else:
            world.check_ranks(count)
        line = world.mpirun_command(mpirun, count, world.RANK_COMMAND, extra)
        plan = _plan(options, None if names else nodes, count, quiet, command, python_path, journal or "")
        return supervisor.supervise(line, plan, variables)

    try:
        code = supervisor.keep_going(launch, names, relaunch, lambda names: supervisor.reachable(names, agent, dict(os.environ)))
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


def _plan(
    options: dict[str, Any],
    nodes: int | None,
    ranks: int,
    quiet: bool,
    command: list[str],
    python_path: list[str],
    journal: str,
) -> dict[str, Any]:
    journal = os.path.abspath(journal) if journal else ""
    return world.make_plan(
        options, nodes=nodes, world=ranks, quiet=quiet, script=command, python_path=python_path, journal=journal
    )


def _named_hosts(names: str | None, hostfile: str | None, survive_nodes: bool) -> list[str] | None:
    """Hosts of the command line, or of the Slurm job; None: nodes are virtual."""
    if names and hostfile:
        _fail("--hosts and --hostfile say the same: give one of them", 2)
    found = None
    if names:
        found = hosts_module.read_hosts(names)
    elif hostfile:
        with open(hostfile) as file:
            found = hosts_module.read_hostfile(file.read())
    elif survive_nodes and os.environ.get("SLURM_JOB_NODELIST"):
        found = hosts_module.expand_nodelist(os.environ["SLURM_JOB_NODELIST"])
    if found == []:
        _fail("no host was named", 2)
    return found


def _with_hosts(
    plan: dict[str, Any], names: list[str] | None, agent: str | None, nodes: int | None, join_file: str | None
) -> dict[str, Any]:
    """The plan of a cluster over TCP. This host leads it; where it is not one of those named it runs the driver and nothing else."""
    plan["settings"]["transport"] = "tcp"
    if names is None:
        world.check_ranks(nodes or 1)
        launches: list[dict[str, Any]] | None = None if (nodes or 1) > 1 else []
        return world.with_members({**plan, "nodes": nodes or 1}, launches=launches, join_file=join_file or "")
    here, others = hosts_module.split(names)
    launches = hosts_module.as_json(hosts_module.plan_launches(others, agent, os.getcwd(), dict(os.environ)))
    head_options = plan["options"] if here else {**plan["options"], "num_cpus": 0, "num_gpus": 0, "resources": None}
    plan["nodes"] = len(others) + 1
    if agent:  # job steps on several hosts need it too
        plan["environment"] = {**world.reach_by(agent), **plan["environment"]}
    return world.with_members(plan, launches=launches, head_options=head_options, join_file=join_file or "")


def _exec_script(command: list[str], options: dict[str, Any]) -> NoReturn:
    """One node: no MPI; the script starts it by itself in ``init()``."""
    variables = session.scrubbed_environment()
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        variables[local.OPTIONS_VARIABLE] = json.dumps(given)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *command], variables)


# ------------------------------------------------------------------ start, stop, status


@cli.command()
@click.option("--head", is_flag=True, help="Accepted for Ray's sake; a cluster's first node is its head.")
@click.option("--join", type=click.Path(dir_okay=False), help="Be a node of the cluster whose --join-file this is.")
@click.option("--block", is_flag=True, help="With --join: stay in the foreground, and leave when this command is ended.")
@parameters.several(_PLACES)
@parameters.several(_AMOUNTS)
def start(
    head: bool,
    join: str | None,
    block: bool,
    hosts: str | None,
    hostfile: str | None,
    agent: str | None,
    join_file: str | None,
    **options: Any,
) -> None:
    """Start a cluster that outlives drivers; `init(address="auto")` finds it. Or, with --join, a node more of one."""
    settings = Settings.from_environment()
    if join is not None:
        for name, given in (("--head", head), ("--hosts", hosts), ("--hostfile", hostfile), ("--agent", agent), ("--join-file", join_file)):
            if given:
                _fail(f"{name} is for the head of a cluster; a node that joins one has none of it", 2)
        plan = world.with_invitation(world.make_plan(options, quiet=True, detached=not block), member.read_invitation(join))
        if block:
            variables = {**session.scrubbed_environment(), world.PLAN_VARIABLE: json.dumps(plan)}
            os.execve(world.MEMBER_COMMAND[0], world.MEMBER_COMMAND, variables)
        note = _start_detached(plan, settings)
        click.echo(f"hpc-ray: this is node {note['node']} of session {note['session']}. `hpc-ray stop` takes it out again.")
        return
    if block:
        _fail("--block is for nodes that --join a cluster", 2)
    if hosts or hostfile or join_file:
        plan = world.make_plan(options, quiet=True, detached=True)
        plan = _with_hosts(plan, _named_hosts(hosts, hostfile, False), agent, None, join_file)
        note = _start_detached(plan, settings)
        name, count = note["session"], len(note["roster"])
        more = f" More nodes: `hpc-ray start --join {join_file}` on their hosts." if join_file else ""
    else:
        if agent:
            _fail("--agent is for nodes on other hosts: name them with --hosts or --hostfile", 2)
        attachment = local.start_local(settings=settings, build=__version__, detached=True, **options)
        name, count, more = attachment.config.session, 1, ""
        attachment.leave()
    of = f" on {count} hosts" if count > 1 else ""
    click.echo(f'hpc-ray: session {name} runs{of}. Connect with init(address="auto"), end it with `hpc-ray stop`.{more}')


def _start_detached(plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Brings up a head, or a node that joins, which goes on without us; what it says of itself."""
    started = world.start_member(plan, settings.start_timeout_s)
    note = started.note
    started.let_go()
    return note


@cli.command()
@click.argument("name", metavar="[SESSION]", required=False)
@click.option("-f", "--force", is_flag=True, help="Accepted for Ray's sake.")
def stop(name: str | None, force: bool) -> None:
    """End a session of this user on this host; without a name, all that were made by `hpc-ray start` (in a Slurm job, by this job)."""
    if name is None:
        found = [other for other in session.of_our_job(name for name, _ in session.running()) if local.is_detached(other)]
    else:
        found = [name]
    if not found:
        click.echo("hpc-ray: nothing to stop")
        return
    missing = False
    for other in found:
        if local.stop_session(other):
            click.echo(f"hpc-ray: session {other} has ended")
        else:
            missing = True
            click.echo(f"hpc-ray: session {other} does not run on this host", err=True)
    session.sweep()
    if missing:
        sys.exit(1)


@cli.command()
@click.argument("name", metavar="[SESSION | JOB]", required=False)
def status(name: str | None) -> None:
    """Show nodes and resources of a session (default: the one of HPC_RAY_ADDRESS, else the newest), or how a Slurm job is."""
    if name is not None and submission.is_job(name):
        submission.show_status(name)
        return
    attachment = local.attach(name or "auto", build=__version__)
    try:
        click.echo(f"session {attachment.config.session}")
        rows = []
        (answer,) = attachment.ask([(GCS_ADDRESS, "nodes", {})])
        if answer is None:
            _fail("the GCS did not answer within 10 s")
        if answer.error:
            _fail(answer.error)
        for info in sorted(answer.value, key=lambda info: info["index"]):
            total, free = info["total"], info["available"]
            amounts = ", ".join(
                f"{key} {_amount(key, free.get(key, 0))}/{_amount(key, amount)}"
                for key, amount in sorted(total.items())
                if not key.startswith("node:")
            )
            state = "alive" if info["alive"] else f"dead ({info['death']})"
            role = "head" if info["is_head"] else "node"
            rows.append(f"  {info['index']:>3}  {role}  {state}  {info['hostname']}  pid {info['pid']}  {amounts}")
        click.echo("\n".join(rows))
    finally:
        attachment.leave()


def _amount(name: str, units: int) -> str:
    value = units / UNIT
    return f"{value / 2**30:.1f}GiB" if "memory" in name else f"{value:g}"


cli.add_command(submission.submit)
cli.add_command(submission.cancel)


def main() -> None:
    """Entry of the ``hpc-ray`` program: our own errors are one line, without a traceback."""
    try:
        cli(standalone_mode=True)
    except (RayError, ConnectionError) as error:
        place = world.discover()
        if place is None or place.rank == 0:
            _fail(str(error))
        _fail_silently(place)


if __name__ == "__main__":
    main()

"""The part of the command line that looks into a running session: ``hpc-ray list``, ``get``, ``summary``, ``logs``, ``timeline``,
``dashboard``. ``launcher.cli`` loads this module when one of them is called.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from typing import Any

import click

from hpc_ray import observation, session
from hpc_ray.launcher import submission
from hpc_ray.util import state
from hpc_ray.util.state.common import DEFAULT_LIMIT, DEFAULT_TIMEOUT_S
from hpc_ray.util.state.sources import SOURCES

_KINDS = click.Choice([name.replace("_", "-") for name in SOURCES])
_address = click.option("--address", help="Name of the session (default: the one of HPC_RAY_ADDRESS, else the newest).")
_timeout = click.option("--timeout", type=float, default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds.")
_format = click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
_WIDEST = 60


class _Command(click.Command):
    """What cannot be asked for, written or listened on is told in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConnectionError:  # there is no session, which ``main`` tells; or nobody reads what is printed
            raise
        except (state.RayStateApiException, OSError) as error:
            raise click.ClickException(str(error)) from error


def _client(address: str | None) -> state.StateApiClient:
    session.observe(address)
    return state.StateApiClient()


def _filter(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str, str]]:
    found = []
    for text in values:
        column, equals, value = text.partition("=")
        if not equals or not column.rstrip("!") or not value:
            raise click.BadParameter(f"{text!r} is not like column=value or column!=value")
        found.append((column.rstrip("!"), "!=" if column.endswith("!") else "=", value))
    return found


def _print(rows: list[Any], form: str, detail: bool) -> None:
    """Rows as JSON, or as a table without the columns that are empty in all."""
    plain = [dataclasses.asdict(row) for row in rows]
    if form == "json":
        click.echo(json.dumps(plain, indent=2))
        return
    if not plain:
        click.echo("none")
        return
    if detail:
        for row in plain:
            click.echo("\n".join(f"{name}: {_text(value)}" for name, value in row.items() if value is not None) + "\n")
        return
    columns = [name for name in plain[0] if any(row[name] not in (None, "") for row in plain)]
    table = [[name.upper() for name in columns], *([_short(row[name]) for name in columns] for row in plain)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    text = "" if value is None else _text(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


@click.command("list", cls=_Command)
@click.argument("kind", type=_KINDS)
@click.option("-f", "--filter", "filters", multiple=True, callback=_filter, help="column=value or column!=value; all must hold.")
@click.option("--limit", type=int, default=DEFAULT_LIMIT, show_default=True)
@click.option("--detail", is_flag=True, help="All that is known of each.")
@_format
@_timeout
@_address
def list_command(
    kind: str, filters: list[tuple[str, str, str]], limit: int, detail: bool, form: str, timeout: float, address: str | None
) -> None:
    """List tasks, actors, nodes …"""
    rows = _client(address).list(kind.replace("-", "_"), filters, limit, timeout, detail, False)
    _print(rows, form, detail)


@click.command("get", cls=_Command)
@click.argument("kind", type=_KINDS)
@click.argument("identity", metavar="ID")
@_format
@_timeout
@_address
def get_command(kind: str, identity: str, form: str, timeout: float, address: str | None) -> None:
    """Show all that is known of one task, actor, node …"""
    found = _client(address).get(kind.replace("-", "_"), identity, timeout)
    if not found:
        raise click.ClickException(f"there are no {kind} with the id {identity}")
    _print(found if isinstance(found, list) else [found], form, True)


@click.command("summary", cls=_Command)
@click.argument("kind", type=click.Choice(["tasks", "actors", "objects"]))
@_format
@_timeout
@_address
def summary_command(kind: str, form: str, timeout: float, address: str | None) -> None:
    """Count tasks, actors or objects by name and state."""
    summary = _client(address).summary(kind, timeout, False)["cluster"]
    if form == "json":
        click.echo(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        if name != "summary":
            click.echo(f"{name}: {_text(value)}")
    for name, counts in summary["summary"].items():
        found = counts.get("state_counts") or {key: value for key, value in counts.items() if key.startswith("total")}
        click.echo(f"  {name}  " + ", ".join(f"{state} {count}" for state, count in sorted(found.items())))


@click.command("logs", cls=_Command)
@click.argument("filename", metavar="[FILENAME | JOB]", required=False)
@click.option("--actor-id", help="What this actor's process has printed.")
@click.option("--task-id", help="What the process that ran this task has printed.")
@click.option("--pid", type=int, help="What this worker of the node has printed.")
@click.option("--node-id", help="The node (default: the head).")
@click.option("--err", is_flag=True, help="stderr instead of stdout.")
@click.option("--tail", type=int, default=-1, help="Only the last so many lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed later.")
@_timeout
@_address
def logs_command(
    filename: str | None, node_id: str | None, err: bool, tail: int, follow: bool, timeout: float, address: str | None, **by: Any
) -> None:
    """Show a log, or what a Slurm job has printed; with nothing to find one by, the names of a node's log files."""
    if filename is not None and submission.is_job(filename):
        sys.exit(submission.show_logs(filename, follow=follow, tail=tail))
    _client(address)
    wanted = {name: value for name, value in {"filename": filename, **by}.items() if value is not None}
    if node_id is None and not (by["actor_id"] or by["task_id"]):
        node_id = next(row.node_id for row in state.list_nodes() if row.is_head_node)
    if not wanted:
        for group, names in state.list_logs(node_id=node_id, timeout=int(timeout)).items():
            click.echo("\n".join([f"{group}:", *(f"  {name}" for name in names)]))
        return
    suffix = "err" if err else "out"
    for text in state.get_log(
        node_id=node_id, tail=tail, follow=follow, suffix=suffix, errors="replace", timeout=int(timeout), **wanted
    ):
        click.echo(text, nl=False)


@click.command("timeline", cls=_Command)
@click.option("-o", "--output", default="timeline.json", show_default=True, help="The file to write.")
@_address
def timeline_command(output: str, address: str | None) -> None:
    """Write what ran when, for chrome://tracing or ui.perfetto.dev."""
    _client(address)
    observation.timeline(output)
    click.echo(f"hpc-ray: wrote {output}")


@click.command("dashboard", cls=_Command)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, help="Default: the first free one from 8265 on.")
@_address
def dashboard_command(host: str, port: int | None, address: str | None) -> None:
    """Serve a page on the session, its lists as JSON and its metrics, until Ctrl-C."""
    _client(address)
    served = session.serve_dashboard(host, port)
    if served is None:
        raise click.ClickException("the dashboard is not installed")
    click.echo(f"hpc-ray: http://{served}")
    threading.Event().wait()


COMMANDS = {
    command.name: command
    for command in (list_command, get_command, summary_command, logs_command, timeline_command, dashboard_command)
}

"""What the options of several commands have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click


def several(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A decorator that stands for these, in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def json_object(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, float] | None:
    if value is None:
        return None
    try:
        found = json.loads(value)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, TypeError) as error:
        raise click.BadParameter(f"a JSON object of numbers is needed, like '{{\"disk\": 2}}': {error}") from None


def label_pairs(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, str] | None:
    if value is None:
        return None
    pairs = [pair.partition("=") for pair in value.split(",") if pair]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise click.BadParameter(f"labels are name=value, separated by commas, like zone=a,disk=fast, not {value!r}")
    return {name.strip(): label.strip() for name, _, label in pairs}


RESOURCES = click.option("--resources", callback=json_object, help="Custom resources of each node, as JSON.")

# Of a Slurm job, in sbatch's words.
NODES = (
    click.option("-G", "--gpus-per-node", default="", metavar="[TYPE:]N", help="GPUs of each node."),
    click.option("--mem", default="", metavar="SIZE", help="Memory of each node, like 64G."),
    click.option("-t", "--time", default="", help="Longest run time: minutes, HH:MM:SS or D-HH:MM:SS."),
    click.option("-p", "--partition", default=""),
    click.option("-A", "--account", default=""),
    click.option("-q", "--qos", default=""),
    click.option("-C", "--constraint", default="", help="Features of the nodes."),
)
EXCLUSIVE = click.option("--exclusive", is_flag=True, help="Whole nodes.")
SURROUNDINGS = (
    click.option("--sbatch", "lines", multiple=True, metavar="OPTION", help="One more #SBATCH line; may be repeated."),
    click.option("--setup", multiple=True, metavar="LINE", help="A line of shell before the start; may be repeated."),
    click.option("--container", default="", metavar="PREFIX", help="Runs a command in a container: 'apptainer exec --nv image.sif'."),
)
COMMAND = click.option("--command", default="", help="hpc-ray on the nodes.  [default: this one]")

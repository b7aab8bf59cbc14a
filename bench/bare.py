"""How near hpc_ray comes to what the hardware allows: ``python -m bench.bare``.

- tasks that only compute, on all cores, beside a pool of ``multiprocessing``: what of the cores the runtime takes;
- the talks' rollouts and evolution strategies, beside a pool and a loop in one process: what there is to be had of their arithmetic;
- a large array into the object store, beside numpy's copy of it;
- a large object to another virtual node, beside Send and Recv of bare mpi4py.

Both sides take turns, and of each the median counts.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench import engines
from bench.core import RESULTS, machine, named_pythons
from bench.engines import run_script


class Part(NamedTuple):
    """Of floor.py."""

    title: str
    text: str  # what the figure of each side means
    unit: float  # so much of what floor.py counts is one
    bare: str


PARTS = {
    "compute": Part("tasks that only compute, on all cores", "{:.0f} tasks/s", 1, "multiprocessing.Pool"),
    "rollouts": Part("rollouts, bulk-synchronous", "{:.0f} steps/s", 1, "multiprocessing.Pool"),
    "evolution": Part("evolution strategies, one worker", "{:.0f} steps/s", 1, "one process"),
    "put": Part("{} MiB into the store", "{:.2f} GB/s", 1e9, "numpy's copy"),
    "send": Part("{} MiB to another virtual node", "{:.2f} GB/s", 1e9, "mpi4py's Send and Recv"),
}


def measure(python: Path, rounds: int, turns: int, mib: int) -> dict[str, dict[str, Any]]:
    """Seconds of each round by part and side.

    Raises:
        RuntimeError: a script failed.
    """
    found: dict[str, dict[str, Any]] = {part: {"ours": [], "bare": [], "first": []} for part in PARTS}
    for _ in range(turns):
        for part, row in found.items():
            told = run_script("hpc_ray", python, "floor.py", part, "--rounds", str(rounds), "--mib", str(mib))
            for side in ("ours", "bare"):
                row[side] += told[side]
            row["first"].append(told["first"])
            row["units"] = told["units"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each part, in each turn (10)")
    parser.add_argument("--turns", type=int, default=2, help="fresh processes (2)")
    parser.add_argument("--mib", type=int, default=256, help="size of what is large (256)")
    parser.add_argument("--python", action="append", default=[], metavar="hpc_ray=PATH", help="an interpreter that has hpc_ray")
    parser.add_argument("--out", type=Path, help="results without suffix (bench/results/bare-DATE)")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    python = engines.interpreter("hpc_ray", named_pythons(given.python))
    if python is None:
        parser.error("hpc_ray is not installed for the benchmarks; say `python -m bench.engines hpc_ray`, or name a --python")
    found = measure(python, given.rounds, given.turns, given.mib)
    date, where = dt.datetime.now().astimezone().date().isoformat(), machine()
    shown = Table(title=f"{date}, {where['cpu']}, {where['cores']} cores")
    for column in ("", "hpc_ray", "bare", "", "of it"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, part in PARTS.items():
        row = found[name]
        ours, other = (row["units"] / part.unit / statistics.median(row[side]) for side in ("ours", "bare"))
        row["share"] = ours / other
        shown.add_row(part.title.format(given.mib), part.text.format(ours), part.text.format(other), part.bare, f"{row['share']:.1%}")
    console.print(shown)
    out = given.out or RESULTS / f"bare-{date}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"date": date, "machine": where, "parts": found}, indent=1) + "\n")
    with out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=120).print(shown)
    return 0


if __name__ == "__main__":
    engines.end_when_asked()
    sys.exit(main())

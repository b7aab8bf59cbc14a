"""The same programs on several engines, in turn: ``python -m bench.core --against ray``.

Each engine has a process; they take turns row by row, so that what else happens on the machine meets all of them alike, and
those whose turn it is not are idle. This is repeated ``--rounds`` times with fresh processes. The result of a row is the median of
the rounds; its spread is the distance from the least to the greatest in percent of the median.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import engines
from bench.child import Child, Gone

RESULTS = Path(__file__).with_name("results")
START = "start: init to first result"
ACROSS = " | 2 nodes"
SLOW = {"100k tasks queued", "100 actors created, called, killed"}  # take long: in the first round only

Figures = dict[str, dict[str, list[float]]]  # row and figure -> engine -> one value for each round


def machine() -> dict[str, Any]:
    """What the figures were measured on; no names of hosts."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


class Run:
    """What has been measured so far."""

    def __init__(self, console: Console, named: dict[str, str], seconds: float, limit_s: float):
        self.console, self.named, self.seconds, self.limit_s = console, named, seconds, limit_s
        self.figures: Figures = defaultdict(lambda: defaultdict(list))
        self.rows: dict[str, dict[str, Any]] = {START: {"unit": "ms", "less_is_better": True}}
        self.versions: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.names: list[str] = []

    def start(self, name: str, *arguments: str) -> Child | None:
        python = engines.interpreter(name, self.named)
        if python is None:
            self._say(name, f"left out: it is not installed; say `python -m bench.engines {name}`")
            return None
        try:
            child = Child(name, python, *arguments, limit_s=self.limit_s)
        except Gone as error:
            self._say(name, f"left out: it did not start: {error}")
            return None
        self.versions[name] = child.told["version"]
        return child

    def _say(self, name: str, text: str) -> None:
        if self.failures.get(name) != text:
            self.console.print(f"{name}: {text}", style="yellow", markup=False, highlight=False)
        self.failures[name] = text

    def round(self, wanted: list[str], pattern: re.Pattern[str], *arguments: str, slow: bool = False, suffix: str = "") -> None:
        """Start the engines, measure the rows in turn, end the engines."""
        children = {name: child for name in wanted if (child := self.start(name, *arguments))}
        if pattern.search(START):
            for name, child in children.items():
                self.figures[START + suffix][name].append(1000 * child.told["init_s"])
                self.rows[START + suffix] = self.rows[START]
        try:
            rows = {row: about for child in reversed(children.values()) for row, about in child.rows.items()}
            first = next(iter(children.values()), None)
            order = [*(first.rows if first else ()), *(row for row in rows if first and row not in first.rows)]
            for row in order:
                if pattern.search(row) and (rows[row]["across"] or not suffix) and (slow or row not in SLOW):
                    self.rows[row + suffix] = rows[row]
                    self._measure(children, row, suffix, arguments)
        finally:
            for child in children.values():
                child.stop()

    def _measure(self, children: dict[str, Child], row: str, suffix: str, arguments: tuple[str, ...]) -> None:
        said = []
        for name, child in list(children.items()):
            if row not in child.rows:
                continue
            try:
                figures = child.measure(row, self.seconds, self.limit_s)
            except RuntimeError as error:
                self._say(f"{name}, {row + suffix}", str(error))
            except Gone as error:
                self._say(f"{name}, {row + suffix}", str(error))
                del children[name]
                if again := self.start(name, *arguments):
                    children[name] = again
            else:
                for figure, value in figures.items():
                    self.figures[f"{row + suffix}, {figure}" if figure else row + suffix][name].append(value)
                said.append(f"{name} {short(next(iter(figures.values())))}")
        self.console.print(f"  {row + suffix}: {', '.join(said)}", style="dim", markup=False, highlight=False)

    def about(self, figure: str) -> dict[str, Any]:
        """Unit and direction of a row or of a figure of one."""
        return self.rows[figure] if figure in self.rows else self.rows[figure.rpartition(", ")[0]]

    def results(self) -> dict[str, Any]:
        found = {}
        for figure, by_engine in self.figures.items():
            medians = {name: statistics.median(values) for name, values in by_engine.items()}
            found[figure] = {
                "unit": self.about(figure)["unit"],
                "less_is_better": self.about(figure)["less_is_better"],
                "median": medians,
                "spread_percent": {
                    name: 100 * (max(values) - min(values)) / medians[name] if medians[name] else 0.0
                    for name, values in by_engine.items()
                },
                "ratio": {name: ratio(self.about(figure), medians, name) for name in medians if name != "hpc_ray"},
            }
        return found


def ratio(about: dict[str, Any], medians: dict[str, float], other: str) -> float | None:
    """How many times better hpc_ray is than the other; None for shares, and where one of them is missing or did nothing."""
    ours, theirs = medians.get("hpc_ray"), medians[other]
    if not ours or not theirs or about["unit"] == "%":
        return None
    return theirs / ours if about["less_is_better"] else ours / theirs


def short(value: float) -> str:
    """Three digits, with a k or an M for thousands and millions."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            value, unit = value / (1e6 if letter == "M" else 1e3), letter
            return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(report: dict[str, Any], title: str) -> Table:
    names = report["engines"]
    shown = Table(title=title, caption="medians (± half the spread in %); ratio: how many times better hpc_ray is", highlight=False)
    shown.add_column("row", no_wrap=True)
    shown.add_column("unit", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
        if name != "hpc_ray":
            shown.add_column("ratio", justify="right", style="bold", no_wrap=True)
    for figure, found in report["rows"].items():
        cells = []
        for name in names:
            value = found["median"].get(name)
            cells.append("" if value is None else f"{short(value)} ±{found['spread_percent'][name] / 2:.0f}")
            if name != "hpc_ray":
                times = found["ratio"].get(name)
                cells.append("" if times is None else f"{times:.1f}" if times < 100 else f"{times:.0f}")
        shown.add_row(figure, found["unit"], *cells)
    return shown


def picture(report: dict[str, Any], against: str, path: Path) -> None:
    """One bar for each row: how many times better hpc_ray is than ``against``."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    bars = {figure: row["ratio"][against] for figure, row in report["rows"].items() if row["ratio"].get(against)}
    if not bars:
        return
    shown, axes = plt.subplots(figsize=(9, 0.24 * len(bars) + 1.5), layout="constrained")
    colours = ["tab:green" if times >= 1 else "tab:red" for times in bars.values()]
    axes.barh(list(bars), [times - 1 for times in bars.values()], left=1, color=colours)
    for index, times in enumerate(bars.values()):
        axes.text(max(times, 1) * 1.05, index, f"{times:.1f}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    where = report["machine"]
    axes.set_title(f"hpc_ray: times as good as {against} {report['versions'].get(against, '')}", fontsize=10)
    axes.set_xlabel(f"{report['date']}, {where['cpu']}, {where['cores']} cores, Python {where['python']}", fontsize=8)
    shown.savefig(path, dpi=130)


def write(report: dict[str, Any], out: Path) -> str:
    """JSON, table and picture, beside each other; the title of the table."""
    where = report["machine"]
    title = f"{report['date']}, {where['cpu']}, {where['cores']} cores, {report['rounds']} rounds of {report['seconds']} s a row"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    with out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=400).print(table(report, title))
    others = [name for name in report["engines"] if name != "hpc_ray"]
    if "hpc_ray" in report["engines"] and others:
        picture(report, "ray" if "ray" in others else others[0], out.with_suffix(".png"))
    return title


def named_pythons(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for name, path in found.items():
        if name not in engines.ENGINES or not Path(path).exists():
            raise SystemExit(f"--python {name}={path}: there is no such engine or file; engines: {', '.join(engines.ENGINES)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.core", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    others = [name for name in engines.ENGINES if name != "hpc_ray"]
    parser.add_argument("--against", nargs="*", choices=others, default=others, help="other engines (all that are installed)")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name has this in it")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row, engine and round (1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="workers that each engine may have (all cores)")
    parser.add_argument("--no-nodes", action="store_true", help="leave out the rows across two virtual nodes")
    parser.add_argument("--no-slow", action="store_true", help=f"leave out {', '.join(sorted(SLOW))}")
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="an engine that takes longer for one row is ended")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter of an engine")
    parser.add_argument("--out", type=Path, help="results without suffix (bench/results/core-DATE)")
    given = parser.parse_args(arguments)
    date = dt.datetime.now().astimezone().date().isoformat()
    console = Console(width=None if sys.stdout.isatty() else 200)
    pattern = re.compile(given.rows)
    run = Run(console, named_pythons(given.python), given.seconds, given.limit)
    wanted = ["hpc_ray", *given.against]
    for number in range(given.rounds):
        console.print(f"round {number + 1} of {given.rounds}")
        run.round(wanted, pattern, "--cpus", str(given.cpus), slow=not given.no_slow and number == 0)
        if not given.no_nodes:
            both = [name for name in wanted if name in ("hpc_ray", "ray")]
            run.round(both, pattern, "--cpus", str(given.cpus), "--nodes", "2", suffix=ACROSS)
        if not run.figures:
            console.print("nothing was measured: no engine, or no row with this name")
            return 1
        # After each round, so that a run that is interrupted has not been for nothing.
        report = {
            "date": date,
            "machine": machine(),
            "engines": [name for name in wanted if name in run.versions],
            "versions": run.versions,
            "rounds": number + 1,
            "seconds": given.seconds,
            "cpus": given.cpus,
            "failures": run.failures,
            "rows": run.results(),
        }
        title = write(report, given.out or RESULTS / f"core-{date}")
    console.print(table(report, title))
    return 0


if __name__ == "__main__":
    engines.end_when_asked()
    sys.exit(main())

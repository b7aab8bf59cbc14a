"""How hpc_ray would do on up to 10,000 nodes, by simulation: ``python -m bench.scale``.

The simulator runs the real deciding halves of GCS and raylets, charges each event, message and task what it was measured to take
on this machine, and shares each host's cores among its processes (``bench/README.md`` says how far that carries). In turn:

- ``--measure``: what things cost here (``costs.py``), into ``results/costs-DATE.json``; without it, the latest file there is used;
- ``--check``: the same program on 2, 4, 8 and 16 virtual nodes of this machine (``virtual.py``) beside the prediction for them;
- ``--nodes``: the prediction for these numbers of nodes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import engines
from bench.core import RESULTS, machine, named_pythons, short

ROWS = {  # scene and its key: title, unit
    ("start", "value"): ("time to start", "s"),
    ("local", "value"): ("tasks, each node its own", "/s"),
    ("spread", "value"): ("tasks, one program for all nodes", "/s"),
    ("actors", "value"): ("actors created", "/s"),
    ("broadcast", "value"): ("1 GiB to all nodes", "s"),
    ("recovery", "value"): ("1 % of the nodes die: their actors live again", "s"),
    ("local", "gcs_messages_per_task"): ("GCS: messages for a task", ""),
    ("busy", "gcs_messages_per_s"): ("GCS, every node busy: messages", "/s"),
    ("busy", "gcs_core"): ("GCS, every node busy: share of a core", "%"),
    ("actors", "gcs_messages_per_s"): ("GCS, actors being made: messages", "/s"),
    ("actors", "gcs_core"): ("GCS, actors being made: share of a core", "%"),
}
MEASURED = ("start", "local", "spread", "actors", "broadcast", "recovery")  # on virtual nodes, too
NETWORK = {"network_s": 2e-6, "bytes_per_s": 12.5e9}  # between hosts: 100 Gbit/s, as such machines have; not measured
SMALLER = {"broadcast": "64 MiB to all nodes", "recovery": "a node dies: its actor lives again"}  # on virtual nodes
GOOD = 0.25


def today() -> str:
    return dt.datetime.now().astimezone().date().isoformat()


class Here:
    """Runs the scripts with an installed hpc_ray."""

    def __init__(self, console: Console, python: Path):
        self.console, self.python = console, python

    def run(self, script: str, *arguments: str, limit_s: float = 900) -> dict[str, Any]:
        return engines.run_script("hpc_ray", self.python, script, *arguments, limit_s=limit_s)

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    # -- the three parts

    def measure(self, path: Path | None, sizes: list[int], rounds: int, seconds: float) -> dict[int, list[dict[str, Any]]]:
        """The costs, into a file if one is named, and the real runs of these numbers of nodes, in turn: so that both meet the machine as it
        is, for others make it faster and slower from minute to minute. The rows of all runs."""
        costs: list[Any] = []
        runs: dict[int, list[dict[str, Any]]] = {nodes: [] for nodes in sizes}
        for number in range(rounds if sizes else 1):
            self.say(f"round {number + 1}")
            if path is not None:
                costs.append(self.run("costs.py", limit_s=600))
            for nodes in sizes:
                for rows in ("local,spread,actors,broadcast", "recovery"):  # a node takes longer to die that has large objects
                    line = ["virtual.py", "--nodes", str(nodes), "--seconds", str(seconds), "--only", rows]
                    try:
                        runs[nodes].append(self.run(*line, limit_s=120)["rows"])
                    except RuntimeError as error:
                        self.say(str(error))
        if path is not None:
            path.write_text(json.dumps({"date": today(), "machine": machine(), **middle(costs)}, indent=1) + "\n")
        return runs

    def check(self, costs: Path, measured_rows: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
        """The real runs, and predictions for what the machine had left for them."""
        found: dict[str, Any] = {}
        for nodes, runs in measured_rows.items():
            rows: dict[str, Any] = {}
            for row in MEASURED:
                values = [(run[row]["value"], run[row]["free"], run[row]) for run in runs if row in run]
                if not values:
                    continue
                free = statistics.median(value[1] for value in values)
                said = {key: values[0][2][key] for key in ("each", "tasks", "count", "size") if key in values[0][2]}
                options = {"shared": True, "cpus": 1, "cores": machine()["cores"], "ours": round(min(free, 0.98), 3)}
                scenes = f"{row},actors" if row == "recovery" else row
                of = "actors" if row == "recovery" else row
                said = {"count": nodes} if row == "recovery" else said
                predicted = self.run(
                    "scenes.py", str(costs), "--nodes", str(nodes), "--scenes", scenes, "--options", json.dumps(options),
                    "--arguments", json.dumps({of: said} if said else {}),
                )["rows"][row]  # fmt: skip
                measured = statistics.median(value[0] for value in values)
                rows[row] = {
                    "measured": measured,
                    "all_measured": [value[0] for value in values],
                    "predicted": predicted["value"],
                    "measured_cpu_s": values[0][2]["cpu"],  # for each task or actor, where there are such
                    "predicted_cpu_s": predicted["cpu_s"],
                    "free": free,
                    "error": predicted["value"] / measured - 1,
                }
                free_text = f"{free:.0%} of the machine"
                self.say(f"  {nodes} virtual nodes, {row}: measured {measured:.4g}, predicted {predicted['value']:.4g}, {free_text}")
            found[str(nodes)] = rows
        return found

    def predict(self, costs: Path, sizes: list[int], cores: int) -> dict[str, Any]:
        found = {}
        options = json.dumps({"cpus": cores, "cores": cores, "costs": NETWORK})
        for nodes in sizes:
            found[str(nodes)] = self.run("scenes.py", str(costs), "--nodes", str(nodes), "--options", options, limit_s=1800)["rows"]
            took = sum(row["took_s"] for row in found[str(nodes)].values())
            self.say(f"  {nodes} nodes are simulated: {took:.0f} s")
        return found


def middle(found: list[Any]) -> Any:
    """Of several measurements of the same things the median of each number."""
    first = found[0]
    if isinstance(first, dict):
        return {key: middle([one[key] for one in found if key in one]) for key in first}
    if isinstance(first, list):
        return [middle(list(several)) for several in zip(*found, strict=True)]
    return statistics.median(found) if isinstance(first, (int, float)) else first


def amount(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.2g}" if value < 1 else f"{short(value)}{unit}"


def prediction_table(found: dict[str, Any]) -> Table:
    table = Table(title="predicted by simulation", caption="hosts like the one where the costs were measured", title_justify="left")
    table.add_column("")
    for nodes in found:
        table.add_column(f"{int(nodes):,} nodes", justify="right")
    for (scene, key), (title, unit) in ROWS.items():
        cells = [amount(rows[scene][key], unit) if scene in rows else "" for rows in found.values()]
        table.add_row(title, *cells)
    return table


def check_table(found: dict[str, Any]) -> Table:
    table = Table(title="virtual nodes of this machine: measured → predicted", title_justify="left")
    table.add_column("")
    for nodes in found:
        table.add_column(f"{nodes} nodes", justify="right")
    for row in MEASURED:
        title, unit = ROWS[row, "value"]
        cells = []
        for rows in found.values():
            one = rows.get(row)
            cells.append(f"{amount(one['measured'], unit)} → {amount(one['predicted'], unit)}  {one['error']:+.0%}" if one else "")
        table.add_row(SMALLER.get(row, title), *cells)
    return table


def draw(predicted: dict[str, Any], checked: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(3, 4, figsize=(17, 11))
    sizes = [int(nodes) for nodes in predicted]
    for plot, ((scene, key), (title, unit)) in zip(plots.flat, ROWS.items(), strict=False):
        scale = 100 if unit == "%" else 1
        points = [(n, scale * rows[scene][key]) for n, rows in zip(sizes, predicted.values(), strict=True) if scene in rows]
        plot.plot(*zip(*points, strict=True), "o-", color="tab:blue", label="predicted, a host each")
        plot.set_title(f"{title}{f' ({unit})' if unit else ''}", fontsize=9)
        plot.set_xscale("log")
        if all(value > 0 for _, value in points):
            plot.set_yscale("log")
        plot.set_xlabel("nodes", fontsize=8)
        plot.grid(alpha=0.3)
    last = plots.flat[len(ROWS)]
    for row, marker in zip(MEASURED, "os^vDP", strict=True):
        points = [(int(n), 100 * rows[row]["error"]) for n, rows in checked.items() if row in rows]
        if points:
            last.plot(*zip(*points, strict=True), marker=marker, label=row)
    last.axhspan(-100 * GOOD, 100 * GOOD, color="tab:green", alpha=0.15)
    last.set_title("virtual nodes: prediction against measurement (%)", fontsize=9)
    last.set_xscale("log", base=2)
    if checked:
        last.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the costs anew")
    parser.add_argument("--costs", type=Path, help="costs to use; default: the latest in results/")
    parser.add_argument("--check", nargs="*", type=int, default=[2, 4, 8, 16], metavar="N", help="virtual nodes; nothing: none")
    parser.add_argument("--rounds", type=int, default=3, help="of all that is measured")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each rate of a real run")
    parser.add_argument("--nodes", nargs="*", type=int, default=[10, 100, 1000, 10_000], metavar="N", help="to predict")
    parser.add_argument("--cores", type=int, default=machine()["cores"], help="of each host that is predicted")
    parser.add_argument("--python", action="append", default=[], metavar="hpc_ray=PATH", help="an interpreter that has hpc_ray")
    parser.add_argument("--out", type=Path, default=RESULTS / f"scale-{today()}", help="files, without their endings")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    python = engines.interpreter("hpc_ray", named_pythons(arguments.python))
    if python is None:
        parser.error("hpc_ray is not installed for the benchmarks; say `python -m bench.engines hpc_ray`, or name a --python")
    here = Here(console, python)
    costs = arguments.costs or max(RESULTS.glob("costs-*.json"), default=None)
    anew = arguments.measure or costs is None
    if anew:
        costs = arguments.costs or RESULTS / f"costs-{today()}.json"
    console.print("measuring what things cost here, and how virtual nodes do" if anew else "measuring how virtual nodes do")
    runs = here.measure(costs if anew else None, arguments.check, arguments.rounds, arguments.seconds)
    about = json.loads(costs.read_text())
    checked = here.check(costs, runs)
    predicted = here.predict(costs, arguments.nodes, arguments.cores)
    report = {
        "date": today(),
        "machine": machine(),
        "costs": {"date": about["date"], "machine": about["machine"]},
        "cores_of_a_host": arguments.cores,
        "network": NETWORK,
        "predicted": predicted,
        "checked": checked,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    tables = [*([prediction_table(predicted)] if predicted else []), *([check_table(checked)] if checked else [])]
    with arguments.out.with_suffix(".txt").open("w") as file:
        for table in tables:
            console.print(table)
            Console(file=file, width=160).print(table)
    if predicted:
        draw(predicted, checked, arguments.out.with_suffix(".png"))
    errors = [abs(row["error"]) for rows in checked.values() for row in rows.values()]
    if errors:
        close = sum(error <= GOOD for error in errors)
        console.print(f"{close} of {len(errors)} figures of virtual nodes are predicted within {GOOD:.0%}")
    return 0


if __name__ == "__main__":
    engines.end_when_asked()
    sys.exit(main())

"""What an engine weighs while it does nothing: ``python -m bench.footprint``.

Processes, threads, listening ports, memory (PSS: shared pages are divided among those that map them), the processor time of
an idle cluster, how long ``import`` and ``init()`` take, and 100 actors created, called and killed. hpc_ray beside Ray, one
after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import statistics
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench import engines
from bench.child import Child, Gone
from bench.core import RESULTS, machine, named_pythons, short

CROWD = "100 actors created, called, killed"
TIMES = 3  # fresh processes whose start is measured


def pss_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def cpu_s(processes: list[psutil.Process]) -> float:
    """What they have run, by their own clocks (clock_getcpuclockid): ticks, as ps shows them, miss who runs for microseconds."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            total += time.clock_gettime(~process.pid << 3 | 2)
    return total


def weigh(name: str, python: Path, workers: int, idle_s: float) -> dict[str, float]:
    """The figures of one engine. Blocks for ``idle_s`` and some seconds.

    Raises:
        Gone: the engine did not start or ended.
    """
    starts = []
    for _ in range(TIMES):
        child = Child(name, python, "--cpus", str(workers))
        starts.append(child.told)
        child.stop()
    child = Child(name, python, "--cpus", str(workers))
    try:
        child.resume()
        time.sleep(3)  # what the start left to do is over
        driver = psutil.Process(child.pid)
        family = [driver, *driver.children(recursive=True)]
        idle = child.told["workers"]
        ports = {
            connection.laddr.port
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        before = cpu_s(family)
        time.sleep(idle_s)
        spent = cpu_s(family) - before
        found = {
            "import, ms": 1000 * statistics.median(start["import_s"] for start in starts),
            "init() to first result, ms": 1000 * statistics.median(start["init_s"] for start in starts),
            "processes beside the driver": len(family) - 1,
            "threads, with the driver's": sum(process.num_threads() for process in family),
            "listening ports": len(ports),
            "memory (PSS) of all, MiB": sum(pss_mib(process.pid) for process in family),
            "memory (PSS) of an idle worker, MiB": statistics.mean(pss_mib(pid) for pid in idle),
            "processor time of the idle cluster, % of a core": 100 * spent / idle_s,
        }
        rate = child.measure(CROWD, 0, 300)[""]
        found[f"{CROWD}, s"] = 100 / rate
        return found
    finally:
        child.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--idle", type=float, default=30, metavar="SECONDS", help="how long the idle cluster is watched (30)")
    parser.add_argument("--against", nargs="*", choices=["ray"], default=["ray"], help="other engines (ray, if it is installed)")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter of an engine")
    parser.add_argument("--out", type=Path, help="results without suffix (bench/results/footprint-DATE)")
    given = parser.parse_args()
    named, console = named_pythons(given.python), Console(width=None if sys.stdout.isatty() else 120)
    date = dt.datetime.now().astimezone().date().isoformat()
    found = {}
    for name in ("hpc_ray", *given.against):
        python = engines.interpreter(name, named)
        if python is None:
            console.print(f"{name}: left out: it is not installed; say `python -m bench.engines {name}`", markup=False)
            continue
        try:
            found[name] = weigh(name, python, given.workers, given.idle)
        except (Gone, RuntimeError) as error:
            console.print(f"{name}: left out: {error}", markup=False)
    if not found:
        return 1
    where = machine()
    shown = Table(title=f"{date}, {where['cpu']}, {where['cores']} cores; {given.workers} idle workers, watched for {given.idle:.0f} s")
    for column in ("", *found, "ratio"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for figure in next(iter(found.values())):
        values = [by_figure[figure] for by_figure in found.values()]
        ratio = f"{values[1] / values[0]:.1f}" if len(values) == 2 and values[0] else ""
        shown.add_row(figure, *map(short, values), ratio)
    console.print(shown)
    out = given.out or RESULTS / f"footprint-{date}"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"date": date, "machine": where, "workers": given.workers, "idle_s": given.idle, "figures": found}
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    with out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=120).print(shown)
    console.print(f"written into {os.path.relpath(out.parent)}: {out.with_suffix('.json').name}, {out.with_suffix('.txt').name}")
    return 0


if __name__ == "__main__":
    engines.end_when_asked()
    sys.exit(main())

"""The child's side of a measurement: which rows there are, and the loop that measures what the runner asks for.

A *row* is a function that gets the engine, prepares what it needs, and returns ``step``: a function that does some
operations and says how many. Or, where one number does not tell, a function that gets the engine and how long to measure,
and returns named figures. Commands come in as lines of JSON, answers go out the same way; whatever the engine prints goes to
the error stream.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    prepare: Callable[..., Any]
    unit: str
    across: bool  # also measured from one virtual node to another
    figures: bool  # returns named figures
    warm: bool  # one step is done before the clock starts
    less_is_better: bool


ROWS: dict[str, Row] = {}


def row(name, unit="/s", *, across=False, figures=False, warm=True, less_is_better=False):
    def add(function):
        ROWS[name] = Row(function, unit, across, figures, warm, less_is_better)
        return function

    return add


def percentiles(samples_s):
    """p50, p99 and p99.9 in microseconds."""
    ordered = sorted(samples_s)
    last = len(ordered) - 1
    return {f"p{share}": 1e6 * ordered[min(last, int(len(ordered) * share / 100))] for share in (50, 99, 99.9)}


def call_latency(call, seconds):
    """The percentiles of single calls, as many as fit."""
    samples = []
    for _ in range(20):
        call()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)


def measure(name, engine, seconds):
    """The figures of one row; a rate has the name ""."""
    row = ROWS[name]
    if row.figures:
        return row.prepare(engine, seconds)
    step = row.prepare(engine)
    if row.warm:
        step()
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not done:
        done += step()
    return {"": done / passed}


def answer(command, engine):
    try:
        return {"figures": measure(command["row"], engine, command["seconds"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[-1][:200]}
    finally:
        gc.collect()  # what the row held goes before the next one


def serve(start):
    """Start the engine and answer commands until there are none. ``start() -> (engine, what to tell about the start)``."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def tell(what):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    engine, told = start()
    rows = {name: {"unit": row.unit, "across": row.across, "less_is_better": row.less_is_better} for name, row in ROWS.items()}
    tell({**told, "rows": rows})
    for line in commands:
        tell(answer(json.loads(line), engine))

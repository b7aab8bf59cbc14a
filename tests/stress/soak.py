"""Runs the stress programs for as long as you like: ``python tests/stress/soak.py --minutes 30 [--nodes 3] [only ...]``.

Prints one line for each round and what the node's processes have grown to. The first wrong answer, hang or leftover ends
it with a traceback and exit code 1; ``--seed`` repeats a run of random references.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import workloads

import hpc_ray as ray


def deaths(seed: int) -> None:
    """Tasks with retries under random kills of workers."""

    @ray.remote(max_retries=-1)
    def work(x):
        time.sleep(0.002)
        return x

    with workloads.Killer(seed=seed):
        assert ray.get([work.remote(i) for i in range(2000)], timeout=workloads.PATIENCE_S) == list(range(2000))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="nested, callers, objects, references, deaths (default: all)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--nodes", type=int, default=1, help="virtual nodes")
    parser.add_argument("--cpus", type=int, default=4, help="of each node")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    chosen = parser.parse_args()
    programs = {
        "nested": lambda seed: workloads.nested_submitters(),
        "callers": lambda seed: workloads.callers(),
        "objects": lambda seed: workloads.objects(nodes=chosen.nodes),
        "references": workloads.references,
        "deaths": deaths,
    }
    unknown = set(chosen.only) - set(programs)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(programs)}")
    end = time.monotonic() + 60 * chosen.minutes
    seed = chosen.seed
    ray.init(num_cpus=chosen.cpus, **({"num_nodes": chosen.nodes} if chosen.nodes > 1 else {}))
    while time.monotonic() < end:
        took = []
        for name in chosen.only or programs:
            faulthandler.dump_traceback_later(4 * workloads.PATIENCE_S, exit=True)
            start = time.monotonic()
            programs[name](seed)
            took.append(f"{name} {time.monotonic() - start:.2f} s")
        workloads.assert_all_released()
        for node in range(chosen.nodes):
            workloads.eventually(lambda node=node: workloads.node_holdings(node), {})
        grown = ", ".join(f"{name} {memory / 1e6:.0f} MB {fds} fds" for name, (memory, fds) in workloads.sizes().items())
        print(f"{seed}: {', '.join(took)} | {grown}", flush=True)
        seed += 1
    faulthandler.cancel_dump_traceback_later()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What things cost on this machine, for the simulator: ``costs.py`` prints it as JSON; run by ``bench.scale`` as a script.

- lanes: messages sent and received through shared memory, as the roles do it, and a process that is woken;
- the deciding halves: each event of the real GCS and raylet states in simulated clusters of several sizes, timed;
- links: two of them over MPI (``links.py``);
- owners, workers, actors, nodes: processor time in a real session (``virtual.py``), on one node; of a node's start, on two and four.

Processor time, not elapsed time, so that other programs disturb little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import scenes

from hpc_ray import _core
from hpc_ray.gcs.journal import SqliteJournal
from hpc_ray.launcher import world
from hpc_ray.machine import Journal
from hpc_ray.protocol import ReportResources, decode, encode
from hpc_ray.simulator.costs import Costs, Prices
from hpc_ray.simulator.process import ASLEEP_S, SLICE_S
from hpc_ray.simulator.roles import units_of

HERE = Path(__file__).parent
SIZES = (2, 16, 100, 1000)
ACTORS = 48
CHAIN = 8  # processes that wake one another
SMALL = ReportResources(3, 7, {"CPU": 20_000, "memory": 10**13}, {"CPU": 10_000, "memory": 10**13}, [])


def per_call(what: Any, count: int, rounds: int = 9) -> float:
    """Processor seconds of one call; the median of some rounds."""
    found = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(count):
            what()
        found.append((time.thread_time() - begin) / count)
    return statistics.median(found)


def lanes() -> dict[str, float]:
    segment = _core.Segment(node=0, arena_bytes=1 << 26)
    us, them = segment.open_lane(20), segment.open_lane(21)
    large = ReportResources(3, 7, {f"CPU_group_{i:032}": 10_000 for i in range(200)}, {}, [])
    data, more = encode(SMALL), encode(large)
    size, extra = len(data), len(more) - len(data)

    def send(payload: bytes) -> float:
        def some() -> None:
            for _ in range(50):
                us.send(them.address, payload)
            them.receive(0)

        return per_call(some, 40) / 50

    def turn() -> None:
        us.send(them.address, data)
        them.receive(0)

    both, both_large = send(data), send(more)
    decode_small, decode_large = per_call(lambda: decode(data), 2000), per_call(lambda: decode(more), 500)
    found = {
        "encode_s": per_call(lambda: encode(SMALL), 2000),
        "encode_byte_s": max(0.0, per_call(lambda: encode(large), 500) - per_call(lambda: encode(SMALL), 2000)) / extra,
        "send_s": both / 2,
        "send_byte_s": max(0.0, both_large - both) / extra / 2,
        "receive_s": both / 2 + decode_small,
        "receive_byte_s": max(0.0, (both_large - both) / 2 + decode_large - decode_small) / extra,
        "turn_s": max(0.0, per_call(turn, 1000) - both) + per_call(time.monotonic, 1000) * 3,
    }
    found["bytes_of_a_message"] = size
    them.close(0)
    us.close(0)
    found["wake_s"] = max(0.0, woken(0.0005, 2000)[0] - found["receive_s"] - found["send_s"])
    found.update(asleep())
    found["ring_s"] = rung()
    return found


def rung() -> float:
    """Processor time of a datagram to somebody of this host, as links wake one another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        there.bind(("127.0.0.1", 0))
        address = there.getsockname()
        return per_call(lambda: here.sendto(b"8 bytes.", address), 100)


def asleep() -> dict[str, float]:
    """What it takes processes more that wake one another when all have slept: the machine, which the first ones wake, and each of them."""
    gcs = scenes.Cluster(2, Costs(), GUESS).simulator.gcs.gcs
    slept, awake = (
        woken(gap_s, rounds, CHAIN, lambda message: gcs.handle(message, 0, 0.0)) for gap_s, rounds in ((ASLEEP_S, 40), (0.0005, 300))
    )
    more = [max(0.0, after - before) for after, before in zip(slept, awake, strict=True)]
    stale_s = statistics.median(more[2:])
    first, second = (max(1e-6, spent - stale_s) for spent in more[:2])
    left = min(0.9, max(0.05, second / first))
    return {"idle_s": first, "stale_s": stale_s, "awake_s": -slept[0] / math.log(left)}


def woken(gap_s: float, rounds: int, count: int = 1, work: Callable[[Any], object] = lambda message: None) -> list[float]:
    """Processor time of processes that sleep on their lanes for so long, take a message, work, and send it to the next; medians."""
    segment = _core.Segment(node=0, arena_bytes=1 << 26)
    us = segment.open_lane(20)
    addresses = [_core.make_address(0, 21 + i, 1) for i in range(count)] + [us.address]
    pids = []
    for number in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                _pass_on(segment.open_lane(21 + number), us.address, addresses[number + 1], rounds, work)
            finally:
                os._exit(0)
    data = encode(SMALL)

    def come(wanted: int) -> list[bytes]:
        got: list[bytes] = []
        while len(got) < wanted:
            some = us.receive(5.0)
            assert some, "a process that was woken did not answer"
            got += [payload for _, payload in some]
        return got

    come(count)
    for _ in range(rounds):
        time.sleep(gap_s)
        us.send(addresses[0], data)
        come(1)
    found = []
    for address in addresses[:-1]:
        us.send(address, data)
        found.append(float(come(1)[0]))
    for pid in pids:
        os.waitpid(pid, 0)
    us.close(0)
    return found


def _pass_on(lane: Any, starter: int, following: int, rounds: int, work: Callable[[Any], object]) -> None:
    lane.send(starter, b"ready")
    found: list[float] = []
    while len(found) < rounds:
        begin = time.thread_time()
        messages = lane.receive(5.0)
        for _, data in messages:
            work(decode(data))
            lane.send(following, data)
            found.append(time.thread_time() - begin)
    lane.receive(60.0)
    lane.send(starter, repr(statistics.median(found)).encode())
    lane.close(1)


def committed() -> float:
    """Of one record, into the GCS's journal."""
    with tempfile.TemporaryDirectory() as folder:
        journal = SqliteJournal(f"{folder}/journal")
        record = Journal("actor", b"key", bytes(400))
        spent = per_call(lambda: journal.commit([record]), 50)
        journal.close()
    return spent


class Stopwatch:
    """Times the states: role → class of event → (units, seconds)."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))

    def __call__(self, role: str, state: Any, event: Any, source: int, now: float) -> list[Any]:
        begin = time.thread_time_ns()
        actions = state.handle(event, source, now)
        spent = time.thread_time_ns() - begin
        entry = self.found[role][type(event).__name__]
        entry[0] += units_of(event, actions)
        entry[1] += spent / 1e9
        return actions


def states(sizes: tuple[int, ...], note: Any = lambda text: None) -> dict[str, dict[str, list[list[float]]]]:
    """Each event of the real states, in clusters of these sizes."""
    prices: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for nodes in sizes:
        watch = Stopwatch()
        costs = Costs(jitter=0.0, boot_s=0.1, detect_s=0.01)
        cluster = scenes.Cluster(nodes, costs, GUESS, stopwatch=watch)
        begin = time.perf_counter()
        some = scenes.SCENES if nodes <= 100 else ("spread", "actors", "broadcast", "recovery")  # the others bring nothing new, slowly
        scenes.play(cluster, list(some), {"local": {"each": 50}, "spread": {"tasks": 500}})
        note(f"states of {nodes} nodes: {time.perf_counter() - begin:.0f} s")
        for role, kinds in watch.found.items():
            whole = [sum(entry[i] for entry in kinds.values()) for i in (0, 1)]
            for kind, (units, spent) in {**kinds, "other": whole}.items():
                prices[role][kind].append([nodes, spent / units])
    return prices


GUESS = Prices(
    events={role: {"other": [[1, 5e-6]]} for role in ("gcs", "raylet")},
    receive_s=2e-6,
    encode_s=1e-6,
    send_s=1e-6,
    wake_s=5e-6,
    turn_s=2e-6,
    link_turn_s=2e-6,
    link_out_s=5e-7,
    link_in_s=7e-7,
    link_chunk_s=3e-6,
    submit_s=1e-5,
    reply_s=6e-6,
    task_s=8e-6,
    actor_s=3e-4,
)


def run(command: list[str], tries: int = 3) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=world.under_root(dict(os.environ)))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines and tries > 1:  # a machine that others use, too
        return run(command, tries - 1)
    if not lines:
        raise RuntimeError(f"{' '.join(command)} said nothing; its last words: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def links() -> dict[str, float]:
    line = [world.find_mpirun().path, "-n", "2", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
    found = run([*line, sys.executable, str(HERE / "links.py")])
    many = found["many"]
    each = [(found["many_s"][i] - found["one_s"][i]) / (many - 1) for i in (0, 1)]
    chunk = [found["one_s"][i] - each[i] for i in (0, 1)]
    return {
        "link_out_s": each[0],
        "link_in_s": each[1],
        "link_chunk_s": sum(chunk) / 2,
        "link_look_s": found["empty_s"],
        "link_wake_s": found["woken_s"] - found["empty_s"],
    }


def derived(found: dict[str, Any], events: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """What the simulator takes, from what was measured."""
    measured, lane, link = found["session"], found["lanes"], found["links"]
    task, actor = measured["task"], measured["actor"]
    cores = os.cpu_count() or 1
    boot_s = max(0.01, (measured["start_cpu_s"][4] - measured["start_cpu_s"][2]) / 2)
    moved = measured["object"]
    costs = {
        "jitter": 0.0,
        "network_s": 1e-6,  # one host's memory
        "bytes_per_s": 1e11,  # the same: what it takes is the receiving link's work
        "launch_s": statistics.median(max(0.0, s - n * boot_s / cores) for n, s in measured["start_s"].items() if n > 1),
        "boot_s": boot_s,
        "fork_s": actor["fork_server"],
        "worker_start_s": 0.9 * actor["worker"],
        "detect_s": measured["death"]["value"],
    }
    prices = {
        **{key: lane[key] for key in ("turn_s", "receive_s", "receive_byte_s", "encode_s", "encode_byte_s", "send_s", "send_byte_s")},
        "wake_s": lane["wake_s"],
        **{key: lane[key] for key in ("idle_s", "stale_s", "awake_s")},
        "ring_s": lane["ring_s"],
        "link_turn_s": link["link_look_s"],
        **{key: link[key] for key in ("link_wake_s", "link_out_s", "link_in_s", "link_chunk_s")},
        "link_byte_s": moved["cpu"]["link"] / moved["size"] / 2,  # the sending link only looks, meanwhile
        "commit_s": found["commit_s"],
        "submit_s": 0.6 * task["driver"],
        "reply_s": 0.4 * task["driver"],
        "task_s": task["worker"],
        "create_s": actor["driver"],
        "actor_s": 0.1 * actor["worker"],
        "exit_s": (measured["death"]["all_s"] - measured["death"]["value"]) * cores / measured["death"]["others"],
        "events": events,
    }
    return costs, prices


def fitted(measured: float, simulated: Callable[[float], float], probe: float = 50e-6) -> float:
    """The price with which what is simulated, which grows with it, is what was measured; 0 if it is as much without."""
    without = simulated(0.0)
    return max(0.0, (measured - without) / (simulated(probe) - without) * probe)


def coldness(found: dict[str, Any], costs: dict[str, float], prices: dict[str, Any]) -> float:
    """What it takes a process to fill its caches again. As GCS and raylet of one node, among workers that start, take so much more
    than their events cost one by one, and the simulator knows how often they run after others."""

    def simulated_s(cold_s: float) -> float:
        spent = scenes.play(alone(costs, {**prices, "cold_s": cold_s}), ["actors"], {"actors": {"count": ACTORS}})["actors"]["cpu_s"]
        return (spent["gcs"] + spent["raylet"]) / ACTORS

    actor = found["session"]["actor"]
    return fitted(actor["gcs"] + actor["raylet"], simulated_s)


def forgotten(found: dict[str, Any], costs: dict[str, float], prices: dict[str, Any]) -> float:
    """What it takes a process whose code is in no cache, as none of its kind has run for long; from a call after such a time."""
    unused = found["session"]["unused"]

    def simulated_s(code_s: float) -> float:
        cluster = alone(costs, {**prices, "code_s": code_s})
        scenes.play(cluster, [])
        cluster.call(0.0)
        lately = cluster.call(1e-3)
        return cluster.call(unused["gap_s"]) - lately

    return fitted(unused["more"], simulated_s)


def alone(costs: dict[str, float], prices: dict[str, Any]) -> scenes.Cluster:
    """One simulated node."""
    told = msgspec.convert(prices, Prices)
    return scenes.Cluster(1, msgspec.convert(costs, Costs), told, cpus=1, cores=os.cpu_count() or 1, shared=True)


def session(nodes: int, *arguments: str) -> dict[str, Any]:
    rows: dict[str, Any] = run([sys.executable, str(HERE / "virtual.py"), "--nodes", str(nodes), *arguments])["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    arguments = parser.parse_args()

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found: dict[str, Any] = {"lanes": lanes(), "links": links(), "commit_s": committed()}
    note("lanes and links are measured")
    one = [session(1, "--actors", str(ACTORS), "--seconds", "1") for _ in range(3)]
    note("one node is measured")

    def middle(row: str, kind: str) -> float:
        return statistics.median(rows[row]["cpu"].get(kind, 0.0) for rows in one)

    starts = {nodes: [session(nodes, "--only", "start")["start"] for _ in range(3)] for nodes in (2, 4)}
    cpu = {nodes: statistics.median(sum(row["cpu"].values()) for row in rows) for nodes, rows in starts.items()}
    object_cpu = session(2, "--only", "broadcast")["broadcast"]
    deaths = [session(1, "--only", "death")["death"] for _ in range(5)]
    found["session"] = {
        "death": {key: statistics.median(death[key] for death in deaths) for key in ("value", "all_s", "others")},
        "task": {kind: middle("spread", kind) for kind in ("driver", "worker", "raylet", "gcs")},
        "actor": {kind: middle("actors", kind) for kind in ("driver", "worker", "fork_server", "raylet", "gcs")},
        # As if the machine were ours alone:
        "start_s": {nodes: statistics.median(row["value"] * row["free"] for row in rows) for nodes, rows in starts.items()},
        "start_cpu_s": {1: sum(middle("start", kind) for kind in one[0]["start"]["cpu"]), **cpu},
        "object": object_cpu,
        "unused": session(1, "--only", "unused")["unused"],
    }
    note("nodes are measured")
    events = states(tuple(map(int, arguments.sizes.split(","))), note)
    costs, prices = derived(found, events)
    prices["cold_s"] = coldness(found, costs, prices)
    prices["code_s"] = forgotten(found, costs, prices)
    # Nodes that start at once take turns, and what their caches cost them then is in what was measured; so are their first workers.
    costs["boot_s"] = costs["boot_s"] / (1 + prices["cold_s"] / SLICE_S) - costs["fork_s"] - costs["worker_start_s"]
    found["costs"], found["prices"] = costs, prices
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

"""What the stress tests and ``soak.py`` run: programs with one right answer, and looks at what they leave behind."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import hpc_ray as ray
from hpc_ray.client import context
from hpc_ray.ids import raylet_address
from hpc_ray.launcher import session

ROUNDS = float(os.environ.get("HPC_RAY_STRESS", "1"))
MEMORY = ("hpc_ray", "sm_segment.", "open_mpi.", "mpich_shm_", "ucx_shm_")  # files in /dev/shm: ours and MPI's
MARK = "HPC_RAY_STRESS_MARK"  # in the environment of every process that comes from here
os.environ.setdefault(MARK, uuid.uuid4().hex)
PATIENCE_S = float(os.environ.get("HPC_RAY_STRESS_PATIENCE_S", "60"))  # before a wait counts as a hang


def rounds(usual: int) -> range:
    """How often to repeat what is repeated ``usual`` times in a normal run."""
    return range(max(1, int(usual * ROUNDS)))


def eventually(look: Callable[[], Any], wanted: Any, timeout_s: float | None = None) -> None:
    """Look again and again until it is as wanted; AssertionError with what it was in the end."""
    timeout_s = PATIENCE_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"still {seen!r} after {timeout_s:g} s; wanted {wanted!r}"
        time.sleep(0.005)


# ------------------------------------------------------------------ what is left behind


@dataclass(frozen=True)
class Traces:
    """What sessions leave on a machine: folders, shared memory, processes that come from here, zombies of this process."""

    folders: frozenset[str]
    memory: frozenset[str]
    processes: frozenset[int]
    zombies: frozenset[int]

    @classmethod
    def now(cls) -> Traces:
        processes, zombies = set(), set()
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                if fields[0] == "Z":
                    zombies.update([int(name)] if int(fields[1]) == os.getpid() else [])
                elif session.environment_of(int(name)).get(MARK.encode()) == os.environ[MARK].encode():
                    processes.add(int(name))
            except OSError:
                continue
        base = session.base_dir()
        return cls(
            frozenset(os.listdir(base)) if os.path.isdir(base) else frozenset(),
            frozenset(name for name in os.listdir("/dev/shm") if name.startswith(MEMORY)),
            frozenset(processes),
            frozenset(zombies),
        )

    def beyond(self, before: Traces) -> list[str]:
        """What is here that was not there before."""
        found = []
        for kind in ("folders", "memory", "processes", "zombies"):
            found += [f"{kind}: {item}" for item in sorted(getattr(self, kind) - getattr(before, kind))]
        return found


def holdings() -> dict[str, Any]:
    """What this process holds and is owed; {} when it holds nothing."""
    client = context.client
    assert client is not None
    gc.collect()
    client.work_off_released()
    found = {
        "entries": len(client.objects.entries),
        "lent": len(client.objects.lent),
        "unacknowledged": len(client.objects.unacknowledged),
        "tasks": len(client.tasks.tasks),
        "calls": len(client.actors.calls),
        "sleepers": len(client.sleepers),
        "requests": len(client._requests),
    }
    return {name: count for name, count in found.items() if count}


def node_holdings(node: int | None = None) -> dict[str, Any]:
    """What the raylet of a node knows of that should be nothing at rest."""
    client = context.client
    assert client is not None
    address = client.raylet if node is None else raylet_address(node)
    statistics = client.query(address, "statistics", PATIENCE_S)
    found = {name: statistics[name] for name in ("leases", "waiting", "pulls", "copies", "bundles")}
    found["resources in use"] = sum(statistics["total"][n] - statistics["available"].get(n, 0) for n in statistics["total"])
    if address == client.raylet:
        store = client.store.statistics()
        found.update({name: store[name] for name in ("objects", "creating", "doomed", "used_bytes")})
    return {name: count for name, count in found.items() if count}


def assert_all_released() -> None:
    """Nothing is held by this process, leased by the raylet, or left in the arena."""
    eventually(holdings, {})
    eventually(node_holdings, {})


# ------------------------------------------------------------------ tasks


@ray.remote
def _square(x: int) -> int:
    return x * x


@ray.remote
def _submitter(start: int, count: int, batch: int) -> int:
    total = 0
    for first in range(start, start + count, batch):
        last = min(first + batch, start + count)
        values = ray.get([_square.remote(x) for x in range(first, last)])
        assert values == [x * x for x in range(first, last)]
        total += sum(values)
    return total


def nested_submitters(tasks: int = 10_000, submitters: int = 4, batch: int = 500) -> None:
    """Tasks that submit tasks and get them; all sums are right."""
    share = tasks // submitters
    found = ray.get([_submitter.remote(i * share, share, batch) for i in range(submitters)], timeout=PATIENCE_S)
    assert found == [sum(x * x for x in range(i * share, (i + 1) * share)) for i in range(submitters)]


# ------------------------------------------------------------------ actors


@ray.remote
class Witness:
    """Sees that the calls of each caller come in order, each once."""

    def __init__(self) -> None:
        self.next: dict[Any, int] = {}
        self.wrong: list[Any] = []

    def see(self, caller: Any, number: int) -> int:
        expected = self.next.get(caller, 0)
        if number != expected:
            self.wrong.append((caller, expected, number))
        self.next[caller] = number + 1
        return number

    def report(self) -> tuple[dict[Any, int], list[Any]]:
        return self.next, self.wrong


def _call_many(witness: Any, caller: Any, calls: int) -> int:
    numbers = ray.get([witness.see.remote(caller, i) for i in range(calls)], timeout=PATIENCE_S)
    assert numbers == list(range(calls))
    return calls


@ray.remote
def _calling_task(witness: Any, caller: Any, calls: int) -> int:
    return _call_many(witness, caller, calls)


@ray.remote
class _CallingActor:
    def call(self, witness: Any, caller: Any, calls: int) -> int:
        return _call_many(witness, caller, calls)


def callers(calls: int = 1000, each: int = 3) -> None:
    """``each`` threads of this process, ``each`` tasks and ``each`` - 1 actors call one actor; per caller all is in order."""
    witness = Witness.remote()
    actors = [_CallingActor.options(num_cpus=0).remote() for _ in range(each - 1)]
    refs = [actor.call.remote(witness, f"actor {i}", calls) for i, actor in enumerate(actors)]
    refs += [_calling_task.remote(witness, f"task {i}", calls) for i in range(each)]
    in_threads([lambda i=i: _call_many(witness, f"thread {i}", calls) for i in range(each)])
    assert ray.get(refs, timeout=PATIENCE_S) == [calls] * len(refs)
    counts, wrong = ray.get(witness.report.remote(), timeout=PATIENCE_S)
    assert wrong == []
    assert set(counts.values()) == {calls} and len(counts) == 3 * each - 1


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run them all at once; their values, or the first error."""
    values: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            values[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return values


# ------------------------------------------------------------------ objects


@ray.remote
def _make(seed: int, size: int) -> tuple[int, np.ndarray]:
    array = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return zlib.crc32(array), array


@ray.remote
def _pass_on(pair: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
    crc, array = pair
    assert zlib.crc32(array) == crc
    inverse = 255 - array
    return zlib.crc32(inverse), inverse


@ray.remote
def _check(boxed: list[Any]) -> int:
    crc, array = ray.get(boxed[0])
    assert zlib.crc32(array) == crc
    return crc


def objects(count: int = 500, size: int = 1 << 20, nodes: int = 1) -> None:
    """Large objects made, passed on and checked in different processes (and nodes); every checksum is right."""
    spread = {"scheduling_strategy": "SPREAD"} if nodes > 1 else {}
    make, hand, check = (f.options(**spread) if spread else f for f in (_make, _pass_on, _check))
    for first in range(0, count, 50):
        seeds = range(first, min(first + 50, count))
        made = [make.remote(seed, size) for seed in seeds]
        passed = [hand.remote(ref) for ref in made]
        checks = ray.get([check.remote([ref]) for ref in passed], timeout=PATIENCE_S)
        for ref, crc in zip(passed, checks, strict=True):
            told, array = ray.get(ref, timeout=PATIENCE_S)
            assert told == crc == zlib.crc32(array)
            del array


# ------------------------------------------------------------------ references


@ray.remote
def _wrap(boxed: list[Any], depth: int) -> list[Any]:
    """Nests a reference deeper, in an object that a worker owns."""
    return boxed if depth == 0 else [ray.put(boxed)]


def open_box(boxed: Any) -> Any:
    """The value at the bottom of lists and references."""
    while isinstance(boxed, (list, ray.ObjectRef)):
        boxed = boxed[0] if isinstance(boxed, list) else ray.get(boxed, timeout=PATIENCE_S)
    return boxed


@ray.remote(num_cpus=0)
class Holder:
    """Keeps references, hands them on, drops them."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def hold(self, key: int, boxed: Any) -> None:
        self.held[key] = boxed

    def make(self, key: int, size: int) -> None:
        self.held[key] = [ray.put((key, bytes(size)))]

    def give(self, key: int) -> Any:
        return self.held[key]

    def pass_on(self, key: int, other: Any) -> None:
        ray.get(other.hold.remote(key, self.held[key]))

    def look(self, key: int) -> int:
        return open_box(self.held[key])[0]

    def drop(self, key: int) -> None:
        del self.held[key]

    def keys(self) -> list[int]:
        return sorted(self.held)

    def holdings(self) -> dict[str, Any]:
        return holdings()


def references(seed: int, operations: int = 200, holders: int = 3) -> None:
    """Random puts, tasks, passing on, looks and drops among processes; each look is right, and at the end nobody holds anything."""
    random_ = random.Random(seed)
    actors = [Holder.remote() for _ in range(holders)]
    mine: dict[int, Any] = {}  # what this process holds
    theirs: list[set[int]] = [set() for _ in actors]
    for key in range(operations):
        i = random_.randrange(holders)
        size = random_.choice((10, 1000, 200_000))
        do = random_.randrange(9)
        if do == 0:
            mine[key] = [ray.put((key, bytes(size)))]
        elif do == 1:
            mine[key] = [_wrap.remote([ray.put((key, bytes(size)))], random_.randrange(3))]
        elif do == 2:
            actors[i].make.remote(key, size)
            theirs[i].add(key)
        elif do == 3 and mine:
            old = random_.choice(list(mine))
            actors[i].hold.remote(old, mine[old])
            theirs[i].add(old)
        elif do == 4 and theirs[i]:
            old = random_.choice(sorted(theirs[i]))
            mine[old] = ray.get(actors[i].give.remote(old), timeout=PATIENCE_S)
        elif do == 5 and theirs[i]:
            old, j = random_.choice(sorted(theirs[i])), random_.randrange(holders)
            if i != j:
                ray.get(actors[i].pass_on.remote(old, actors[j]), timeout=PATIENCE_S)
                theirs[j].add(old)
        elif do == 6 and mine:
            old = random_.choice(list(mine))
            assert open_box(mine[old])[0] == old
        elif do == 7 and theirs[i]:
            old = random_.choice(sorted(theirs[i]))
            assert ray.get(actors[i].look.remote(old), timeout=PATIENCE_S) == old
        elif mine or theirs[i]:
            if mine and (random_.random() < 0.5 or not theirs[i]):
                del mine[random_.choice(list(mine))]
            else:
                old = random_.choice(sorted(theirs[i]))
                theirs[i].discard(old)
                ray.get(actors[i].drop.remote(old), timeout=PATIENCE_S)  # or a later pass_on could overtake it
    for actor, keys in zip(actors, theirs, strict=True):
        assert ray.get(actor.keys.remote(), timeout=PATIENCE_S) == sorted(keys)
    left = [(actor, key) for actor, keys in zip(actors, theirs, strict=True) for key in keys]
    left += [(None, key) for key in mine]
    random_.shuffle(left)
    for actor, key in left:
        if actor is None:
            del mine[key]
        else:
            actor.drop.remote(key)
    for actor in actors:  # but for the call itself nothing is left there
        eventually(lambda actor=actor: ray.get(actor.holdings.remote(), timeout=PATIENCE_S), {})
    eventually(lambda: holdings().get("entries", 0), len(actors))  # the actors' scopes
    assert context.client is not None
    eventually(lambda: context.client.store.statistics()["objects"], 0)



# ------------------------------------------------------------------ deaths


def workers() -> list[dict[str, Any]]:
    """The worker processes of this node, as its raylet knows them."""
    client = context.client
    assert client is not None
    rows = client.query(client.raylet, "workers", PATIENCE_S)
    return [row for row in rows if row["kind"] == "WORKER" and row["pid"]]


class Killer:
    """Kills processes by SIGKILL at random moments while the ``with`` lasts."""

    def __init__(self, state: str = "LEASED", every_s: float = 0.05, seed: int = 0):
        self.state = state
        self.every_s = every_s
        self.kills = 0
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(self._random.random() * self.every_s):
            pids = [row["pid"] for row in workers() if row["state"] == self.state]
            if pids:
                try:
                    os.kill(self._random.choice(pids), signal.SIGKILL)
                    self.kills += 1
                except ProcessLookupError:
                    pass

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def role(name: str) -> int:
    """Pid of this node's raylet, gcs, or (\"\") node process."""
    client = context.client
    assert client is not None
    with open(f"{client.config.session_dir}/lock") as file:
        leader = int(json.load(file)["pid"])
    if not name:
        return leader
    for pid in session.children(leader):
        with open(f"/proc/{pid}/cmdline") as file:
            if file.read().startswith(f"hpc_ray::{name}"):
                return pid
    raise AssertionError(f"there is no {name}")


# ------------------------------------------------------------------ costs


def cpu_seconds(pids: list[int]) -> float:
    """What these processes have used so far, in total."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def sizes() -> dict[str, tuple[int, int]]:
    """(private memory in bytes, open descriptors) of the driver, the gcs, the raylet and the node process."""
    found = {}
    for name, pid in {"driver": os.getpid(), "gcs": role("gcs"), "raylet": role("raylet"), "node": role("")}.items():
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared = map(int, file.read().split()[:3])
        found[name] = ((resident - shared) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))
    return found

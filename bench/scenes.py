"""The questions of ``bench.scale``, asked of the simulator. Each scene takes a cluster that has started and says what it measured,
in the simulator's time. Run by the runner as a script: ``scenes.py COSTS --nodes 100`` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from hpc_ray.config import Settings
from hpc_ray.ids import IdMinter, raylet_address
from hpc_ray.protocol import (
    ActorState,
    LeaseGranted,
    ObjectLocal,
    PullFailed,
    PullObject,
    RequestLease,
    ReturnLease,
    Shape,
    Strategy,
)
from hpc_ray.simulator.cluster import Simulator
from hpc_ray.simulator.costs import Costs, Prices
from hpc_ray.simulator.process import Process
from hpc_ray.simulator.programs import Driver

LOCAL_NODES = 64  # nodes whose programs run, where there are more: they do not meet
ACTORS = 10_000  # at most so many are made
AWARE = 4  # nodes that keep a view of all the others; the driver's is one


class Reader(Process):
    """Wants an object on its node."""

    def __init__(self, simulator: Simulator, node: int):
        super().__init__(simulator, simulator.next_address(node))
        self.node = node
        self.found: Any = None

    def receive(self, source: int, message: Any) -> None:
        if isinstance(message, (ObjectLocal, PullFailed)):
            self.found = message

    def pull(self, object_id: bytes, size: int, places: list[list[int]]) -> None:
        self.send(raylet_address(self.node), PullObject(object_id, size, places))


class Holder(Process):
    """Has one worker of its node after the other, for a while each; of the driver's job, so that it needs no program of its own."""

    def __init__(self, simulator: Simulator, node: int):
        super().__init__(simulator, simulator.next_address(node))
        self.node = node
        self.seconds = 0.0
        self._numbers = itertools.count(1)

    def hold(self, shape: Shape, seconds: float) -> None:
        self.seconds = seconds
        self.send(raylet_address(self.node), RequestLease(next(self._numbers), shape, 1))

    def receive(self, source: int, message: Any) -> None:
        if isinstance(message, LeaseGranted):
            self.simulator.after(self.seconds, lambda: self.send(source, ReturnLease(message.lease_id)))


class Cluster:
    """A simulated cluster, and what the scenes need of it."""

    def __init__(self, nodes: int, costs: Costs, prices: Prices, *, cpus: int = 2, cores: int = 2, **options: Any):
        self.nodes = nodes
        arena = 1 << 40  # memory is not the question
        settings = Settings()
        self.simulator = Simulator(
            [{"CPU": cpus}] * nodes,
            costs=costs,
            prices=prices,
            settings=settings,
            arena_bytes=arena,
            cores=cores,
            aware=min(nodes, AWARE),
            **options,
        )
        self.driver: Driver = None  # type: ignore[assignment]
        self.made: list[bytes] = []  # actors

    def until(self, condition: Callable[[], bool], limit_s: float = 600.0) -> float:
        """Seconds that pass until then."""
        simulator, begin = self.simulator, self.simulator.now
        while not condition():
            assert simulator._queue, "nothing is under way any more"
            simulator.step()
            assert simulator.now - begin < limit_s, "it takes too long"
        return simulator.now - begin

    def until_all(self, things: Iterable[Any], good: Callable[[Any], bool]) -> float:
        """Seconds until each has been good."""
        left = list(things)

        def none_left() -> bool:
            while left and good(left[-1]):
                left.pop()
            return not left

        return self.until(none_left)

    def wait(self, seconds: float) -> None:
        self.simulator.run(until=self.simulator.now + seconds, limit=1 << 40)

    def load(self) -> tuple[int, float, float]:
        gcs = self.simulator.gcs
        return gcs.events, gcs.busy_s, self.simulator.now

    def since(self, load: tuple[int, float, float]) -> dict[str, float]:
        """The GCS's load: messages and its share of a core."""
        gcs = self.simulator.gcs
        seconds = max(1e-9, self.simulator.now - load[2])
        return {"gcs_messages_per_s": (gcs.events - load[0]) / seconds, "gcs_core": (gcs.busy_s - load[1]) / seconds}

    def busy_s(self) -> dict[str, float]:
        """Processor time by kind of process, of those that live."""
        found: dict[str, float] = defaultdict(float)
        for process in self.simulator.processes.values():
            found[type(process).__name__.lower()] += process.busy_s
        return found

    # -- the scenes

    def start(self) -> dict[str, Any]:
        """Nodes register, hear of one another, and a first task runs."""
        load = self.load()
        asked = []

        def program(driver: Driver) -> None:
            asked.append(driver.ask("wait_nodes", count=self.nodes))

        self.driver = driver = self.simulator.add_driver(0, program)
        self.until(lambda: bool(asked) and asked[0] in driver.answers)
        driver.owner.most_units = 1 << 30  # type: ignore[union-attr]
        driver.submit(1, {"CPU": 1}, 0.0)
        self.until(lambda: driver.owner.finished == 1)  # type: ignore[union-attr]
        return {"value": self.simulator.now, **self.since(load)}

    def settle(self) -> None:
        """Workers have started, news has spread."""
        self.wait(2.0)

    def idle(self) -> dict[str, Any]:
        load = self.load()
        self.wait(5.0)
        found = self.since(load)
        return {"value": found["gcs_messages_per_s"], **found}

    def local(self, each: int = 1000) -> dict[str, Any]:
        """A program on each node submits tasks to its own node; of the nodes of a large cluster some."""
        simulator = self.simulator
        some = min(self.nodes, LOCAL_NODES)
        drivers = [simulator.add_driver(node) for node in range(some)]
        self.until_all(drivers, lambda driver: driver.owner is not None)
        for driver in drivers:
            driver.owner.most_units = 1 << 30  # type: ignore[union-attr]
        before = dict(simulator.gcs.gcs.counts)
        found = 0.0
        for _ in range(2):  # the second time with workers that are warm
            done = [driver.owner.finished + each for driver in drivers]  # type: ignore[union-attr]
            begin = simulator.now
            for node, driver in enumerate(drivers):
                here = Strategy("NODE", simulator.raylets[node].raylet.node_id, False)
                driver.submit(each, {"CPU": 1}, 0.0, strategy=here)
            self.until_all(zip(drivers, done, strict=True), lambda one: one[0].owner.finished >= one[1])
            found = each * some / (simulator.now - begin)
        after = simulator.gcs.gcs.counts
        for driver in drivers:
            driver.finish()
        grown = sum(after.values()) - sum(before.values())
        self.wait(0.5)
        return {"value": found * self.nodes / some, "simulated": some, "gcs_messages_per_task": grown / (2 * each * some)}

    def busy(self, rounds: int = 3) -> dict[str, Any]:
        """Every node's free amounts change all the time: what the GCS hears and tells then. No task is its concern."""
        simulator = self.simulator
        settings = simulator.settings
        interval = max(settings.report_interval_s, simulator.raylets[0].raylet.report_interval)
        holders = [Holder(simulator, node) for node in range(self.nodes)]
        load = self.load()
        for node, holder in enumerate(holders):
            here = Strategy("NODE", simulator.raylets[node].raylet.node_id, False)
            shape = self.driver.shape({"CPU": 1}, strategy=here)
            for number in range(rounds):
                when = (2 * number + simulator.random.random()) * interval
                simulator.after(when, functools.partial(holder.hold, shape, interval))
        self.wait(2 * rounds * interval)
        found = self.since(load)
        self.wait(interval + 0.5)
        return {"value": found["gcs_messages_per_s"], **found}

    def spread(self, tasks: int = 4000) -> dict[str, Any]:
        """The driver on the head submits tasks that go round all nodes."""
        driver = self.driver
        owner = driver.owner
        assert owner is not None
        seconds = 0.0
        for _ in range(3):
            done = owner.finished + tasks
            driver.submit(tasks, {"CPU": 1}, 0.0, strategy=Strategy("SPREAD"))
            seconds = self.until(lambda done=done: owner.finished >= done)
        self.wait(1.0)
        return {"value": tasks / seconds, "tasks": tasks}

    def actors(self, count: int = 0) -> dict[str, Any]:
        driver = self.driver
        count = count or min(ACTORS, max(32, 2 * self.nodes))
        load = self.load()
        made = [
            driver.create_actor(max_restarts=-1, rest={"strategy": Strategy("SPREAD")}) for _ in range(count)
        ]
        for one in made:
            driver.call_actor(one)
        seconds = self.until(lambda: not driver.waiting and not driver.calls)
        self.made = made
        messages = self.simulator.gcs.events - load[0]
        found = self.since(load)
        self.wait(2.0)
        return {"value": count / seconds, "count": count, "gcs_messages_per_actor": messages / count, **found}

    def broadcast(self, size: int = 1 << 30) -> dict[str, Any]:
        """An object of the head's, wanted on all other nodes at once."""
        simulator = self.simulator
        readers = [Reader(simulator, node) for node in range(1, self.nodes)]
        object_id = IdMinter(self.driver.address, self.driver.job_id).put_id()
        handle = simulator.raylets[0].arena.create(object_id, size, True)
        for reader in readers:
            reader.pull(object_id, size, [[0, handle]])
        seconds = self.until_all(readers, lambda reader: reader.found is not None)
        assert all(isinstance(reader.found, ObjectLocal) for reader in readers)
        return {"value": seconds, "size": size}

    def recovery(self) -> dict[str, Any]:
        """1 % of the nodes, at least one, die at once: until each actor that was there has answered from elsewhere."""
        simulator, driver = self.simulator, self.driver
        dead = range(self.nodes - max(1, self.nodes // 100), self.nodes)
        ids = {simulator.raylets[node].raylet.node_id for node in dead}
        lost = [one for one in self.made if driver.actors[one].node_id in ids]  # type: ignore[union-attr]
        load = self.load()
        for node in dead:
            simulator.kill_node(node)

        def is_back(one: bytes) -> bool:
            info = driver.actors[one]
            return info is not None and info.state == ActorState.ALIVE and info.attempt > 0

        assert lost, "no actor was there"
        begin = simulator.now
        self.until_all(lost, is_back)
        for one in lost:
            driver.call_actor(one)
        self.until(lambda: not driver.calls)
        seconds = simulator.now - begin
        return {"value": seconds, "died": len(dead), "lost_actors": len(lost), **self.since(load)}

    def call(self, gap_s: float) -> float:
        """Seconds that a call of an actor takes when nobody has done anything for so long."""
        driver = self.driver
        if not self.made:
            self.actors(1)
        self.wait(gap_s)
        driver.call_actor(self.made[0])
        return self.until(lambda: not driver.calls)


SCENES = ("start", "idle", "local", "busy", "spread", "actors", "broadcast", "recovery")


def play(cluster: Cluster, scenes: list[str], arguments: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    rows = {}
    for scene in ["start", *(name for name in SCENES[1:] if name in scenes)]:
        begin = time.perf_counter()
        before = cluster.busy_s()
        rows[scene] = getattr(cluster, scene)(**(arguments or {}).get(scene, {}))
        rows[scene]["cpu_s"] = {kind: spent - before.get(kind, 0.0) for kind, spent in cluster.busy_s().items()}
        rows[scene]["took_s"] = time.perf_counter() - begin
        if scene == "start":
            cluster.settle()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("costs", help="file that bench.costs has written")
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--scenes", default=",".join(SCENES))
    parser.add_argument("--options", default="{}", help="JSON: of Cluster")
    parser.add_argument("--arguments", default="{}", help="JSON: scene → its arguments")
    arguments = parser.parse_args()
    with open(arguments.costs) as file:
        told = json.load(file)
    options = json.loads(arguments.options)
    costs = msgspec.convert(told["costs"] | options.pop("costs", {}), Costs)
    cluster = Cluster(arguments.nodes, costs, msgspec.convert(told["prices"], Prices), **options)
    rows = play(cluster, arguments.scenes.split(","), json.loads(arguments.arguments))
    print(json.dumps({"nodes": arguments.nodes, "rows": rows}), flush=True)
    os._exit(0)  # what ten thousand nodes leave behind takes a while to free


if __name__ == "__main__":
    main()

"""The programs: what is measured on every engine that has Ray's API. ``ray`` is hpc_ray or Ray, and the lines are the same.

The first part has the rows of Ray's own microbenchmark with their sizes (``n`` is half the cores there, and at least 2 here);
then come rows that it lacks, and the experiments of the talks that made Ray known. Run by the runner as a script, so that
all functions travel to workers by value.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time

import numpy as np
from serve import call_latency, row, serve

N = max(2, (os.cpu_count() or 2) // 2)
MIB = np.zeros(1 << 20, dtype=np.uint8)


def small_value():
    return b"ok"


def identity(value):
    return value


def size_of(value):
    return len(value)


class Actor:
    def small_value(self):
        return b"ok"

    def small_value_arg(self, value):
        return b"ok"

    def size_of(self, value):
        return len(value)


class AsyncActor:
    async def small_value(self):
        return b"ok"

    async def small_value_arg(self, value):
        return b"ok"


def task(ray):
    return ray.remote(small_value)


def actor(ray, cls=Actor, **options):
    """An actor that has answered once."""
    handle = ray.remote(num_cpus=0)(cls).options(**options).remote()
    ray.get(handle.small_value.remote())
    return handle


def client_of(ray, servers):
    """An actor that calls others, and has done so once."""

    class Client:
        def batch(self, n):
            ray.get([server.small_value.remote() for server in servers for _ in range(n)])

        def batch_arg(self, n):
            value = ray.put(0)
            ray.get([server.small_value_arg.remote(value) for server in servers for _ in range(n)])

    handle = ray.remote(num_cpus=0)(Client).remote()
    ray.get(handle.batch.remote(1))
    return handle


def elsewhere(ray):
    """Options that place a task or actor on the other node, if there is one."""
    others = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != ray.get_runtime_context().get_node_id()]
    if not others:
        return {}
    strategies = importlib.import_module(f"{ray.__name__}.util.scheduling_strategies")
    return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(others[0], soft=False)}


# ---------------------------------------------------------------- Ray's microbenchmark


@row("get small")
def get_small(ray):
    ref = ray.put(0)

    def step():
        ray.get(ref)
        return 1

    return step


@row("put small")
def put_small(ray):
    def step():
        ray.put(0)
        return 1

    return step


@row("put small, multi client")
def put_small_multi(ray):
    @ray.remote
    def puts():
        for _ in range(100):
            ray.put(0)

    def step():
        ray.get([puts.remote() for _ in range(10)])
        return 1000

    return step


@row("put large", "GB/s")
def put_large(ray):
    array = np.zeros(100 << 20, dtype=np.int64)

    def step():
        ray.put(array)
        return array.nbytes / 1e9

    return step


@row("put large, multi client", "GB/s")
def put_large_multi(ray):
    @ray.remote
    def puts():
        for _ in range(10):
            ray.put(np.zeros(10 << 20, dtype=np.int64))

    def step():
        ray.get([puts.remote() for _ in range(10)])
        return 10 * 10 * (80 << 20) / 1e9

    return step


@row("tasks and get, batches of 1k", "batches/s")
def task_batches(ray):
    f = task(ray)

    def step():
        ray.get([f.remote() for _ in range(1000)])
        return 1

    return step


@row("get an object with 10k refs")
def get_refs(ray):
    @ray.remote
    def refs():
        return [ray.put(1) for _ in range(10_000)]

    ref = refs.remote()

    def step():
        ray.get(ref)
        return 1

    return step


@row("wait for 1k refs one by one", "batches/s")
def wait_refs(ray):
    f = task(ray)

    def step():
        waiting = [f.remote() for _ in range(1000)]
        fetch_local = True
        while waiting:
            _, waiting = ray.wait(waiting, fetch_local=fetch_local)
            fetch_local = False
        return 1

    return step


@row("tasks, one at a time", across=True)
def tasks_sync(ray):
    f = task(ray).options(**elsewhere(ray))

    def step():
        ray.get(f.remote())
        return 1

    return step


@row("tasks, 1k at once", across=True)
def tasks_async(ray):
    f = task(ray).options(**elsewhere(ray))

    def step():
        ray.get([f.remote() for _ in range(1000)])
        return 1000

    return step


@row("tasks, multi client")
def tasks_multi(ray):
    f = task(ray)

    class Client:
        def batch(self, n):
            ray.get([f.remote() for _ in range(n)])

    clients = [ray.remote(num_cpus=0)(Client).remote() for _ in range(4)]
    ray.get([client.batch.remote(1) for client in clients])

    def step():
        ray.get([client.batch.remote(2500) for client in clients])  # Ray's has 10k each
        return 4 * 2500

    return step


def sync_calls(ray, handle):
    def step():
        ray.get(handle.small_value.remote())
        return 1

    return step


def async_calls(ray, handle):
    def step():
        ray.get([handle.small_value.remote() for _ in range(1000)])
        return 1000

    return step


@row("1:1 actor calls, one at a time", across=True)
def actor_sync(ray):
    return sync_calls(ray, actor(ray, **elsewhere(ray)))


@row("1:1 actor calls, 1k at once", across=True)
def actor_async(ray):
    return async_calls(ray, actor(ray, **elsewhere(ray)))


@row("1:1 threaded actor calls, 1k at once")
def actor_threaded(ray):
    return async_calls(ray, actor(ray, max_concurrency=16))


def one_to_n(ray, cls):
    client = client_of(ray, [actor(ray, cls) for _ in range(N)])

    def step():
        ray.get(client.batch.remote(5000))
        return 5000 * N

    return step


def n_to_n(ray, cls):
    servers = [actor(ray, cls) for _ in range(N)]

    @ray.remote
    def work(servers):
        ray.get([servers[i % N].small_value.remote() for i in range(5000)])

    def step():
        ray.get([work.remote(servers) for _ in range(4)])
        return 4 * 5000

    return step


@row("1:n actor calls")
def actor_one_to_n(ray):
    return one_to_n(ray, Actor)


@row("n:n actor calls")
def actor_n_to_n(ray):
    return n_to_n(ray, Actor)


@row("n:n actor calls with a ref")
def actor_n_to_n_arg(ray):
    clients = [client_of(ray, [actor(ray)]) for _ in range(N)]

    def step():
        ray.get([client.batch_arg.remote(1000) for client in clients])
        return 1000 * N

    return step


@row("1:1 async actor calls, one at a time")
def async_actor_sync(ray):
    return sync_calls(ray, actor(ray, AsyncActor))


@row("1:1 async actor calls, 1k at once")
def async_actor_async(ray):
    return async_calls(ray, actor(ray, AsyncActor))


@row("1:1 async actor calls with arguments")
def async_actor_args(ray):
    handle = actor(ray, AsyncActor)

    def step():
        ray.get([handle.small_value_arg.remote(i) for i in range(1000)])
        return 1000

    return step


@row("1:n async actor calls")
def async_actor_one_to_n(ray):
    return one_to_n(ray, AsyncActor)


@row("n:n async actor calls")
def async_actor_n_to_n(ray):
    return n_to_n(ray, AsyncActor)


@row("placement groups created and removed")
def placement_groups(ray):
    def step():
        groups = [ray.util.placement_group([{"CPU": 0.01}]) for _ in range(100)]
        for group in groups:
            group.wait(timeout_seconds=30)
        for group in groups:
            ray.util.remove_placement_group(group)
        return 100

    return step


# ---------------------------------------------------------------- more rows


@row("actors created, called, killed")
def actor_lives(ray):
    cls = ray.remote(num_cpus=0)(Actor)

    def step():
        handle = cls.remote()
        ray.get(handle.small_value.remote())
        ray.kill(handle)
        return 1

    return step


@row("100 actors created, called, killed", "actors/s", warm=False)
def actor_crowd(ray):
    cls = ray.remote(num_cpus=0)(Actor)

    def step():
        handles = [cls.remote() for _ in range(100)]
        ray.get([handle.small_value.remote() for handle in handles])
        for handle in handles:
            ray.kill(handle)
        return 100

    return step


@row("chain of 1k tasks", "links/s")
def chain(ray):
    f = ray.remote(identity)

    def step():
        ref = f.remote(0)
        for _ in range(999):
            ref = f.remote(ref)
        ray.get(ref)
        return 1000

    return step


@row("fan-in of 10k arguments", "arguments/s")
def fan_in(ray):
    refs = [ray.put(i) for i in range(10_000)]
    f = ray.remote(lambda *values: len(values))

    def step():
        assert ray.get(f.remote(*refs)) == len(refs)
        return len(refs)

    return step


@row("task with 3k returns", "returns/s")
def many_returns(ray):
    f = ray.remote(num_returns=3000)(lambda: range(3000))

    def step():
        assert ray.get(f.remote())[-1] == 2999
        return 3000

    return step


@row("streaming generator", "items/s", across=True)
def generator(ray):
    @ray.remote(num_returns="streaming", **elsewhere(ray))
    def items():
        for i in range(1000):  # noqa: UP028 (Ray's cannot do yield from)
            yield i

    def step():
        return sum(1 for ref in items.remote() if ray.get(ref) is not None)

    return step


@row("1 MiB by value to an actor", "calls/s", across=True)
def argument_by_value(ray):
    handle = actor(ray, **elsewhere(ray))

    def step():
        ray.get([handle.size_of.remote(MIB) for _ in range(20)])
        return 20

    return step


@row("1 MiB by ref to an actor", "calls/s", across=True)
def argument_by_ref(ray):
    handle = actor(ray, **elsewhere(ray))

    def step():
        ref = ray.put(MIB)
        ray.get([handle.size_of.remote(ref) for _ in range(20)])
        return 20

    return step


@row("1 MiB results of tasks", "results/s", across=True)
def large_results(ray):
    f = ray.remote(lambda: np.zeros(1 << 20, dtype=np.uint8)).options(**elsewhere(ray))

    def step():
        return len([len(value) for value in ray.get([f.remote() for _ in range(20)])])

    return step


@row("100k tasks queued", "tasks/s", warm=False)
def queued_tasks(ray):
    f = task(ray)

    def step():
        ray.get([f.remote() for _ in range(100_000)])
        return 100_000

    return step


@row("latency of a task", "µs", figures=True, less_is_better=True, across=True)
def task_latency(ray, seconds):
    f = task(ray).options(**elsewhere(ray))
    return call_latency(lambda: ray.get(f.remote()), seconds)


@row("latency of an actor call", "µs", figures=True, less_is_better=True, across=True)
def actor_latency(ray, seconds):
    handle = actor(ray, **elsewhere(ray))
    return call_latency(lambda: ray.get(handle.small_value.remote()), seconds)


# ---------------------------------------------------------------- the talks' experiments


class Robot:
    """A cart with a pole on it; a step lasts 20 ms of its own time. Falls in about 40 steps if nobody balances it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.state = self.rng.normal(0, 0.05, 4)  # position, speed, angle, speed of turning

    def move(self, force):
        _, speed, angle, turning = self.state.tolist()
        sin, cos = math.sin(angle), math.cos(angle)
        carried = (force + 0.05 * turning**2 * sin) / 1.1
        fall = (9.8 * sin - cos * carried) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        change = (speed, carried - 0.05 * fall * cos / 1.1, turning, fall)
        self.state = self.state + 0.02 * np.array(change)
        return self.state

    @property
    def fallen(self):
        return abs(self.state[2]) > 0.6


class Policy:
    """A network of two layers; it does its work, but what it says hardly matters beside what a simple rule says."""

    def __init__(self, width=512):
        rng = np.random.default_rng(0)
        self.layers = [rng.normal(0, 0.01, (width, width)).astype(np.float32) for _ in range(2)]

    def small_value(self):
        return b"ok"

    def forces(self, states):
        """For each of several states the force that keeps the pole upright."""
        hidden = np.zeros((len(states), len(self.layers[0])), dtype=np.float32)
        hidden[:, :4] = states
        for layer in self.layers:
            hidden = np.tanh(hidden @ layer)
        return np.asarray(states) @ [1.0, 2.0, 30.0, 6.0] + 1e-6 * hidden[:, 0]


@row("robot: actions within budget", "%", figures=True)
def robot_control(ray, seconds):
    """The share of actions that came in time, by budget, and whether the robot kept its balance ("stable", 100 or 0)."""
    policy, found = actor(ray, Policy), {}
    ray.get(policy.forces.remote(np.zeros((1, 4))))
    budgets = (30, 20, 10, 5, 3, 2, 1, 0.5)
    for budget in budgets:
        robot, force, sent, in_time = Robot(0), 0.0, 0, 0
        end = time.perf_counter() + seconds / len(budgets)
        while sent < 100 or time.perf_counter() < end:
            action = policy.forces.remote(robot.state[None])
            ready, _ = ray.wait([action], timeout=budget / 1000)
            if ready:
                force = float(ray.get(action)[0])
                in_time += 1
            sent += 1
            if not robot.fallen:
                robot.move(force)
        found[f"{budget} ms"] = 100 * in_time / sent
        found[f"{budget} ms stable"] = 0.0 if robot.fallen else 100.0
        ray.get(action)
    return found


ROLLOUTS, STEPS, WIDTH = 128, (5, 35), 1024  # simulations at once; steps of a rollout, from and to; of the policy


def lengths(count):
    return np.random.default_rng(1).integers(*STEPS, count).tolist()


def rollout(policy, seed, steps):
    """A whole one, which evaluates the policy for itself."""
    robot = Robot(seed)
    for _ in range(steps):
        robot.move(float(policy.forces(robot.state[None])[0]))
    return steps


@row("rollouts, bulk-synchronous", "steps/s")
def rollouts_bsp(ray):
    """Each task is a whole rollout; the next batch starts when all have ended."""
    task, policy = ray.remote(rollout), ray.put(Policy(WIDTH))

    def step():
        return sum(sum(ray.get([task.remote(policy, i, steps) for i, steps in enumerate(lengths(ROLLOUTS))])) for _ in range(2))

    return step


@row("rollouts, fine-grained", "steps/s")
def rollouts_fine(ray):
    """Each step is a call; the policy is evaluated for all simulations that wait for it at once, and nobody waits for the
    longest rollout."""

    class Simulations:
        def __init__(self):
            self.robots = {}

        def reset(self, seed):
            self.robots[seed] = Robot(seed)
            return self.robots[seed].state

        def move(self, seed, force):
            return self.robots[seed].move(force)

    hosts = [ray.remote(num_cpus=0)(Simulations).remote() for _ in range(N)]
    policy = Policy(WIDTH)

    def step():
        todo = list(enumerate(lengths(2 * ROLLOUTS)))
        total, moving = sum(steps for _, steps in todo), {}  # what a reference stands for: robot, steps that are left

        def begin():
            if todo:
                seed, steps = todo.pop()
                moving[hosts[seed % N].reset.remote(seed)] = seed, steps

        for _ in range(ROLLOUTS):
            begin()
        while moving:
            ray.wait(list(moving))
            ready, _ = ray.wait(list(moving), num_returns=len(moving), timeout=0)
            forces = policy.forces(np.stack(ray.get(ready))).tolist()
            for ref, force in zip(ready, forces, strict=True):
                seed, steps = moving.pop(ref)
                if steps:
                    moving[hosts[seed % N].move.remote(seed, force)] = seed, steps - 1
                else:
                    begin()
        return total

    return step


def noise_of(seed):
    return np.random.default_rng(seed).normal(0, 0.5, 4)


class Evaluator:
    """Tries noisy versions of a policy."""

    def small_value(self):
        return b"ok"

    def evaluate(self, policy, seed):
        """How many steps the robot stays upright."""
        weights = policy + noise_of(seed)
        robot, steps = Robot(seed), 0
        while steps < 50 and not robot.fallen:
            robot.move(float(robot.state @ weights))
            steps += 1
        return steps


def evolve(evaluate, count, seconds):
    """``evaluate(policy, seeds)`` gives the reward of each; only seeds and rewards travel. Steps a second of so many workers."""
    weights, seed, steps = np.zeros(4), 0, 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        seeds = range(seed, seed + 10 * count)
        rewards = np.array(evaluate(weights, seeds))
        noise = np.stack([noise_of(i) for i in seeds])
        weights = weights + 0.1 * ((rewards - rewards.mean()) / (rewards.std() + 1e-9)) @ noise / len(seeds)
        seed, steps = seed + len(seeds), steps + int(rewards.sum())
    return steps / passed


@row("evolution strategies", "steps/s", figures=True)
def evolution(ray, seconds):
    """Rates by number of workers."""
    counts = [1 << i for i in range(N.bit_length()) if 1 << i <= max(2, os.cpu_count() or 2)]
    found = {}
    for count in counts:
        workers = [actor(ray, Evaluator) for _ in range(count)]

        def evaluate(weights, seeds, workers=workers):
            policy = ray.put(weights)
            return ray.get([workers[i % len(workers)].evaluate.remote(policy, i) for i in seeds])

        found[f"{count} workers"] = evolve(evaluate, count, seconds / len(counts))
    return found


# ---------------------------------------------------------------- the start


def start():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--nodes", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    ray = importlib.import_module(arguments.engine)
    imported = time.perf_counter()
    options = {"address": "local", "num_cpus": arguments.cpus, "include_dashboard": False, "log_to_driver": False}
    if arguments.nodes == 1:
        ray.init(**options)
    elif arguments.engine == "hpc_ray":
        ray.init(num_nodes=arguments.nodes, **options)
    else:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": arguments.cpus, "include_dashboard": False})
        for _ in range(arguments.nodes - 1):
            cluster.add_node(num_cpus=arguments.cpus)
        ray.init(address=cluster.address, log_to_driver=False)
    ray.get(task(ray).remote())
    ready = time.perf_counter()

    @ray.remote
    def pid():
        time.sleep(0.5)
        return os.getpid()

    workers = sorted(set(ray.get([pid.remote() for _ in range(arguments.cpus)]))) if arguments.nodes == 1 else []
    return ray, {"version": ray.__version__, "import_s": imported - begin, "init_s": ready - imported, "workers": workers}


if __name__ == "__main__":
    serve(start)

"""Whole clusters in one thread: programs run to their end, whatever dies on the way."""

import random
from collections import Counter

import pytest

from hpc_ray.config import Settings
from hpc_ray.ids import GCS_ADDRESS, IdMinter
from hpc_ray.protocol import ActorState, LeaseRefusal, ObjectLocal, PullFailed, Shutdown, Strategy
from hpc_ray.simulator.cluster import Simulator
from hpc_ray.simulator.costs import Costs

CPUS = {"CPU": 4}


def finish(simulator):
    """All programs end; nothing may be left."""
    for driver in simulator.drivers:
        if driver.alive:
            driver.finish()
    simulator.run()
    simulator.check()
    simulator.check_free()


def test_tasks_of_one_driver_run_on_all_nodes():
    simulator = Simulator([CPUS, CPUS, CPUS], seed=1, keep_log=True)
    driver = simulator.add_driver(0, lambda d: d.submit(300, {"CPU": 1}, 0.01))
    simulator.run(until=5)
    assert driver.owner.finished == 300
    nodes = {node for node, raylet in simulator.raylets.items() if raylet.state.counts.get("RequestLease")}
    assert nodes == {0, 1, 2}
    finish(simulator)
    simulator.check_replay()


def test_many_owners_share_one_node():
    simulator = Simulator([CPUS], seed=2)
    drivers = [simulator.add_driver(0, lambda d: d.submit(40, {"CPU": 1}, 0.005)) for _ in range(6)]
    simulator.run(until=3)
    assert [driver.owner.finished for driver in drivers] == [40] * 6
    finish(simulator)


def test_nested_tasks_do_not_deadlock():
    """A blocked worker gives its CPU back."""
    simulator = Simulator([{"CPU": 1}], seed=3)
    driver = simulator.add_driver(0, lambda d: d.submit(3, {"CPU": 1}, 0.002, children=2))
    simulator.run(until=5)
    assert driver.owner.finished == 3
    finish(simulator)


def test_worker_death_in_the_middle():
    simulator = Simulator([CPUS], seed=4)
    driver = simulator.add_driver(0, lambda d: d.submit(50, {"CPU": 1}, 0.01))
    for _ in range(10):
        simulator.run(until=simulator.now + 0.02)
        if simulator.workers():
            simulator.kill(simulator.random.choice(simulator.workers()))
    simulator.run(until=10)
    assert driver.owner.finished == 50
    assert driver.owner.retries > 0
    finish(simulator)


def test_driver_death_frees_everything():
    simulator = Simulator([CPUS, CPUS], seed=5)

    def program(driver):
        driver.submit(100, {"CPU": 1}, 0.1, children=1)
        driver.create_actor(resources={"CPU": 1})
        driver.create_actor(detached=True, name="stays")
        driver.ask("create_placement_group", group_id=b"g" * 18, bundles=[{"CPU": 10_000}], job_id=driver.job_id)

    driver = simulator.add_driver(1, program)
    simulator.run(until=0.5)
    simulator.kill(driver)
    simulator.run(until=30)
    simulator.check()
    assert simulator.actor_states() == {"DEAD": 1, "ALIVE": 1}
    for raylet in simulator.raylets.values():
        assert raylet.raylet.pool.available == raylet.raylet.pool.total


def test_actor_restarts_and_then_stays_dead():
    simulator = Simulator([CPUS], seed=6)
    made = []
    driver = simulator.add_driver(0, lambda d: made.append(d.create_actor(max_restarts=2)))
    for attempt in range(3):
        simulator.run(until=simulator.now + 1)
        info = driver.actors[made[0]]
        assert (info.state, info.restarts_left) == (ActorState.ALIVE, 2 - attempt)
        simulator.kill(simulator.processes[info.address])
    simulator.run(until=simulator.now + 1)
    info = driver.actors[made[0]]
    assert info.state == ActorState.DEAD
    assert (info.cause.kind, info.cause.text) == ("CRASHED", "killed by SIGKILL")
    finish(simulator)


def test_actor_on_a_lost_node_restarts_elsewhere():
    simulator = Simulator([CPUS, CPUS], seed=7)
    made = []
    node_id = simulator.raylets[1].raylet.node_id
    away = Strategy("NODE", node_id, True)
    simulator.run(until=0.1)
    driver = simulator.add_driver(0, lambda d: made.append(d.create_actor(max_restarts=-1, rest={"strategy": away})))
    simulator.run(until=1)
    assert driver.actors[made[0]].node_id == node_id
    simulator.kill_node(1)
    simulator.run(until=3)
    info = driver.actors[made[0]]
    assert (info.state, info.attempt) == (ActorState.ALIVE, 1)
    assert info.node_id == simulator.raylets[0].raylet.node_id
    finish(simulator)


def test_placement_group_survives_a_node():
    simulator = Simulator([{"CPU": 1}, CPUS, CPUS], seed=8)
    group = b"p" * 18
    asked = []

    def program(driver):
        bundles = [{"CPU": 20_000}, {"CPU": 20_000}]
        driver.ask("create_placement_group", group_id=group, bundles=bundles, strategy="STRICT_SPREAD")
        asked.append(driver.ask("wait_placement_group", group_id=group))

    driver = simulator.add_driver(0, program)
    simulator.run(until=1)
    assert driver.answers[asked[0]].value == "CREATED"
    simulator.kill_node(2)
    simulator.run(until=2)
    simulator.check()
    table = simulator.gcs.gcs.query_placement_group_table(group)
    assert table["state"] == "RESCHEDULING"
    simulator.add_node(CPUS)
    simulator.run(until=3)
    simulator.check()
    assert simulator.gcs.gcs.query_placement_group_table(group)["state"] == "CREATED"
    driver.ask("remove_placement_group", group_id=group)
    finish(simulator)


def test_tasks_of_a_removed_group_are_refused():
    simulator = Simulator([CPUS, CPUS], seed=9)
    group = b"p" * 18
    names = {f"CPU_group_0_{group.hex()}": 1, f"CPU_group_{group.hex()}": 1}

    def program(driver):
        driver.ask("create_placement_group", group_id=group, bundles=[{"CPU": 10_000}])
        driver.submit(5, names, 0.3, group_id=group, bundle=0)

    driver = simulator.add_driver(0, program)
    simulator.run(until=0.5)
    driver.ask("remove_placement_group", group_id=group)
    simulator.run(until=5)
    simulator.check()
    assert {refusal.reason for refusal in driver.owner.refused} == {LeaseRefusal.GROUP_REMOVED}
    finish(simulator)


def test_copies_come_once_and_from_the_second_place_when_the_first_dies():
    simulator = Simulator([CPUS] * 4, seed=10)
    drivers = [simulator.add_driver(0) for _ in range(3)]
    simulator.run(until=0.2)
    object_id = IdMinter(drivers[0].address, b"\0\0\0\1").put_id()
    size = 500_000_000
    places = [[node, simulator.raylets[node].arena.create(object_id, size, True)] for node in (1, 2)]
    for driver in drivers:
        driver.pull(object_id, size, places)
    simulator.run(until=0.21)
    assert simulator.messages["TransferObject"] == 1
    simulator.kill_node(1)
    simulator.run(until=2)
    assert simulator.messages["TransferObject"] == 2
    assert all(isinstance(driver.pulled[object_id], ObjectLocal) for driver in drivers)
    simulator.kill_node(2)
    other = IdMinter(drivers[1].address, b"\0\0\0\1").put_id()
    drivers[0].pull(other, size, [[2, 1]])
    simulator.run(until=4)
    assert isinstance(drivers[0].pulled[other], PullFailed)
    finish(simulator)


def broadcast(simulator, size, dying=()):
    """An object of node 0 goes to all the others at once; the transfers that each node gave, and the time until the last had it."""
    drivers = [simulator.add_driver(node) for node in simulator.raylets]
    simulator.run(until=0.2)
    object_id = IdMinter(drivers[0].address, b"\0\0\0\1").put_id()
    handle = simulator.raylets[0].arena.create(object_id, size, True)
    for driver in drivers[1:]:
        driver.pull(object_id, size, [[0, handle]])
    for node, at in dying:
        simulator.run(until=at)
        simulator.kill_node(node)
    simulator.run(until=60)
    living = [driver for driver in drivers[1:] if driver.alive]
    assert all(isinstance(driver.pulled[object_id], ObjectLocal) for driver in living)
    assert not any(raylet.raylet.givings for raylet in simulator.raylets.values() if raylet.alive)
    return object_id, living


def test_a_large_object_goes_to_all_nodes_along_a_tree():
    """COPY-4: the head gives it to few, and rounds grow with the logarithm."""
    simulator = Simulator([CPUS] * 33, seed=15, arena_bytes=1 << 40)
    given, moves = Counter(), []
    link = simulator.raylets[1].link.__class__
    receive = link.receive

    def count(self, source, message):
        given[message.source_node] += 1
        moves.append(self.simulator.now)
        receive(self, source, message)

    link.receive = count
    try:
        broadcast(simulator, 5_000_000_000)  # a second for each transfer, whatever else moves
    finally:
        link.receive = receive
    assert sum(given.values()) == 32 and max(given.values()) <= 12 and len(given) >= 8
    assert max(moves) - min(moves) < 6.5
    finish(simulator)


@pytest.mark.parametrize("seed", range(20))
def test_a_broadcast_outlives_nodes_that_have_it(seed):
    dice = random.Random(seed)
    simulator = Simulator([CPUS] * 20, seed=seed, arena_bytes=1 << 40)
    dying = sorted(((node, 0.2 + 6 * dice.random()) for node in dice.sample(range(1, 20), 5)), key=lambda pair: pair[1])
    broadcast(simulator, 5_000_000_000, dying)
    simulator.check()


def test_copies_come_to_a_full_arena_and_to_one_that_is_too_small():
    simulator = Simulator([CPUS, CPUS], seed=11, arena_bytes=1000)
    driver = simulator.add_driver(0)
    simulator.run(until=0.2)
    minter = IdMinter(driver.address, b"\0\0\0\1")
    object_id, large_id = minter.put_id(), minter.put_id()
    simulator.raylets[0].arena.create(b"x" * 28, 800, True)
    driver.pull(object_id, 500, [[1, simulator.raylets[1].arena.create(object_id, 500, True)]])
    driver.pull(large_id, 5000, [[1, simulator.raylets[1].arena.create(large_id, 5000, True, on_disk=True)]])
    simulator.run(until=10)
    arena = simulator.raylets[0].arena
    found = driver.pulled[object_id], driver.pulled[large_id]
    assert all(isinstance(answer, ObjectLocal) for answer in found)
    assert [answer.handle in arena.spilled for answer in found] == [False, True] and arena.used == 500
    finish(simulator)


def test_broken_environment_is_told_to_whoever_asked():
    simulator = Simulator([CPUS], seed=12)
    simulator.start_fault = lambda message: "no such package" if message.runtime_env else ""
    made = []

    def program(driver):
        driver.submit(3, {"CPU": 1}, 0.01, runtime_env='{"pip": ["nothing"]}')
        made.append(driver.create_actor(rest={"runtime_env": '{"pip": ["nothing"]}'}))
        driver.submit(3, {"CPU": 1}, 0.01)

    driver = simulator.add_driver(0, program)
    simulator.run(until=5)
    assert driver.owner.finished == 3
    assert {(refusal.reason, refusal.text) for refusal in driver.owner.refused} == {(2, "no such package")}
    assert driver.actors[made[0]].cause.kind == "RUNTIME_ENV"
    finish(simulator)


def test_shutdown_ends_every_worker():
    simulator = Simulator([CPUS, CPUS], seed=13)
    driver = simulator.add_driver(0, lambda d: d.submit(100, {"CPU": 1}, 10.0))
    simulator.run(until=1)
    driver.send(GCS_ADDRESS, Shutdown("enough"))
    simulator.run()
    assert not simulator.workers()
    assert [raylet.exit_code for raylet in simulator.raylets.values()] == [0, 0]
    assert simulator.gcs.exit_code == 0


def test_no_task_costs_the_gcs_anything():
    """GCS-1: ten times the tasks, the same number of events at the GCS but for the passing of time."""

    def events(tasks):
        simulator = Simulator([CPUS] * 4, seed=14)
        for node in range(4):
            simulator.add_driver(node, lambda d: d.submit(tasks, {"CPU": 1}, 0.0002))
        simulator.run(until=5)
        assert all(driver.owner.finished == tasks for driver in simulator.drivers)
        counts = simulator.gcs.gcs.counts
        assert set(counts) <= {"RegisterNode", "RegisterJob", "ReportResources", "TimerFired"}
        return sum(counts.values())

    few, many = events(20), events(200)
    assert many <= few + 20


# ------------------------------------------------------------------ random schedules


def random_program(driver, dice):
    """What a driver does: some of everything."""
    driver.groups = []
    for _ in range(dice.randint(1, 3)):
        driver.submit(
            dice.randint(1, 12),
            {"CPU": dice.choice([0, 1, 1, 2]), "GPU": (gpus := dice.choice([0, 0, 0, 0.5, 1]))},
            dice.choice([0.0, 0.001, 0.02]),
            children=0 if gpus else dice.choice([0, 0, 0, 1, 2]),  # a parent keeps its GPU
            runtime_env=dice.choice(["", "", "", "{}"]),
            strategy=Strategy(dice.choice(["DEFAULT", "DEFAULT", "SPREAD"])),
        )
    for number in range(dice.randint(0, 3)):
        driver.create_actor(
            max_restarts=dice.choice([0, 1, -1]),
            class_name=dice.choice(["Simulated", "Simulated", "Failing"]),
            resources=dice.choice([{}, {"CPU": 1}, {"GPU": 0.5}]),
            name=dice.choice(["", f"name{number}"]),
        )
    if dice.random() < 0.4:
        group_id = dice.randbytes(18)
        driver.groups = [group_id]
        driver.ask(
            "create_placement_group",
            group_id=group_id,
            bundles=[{"CPU": 10_000}] * dice.randint(1, 3),
            strategy=dice.choice(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
            job_id=driver.job_id,
        )
        index = dice.choice(["", "0_"])
        names = {f"CPU_group_{group_id.hex()}": 1, f"CPU_group_{index}{group_id.hex()}": 1}
        driver.submit(dice.randint(0, 4), names, 0.003, group_id=group_id)
        if dice.random() < 0.7:
            driver.simulator.after(
                dice.random() * 0.5, lambda: driver.alive and driver.ask("remove_placement_group", group_id=group_id)
            )
    if dice.random() < 0.3:
        for actor_id in list(driver.actors):
            driver.simulator.after(
                dice.random() * 0.3,
                lambda actor_id=actor_id: driver.alive and driver.kill_actor(actor_id, no_restart=dice.random() < 0.5),
            )


def random_death(simulator, dice):
    kind = dice.random()
    if kind < 0.7 and simulator.workers():
        simulator.kill(dice.choice(simulator.workers()), dice.choice([9, 11, 256, 0]))
    elif kind < 0.85 and simulator.drivers:
        simulator.kill(dice.choice(simulator.drivers))
    elif kind < 0.95 and len(simulator.raylets) > 1:
        simulator.kill_node(dice.randrange(1, len(simulator.raylets)))


@pytest.mark.parametrize("block", range(20))
def test_random_schedules(block):
    """50 seeds each: programs, deaths at random steps, then rest; every invariant at the end."""
    for seed in range(block * 50, block * 50 + 50):
        try:
            run_random(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


def run_random(seed):
    dice = random.Random(seed)
    nodes = [{"CPU": dice.randint(1, 4), "GPU": dice.randint(0, 2)} for _ in range(dice.randint(1, 3))]
    nodes[0] = {"CPU": 4, "GPU": 1}  # everything can run where nobody kills the node
    settings = Settings(prestart_workers=dice.choice([-1, 0, 2]), idle_worker_s=dice.choice([0.05, 60.0]))
    costs = Costs(jitter=dice.choice([1.0, 100.0]))  # the second one lets messages of different senders overtake a lot
    simulator = Simulator(nodes, seed=seed, costs=costs, settings=settings, keep_log=seed % 10 == 0)
    for _ in range(dice.randint(1, 3)):
        simulator.add_driver(dice.randrange(len(nodes)), lambda driver: random_program(driver, dice))
    for _ in range(dice.randint(0, 6)):
        simulator.run(until=simulator.now + dice.random() * dice.choice([0.01, 0.1]))
        random_death(simulator, dice)
    simulator.run(until=simulator.now + 20)
    for driver in simulator.drivers:  # actors and groups may hold what tasks wait for
        if driver.alive:
            for actor_id in driver.actors:
                driver.kill_actor(actor_id)
            for group_id in driver.groups:
                driver.ask("remove_placement_group", group_id=group_id)
    simulator.run(until=simulator.now + 20)
    simulator.check()
    for driver in simulator.drivers:
        if driver.alive:
            driver.finish()
    simulator.run()
    simulator.check()
    simulator.check_free()
    if seed % 10 == 0:
        simulator.check_replay()

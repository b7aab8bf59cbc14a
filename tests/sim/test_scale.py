"""What must not grow faster than it should: messages at the GCS, and what a session of many nodes says to itself. And prices."""

from collections import Counter

import msgspec
import pytest

from hpc_ray.ids import raylet_address
from hpc_ray.protocol import ActorState, ClusterView, Strategy
from hpc_ray.scheduling import FANOUT
from hpc_ray.simulator.cluster import Simulator
from hpc_ray.simulator.costs import Costs, Prices
from hpc_ray.simulator.process import Process

CPUS = {"CPU": 2}
PRICES = Prices(
    events={"gcs": {"other": [[1, 3e-6]]}, "raylet": {"other": [[1, 4e-6]]}},
    receive_s=1e-6,
    encode_s=1e-6,
    send_s=1e-7,
    wake_s=1e-5,
    link_turn_s=2e-6,
    link_out_s=1e-6,
    link_in_s=1e-6,
    link_chunk_s=3e-6,
    submit_s=1e-5,
    reply_s=5e-6,
    task_s=8e-6,
)


def cluster(nodes, **options):
    options = {"costs": Costs(jitter=0.0), "prices": PRICES, **options}
    simulator = Simulator([CPUS] * nodes, **options)
    simulator.run(until=2.0)
    assert len(simulator.gcs.gcs.living) == nodes
    return simulator


def program(simulator, node):
    driver = simulator.add_driver(node)
    simulator.run(until=simulator.now + 0.1)
    driver.owner.most_units = 1 << 20
    return driver


def rate(simulator, drivers, tasks, **shape):
    """Tasks per second of all of them, the second time round: workers are warm."""
    seconds = 0.0
    for _ in range(2):
        begin = simulator.now
        for driver in drivers:
            here = Strategy("NODE", simulator.raylets[driver.node].raylet.node_id, False)
            driver.submit(tasks, {"CPU": 1}, 0.0, **{"strategy": here, **shape})
        while not all(driver.owner.is_idle for driver in drivers):
            simulator.step()
        seconds = simulator.now - begin
    return tasks * len(drivers) / seconds


@pytest.mark.parametrize("strategy", ["NODE", "SPREAD"])
def test_the_gcs_gets_the_same_messages_for_ten_times_the_tasks(strategy):
    """GCS-1"""
    shape = {} if strategy == "NODE" else {"strategy": Strategy("SPREAD")}

    def messages(tasks):
        simulator = cluster(40)
        drivers = [program(simulator, node) for node in range(0, 40, 8)]
        rate(simulator, drivers, tasks, **shape)
        begin = simulator.gcs.events
        rate(simulator, drivers, tasks, **shape)
        simulator.run(until=6.0)
        counts = simulator.gcs.gcs.counts
        assert set(counts) <= {"RegisterNode", "RegisterJob", "ReportResources", "TimerFired"}
        return simulator.gcs.events - begin

    few, many = messages(100), messages(1000)
    assert many <= few + 40  # a report of each node, for it takes longer


def test_rates_follow_from_prices_and_cores():
    """An owner makes a task in 15 µs while a worker runs one in 8; with one core they take turns."""
    two = cluster(1, cores=2)
    fast = rate(two, [program(two, 0)], 2000)
    one = cluster(1, cores=1)
    slow = rate(one, [program(one, 0)], 2000)
    assert 1 / 15e-6 > fast > 0.8 / 15e-6
    assert 1 / 23e-6 > slow > 0.7 / 23e-6


def test_nodes_that_share_a_host_share_its_cores():
    apart = cluster(4)
    together = cluster(4, shared=True)
    rates = [rate(sim, [program(sim, node) for node in range(4)], 500) for sim in (apart, together)]
    assert 2.5 < rates[0] / rates[1] < 3.7  # apart an owner's 15 µs count, together all 23 on half a core for each node


def test_processes_share_cores_and_who_wants_little_does_not_wait_for_those_who_want_much():
    simulator = cluster(1, cores=2)
    ended = []
    begin = simulator.now
    for seconds in (1.0, 1.0, 1.0, 0.5, 0.01):
        one = Process(simulator, simulator.next_address(0))
        one.end_turn = lambda seconds=seconds: ended.append((seconds, round(simulator.now - begin, 1)))
        simulator.work(one, seconds, lambda: None)
    simulator.run(until=begin + 3)
    assert ended == [(0.01, 0.0), (0.5, 1.0), (1.0, 1.8), (1.0, 1.8), (1.0, 1.8)]


def test_what_others_do_in_between_makes_a_process_slower():
    def busy(cold_s, others_s):
        simulator = cluster(1, cores=1, prices=msgspec.structs.replace(PRICES, cold_s=cold_s))
        one, other = (Process(simulator, simulator.next_address(0)) for _ in range(2))
        for process, seconds in ((one, 1e-4), (other, others_s), (one, 1e-4)):
            simulator.work(process, seconds, lambda: None)
            simulator.run(until=simulator.now + 0.1)
        return one.busy_s

    assert busy(5e-5, 0.0) < busy(5e-5, 2e-4) < busy(5e-5, 2e-3) == busy(5e-5, 4e-3)
    assert busy(0.0, 4e-3) == busy(0.0, 0.0)


def views_sent(simulator):
    sent = Counter()
    post = simulator.post

    def count(source, destination, message):
        if isinstance(message, ClusterView):
            sent[source] += 1
        post(source, destination, message)

    simulator.post = count
    return sent


def test_the_gcs_tells_a_view_to_few_who_pass_it_on():
    """NODE-4: each node hears of each change, and nobody says it more than FANOUT times."""
    simulator = cluster(120)
    drivers = [program(simulator, node) for node in (0, 50, 100)]
    sent = views_sent(simulator)
    for driver in drivers:
        here = Strategy("NODE", simulator.raylets[driver.node].raylet.node_id, False)
        driver.submit(1, {"CPU": 1}, 5.0, strategy=here)
    simulator.run(until=simulator.now + 2)
    assert all(raylet.raylet.views[50].available["CPU"] == 10_000 for raylet in simulator.raylets.values())
    rounds = simulator.gcs.gcs._view_number - 1
    assert max(sent.values()) <= FANOUT * max(1, rounds)


def test_whom_a_dying_node_did_not_tell_hears_it_later():
    """NODE-4: a view that got lost on its way down is told again."""
    simulator = cluster(120)
    driver = program(simulator, 100)
    here = Strategy("NODE", simulator.raylets[100].raylet.node_id, False)
    driver.submit(1, {"CPU": 1}, 20.0, strategy=here)
    victims = [node for node in range(1, 120, 9) if node != 100]
    for node in victims:
        simulator.kill_node(node)
    simulator.run(until=simulator.now + 5)
    for node, raylet in simulator.raylets.items():
        if raylet.alive:
            views = raylet.raylet.views
            assert views[100].available["CPU"] == 10_000, node
            assert [other for other in victims if views[other].alive] == [], node
            raylet.raylet.validate()


def test_nodes_that_die_together_are_told_together():
    """NODE-1: what a raylet hears does not grow with the number of deaths at once."""
    simulator = cluster(90)
    heard = Counter()
    receive = simulator.raylets[5].receive
    simulator.raylets[5].receive = lambda source, message: (heard.update([type(message).__name__]), receive(source, message))
    for node in range(40, 80):
        simulator.kill_node(node)
    simulator.run(until=simulator.now + 3)
    assert sum(not view.alive for view in simulator.raylets[5].raylet.views.values()) == 40
    assert heard["NodeDied"] + heard["Deaths"] <= 4


def test_actors_of_lost_nodes_come_back():
    simulator = cluster(50)
    driver = program(simulator, 0)
    spread = {"strategy": Strategy("SPREAD")}
    made = [driver.create_actor(max_restarts=-1, rest=spread) for _ in range(100)]
    simulator.run(until=simulator.now + 5)
    assert all(driver.actors[one].state == ActorState.ALIVE for one in made)
    dead = {simulator.raylets[node].raylet.node_id for node in (7, 8)}
    lost = [one for one in made if driver.actors[one].node_id in dead]
    for node in (7, 8):
        simulator.kill_node(node)
    simulator.run(until=simulator.now + 5)
    assert lost and all(driver.actors[one].state == ActorState.ALIVE and driver.actors[one].attempt == 1 for one in lost)
    simulator.gcs.gcs.validate()


def test_a_node_that_forgets_the_others_still_serves_them():
    simulator = cluster(60, aware=2)
    driver = program(simulator, 0)
    driver.submit(500, {"CPU": 1}, 0.002, strategy=Strategy("SPREAD"))
    simulator.run(until=simulator.now + 2)
    assert driver.owner.finished == 500
    served = [node for node, raylet in simulator.raylets.items() if raylet.state.counts.get("RequestLease")]
    assert len(served) > 50
    assert len(simulator.raylets[1].raylet.views) == 60 and len(simulator.raylets[30].raylet.views) == 1
    assert raylet_address(30) in simulator.processes

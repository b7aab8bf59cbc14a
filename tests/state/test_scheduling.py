"""Which node."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ray.options import in_bundle
from hpc_ray.protocol import UNIT, NodeInfo, Strategy
from hpc_ray.raylet.resources import bundle_names
from hpc_ray.scheduling import FANOUT, NodeView, Search, Verdict, branches, choose, matches, place_bundles

ONE = {"CPU": UNIT}


def view(index, free, total=4, alive=True, **labels):
    amounts = {"CPU": total * UNIT}
    info = NodeInfo(bytes([index]) * 28, index, "h", "i", 1, amounts, {"CPU": round(free * UNIT)}, labels, alive=alive)
    return NodeView(info)


def test_packs_at_home_until_half_then_the_least_used():
    assert choose([view(0, 3), view(1, 4)], ONE, Strategy(), prefer=0) == (Verdict.AVAILABLE, 0)
    assert choose([view(0, 2), view(1, 4)], ONE, Strategy(), prefer=0) == (Verdict.AVAILABLE, 1)
    assert choose([view(0, 2), view(1, 1)], ONE, Strategy(), prefer=0) == (Verdict.AVAILABLE, 0)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(["DEFAULT", "SPREAD"]),
    st.integers(-1, 9),
    st.integers(1, 3),
    st.integers(1, 25),
)
def test_a_search_makes_no_difference(nodes, kind, prefer, amount, units):
    """What a search leaves out could not have been chosen."""
    living = [view(index, free) for index, (free, alive) in enumerate(nodes) if alive]
    demand, search = {"CPU": amount * UNIT}, Search().at(1)
    for turn in range(units):
        wanted = choose(living, demand, Strategy(kind), prefer=prefer, turn=turn)
        assert choose(living, demand, Strategy(kind), prefer=prefer, turn=turn, search=search) == wanted
        if wanted.verdict is Verdict.AVAILABLE:
            next(node for node in living if node.index == wanted.node).take(demand)


@given(st.lists(st.integers(), unique=True, max_size=700))
def test_branches_reach_each_node_once(nodes):
    def told(some):
        found = []
        for head, rest in branches(some):
            found += [head, *told(rest)]
        return found

    assert sorted(told(nodes)) == sorted(nodes)
    assert len(list(branches(nodes))) <= FANOUT


def test_ties_go_round():
    """SCHED-2"""
    nodes = [view(index, 4) for index in range(4)]
    nodes[2].available["CPU"] = 0
    assert choose(nodes, ONE, Strategy(), prefer=2).node == 3
    nodes[3].available["CPU"] = 0
    assert choose(nodes, ONE, Strategy(), prefer=2).node == 0


def test_feasible_later_nowhere_impossible():
    busy = [view(0, 0), view(1, 0)]
    assert choose(busy, ONE, Strategy(), prefer=1) == (Verdict.FEASIBLE, 1)
    assert choose(busy, {"GPU": 1}, Strategy()).verdict is Verdict.NOWHERE
    gone = Strategy("NODE", bytes([7]) * 28)
    assert choose(busy, ONE, gone).verdict is Verdict.IMPOSSIBLE
    assert choose(busy, ONE, Strategy("NODE", bytes([7]) * 28, True), prefer=0) == (Verdict.FEASIBLE, 0)
    dead = [view(0, 4), view(1, 4, alive=False)]
    assert choose(dead, ONE, Strategy("NODE", bytes([1]) * 28)).verdict is Verdict.IMPOSSIBLE


def test_any_bundle_of_a_group_is_one_bundle():
    """RES-5: a node does not count that has as much only in several bundles; it would never start there."""
    group = b"g" * 18
    nodes = [view(0, 4), view(1, 4)]
    names = [{"CPU": UNIT}, {"CPU": UNIT}, {"CPU": 2 * UNIT}]
    for node, indices in zip(nodes, ((0, 1), (2,)), strict=True):
        for index in indices:
            for name, amount in bundle_names(names[index], group, index).items():
                node.total[name] = node.available[name] = node.total.get(name, 0) + amount
    two, one = (in_bundle({"CPU": count * UNIT}, group, -1) for count in (2, 1))
    assert choose(nodes, two, Strategy(), prefer=0) == (Verdict.AVAILABLE, 1)
    assert choose(nodes[:1], two, Strategy(), prefer=0)[0] is Verdict.NOWHERE
    nodes[1].take(in_bundle({"CPU": UNIT}, group, 2))
    assert choose(nodes, two, Strategy(), prefer=0) == (Verdict.FEASIBLE, 1)
    for index in (0, 1):
        assert choose(nodes, one, Strategy(), prefer=0) == (Verdict.AVAILABLE, 0)
        nodes[0].take(in_bundle({"CPU": UNIT}, group, index))
    assert choose(nodes, one, Strategy(), prefer=0) == (Verdict.AVAILABLE, 1)
    assert choose(nodes, in_bundle(ONE, group, 0), Strategy(), prefer=1) == (Verdict.FEASIBLE, 0)


def test_spread_takes_turns():
    nodes = [view(0, 4), view(1, 4), view(2, 0)]
    spread = Strategy("SPREAD")
    assert [choose(nodes, ONE, spread, turn=turn).node for turn in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ({"zone": ["in", ["a", "b"]]}, True),
        ({"zone": ["NotIn", ["a"]]}, False),
        ({"zone": ["not_in", ["b"]]}, True),
        ({"zone": ["exists"]}, True),
        ({"zone": ["does_not_exist", []]}, False),
        ({"zone": "a"}, True),
        ({"zone": "!a"}, False),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "!in(b,c)"}, True),
        ({"zone": {"in": ["c"]}}, False),
        ({"disk": "!ssd"}, True),
        ({"zone": "a", "disk": "ssd"}, False),
    ],
)
def test_labels(selector, found):
    assert matches({"zone": "a"}, selector) is found


def test_hard_and_soft_labels():
    """SCHED-1"""
    nodes = [view(0, 4, zone="a"), view(1, 4, zone="b", disk="ssd"), view(2, 4, zone="b")]
    wanted = Strategy("LABELS", hard_labels={"zone": "b"}, soft_labels={"disk": "ssd"})
    assert choose(nodes, ONE, wanted, prefer=0).node == 1
    nodes[1].available["CPU"] = 0
    assert choose(nodes, ONE, wanted, prefer=0).node == 2


def test_bundles():
    nodes = [view(0, 2), view(1, 4), view(2, 4)]
    two = {0: ONE, 1: ONE}
    assert place_bundles(nodes, two, "PACK", prefer=0) == {0: 0, 1: 0}
    assert place_bundles(nodes, dict.fromkeys(range(5), ONE), "STRICT_PACK") is None
    assert len(set(place_bundles(nodes, dict.fromkeys(range(5), ONE), "PACK").values())) == 2
    assert sorted(place_bundles(nodes, dict.fromkeys(range(3), ONE), "STRICT_SPREAD").values()) == [0, 1, 2]
    assert place_bundles(nodes, dict.fromkeys(range(4), ONE), "STRICT_SPREAD") is None
    assert len(set(place_bundles(nodes, dict.fromkeys(range(4), ONE), "SPREAD").values())) == 3
    assert place_bundles(nodes, {1: ONE}, "STRICT_SPREAD", occupied=frozenset({0, 1})) == {1: 2}


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_bundles_never_exceed_a_node(free, sizes, strategy):
    nodes = [view(index, amount, 6) for index, amount in enumerate(free)]
    bundles = {index: {"CPU": size * UNIT} for index, size in enumerate(sizes)}
    placed = place_bundles(nodes, bundles, strategy)
    if placed is None:
        assert strategy != "STRICT_PACK" or max(free) < sum(sizes)
        assert strategy not in ("PACK", "SPREAD") or len(sizes) > 1 or max(free) < sizes[0]
        return
    assert set(placed) == set(bundles)
    for index, amount in enumerate(free):
        assert sum(sizes[number] for number, node in placed.items() if node == index) <= amount
    if strategy == "STRICT_PACK":
        assert len(set(placed.values())) == 1
    if strategy == "STRICT_SPREAD":
        assert len(set(placed.values())) == len(placed)

"""Amounts and instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ray.options import BUNDLE_MARK, in_bundle
from hpc_ray.protocol import UNIT, NodeInfo
from hpc_ray.raylet.resources import ResourcePool, bundle_names
from hpc_ray.scheduling import NodeView

GROUP = b"g" * 18


def units(**amounts):
    return {name: round(amount * UNIT) for name, amount in amounts.items()}


def test_whole_and_part_accelerators():
    """RES-3"""
    pool = ResourcePool(units(CPU=4, GPU=2))
    half = pool.grant(units(GPU=0.5))
    assert half.instances == {"GPU": [[0, 5000]]}
    whole = pool.grant(units(GPU=1))
    assert whole.instances == {"GPU": [[1, 10000]]}
    assert pool.grant(units(GPU=1)) is None
    assert pool.grant(units(GPU=0.5)).instances == {"GPU": [[0, 5000]]}
    assert not pool.feasible(units(GPU=1.5))
    assert not pool.feasible(units(GPU=3))


def test_no_part_is_spread_over_two():
    pool = ResourcePool(units(GPU=2))
    pool.grant(units(GPU=0.6))
    pool.grant(units(GPU=0.6))
    assert pool.available["GPU"] == 8000
    assert pool.grant(units(GPU=0.5)) is None


def test_blocked_holder_lends_cpus_only_and_takes_them_back():
    """RES-1"""
    pool = ResourcePool(units(CPU=1, GPU=1))
    first = pool.grant(units(CPU=1, GPU=1))
    assert pool.park_cpus(first)
    assert not pool.park_cpus(first)
    second = pool.grant(units(CPU=1))
    assert second is not None
    pool.retake(first)
    assert pool.available == {"CPU": -UNIT, "GPU": 0}
    assert pool.grant(units(CPU=0.1)) is None
    pool.validate([first, second])
    pool.give_back(second)
    pool.give_back(first)
    assert pool.available == pool.total


def test_group_gets_the_same_accelerators_under_both_names():
    pool = ResourcePool(units(CPU=4, GPU=4))
    pool.grant(units(GPU=1))
    bundle = pool.grant(units(GPU=2))
    assert bundle.instances == {"GPU": [[1, UNIT], [2, UNIT]]}
    names = bundle_names(units(GPU=2), GROUP, 0)
    pool.add(names, bundle.instances)
    inside = pool.grant({f"GPU_group_0_{GROUP.hex()}": UNIT, f"GPU_group_{GROUP.hex()}": UNIT})
    assert inside.visible_instances() == {"GPU": [[1, UNIT]]}
    pool.give_back(inside)
    pool.remove(names, bundle.instances)
    pool.give_back(bundle)
    assert set(pool.total) == {"CPU", "GPU"}


def test_marker_of_a_bundle():
    names = bundle_names(units(CPU=1), GROUP, 3)
    assert names[f"bundle_group_3_{GROUP.hex()}"] == names[f"bundle_group_{GROUP.hex()}"] == 1000 * UNIT
    assert len(names) == 4


def group_of(*bundles, rooms=None, **node):
    """A pool in which these bundles are set aside, the grants for that in ``rooms``."""
    pool = ResourcePool(units(**node))
    for index, bundle in enumerate(bundles):
        room = pool.grant(units(**bundle))
        pool.add(bundle_names(units(**bundle), GROUP, index), room.visible_instances())
        if rooms is not None:
            rooms.append(room)
    return pool


def inside(index, **amounts):
    return in_bundle(units(**amounts), GROUP, index)


@pytest.mark.parametrize("order", [(0, 1, -1), (-1, 0, 1), (-1, -1, 0), (1, -1, -1), (0, -1, 1)])
def test_a_bundle_and_the_group_are_one_room(order):
    """RES-5: whichever name is asked for first, each GPU is given once."""
    pool = group_of({"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}, CPU=2, GPU=2)
    grants, given = [], []
    for index in order:
        demand = inside(index, CPU=1, GPU=1)
        fits = pool.fits(demand)
        grant = pool.grant(demand)
        assert fits == (grant is not None) and pool.feasible(demand)
        if grant is not None:
            grants.append(grant)
            given += [number for number, _ in grant.visible_instances()["GPU"]]
        assert pool.available[f"CPU_group_{GROUP.hex()}"] == (2 - len(grants)) * UNIT
    assert sorted(given) == [0, 1]
    assert not any(pool.fits(inside(index, CPU=1)) for index in (-1, 0, 1))
    for grant in grants:
        pool.give_back(grant)
    assert pool.fits(inside(0, CPU=1)) and pool.fits(inside(1, CPU=1))


def test_whoever_may_use_any_bundle_uses_one():
    """RES-5: never a part of one and a part of another."""
    pool = group_of({"CPU": 2}, {"CPU": 1, "GPU": 1}, CPU=3, GPU=1)
    assert not pool.feasible(inside(-1, CPU=3)) and not pool.feasible(inside(-1, CPU=2, GPU=1))
    assert pool.feasible(inside(-1, CPU=2)) and not pool.feasible(inside(1, CPU=2)) and not pool.feasible(inside(2))
    one = pool.grant(inside(0, CPU=1))
    assert not pool.fits(inside(-1, CPU=2)) and pool.grant(inside(-1, CPU=2)) is None
    assert pool.grant(inside(-1, GPU=1, CPU=1)).amounts == inside(1, CPU=1, GPU=1)
    pool.give_back(one)
    assert pool.fits(inside(-1, CPU=2))


def test_who_takes_nothing_of_a_bundle_takes_its_mark():
    pool = group_of({"CPU": 1}, CPU=1)
    assert pool.grant(inside(-1)).amounts == {f"bundle_group_{GROUP.hex()}": BUNDLE_MARK, f"bundle_group_0_{GROUP.hex()}": BUNDLE_MARK}


def test_a_bundle_with_room_is_found_at_once():
    """Of many, most of them full; also the one that something came back to, and one of a view on the node."""

    class Amounts(dict):
        looked = 0

        def get(self, *args):
            Amounts.looked += 1
            return super().get(*args)

    pool = group_of(*[{"CPU": 1}] * 200, CPU=200)
    pool.available = Amounts(pool.available)
    demand = inside(-1, CPU=1)
    grants = [pool.grant(demand) for _ in range(200)]
    assert Amounts.looked < 200 * 20 and not pool.fits(demand)
    view = NodeView(NodeInfo(b"", 0, "", "", 0, pool.total, pool.available, {}))
    for one in (grants[70], grants[130]):
        pool.give_back(one)
        Amounts.looked = 0
        again = pool.grant(demand)
        assert again is not None and Amounts.looked < 20
        pool.give_back(again)
        view.update(NodeInfo(b"", 0, "", "", 0, pool.total, pool.available, {}))
        assert view.fits(demand) and view.feasible(demand)
        pool.grant(demand)
    view.update(NodeInfo(b"", 0, "", "", 0, {}, {}, {}))
    assert not view.fits(demand) and not view.feasible(demand)


def test_resources_that_are_called_like_those_of_groups():
    pool = group_of({"CPU": 1}, CPU=1, a_group_b=1, a_group_1_b=2)
    assert pool.grant(units(a_group_b=1)).amounts == units(a_group_b=1)
    assert pool.grant(units(a_group_1_b=2)) is not None


group_demands = st.tuples(st.integers(-1, 2), st.sampled_from([0, 0.5, 1, 2]), st.sampled_from([0, 0.25, 0.5, 1]))


def walk(pool, steps, held):
    """Grants, which are ``held`` then, and what becomes of them, by steps of (what, demand, which of them); stops after each."""
    for what, demand, which in steps:
        if what == "grant":
            fits = pool.fits(demand)
            grant = pool.grant(demand)
            assert fits == (grant is not None)
            assert not fits or pool.feasible(demand)
            held += [grant] if grant else []
        elif held:
            grant = held[which % len(held)]
            if what == "free":
                held.remove(grant)
                pool.give_back(grant)
            elif what == "park":
                pool.park_cpus(grant)
            else:
                pool.retake(grant)
        yield


@given(st.lists(st.tuples(st.sampled_from(["grant", "free", "park", "retake"]), group_demands, st.integers(0, 9))))
def test_nothing_is_given_twice_in_a_group(steps):
    """RES-5 over any sequence, with bundles that share an accelerator."""
    rooms, held = [], []
    pool = group_of({"CPU": 1, "GPU": 0.5}, {"CPU": 2, "GPU": 0.5}, {"CPU": 1, "GPU": 1}, CPU=4, GPU=2, rooms=rooms)
    empty = dict(pool.available)
    asked = [(what, inside(index, CPU=cpus, GPU=gpus), which) for what, (index, cpus, gpus), which in steps]
    for _ in walk(pool, asked, held):
        pool.validate(rooms + held)
        used = {}
        for grant in held:
            for number, part in grant.visible_instances().get("GPU", ()):
                used[number] = used.get(number, 0) + part
        assert all(part <= UNIT for part in used.values())
    for grant in held:
        pool.give_back(grant)
    assert pool.available == empty


demands = st.fixed_dictionaries(
    {
        "CPU": st.sampled_from([0, UNIT // 2, UNIT, 2 * UNIT]),
        "GPU": st.sampled_from([0, 2500, 5000, UNIT, 2 * UNIT]),
        "memory": st.integers(0, 50),
    }
)


@given(st.lists(st.tuples(st.sampled_from(["grant", "free", "park", "retake"]), demands, st.integers(0, 9))))
def test_nothing_is_made_or_lost(steps):
    """RES-1, RES-2 over any sequence."""
    pool = ResourcePool({"CPU": 4 * UNIT, "GPU": 3 * UNIT, "memory": 100})
    held = []
    for _ in walk(pool, steps, held):
        pool.validate(held)
    for grant in held:
        pool.give_back(grant)
    assert pool.available == pool.total


@pytest.mark.parametrize("amount", [1, UNIT, 3 * UNIT])
def test_zero_demands_cost_nothing(amount):
    pool = ResourcePool({"CPU": amount})
    grant = pool.grant({"CPU": 0, "GPU": 0})
    assert grant.amounts == {}


def test_a_new_total():
    """What is granted stays; a resource that is overdrawn is free again when enough has come back."""
    pool = ResourcePool(units(CPU=4, GPU=2, slot=1))
    pool.add(bundle_names(units(CPU=1), GROUP, 0))
    grants = [pool.grant(units(CPU=3)), pool.grant(units(GPU=0.5))]
    pool.change_total(units(CPU=2, GPU=4, disk=1))
    assert pool.total == {**units(CPU=2, GPU=2, disk=1), **bundle_names(units(CPU=1), GROUP, 0)}
    assert pool.available["CPU"] == -UNIT and not pool.fits(units(CPU=1))
    pool.validate(grants)
    for grant in grants:
        pool.give_back(grant)
    pool.change_total(units(CPU=2, GPU=4))
    pool.validate([])
    assert pool.grant(units(GPU=4)).instances == {"GPU": [[index, UNIT] for index in range(4)]}

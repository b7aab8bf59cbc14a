"""Amounts and instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ray.protocol import UNIT
from hpc_ray.raylet.resources import ResourcePool, bundle_names

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

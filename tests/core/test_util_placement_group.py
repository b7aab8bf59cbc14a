"""Placement groups, as programs use them; how they are placed is tested in tests/state."""

from __future__ import annotations

import pytest

from hpc_ray import exceptions, util
from hpc_ray.util.placement_group import PlacementGroup
from hpc_ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup


@pytest.fixture
def make(ray, eventually):
    """Makes groups that are removed at the end, and whose resources are then gone from the lists."""
    made = []

    def placement_group(*args, **kwargs):
        made.append(util.placement_group(*args, **kwargs))
        return made[-1]

    yield placement_group
    for group in made:
        util.remove_placement_group(group)
    eventually(lambda: not [name for name in ray.cluster_resources() if "_group_" in name], "groups are gone")


def test_life(ray, make, eventually):
    group = make([{"CPU": 1}, {"CPU": 1, "slot": 0.5}], name="by name")
    assert ray.get(group.ready()) == group and group.wait(0)
    assert group.bundle_specs == [{"CPU": 1.0}, {"CPU": 1.0, "slot": 0.5}] and group.bundle_count == 2
    found = util.get_placement_group("by name")
    assert found == group and hash(found) == hash(group) and found.bundle_specs == group.bundle_specs
    row = util.placement_group_table(group)
    assert row["state"] == "CREATED" and row["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0, "slot": 0.5}}
    assert util.placement_group_table()[group.id.hex()] == row
    with pytest.raises(exceptions.RaySystemError, match="taken"):
        util.placement_group([{"CPU": 1}], name="by name")
    util.remove_placement_group(group)
    util.remove_placement_group(group)
    assert util.placement_group_table(group)["state"] == "REMOVED"
    with pytest.raises(ValueError, match="by name"):
        util.get_placement_group("by name")
    with pytest.raises(Exception, match="does not exist"):
        group.wait(1)
    eventually(lambda: not [name for name in ray.cluster_resources() if "_group_" in name], "the group is gone")

    def refuses():
        try:
            ray.get(group.ready())  # a worker that is being killed may still do it
        except exceptions.TaskPlacementGroupRemoved:
            return True
        return False

    eventually(refuses, "nothing starts in the group any more")


def test_waiting(ray, make):
    group = make([{"CPU": 3}])
    assert group.wait(10)
    late = make([{"CPU": 3}])
    ready = late.ready()
    assert not late.wait(0.05)
    assert util.placement_group_table(late)["state"] == "PENDING"
    util.remove_placement_group(group)
    assert ray.get(ready) == late


@pytest.mark.parametrize("capture", [True, False, None])
def test_where_children_run(ray, make, capture):
    """A captured parent's children stay in its group, unless they say otherwise."""
    group = make([{"CPU": 2}])

    @ray.remote
    def where():
        return util.get_current_placement_group()

    @ray.remote
    def parent(capture):
        free = where.options(scheduling_strategy="DEFAULT")
        out = where.options(scheduling_strategy=InGroup(None))
        return ray.get([where.remote(), free.remote(), out.remote()])

    inside = parent.options(scheduling_strategy=InGroup(group, 0, capture), name=f"parent {capture}")
    assert ray.get(inside.remote(capture)) == [group if capture else None, None, None]
    assert util.get_current_placement_group() is None


def test_actors_of_a_captured_actor(ray, make):
    group = make([{"CPU": 2}])

    class Where:
        def here(self):
            return util.get_current_placement_group()

        def child(self):
            return ray.get(ray.remote(num_cpus=0)(Where).remote().here.remote())

    for capture, expected in ((True, group), (False, None)):
        actor = ray.remote(Where).options(num_cpus=1, scheduling_strategy=InGroup(group, -1, capture)).remote()
        assert ray.get(actor.here.remote()) == group
        assert ray.get(actor.child.remote()) == expected


def test_what_fits(ray, make):
    group = make([{"CPU": 1}, {"slot": 1}])

    @ray.remote
    def run():
        return 1

    def submit(index, **options):
        return run.options(scheduling_strategy=InGroup(group, index), **options).remote()

    assert ray.get([submit(0), submit(1, num_cpus=0), submit(-1)]) == [1, 1, 1]
    for wrong in ({"index": 2}, {"index": -2}, {"index": 1}, {"index": -1, "num_cpus": 2}, {"index": 0, "num_gpus": 1}):
        with pytest.raises(ValueError, match="bundle"):
            submit(**wrong)


def test_empty_group(ray):
    group = PlacementGroup.empty()
    assert group.is_empty and group.wait(0) and group.bundle_count == 0
    assert ray.get(group.ready()) == group
    where = ray.remote(util.get_current_placement_group)
    assert ray.get(where.options(scheduling_strategy=InGroup(group)).remote()) is None


@pytest.mark.parametrize(
    ("bundles", "options"),
    [
        ([], {}),
        ({"CPU": 1}, {}),
        ([1], {}),
        ([{}], {}),
        ([{"CPU": 0}], {}),
        ([{"CPU": -1}], {}),
        ([{"CPU": "1"}], {}),
        ([{1: 1}], {}),
        ([{"CPU": 1}], {"strategy": "NEAR"}),
        ([{"CPU": 1}], {"lifetime": "long"}),
        ([{"CPU": 1}], {"bundle_label_selector": [{}, {}]}),
        ([{"CPU": 1}], {"bundle_label_selector": [{"a": 1}]}),
        ([{"CPU": 1}], {"bundle_label_selector": [{"a": "in(x"}]}),
    ],
)
def test_groups_that_cannot_be(ray, bundles, options):
    with pytest.raises(ValueError, match=r".+"):
        util.placement_group(bundles, **options)


def test_actors_of_a_removed_group_are_dead(ray, make):
    @ray.remote(num_cpus=1)
    class Actor:
        def answer(self):
            return 42

    group = make([{"CPU": 1}])
    actor = Actor.options(scheduling_strategy=InGroup(group)).remote()
    assert ray.get(actor.answer.remote()) == 42
    util.remove_placement_group(group)
    for late in (actor, Actor.options(scheduling_strategy=InGroup(group)).remote()):
        with pytest.raises(exceptions.ActorDiedError, match="placement group was removed"):
            while True:  # its end takes a moment
                ray.get(late.answer.remote(), timeout=30)


def test_options_as_they_were_before_strategies(ray, make):
    @ray.remote(num_cpus=1)
    def where():
        return util.get_current_placement_group()

    @ray.remote(num_cpus=1)
    class Actor:
        def where(self):
            return util.get_current_placement_group()

    group = make([{"CPU": 1}, {"CPU": 1}])
    assert ray.get(where.options(placement_group=group, placement_group_bundle_index=1).remote()) == group
    assert ray.get(where.options(placement_group=group).remote()) == group
    actor = Actor.options(placement_group=group, placement_group_capture_child_tasks=True).remote()
    assert ray.get(actor.where.remote()) == group
    for nothing in ("default", None):
        assert ray.get(where.options(placement_group=nothing).remote()) is None
    with pytest.raises(ValueError, match="bundle index 7 is invalid"):
        where.options(placement_group=group, placement_group_bundle_index=7).remote()
    with pytest.raises(ValueError, match="must be -1"):
        where.options(placement_group_bundle_index=0).remote()
    with pytest.raises(ValueError, match="scheduling_strategy"):
        where.options(placement_group=group, scheduling_strategy="SPREAD").remote()
    for wrong in ({"placement_group": "x"}, {"scheduling_strategy": InGroup("x")}):
        for kind in (where, Actor):
            with pytest.raises(AssertionError, match=r"must (be|hold) a placement group"):
                kind.options(**wrong).remote()


def test_nodes_list_their_own_resources_only(ray, make, eventually):
    before = ray.nodes()[0]["Resources"]
    make([{"CPU": 1}])
    eventually(lambda: [name for name in ray.cluster_resources() if "_group_" in name], "the group is known")
    assert ray.nodes()[0]["Resources"] == before

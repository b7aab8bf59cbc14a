"""The GCS's decisions, one event at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ray import protocol as p
from hpc_ray.gcs.journal import MemoryJournal, SqliteJournal
from hpc_ray.gcs.state import GcsState
from hpc_ray.ids import LINK_LANE, address_of, raylet_address
from hpc_ray.machine import Journal, Send, SetTimer, TimerFired
from hpc_ray.protocol import UNIT, ActorState
from hpc_ray.scheduling import FANOUT

ME, OTHER = address_of(0, 20, 1), address_of(1, 20, 1)
ID = bytes(range(16))
GROUP = b"g" * 18
FIRST = address_of(0, 50, 1)  # process of the first actor
CRASH = p.DeathCause("CRASHED", "killed by SIGKILL")


class Gcs:
    """A GCS under test, with its journal."""

    def __init__(self, cpus=(4,), state=None, journal=None):
        self.state = state or GcsState(keep_log=True)
        self.journal = journal or MemoryJournal()
        self.now = 0.0
        self.sent = []
        self.timers = {}
        self.total = {}
        self.do(self.state.start(0.0))
        for index, amount in enumerate(cpus):
            self.join(index, amount)
        self.sent.clear()

    def tell(self, message, source=ME):
        self.do(self.state.handle(message, source, self.now))

    def do(self, actions):
        kinds = [type(action) for action in actions]
        for action in actions:
            if isinstance(action, Journal):
                self.journal.commit([action])
            elif isinstance(action, Send):
                self.sent.append((action.destination, action.message))
            elif isinstance(action, SetTimer):
                self.timers[action.name] = action.at
        return kinds

    def pass_time(self, seconds):
        end = self.now + seconds
        while self.timers and min(self.timers.values()) <= end:
            name = min(self.timers, key=self.timers.get)
            self.now = self.timers.pop(name)
            self.tell(TimerFired(name), 0)
        self.now = end

    def take(self, kind, destination=None):
        found = [m for d, m in self.sent if isinstance(m, kind) and destination in (None, d)]
        self.sent = [(d, m) for d, m in self.sent if not (isinstance(m, kind) and destination in (None, d))]
        return found

    def join(self, index, cpus=4, **values):
        total = {"CPU": cpus * UNIT}
        self.total[index] = total
        info = p.NodeInfo(bytes([index]) * 28, index, f"host{index}", "i", 1, total, dict(total), {})
        self.tell(p.RegisterNode(info, **values), raylet_address(index))

    def report(self, index, free, sequence=1):
        message = p.ReportResources(index, sequence, self.total[index], {"CPU": free * UNIT})
        self.tell(message, raylet_address(index))

    def ask(self, name, /, source=ME, **arguments):
        self.tell(p.Query(7, name, arguments), source)
        answers = self.take(p.Answer, source)
        return answers[0] if answers else None

    # actors

    def create(self, actor_id=ID, *, get_if_exists=False, unready=False, source=ME, **values):
        spec = actor_spec(actor_id, source, **values)
        self.tell(p.CreateActor(1, spec, get_if_exists, unready), source)
        answers = self.take(p.ActorCreated, source)
        return answers[0] if answers else None

    def place(self, actor_id=ID):
        """The StartActor that was sent: (node, attempt)."""
        found = [(d >> 48, m.attempt) for d, m in self.sent if isinstance(m, p.StartActor)]
        self.take(p.StartActor)
        return found[-1] if found else None

    def begin(self, actor_id=ID, address=FIRST):
        node, attempt = self.place(actor_id)
        self.tell(p.ActorStarting(actor_id, attempt, address, 99), raylet_address(node))
        self.tell(p.ActorReady(actor_id, attempt, address), address)
        return address

    def info(self, actor_id=ID):
        return self.state.actor_info(self.state.actors[actor_id])

    def die(self, address, cause=CRASH):
        self.tell(p.ProcessDied(address, b"", 1, 0, cause), raylet_address(address >> 48))


def actor_spec(actor_id, owner, **values):
    strategy = values.pop("strategy", p.Strategy())
    shape = p.Shape(values.pop("resources", {}), values.get("job_id", b"\0\0\0\1"), strategy,
                    group_id=values.pop("group_id", b""))  # fmt: skip
    values.setdefault("job_id", b"\0\0\0\1")
    values.setdefault("handle", b"handle of " + actor_id)
    placement = values.pop("placement", {"CPU": UNIT})
    return p.ActorSpec(actor_id, "A", b"", b"", b"", [], [], shape, placement, owner, **values)


# ------------------------------------------------------------------ nodes


def test_a_node_joins():
    gcs = Gcs([4])
    gcs.join(1)
    assert gcs.take(p.NodeRegistered, raylet_address(1)) == [p.NodeRegistered()]
    gcs.pass_time(0.01)
    assert [n.index for n in gcs.take(p.ClusterView, raylet_address(1))[0].nodes] == [0, 1]
    gcs.join(2)
    gcs.pass_time(0.01)
    assert [n.index for n in gcs.take(p.ClusterView, raylet_address(0))[-1].nodes] == [2]


def test_many_nodes_pass_the_view_on():
    """NODE-4"""
    gcs = Gcs([4] * 100)
    gcs.pass_time(1)
    gcs.sent.clear()
    gcs.report(0, 1, 1)
    gcs.pass_time(1)
    views = gcs.take(p.ClusterView)
    assert len(views) <= FANOUT and sum(1 + len(view.then) for view in views) == 100
    gcs.sent.clear()
    gcs.tell(p.NodeDied(7, b"", "lost"), address_of(0, LINK_LANE, 1))
    assert len(gcs.take(p.NodeDied)) == 99
    gcs.pass_time(1)
    assert {len(view.nodes) for view in gcs.take(p.ClusterView)} == {100}  # somebody may have heard nothing from it


def test_deaths_that_follow_closely_are_told_together():
    """NODE-1"""
    gcs = Gcs([4] * 100)
    gcs.pass_time(1)
    gcs.sent.clear()
    for node in (7, 8, 9):
        gcs.tell(p.NodeDied(node, b"", "lost"), address_of(0, LINK_LANE, 1))
    dead = p.ProcessDied(address_of(3, 20, 1), b"", 5, p.ProcessKind.WORKER, p.DeathCause("CRASHED", "boom"))
    gcs.tell(dead, raylet_address(3))
    assert [m.node for m in gcs.take(p.NodeDied, raylet_address(1))] == [7]
    gcs.pass_time(0.01)
    [deaths] = gcs.take(p.Deaths, raylet_address(1))
    assert [m.node for m in deaths.nodes] == [8, 9] and deaths.processes == [dead]


def test_a_node_that_cannot_join():
    gcs = Gcs([4])
    gcs.join(1, version=99)
    assert "version 99" in gcs.take(p.NodeRegistered)[0].refusal
    gcs.join(0)
    assert "registered already" in gcs.take(p.NodeRegistered)[0].refusal


def test_views_are_coalesced():
    """NODE-2"""
    gcs = Gcs([4, 4])
    gcs.pass_time(1)
    gcs.sent.clear()
    for sequence in range(1, 9):
        gcs.report(0, sequence % 4, sequence)
    gcs.pass_time(0)
    gcs.report(0, 1, 9)
    gcs.pass_time(0.04)
    assert len(gcs.take(p.ClusterView, raylet_address(1))) == 1
    gcs.pass_time(0.02)
    assert len(gcs.take(p.ClusterView, raylet_address(1))) == 1


def test_old_reports_are_ignored():
    gcs = Gcs([4])
    gcs.report(0, 1, sequence=5)
    gcs.report(0, 3, sequence=4)
    assert gcs.ask("available_resources").value == {"CPU": UNIT}


def test_a_driver_sets_resources():
    """Answered when every node has said that it has them, or has died."""
    gcs = Gcs([4, 4, 4])
    assert gcs.ask("set_resources", resources={"CPU": UNIT}, labels={"zone": "a"}, object_store_memory=5) is None
    assert gcs.take(p.SetResources, raylet_address(0)) == [p.SetResources({"CPU": UNIT}, {"zone": "a"}, [], 5)]
    assert gcs.take(p.SetResources, raylet_address(1)) == [p.SetResources({}, {}, ["CPU"], 5)]
    gcs.tell(p.ReportResources(0, 1, {"CPU": UNIT}, {"CPU": UNIT}), raylet_address(0))
    gcs.tell(p.ResourcesSet(0, {"zone": "a"}), raylet_address(0))
    gcs.tell(p.ReportResources(1, 1, {}, {}), raylet_address(1))
    gcs.tell(p.ResourcesSet(1, {}), raylet_address(1))
    assert gcs.take(p.Answer) == []
    gcs.tell(p.NodeDied(2, b"", "lost"), raylet_address(2))
    assert len(gcs.take(p.Answer)) == 1
    assert gcs.ask("cluster_resources").value == {"CPU": UNIT}
    assert [node["labels"] for node in gcs.ask("nodes").value[:2]] == [{"zone": "a"}, {}]


def test_death_of_a_node():
    """NODE-1, NODE-3"""
    gcs = Gcs([4, 4, 4])
    link = address_of(1, LINK_LANE, 1)
    gcs.tell(p.ProcessDied(link, b"", 1, p.ProcessKind.LINK, p.DeathCause("CRASHED", "lost")), 0)
    assert len(gcs.take(p.NodeDied)) == 2
    assert [node["alive"] for node in gcs.ask("nodes").value] == [True, False, True]
    assert gcs.ask("cluster_resources").value == {"CPU": 8 * UNIT}
    gcs.join(1)
    assert "dead" in gcs.take(p.NodeRegistered)[0].refusal


def test_a_process_death_goes_to_the_other_nodes():
    gcs = Gcs([4, 4, 4])
    gcs.die(address_of(1, 30, 1))
    assert sorted(d >> 48 for d, m in gcs.sent if isinstance(m, p.ProcessDied)) == [0, 2]


# ------------------------------------------------------------------ jobs


def start_job(gcs, driver=ME):
    gcs.tell(p.RegisterJob(1, driver, 5, "x.py", "space", {}), driver)
    return gcs.take(p.JobRegistered)[0].job_id


def test_jobs_are_numbered():
    """JOB-1"""
    gcs = Gcs()
    assert start_job(gcs) == b"\0\0\0\1"
    assert start_job(gcs, OTHER) == b"\0\0\0\2"
    assert [job["state"] for job in gcs.ask("list_jobs").value] == ["RUNNING", "RUNNING"]


@pytest.mark.parametrize("how", ["finish", "death"])
def test_the_end_of_a_job(how):
    """JOB-2"""
    gcs = Gcs()
    job = start_job(gcs)
    gcs.create(job_id=job)
    gcs.create(b"d" * 16, job_id=job, detached=True, name="stays")
    gcs.ask("create_placement_group", group_id=GROUP, bundles=[{"CPU": UNIT}], job_id=job)
    if how == "finish":
        gcs.tell(p.FinishJob(job))
    else:
        gcs.die(ME)
    assert gcs.take(p.JobFinished) == [p.JobFinished(job, ME)]
    assert (gcs.info().state, gcs.info().cause.kind) == (ActorState.DEAD, "OWNER_DIED")
    assert gcs.info(b"d" * 16).state == ActorState.PENDING_CREATION
    assert gcs.state.query_placement_group_table(GROUP)["state"] == "REMOVED"
    gcs.state.validate()


# ------------------------------------------------------------------ actors


def test_life_of_an_actor():
    gcs = Gcs()
    assert gcs.create() == p.ActorCreated(1)
    address = gcs.begin()
    [update] = gcs.take(p.ActorUpdate, ME)
    assert (update.info.state, update.info.address) == (ActorState.ALIVE, address)
    gcs.die(address)
    [update] = gcs.take(p.ActorUpdate, ME)
    assert (update.info.state, update.info.cause.text) == (ActorState.DEAD, "killed by SIGKILL")
    gcs.state.validate()


def test_creation_is_journalled_before_the_answer():
    """ACTOR-3: within one batch the server commits first; the record must be in that batch."""
    gcs = Gcs()
    actions = gcs.state.handle(p.CreateActor(1, actor_spec(ID, ME)), ME, 0.0)
    kinds = [type(getattr(a, "message", a)) for a in actions]
    assert kinds.count(Journal) >= 2
    assert kinds.index(Journal) < kinds.index(p.ActorCreated)


def test_its_own_word_may_come_first():
    gcs = Gcs()
    gcs.create()
    _, attempt = gcs.place()
    gcs.tell(p.ActorReady(ID, attempt, OTHER), OTHER)
    gcs.tell(p.ActorStarting(ID, attempt, OTHER, 99), raylet_address(0))
    assert [u.info.pid for u in gcs.take(p.ActorUpdate, ME)] == [0, 99]
    gcs.state.validate()


def test_restarts_until_none_is_left():
    """ACTOR-6"""
    gcs = Gcs()
    gcs.create(max_restarts=1)
    gcs.die(gcs.begin())
    assert (gcs.info().state, gcs.info().restarts_left) == (ActorState.RESTARTING, 0)
    gcs.die(gcs.begin(address=address_of(0, 51, 1)))
    assert gcs.info().state == ActorState.DEAD


@pytest.mark.parametrize("kind", ["EXITED", "OWNER_DIED", "GROUP_REMOVED"])
def test_other_ends_are_final(kind):
    gcs = Gcs()
    gcs.create(max_restarts=-1)
    gcs.die(gcs.begin(), p.DeathCause(kind))
    assert gcs.info().state == ActorState.DEAD


def test_late_words_of_an_old_attempt():
    """ACTOR-2"""
    gcs = Gcs()
    gcs.create(max_restarts=-1)
    address = gcs.begin()
    gcs.die(address)
    gcs.tell(p.ActorReady(ID, 0, address_of(0, 77, 1)), address_of(0, 77, 1))
    gcs.tell(p.ActorInitFailed(ID, 0, p.DeathCause("INIT_FAILED")), address_of(0, 77, 1))
    assert gcs.info().state == ActorState.RESTARTING
    assert gcs.place() == (0, 1)


def test_failed_init_is_final_and_carries_the_error():
    gcs = Gcs()
    gcs.create(max_restarts=-1)
    _, attempt = gcs.place()
    gcs.tell(p.ActorInitFailed(ID, attempt, p.DeathCause("INIT_FAILED", "x", b"pickle")), OTHER)
    [update] = gcs.take(p.ActorUpdate, ME)
    assert update.info.cause.error == b"pickle"


def test_names():
    """ACTOR-4"""
    gcs = Gcs()
    gcs.create(name="single", namespace="n")
    again = gcs.create(b"2" * 16, name="single", namespace="n")
    assert "single" in again.error
    assert gcs.create(b"2" * 16, name="single", namespace="n", get_if_exists=True).existing == b"handle of " + ID
    assert gcs.create(b"3" * 16, name="single", namespace="m").error == ""
    gcs.tell(p.GetNamedActor(4, "single", "n"))
    assert gcs.take(p.NamedActor)[0].handle == b"handle of " + ID
    assert gcs.ask("list_named_actors", namespace="n").value == [{"name": "single", "namespace": "n"}]
    assert len(gcs.ask("list_named_actors", all_namespaces=True).value) == 2
    gcs.tell(p.KillActor(ID))
    gcs.tell(p.GetNamedActor(5, "single", "n"))
    assert gcs.take(p.NamedActor) == [p.NamedActor(5, b"")]
    assert gcs.create(b"4" * 16, name="single", namespace="n").error == ""


def test_kill():
    gcs = Gcs()
    gcs.create(max_restarts=5)
    address = gcs.begin()
    gcs.tell(p.KillActor(ID, no_restart=False))
    assert [m.force for m in gcs.take(p.StopActor)] == [True]
    assert gcs.info().state == ActorState.RESTARTING
    gcs.die(address, p.DeathCause("KILLED"))  # the end of the old process costs nothing more
    assert gcs.info().restarts_left == 4
    gcs.begin(address=address_of(0, 51, 1))
    gcs.tell(p.KillActor(ID))
    assert (gcs.info().state, gcs.info().cause.kind) == (ActorState.DEAD, "KILLED")


def test_out_of_scope_ends_after_its_calls():
    gcs = Gcs()
    gcs.create(name="x", max_restarts=3)
    address = gcs.begin()
    gcs.tell(p.ActorOutOfScope(ID))
    assert [m.force for m in gcs.take(p.StopActor)] == [False]
    assert (gcs.info().state, gcs.info().stopping) == (ActorState.ALIVE, True)
    assert gcs.take(p.ActorUpdate)[-1].info.stopping, "whoever has a handle makes no more calls"
    gcs.tell(p.GetNamedActor(1, "x", ""))
    assert gcs.take(p.NamedActor)[0].handle == b""
    gcs.die(address, p.DeathCause("EXITED"))
    assert (gcs.info().state, gcs.info().cause.kind) == (ActorState.DEAD, "OUT_OF_SCOPE")


def test_owner_death():
    """ACTOR-5"""
    gcs = Gcs([4, 4])
    gcs.create(source=OTHER, strategy=p.Strategy("NODE", b"\0" * 28))
    gcs.begin()
    gcs.tell(p.NodeDied(1, b"\1" * 28, "lost"), 0)
    assert (gcs.info().state, gcs.info().cause.kind) == (ActorState.DEAD, "OWNER_DIED")
    assert len(gcs.take(p.StopActor)) == 1


def test_an_actor_of_an_owner_that_died_before_it_was_heard():
    """MACHINE-4"""
    gcs = Gcs()
    gcs.die(ME)
    gcs.tell(p.CreateActor(1, actor_spec(ID, ME)), ME)
    assert gcs.state.actors == {}


def test_rejected_and_retried_after_a_while():
    gcs = Gcs([4, 4])
    gcs.create()
    node, attempt = gcs.place()
    gcs.tell(p.ActorRejected(ID, attempt), raylet_address(node))
    assert gcs.place() is None
    gcs.pass_time(0.03)
    assert gcs.place() == (node, attempt + 1)
    gcs.tell(p.ActorRejected(ID, attempt + 1, p.DeathCause("RUNTIME_ENV", "no pip")), raylet_address(node))
    assert gcs.info().cause.kind == "RUNTIME_ENV"


def test_infeasible_actors_wait_and_their_owner_is_told_once():
    gcs = Gcs([1])
    gcs.create(placement={"slot": UNIT})
    gcs.pass_time(100)
    [warning] = gcs.take(p.LogLines, ME)
    assert "slot: 1" in warning.lines[0]
    assert "has: {CPU: 1" in warning.lines[0]


def test_an_actor_that_only_waits_for_room_is_not_told_of():
    gcs = Gcs([1])
    gcs.create()
    gcs.place()
    gcs.create(bytes(16))
    gcs.pass_time(100)
    assert gcs.take(p.LogLines) == []


def test_waits_for_room_that_may_come():
    gcs = Gcs([1])
    gcs.create(placement={"CPU": 4 * UNIT})
    assert gcs.place() is None
    gcs.join(1, 8)
    assert gcs.place() == (1, 0)


def test_node_that_dies_before_the_actor_began_costs_no_restart():
    gcs = Gcs([4, 4])
    gcs.create(strategy=p.Strategy("NODE", b"\1" * 28, True))
    assert gcs.place() == (1, 0)
    gcs.tell(p.NodeDied(1, b"\1" * 28, "lost"), 0)
    assert gcs.place() == (0, 1)
    assert gcs.info().state == ActorState.PENDING_CREATION


def test_hard_affinity_to_a_dead_node():
    gcs = Gcs([4])
    gcs.create(strategy=p.Strategy("NODE", b"\7" * 28))
    assert gcs.info().cause.kind == "UNSCHEDULABLE"


def test_subscriptions():
    gcs = Gcs()
    gcs.tell(p.SubscribeActor(b"?" * 16), OTHER)
    assert gcs.take(p.ActorUpdate, OTHER)[0].info.state == ActorState.DEAD
    gcs.create()
    gcs.tell(p.SubscribeActor(ID), OTHER)
    assert gcs.take(p.ActorUpdate, OTHER)[0].info.state == ActorState.PENDING_CREATION
    gcs.begin()
    assert gcs.take(p.ActorUpdate, OTHER)[0].info.state == ActorState.ALIVE
    gcs.die(OTHER)
    gcs.tell(p.KillActor(ID))
    assert gcs.take(p.ActorUpdate, OTHER) == []
    assert gcs.state.subscriptions == {}


@pytest.mark.parametrize(("restarts", "wanted"), [(0, ActorState.DEAD), (1, ActorState.RESTARTING)])
def test_an_actor_that_says_it_failed_has_crashed(restarts, wanted):
    gcs = Gcs([4])
    gcs.create(max_restarts=restarts)
    gcs.begin()
    gcs.tell(p.ActorFailed(ID, 5, "of an earlier attempt"), FIRST)
    assert gcs.info().state == ActorState.ALIVE
    gcs.tell(p.ActorFailed(ID, 0, "rank 1 died"), FIRST)
    assert gcs.info().state == wanted
    assert (gcs.info().cause.kind, gcs.info().cause.text) == ("CRASHED", "rank 1 died")
    assert [(m.force, m.reason) for m in gcs.take(p.StopActor)] == [(True, "rank 1 died")]
    gcs.die(FIRST)  # the end that the GCS asked for is no second crash
    assert gcs.info().state == wanted
    gcs.state.validate()


# ------------------------------------------------------------------ placement groups


def new_group(gcs, count=2, strategy="PACK", **values):
    answer = gcs.ask(
        "create_placement_group", group_id=GROUP, bundles=[{"CPU": UNIT}] * count, strategy=strategy, **values
    )
    return answer


def answer_prepares(gcs, ok=True):
    prepares = [(d >> 48, m) for d, m in gcs.sent if isinstance(m, p.PrepareBundles)]
    gcs.take(p.PrepareBundles)
    for node, m in prepares:
        gcs.tell(p.BundlesPrepared(m.group_id, m.attempt, node, ok), raylet_address(node))
    return sorted(node for node, _ in prepares)


def test_two_phases():
    """GROUP-2, GROUP-4"""
    gcs = Gcs([4, 4])
    new_group(gcs, strategy="STRICT_SPREAD")
    assert gcs.ask("wait_placement_group", group_id=GROUP) is None
    assert gcs.take(p.CommitBundles) == []
    assert answer_prepares(gcs) == [0, 1]
    assert len(gcs.take(p.CommitBundles)) == 2
    assert gcs.take(p.Answer, ME)[0].value == "CREATED"
    assert gcs.ask("wait_placement_group", group_id=GROUP).value == "CREATED"
    row = gcs.ask("placement_group_table", group_id=GROUP).value
    assert sorted(row["nodes"]) == [b"\0" * 28, b"\1" * 28]
    gcs.state.validate()


def test_an_owned_group_goes_with_its_creator_and_is_forgotten():
    gcs = Gcs([4, 4])
    gcs.ask("create_placement_group", source=OTHER, group_id=GROUP, bundles=[{}, {}], strategy="STRICT_SPREAD", owned=True)
    assert answer_prepares(gcs) == [0, 1]
    gcs.die(ME)
    assert gcs.take(p.ReleaseBundles) == []
    gcs.die(OTHER)
    assert len(gcs.take(p.ReleaseBundles)) == 2
    assert gcs.state.groups == {}
    assert not [kind for kind, *_ in gcs.journal.load() if kind == "group"]
    gcs.state.validate()


def test_an_owned_group_goes_with_its_creators_node():
    gcs = Gcs([4, 4])
    gcs.ask("create_placement_group", source=OTHER, group_id=GROUP, bundles=[{"CPU": UNIT}], owned=True)
    gcs.tell(p.NodeDied(1, b"\1" * 28, "lost"), 0)
    assert gcs.state.groups == {}
    gcs.state.validate()


def test_failed_prepare_releases_the_attempt_and_tries_again():
    gcs = Gcs([4, 4])
    new_group(gcs)
    answer_prepares(gcs, ok=False)
    assert [m.attempt for m in gcs.take(p.ReleaseBundles)] == [1]
    assert answer_prepares(gcs) == []
    gcs.pass_time(0.1)
    assert len(answer_prepares(gcs)) == 1
    assert gcs.state.query_placement_group_table(GROUP)["state"] == "CREATED"


def test_lost_bundles_are_placed_anew():
    """GROUP-3"""
    gcs = Gcs([4, 4, 4])
    new_group(gcs, strategy="STRICT_SPREAD")
    nodes = answer_prepares(gcs)
    gcs.take(p.CommitBundles)
    gcs.tell(p.NodeDied(nodes[1], bytes([nodes[1]]) * 28, "lost"), 0)
    assert answer_prepares(gcs) == [2]
    assert [m.attempt for m in gcs.take(p.CommitBundles)] == [2]
    gcs.state.validate()


def test_node_death_during_the_first_phase():
    gcs = Gcs([4, 4, 4])
    new_group(gcs, strategy="STRICT_SPREAD")
    gcs.tell(p.NodeDied(1, b"\1" * 28, "lost"), 0)
    gcs.tell(p.BundlesPrepared(GROUP, 1, 0, True), raylet_address(0))
    gcs.take(p.PrepareBundles)
    gcs.pass_time(0.1)
    assert answer_prepares(gcs) == [0, 2]
    gcs.state.validate()


def test_removal():
    gcs = Gcs([4, 4])
    new_group(gcs, name="table")
    assert gcs.ask("get_placement_group", name="table").value["group_id"] == GROUP
    answer_prepares(gcs)
    gcs.create(group_id=GROUP)
    gcs.begin()
    gcs.ask("remove_placement_group", group_id=GROUP)
    gcs.ask("remove_placement_group", group_id=GROUP)
    assert [m.attempt for m in gcs.take(p.ReleaseBundles)] == [-1]
    assert len(gcs.take(p.GroupRemoved)) == 2
    assert gcs.info().cause.kind == "GROUP_REMOVED"
    assert gcs.ask("get_placement_group", name="table").value is None
    assert gcs.ask("wait_placement_group", group_id=GROUP).value == "REMOVED"
    gcs.create(b"2" * 16, group_id=GROUP)
    assert gcs.info(b"2" * 16).cause.kind == "GROUP_REMOVED"


def test_a_group_that_does_not_fit_waits():
    gcs = Gcs([1])
    new_group(gcs)
    assert answer_prepares(gcs) == []
    assert gcs.state.query_placement_group_table(GROUP)["state"] == "PENDING"
    gcs.join(1, 4)
    assert answer_prepares(gcs) == [1]


def test_what_waits_for_room():
    """Actors that any node may have, alike ones together, and groups."""
    gcs = Gcs([1])
    new_group(gcs)
    for number in range(3):
        gcs.create(bytes([number]) * 16, placement={"CPU": 2 * UNIT})
    gcs.create(b"n" * 16, placement={"CPU": 3 * UNIT}, strategy=p.Strategy("NODE", bytes([0]) * 28))
    demand = gcs.ask("demand").value
    assert demand["tasks"] == [({"CPU": 2 * UNIT}, 3)]
    [group] = demand["groups"]
    assert group["bundles"] == gcs.state.groups[GROUP].bundles and group["occupied"] == []


def test_infeasible_groups_wait_and_their_maker_is_told_once():
    gcs = Gcs([1])
    new_group(gcs)
    gcs.pass_time(100)
    [warning] = gcs.take(p.LogLines)
    assert "placement group" in warning.lines[0]
    assert "has: {CPU: 1" in warning.lines[0]


def test_bad_groups():
    gcs = Gcs()
    assert "PACK" in gcs.ask("create_placement_group", group_id=GROUP, bundles=[{"CPU": 1}], strategy="x").error
    assert gcs.ask("create_placement_group", group_id=GROUP, bundles=[]).error_kind == "ValueError"


# ------------------------------------------------------------------ keys, questions, journal


def test_keys():
    gcs = Gcs()
    assert gcs.ask("kv_put", key=b"a1", value=b"x").value is True
    assert gcs.ask("kv_put", key=b"a1", value=b"y", overwrite=False).value is False
    assert gcs.ask("kv_get", key=b"a1").value == b"x"
    gcs.ask("kv_put", key="a2", value="z", namespace="n")
    assert gcs.ask("kv_get", key=b"a2").value is None
    assert gcs.ask("kv_keys", prefix=b"a", namespace=b"n").value == [b"a2"]
    assert gcs.ask("kv_multi_get", keys=[b"a1", b"?"]).value == {b"a1": b"x"}
    assert gcs.ask("kv_exists", key=b"a1").value is True
    assert gcs.ask("kv_del", key=b"a", by_prefix=True).value == 1
    assert gcs.ask("kv_exists", key=b"a1").value is False


def test_every_answer_travels():
    gcs = Gcs()
    start_job(gcs)
    gcs.create(name="x")
    gcs.begin()
    new_group(gcs)
    for name in ("nodes", "cluster_resources", "available_resources", "list_actors", "list_jobs", "statistics",
                 "list_named_actors", "placement_group_table", "pending_resources"):  # fmt: skip
        answer = gcs.ask(name)
        assert not answer.error
        p.decode(p.encode(answer))
    assert "it has" in gcs.ask("nothing").error
    assert gcs.ask("kv_get", wrong=1).error_kind == "TypeError"


ARGUMENTS = [p.Dependency(b"a" * 28, p.Result(0, b"value"), 0)]


def test_an_actor_whose_arguments_are_not_ready_has_its_name_and_waits():
    gcs = Gcs([4])
    gcs.create(name="mine", unready=True)
    assert gcs.place() is None and gcs.info().state == ActorState.DEPENDENCIES_UNREADY
    assert "taken" in gcs.create(b"b" * 16, name="mine").error
    gcs.state.validate()
    gcs.tell(p.ActorArguments(ID, ARGUMENTS), ME)
    (started,) = [message for _, message in gcs.sent if isinstance(message, p.StartActor)]
    assert started.spec.dependencies == ARGUMENTS
    gcs.tell(p.ActorArguments(ID, []), ME)  # once
    assert gcs.state.actors[ID].spec.dependencies == ARGUMENTS
    state = GcsState()
    state.replay(gcs.journal.load())
    assert state.actors[ID].spec.dependencies == ARGUMENTS
    gcs.begin()
    gcs.state.validate()


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("end", ["owner", "kill", "out of scope"])
def test_an_actor_ends_before_its_arguments_are_ready(end, detached):
    """ACTOR-5: also a detached one, as nobody else will send them."""
    gcs = Gcs([4])
    gcs.create(detached=detached, unready=True)
    if end == "owner":
        gcs.die(ME)
    else:
        gcs.tell(p.KillActor(ID) if end == "kill" else p.ActorOutOfScope(ID), ME)
    assert gcs.info().state == ActorState.DEAD
    gcs.tell(p.ActorArguments(ID, ARGUMENTS), ME)
    assert gcs.place() is None
    gcs.state.validate()


def test_a_detached_actor_with_its_arguments_outlives_its_owner():
    gcs = Gcs([4])
    gcs.create(detached=True, unready=True)
    gcs.tell(p.ActorArguments(ID, ARGUMENTS), ME)
    gcs.begin()
    gcs.die(ME)
    assert gcs.info().state == ActorState.ALIVE
    gcs.state.validate()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_journal_brings_everything_back(kind, tmp_path):
    """GCS-2, JOURNAL-2"""
    path = str(tmp_path / "journal")
    journal = MemoryJournal() if kind == "memory" else SqliteJournal(path)
    gcs = Gcs([4], journal=journal)
    job = start_job(gcs)
    gcs.create(job_id=job)
    gcs.begin()
    gcs.create(b"d" * 16, job_id=job, detached=True, name="stays")
    gcs.begin(b"d" * 16, address_of(0, 51, 1))
    gcs.ask("kv_put", key=b"k", value=b"v", namespace=b"n")
    gcs.ask("kv_put", key=b"k2", value=b"v")
    gcs.ask("kv_del", key=b"k2")
    gcs.ask("create_placement_group", group_id=GROUP, bundles=[{"CPU": UNIT}], detached=True)
    answer_prepares(gcs)
    if kind == "sqlite":
        journal.close()
        journal = SqliteJournal(path)
    state = GcsState()
    state.replay(journal.load())
    assert state.durable() == gcs.state.durable()
    gcs.tell(p.Shutdown("its node ends"), 0)  # whose processes end with it; what they kept alive goes on
    gcs.tell(p.ProcessDied(address_of(0, 51, 1), b"", 1, 0, p.DeathCause("INTENDED_EXIT", "shutdown")), raylet_address(0))
    state = GcsState()
    state.replay(journal.load())
    again = Gcs([], state=state, journal=journal)
    assert again.info().state == ActorState.DEAD
    assert again.info(b"d" * 16).state == ActorState.RESTARTING
    again.join(0)
    assert again.place(b"d" * 16) == (0, 1)
    assert answer_prepares(again) == [0]
    assert start_job(again) == b"\0\0\0\2"
    again.state.validate()
    journal.close()


# ------------------------------------------------------------------ any sequence

actor_numbers = st.integers(1, 3)
steps = st.one_of(
    st.tuples(st.just("create"), actor_numbers, st.integers(-1, 2), st.booleans(), st.sampled_from(["", "n"])),
    st.tuples(st.sampled_from(["starting", "ready", "failed", "rejected"]), actor_numbers, st.integers(0, 3)),
    st.tuples(st.just("die"), actor_numbers, st.sampled_from(["CRASHED", "EXITED", "KILLED"])),
    st.tuples(st.just("kill"), actor_numbers, st.booleans()),
    st.tuples(st.sampled_from(["scope", "watch"]), actor_numbers),
    st.tuples(st.just("node"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("group"), st.integers(1, 2), st.sampled_from(["PACK", "STRICT_SPREAD"]), st.booleans()),
    st.tuples(st.just("prepared"), st.integers(1, 2), st.integers(0, 3), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("remove"), st.integers(1, 2)),
    st.tuples(st.just("report"), st.integers(0, 3), st.integers(0, 4)),
    st.tuples(st.just("time"), st.sampled_from([0.01, 1.0])),
    st.tuples(st.just("owner"), st.just(1)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=40))
def test_any_sequence_keeps_the_invariants_and_replays(sequence):
    """ACTOR-1, ACTOR-4, GROUP-1, GROUP-3, MACHINE-2, GCS-2."""
    gcs = Gcs([4])
    state = gcs.state
    addresses = iter(range(100, 1000))
    for what, *rest in sequence:
        actor_id = bytes([rest[0]]) * 16 if rest and isinstance(rest[0], int) else b""
        actor = state.actors.get(actor_id)
        if what == "create":
            gcs.create(actor_id, max_restarts=rest[1], detached=rest[2], name=rest[3])
        elif what == "starting":
            node = actor.record.node if actor and actor.record.node >= 0 else 0
            address = address_of(node, next(addresses), 1)
            gcs.tell(p.ActorStarting(actor_id, rest[1], address, 5), raylet_address(node))
        elif what == "ready" and actor and actor.record.address:
            gcs.tell(p.ActorReady(actor_id, rest[1], actor.record.address), actor.record.address)
        elif what == "failed":
            gcs.tell(p.ActorInitFailed(actor_id, rest[1], p.DeathCause("INIT_FAILED")), 999)
        elif what == "rejected":
            gcs.tell(p.ActorRejected(actor_id, rest[1]), raylet_address(0))
        elif what == "die" and actor and actor.record.address:
            gcs.die(actor.record.address, p.DeathCause(rest[1]))
        elif what == "kill":
            gcs.tell(p.KillActor(actor_id, rest[1]))
        elif what == "scope":
            gcs.tell(p.ActorOutOfScope(actor_id))
        elif what == "watch":
            gcs.tell(p.SubscribeActor(actor_id), OTHER)
        elif what == "node":
            if rest[1]:
                gcs.join(rest[0])
            else:
                gcs.tell(p.NodeDied(rest[0], b"", "lost"), 0)
        elif what == "group":
            gcs.ask("create_placement_group", group_id=bytes([rest[0]]) * 18, strategy=rest[1],
                    bundles=[{"CPU": UNIT}] * 2, detached=rest[2], source=OTHER)  # fmt: skip
        elif what == "prepared":
            answer = p.BundlesPrepared(bytes([rest[0]]) * 18, rest[1], rest[2], rest[3])
            gcs.tell(answer, raylet_address(rest[2]))
        elif what == "remove":
            gcs.ask("remove_placement_group", group_id=bytes([rest[0]]) * 18)
        elif what == "report" and rest[0] in gcs.total:
            gcs.report(rest[0], rest[1], sequence=len(state.log))
        elif what == "time":
            gcs.pass_time(rest[0])
        elif what == "owner":
            gcs.die(ME)
        state.validate()
    again = GcsState()
    again.replay_log(state.log)
    assert again.snapshot() == state.snapshot()
    restored = GcsState()
    restored.replay(gcs.journal.load())
    assert restored.durable() == state.durable()

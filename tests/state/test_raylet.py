"""The raylet's decisions, one event at a time."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ray import protocol as p
from hpc_ray.config import NodeConfig, Settings
from hpc_ray.ids import GCS_ADDRESS, LINK_LANE, IdMinter, address_of, raylet_address
from hpc_ray.machine import Exit, Send, SetTimer, TimerFired
from hpc_ray.options import in_bundle
from hpc_ray.protocol import UNIT
from hpc_ray.raylet import events as e
from hpc_ray.raylet.logs import LogFolder
from hpc_ray.raylet.state import RayletState
from hpc_ray.raylet.workers import MAX_LEFT_ROWS, WorkerState

JOB = b"\0\0\0\1"
GROUP = b"g" * 18
ME, OTHER, THIRD = (address_of(0, lane, 1) for lane in (500, 501, 502))


class Node:
    """A raylet under test, with a fork server and workers that do as they are told."""

    def __init__(self, resources=None, node=0, **values):
        values.setdefault("prestart_workers", 0)
        config = NodeConfig(
            session="s",
            session_dir="/nowhere",
            node=node,
            node_id=(b"\0" * 28).hex(),
            hostname="host",
            ip="10.0.0.1",
            resources=resources or {"CPU": 2},
            arena_bytes=1000,
            settings=Settings(**values),
        )
        self.state = RayletState(config, keep_log=True)
        self.now = 0.0
        self.sent = []  # (destination, message), since the last take
        self.asked = []  # of the fork server
        self.actions = []
        self.timers = {}
        self.auto = True  # the fork server forks and workers start at once
        self._lane = 600
        self.do(self.state.start(0.0))
        self.tell(p.NodeRegistered(), GCS_ADDRESS)

    def tell(self, message, source):
        self.do(self.state.handle(message, source, self.now))

    def do(self, actions):
        following = []
        for action in actions:
            self.actions.append(action)
            if isinstance(action, Send):
                self.sent.append((action.destination, action.message))
            elif isinstance(action, SetTimer):
                self.timers[action.name] = action.at
            elif isinstance(action, e.AskForkServer):
                self.asked.append(action.message)
                if isinstance(action.message, p.StartWorker) and self.auto:
                    following.append(action.message.token)
        for token in following:
            self.start(token)

    def start(self, token):
        self._lane += 1
        self.tell(p.WorkerForked(token, 1000 + token), 0)
        self.tell(p.ProcessStarted(p.ProcessKind.WORKER, b"w", 1000 + token, token), address_of(self.state.node, self._lane, 1))

    def exit(self, address, status=9):
        pid = self.state.by_address[address].pid
        self.tell(p.ProcessExited(pid, status), 0)

    def pass_time(self, seconds):
        end = self.now + seconds
        while self.timers and min(self.timers.values()) <= end:
            name = min(self.timers, key=self.timers.get)
            self.now = self.timers.pop(name)
            self.tell(TimerFired(name), 0)
        self.now = end

    def take(self, kind, destination=None):
        """Messages of this class, sent since they were last taken."""
        found = [m for d, m in self.sent if isinstance(m, kind) and destination in (None, d)]
        self.sent = [(d, m) for d, m in self.sent if not (isinstance(m, kind) and destination in (None, d))]
        return found

    def lease(self, owner=ME, count=1, number=1, redirected=False, **shape_values):
        self.tell(p.RequestLease(number, shape(**shape_values), count, redirected), owner)
        return self.take(p.LeaseGranted, owner)

    def see(self, index, cpus, free=None, alive=True, **labels):
        total = {"CPU": cpus * UNIT}
        available = {"CPU": (cpus if free is None else free) * UNIT}
        info = p.NodeInfo(bytes([index]) * 28, index, "h", "i", 1, total, available, labels, alive=alive)
        self.tell(p.ClusterView([info]), GCS_ADDRESS)


def shape(resources=None, job=JOB, **rest):
    amounts = {"CPU": UNIT} if resources is None else resources
    return p.Shape(amounts, job, rest.pop("strategy", p.Strategy()), **rest)


def actor(number=1, resources=None, placement=None, **rest):
    resources = resources or {}
    return p.ActorSpec(
        bytes([number]) * 16, "A", b"", b"", b"", [], [], shape(resources, **rest),
        placement or {"CPU": UNIT}, ME, JOB,
    )  # fmt: skip


def test_it_registers_and_starts_workers():
    node = Node({"CPU": 3}, prestart_workers=-1)
    assert isinstance(node.sent[0][1], p.RegisterNode)
    assert len([m for m in node.asked if isinstance(m, p.StartWorker)]) == 3
    assert len(node.take(p.Welcome)) == 3


def test_grant_return_and_reuse():
    node = Node()
    [first] = node.lease()
    node.tell(p.ReturnLease(first.lease_id), ME)
    [second] = node.lease(number=2)
    assert second.worker == first.worker
    assert second.lease_id != first.lease_id
    node.state.validate()


def test_a_gang_has_all_its_ranks_or_none():
    node = Node({"CPU": 4})
    [small] = node.lease(ME)
    gang = {"resources": {"CPU": 4 * UNIT}, "runtime_env": '{"_mpi_ranks": 4}'}
    assert node.lease(OTHER, **gang) == []
    node.tell(p.ReturnLease(small.lease_id), ME)
    [whole] = node.take(p.LeaseGranted, OTHER)
    assert node.lease(ME, number=2) == []  # nothing is left
    node.tell(p.ReturnLease(whole.lease_id), OTHER)
    assert len(node.take(p.LeaseGranted, ME)) == 1
    [again] = node.lease(OTHER, number=3, resources={"CPU": 2 * UNIT}, runtime_env='{"_mpi_ranks": 4}')
    assert again.worker == whole.worker  # the leader that has the ranks
    node.state.validate()


def test_all_hear_of_the_death_of_a_rank():
    """WORKER-3. It is nobody's child here: its connection tells of its end."""
    node = Node()
    [lease] = node.lease()
    rank = address_of(0, 700, 1)
    node.tell(p.ProcessStarted(p.ProcessKind.RANK, b"r", 4711, 0), rank)
    assert len(node.take(p.Welcome, rank)) == 1
    node.tell(p.ProcessExited(4711, 0, p.ProcessKind.RANK, rank), 0)
    for destination in (lease.worker, GCS_ADDRESS):
        [notice] = node.take(p.ProcessDied, destination)
        assert (notice.address, notice.kind) == (rank, p.ProcessKind.RANK)
    node.state.validate()


def test_no_more_grants_than_resources():
    node = Node({"CPU": 2})
    assert len(node.lease(count=5)) == 2
    node.tell(p.ResizeLeaseRequest(1, 0), ME)
    assert node.state.requests == {}


def test_owners_are_served_in_turn():
    """LEASE-3"""
    node = Node({"CPU": 1})
    [lease] = node.lease(THIRD, count=1)
    node.lease(ME, count=3)
    node.lease(OTHER, count=3)
    order = []
    for _ in range(6):
        owner = THIRD if not order else order[-1]
        node.tell(p.ReturnLease(lease.lease_id), owner)
        [(destination, lease)] = [(d, m) for d, m in node.sent if isinstance(m, p.LeaseGranted)]
        node.sent.clear()
        order.append(destination)
    assert order == [ME, OTHER] * 3


def test_a_large_request_does_not_hold_up_small_ones():
    node = Node({"CPU": 2})
    node.lease(ME)
    assert node.lease(OTHER, resources={"CPU": 2 * UNIT}) == []
    assert len(node.lease(THIRD)) == 1


def test_holders_hear_of_contention_once():
    """LEASE-5"""
    node = Node({"CPU": 1})
    [lease] = node.lease(ME)
    assert node.lease(OTHER) == []
    assert node.lease(THIRD) == []
    assert len(node.take(p.LeaseContended, ME)) == 1
    node.tell(p.ReturnLease(lease.lease_id), ME)
    assert len(node.take(p.LeaseContended, OTHER)) == 1


def test_waiting_for_oneself_is_no_contention():
    node = Node({"CPU": 1})
    node.lease(ME, count=3)
    assert node.take(p.LeaseContended) == []


def test_workers_belong_to_one_job():
    """WORKER-2"""
    node = Node()
    [first] = node.lease()
    node.tell(p.ReturnLease(first.lease_id), ME)
    [second] = node.lease(OTHER, job=b"\0\0\0\2")
    assert second.worker != first.worker


def test_environments_have_workers_of_their_own():
    node = Node()
    [plain] = node.lease()
    node.tell(p.ReturnLease(plain.lease_id), ME)
    [other] = node.lease(number=2, runtime_env="{}")
    assert other.worker != plain.worker
    assert node.asked[-1].runtime_env == "{}"


def env(name):
    return json.dumps({"env_vars": {"E": name}})


def started(node, environment):
    return [m.token for m in node.asked if isinstance(m, p.StartWorker) and m.runtime_env == environment]


def test_one_worker_makes_an_environment_and_holds_up_nobody():
    node = Node({"CPU": 2})
    node.auto = False
    node.lease(count=2, runtime_env=env("slow"))
    assert len(started(node, env("slow"))) == 1
    node.lease(OTHER, count=2)
    for token in started(node, ""):
        node.start(token)
    assert len(started(node, "")) == 2
    for granted in node.take(p.LeaseGranted, OTHER):
        node.tell(p.ReturnLease(granted.lease_id), OTHER)
    node.start(*started(node, env("slow")))
    assert len(started(node, env("slow"))) == 2  # the other one, now that it is there
    node.start(started(node, env("slow"))[1])
    assert len(node.take(p.LeaseGranted, ME)) == 2
    node.state.validate()


def test_an_environment_that_fails():
    node = Node({"CPU": 2})
    node.auto = False
    node.lease(count=2, runtime_env=env("bad"))
    node.tell(p.StartActor(0, actor(runtime_env=env("bad"))), GCS_ADDRESS)
    [token] = started(node, env("bad"))
    node.tell(p.WorkerForked(token, 77), 0)
    node.tell(p.EnvironmentFailed(token, "no such package"), address_of(0, 900, 1))
    assert not node.take(p.LeaseRefused)
    node.tell(p.ProcessExited(77, 256), 0)
    [refusal] = node.take(p.LeaseRefused, ME)
    assert (refusal.reason, refusal.text) == (p.LeaseRefusal.RUNTIME_ENV, "no such package")
    [rejection] = node.take(p.ActorRejected)
    assert (rejection.cause.kind, rejection.cause.text) == ("RUNTIME_ENV", "no such package")
    assert len(started(node, env("bad"))) == 1
    node.lease(number=2, runtime_env=env("bad"))  # asked for again it is tried again
    assert len(started(node, env("bad"))) == 2
    node.state.validate()


def test_a_setup_that_never_ends_is_ended():
    node = Node(start_timeout_s=10.0)
    node.auto = False
    limited = '{"config": {"setup_timeout_seconds": 5}}'
    endless = '{"config": {"setup_timeout_seconds": -1}}'
    node.lease(runtime_env=limited)
    node.lease(OTHER, runtime_env=endless)
    tokens = [started(node, limited)[0], started(node, endless)[0]]
    for token in tokens:
        node.tell(p.WorkerForked(token, 70 + token), 0)
    node.pass_time(14)
    assert not [m for m in node.asked if isinstance(m, p.KillProcess)]
    node.pass_time(1000)
    assert [m.pid for m in node.asked if isinstance(m, p.KillProcess)] == [70 + tokens[0]]
    node.tell(p.ProcessExited(70 + tokens[0], 9), 0)
    assert "15 s" in node.take(p.LeaseRefused, ME)[0].text
    assert len(started(node, limited)) == 1


def test_an_environment_is_made_before_it_is_wanted():
    node = Node()
    node.tell(p.InstallEnvironment(env("job")), ME)
    node.tell(p.InstallEnvironment(env("job")), ME)
    [token] = started(node, env("job"))
    [granted] = node.lease(runtime_env=env("job"))
    assert node.state.by_address[granted.worker].token == token


def test_idle_workers_of_other_environments_make_room():
    node = Node({"CPU": 2})
    for name in "ab":
        [granted] = node.lease(runtime_env=env(name))
        node.tell(p.ReturnLease(granted.lease_id), ME)
    assert len(node.state.idle) == 2
    node.pass_time(2)
    [granted] = node.lease(runtime_env=env("c"))
    [ended] = [worker for worker in node.state.workers.values() if worker.state is WorkerState.ENDING]
    assert ended.env == env("a")  # the one that was idle for longest
    assert [d for d, m in node.sent if isinstance(m, p.Shutdown)] == [ended.address]
    assert [worker.env for worker in node.state.idle.values()] == [env("b")]
    node.state.validate()


def test_blocked_worker_gives_its_cpu_and_takes_it_back():
    node = Node({"CPU": 1})
    [first] = node.lease(ME)
    node.lease(OTHER)
    node.tell(p.WorkerBlocked(), first.worker)
    [second] = node.take(p.LeaseGranted, OTHER)
    node.tell(p.WorkerUnblocked(), first.worker)
    assert node.state.pool.available["CPU"] == -UNIT
    node.lease(THIRD)
    node.tell(p.ReturnLease(second.lease_id), OTHER)
    assert node.take(p.LeaseGranted) == []
    node.tell(p.ReturnLease(first.lease_id), ME)
    assert len(node.take(p.LeaseGranted, THIRD)) == 1
    node.state.validate()


def test_death_of_a_leased_worker():
    node = Node()
    [lease] = node.lease()
    node.tell(p.ProcessStarted(p.ProcessKind.DRIVER, b"d", 5, 0), ME)
    node.sent.clear()
    node.exit(lease.worker, 9)
    assert node.state.pool.available == node.state.pool.total
    [revoked] = node.take(p.LeaseRevoked, ME)
    assert (revoked.lease_id, revoked.cause.text) == (lease.lease_id, "killed by SIGKILL")
    [(_, local), (_, remote)] = [(d, m) for d, m in node.sent if isinstance(m, p.ProcessDied)]
    assert local == remote
    assert [type(a) for a in node.actions if isinstance(a, (e.MarkDead, e.Reclaim))] == [e.MarkDead, e.Reclaim]


def test_an_orderly_exit_is_no_crash():
    node = Node()
    [lease] = node.lease()
    node.tell(p.ProcessLeaving("exit_actor"), lease.worker)
    node.exit(lease.worker, 0)
    assert node.take(p.LeaseRevoked)[0].cause.kind == "EXITED"


def test_an_owner_that_dies_takes_its_workers_along():
    node = Node({"CPU": 1})
    node.tell(p.ProcessStarted(p.ProcessKind.DRIVER, b"d", 5, 0), ME)
    [lease] = node.lease(ME, count=2)
    node.tell(p.ProcessExited(5, 9, p.ProcessKind.DRIVER, ME), 0)
    assert [m.signal for m in node.asked if isinstance(m, p.KillProcess)] == [9]
    assert node.state.pool.available["CPU"] == 0
    assert node.lease(OTHER) == []
    node.exit(lease.worker)
    assert len(node.take(p.LeaseGranted, OTHER)) == 1
    assert node.take(p.LeaseRevoked) == []


def test_retired_worker_keeps_its_resources_until_it_is_gone():
    node = Node({"CPU": 1})
    [lease] = node.lease()
    node.tell(p.ReturnLease(lease.lease_id, False), ME)
    assert len(node.take(p.Shutdown, lease.worker)) == 1
    assert node.state.pool.available["CPU"] == 0
    node.pass_time(3)
    assert isinstance(node.asked[-1], p.KillProcess)
    node.exit(lease.worker, 9)
    assert node.state.pool.available["CPU"] == UNIT


def test_spillback_to_a_node_with_room():
    node = Node({"CPU": 1})
    node.lease()
    node.see(1, 4)
    node.tell(p.RequestLease(2, shape(), 2), ME)
    assert [(m.node, m.count) for m in node.take(p.LeaseRedirected)] == [(1, 2)]


def test_redirected_requests_stay():
    """LEASE-4"""
    node = Node({"CPU": 1})
    node.lease()
    node.see(1, 4)
    node.lease(OTHER, redirected=True)
    assert node.take(p.LeaseRedirected) == []
    node.lease(THIRD, redirected=True, resources={"CPU": 3 * UNIT})
    assert [m.node for m in node.take(p.LeaseRedirected)] == [1]


def test_redirected_requests_move_once_they_have_waited():
    """LEASE-4: as many of them as there is room for, and no sooner."""
    node = Node({"CPU": 1})
    node.lease()
    node.see(1, 4, free=0)
    node.lease(OTHER, count=3, redirected=True)
    node.see(1, 4, free=2)
    assert node.take(p.LeaseRedirected) == []
    node.pass_time(0.3)
    assert [(m.node, m.count) for m in node.take(p.LeaseRedirected, OTHER)] == [(1, 2)]
    node.see(1, 4, free=0)
    node.pass_time(1)
    assert node.take(p.LeaseRedirected) == []
    node.state.validate()


def test_waiting_requests_go_where_room_appears():
    node = Node({"CPU": 1})
    node.lease()
    node.see(1, 4, free=0)
    assert node.lease(OTHER) == []
    node.see(1, 4, free=1)
    assert [m.node for m in node.take(p.LeaseRedirected, OTHER)] == [1]


def test_affinity():
    node = Node()
    node.see(1, 4)
    there = p.Strategy("NODE", bytes([1]) * 28)
    node.lease(strategy=there)
    assert [m.node for m in node.take(p.LeaseRedirected)] == [1]
    node.tell(p.NodeDied(1, bytes([1]) * 28, "gone"), GCS_ADDRESS)
    node.lease(number=2, strategy=there)
    [refusal] = node.take(p.LeaseRefused)
    assert refusal.reason == p.LeaseRefusal.UNSCHEDULABLE
    node.lease(number=3, strategy=p.Strategy("NODE", bytes([9]) * 28))
    assert node.take(p.LeaseRefused) == []
    node.pass_time(1)
    assert "does not exist" in node.take(p.LeaseRefused)[0].text
    assert len(node.lease(number=4, strategy=p.Strategy("NODE", bytes([9]) * 28, True))) == 1


def test_infeasible_requests_wait_and_warn_once():
    node = Node()
    node.lease(resources={"GPU": UNIT})
    node.pass_time(10)
    [warning] = node.take(p.LogLines, ME)
    assert "GPU: 1" in warning.lines[0]
    assert "CPU: 2" in warning.lines[0]


def test_who_waits_for_a_placement_group_is_not_warned():
    """The group may have room soon; and where it never will, whoever made it is warned."""
    node = Node()
    node.lease(resources={f"bundle_group_{GROUP.hex()}": UNIT}, group_id=GROUP)
    node.pass_time(10)
    assert node.take(p.LogLines, ME) == []


def test_workers_that_die_while_they_start():
    node = Node()
    node.auto = False
    node.lease(ME)
    node.lease(OTHER, runtime_env="{}")
    for _ in range(3):
        plain = [m.token for m in node.asked if isinstance(m, p.StartWorker) and not m.runtime_env]
        node.asked = [m for m in node.asked if not (isinstance(m, p.StartWorker) and not m.runtime_env)]
        for token in plain[:1]:
            node.tell(p.WorkerForked(token, 77), 0)
            node.tell(p.ProcessExited(77, 256), 0)
    [refusal] = node.take(p.LeaseRefused, ME)
    assert "exit code 1" in refusal.text
    token = next(m.token for m in node.asked if isinstance(m, p.StartWorker))
    node.tell(p.WorkerForked(token, 0, "no such package"), 0)
    assert [m.text for m in node.take(p.LeaseRefused, OTHER)] == ["no such package"]
    node.state.validate()


def test_surplus_idle_workers_end():
    node = Node({"CPU": 1}, idle_worker_s=1.0)
    leases = []
    for number in range(3):
        leases += node.lease(number=number)
        node.tell(p.WorkerBlocked(), leases[-1].worker)
    for lease in leases:
        node.tell(p.ReturnLease(lease.lease_id), ME)
    node.pass_time(2)
    states = [worker.state for worker in node.state.workers.values()]
    assert states.count(WorkerState.ENDING) == 2


def test_a_worker_that_owns_what_others_use_stays():
    """WORKER-4: without resources, until it leaves by itself, or its job is over."""
    node = Node({"CPU": 1}, kill_on_exit_s=1.0)
    workers = []
    for number in range(2):
        [lease] = node.lease(number=number)
        node.tell(p.StayingOn(), lease.worker)
        node.tell(p.ReturnLease(lease.lease_id, False), ME)
        assert [m.unless_used for m in node.take(p.Shutdown, lease.worker)] == [True]
        assert node.state.pool.available["CPU"] == UNIT
        workers.append(lease.worker)
    node.pass_time(10)
    assert not any(isinstance(m, p.KillProcess) for m in node.asked)
    node.tell(p.ProcessLeaving("max_calls"), workers[0])
    node.exit(workers[0], 0)
    assert [m.cause.kind for m in node.take(p.ProcessDied, GCS_ADDRESS)] == ["EXITED"]
    node.tell(p.JobFinished(JOB), GCS_ADDRESS)
    assert [m.unless_used for m in node.take(p.Shutdown, workers[1])] == [False]
    node.pass_time(2)
    assert any(isinstance(m, p.KillProcess) for m in node.asked)
    node.state.validate()


def drained(node, request_id, handles=()):
    """What the node answers to DrainNode, with these objects in its arena; None: nothing yet."""
    node.actions.clear()
    node.tell(p.DrainNode(request_id, "idle"), OTHER)
    if any(isinstance(action, e.ListObjects) for action in node.actions):
        node.tell(e.ObjectsListed(list(handles)), 0)
    return next((m.value for m in node.take(p.Answer, OTHER) if m.request_id == request_id), None)


def drainable() -> Node:
    return Node({"CPU": 1}, node=1, prestart_workers=1)


def test_a_node_that_is_needed_does_not_leave():
    """DRAIN-2: it says for what, and goes on."""
    assert drained(Node(), 1) == "it is the head"
    node = drainable()
    [lease] = node.lease()
    assert drained(node, 2) == "it has 1 tasks or actors"
    node.lease(OTHER)
    node.tell(p.ReturnLease(lease.lease_id), ME)
    [other] = node.take(p.LeaseGranted, OTHER)
    node.tell(p.ReturnLease(other.lease_id), OTHER)
    assert drained(node, 3, [77]) == "it has 1 objects in use"
    assert drained(node, 4) is None, "its worker has not gone"
    worker = next(iter(node.state.by_address))
    assert [m.unless_used for m in node.take(p.Shutdown, worker)] == [True]
    node.tell(p.StayingOn(), worker)
    assert [m.value for m in node.take(p.Answer)] == ["it has 1 workers that own objects in use"]
    assert len(node.lease(number=5)) == 1, "it goes on with another worker"
    node.state.validate()


def test_an_idle_node_leaves():
    """DRAIN-1; what comes meanwhile is not granted."""
    node = drainable()
    worker = next(iter(node.state.by_address))
    assert drained(node, 1) is None
    node.exit(worker, 0)
    assert [m.value for m in node.take(p.Answer)] == [""]
    assert [m.reason for m in node.asked if isinstance(m, p.Shutdown)] == ["idle"]
    assert node.lease() == []
    assert drained(node, 2) == "it ends already"


def test_actor_start_ready_stop():
    node = Node()
    node.tell(p.StartActor(0, actor(resources={"CPU": UNIT})), GCS_ADDRESS)
    [starting] = node.take(p.ActorStarting)
    [install] = node.take(p.InstallActor, starting.address)
    assert install.attempt == starting.attempt == 0
    assert node.state.pool.available["CPU"] == UNIT
    node.tell(p.StopActor(b"\1" * 16, 0, False, "out of scope"), GCS_ADDRESS)
    assert len(node.take(p.TerminateActor, starting.address)) == 1
    node.tell(p.StopActor(b"\1" * 16, 0, True, "killed"), GCS_ADDRESS)
    node.exit(starting.address)
    assert [m.cause.kind for m in node.take(p.ProcessDied, GCS_ADDRESS)] == ["KILLED"]
    assert node.state.pool.available["CPU"] == 2 * UNIT


def test_actor_keeps_its_cpus_while_it_waits():
    node = Node({"CPU": 1})
    node.tell(p.StartActor(0, actor(resources={"CPU": UNIT})), GCS_ADDRESS)
    node.tell(p.WorkerBlocked(), node.take(p.ActorStarting)[0].address)
    assert node.lease(OTHER) == []


def test_actor_waits_for_its_placement_and_uses_less():
    node = Node({"CPU": 1})
    [lease] = node.lease()
    node.tell(p.StartActor(0, actor()), GCS_ADDRESS)
    assert node.take(p.ActorStarting) == []
    assert len(node.take(p.LeaseContended, ME)) == 1
    node.tell(p.ReturnLease(lease.lease_id), ME)
    assert len(node.take(p.ActorStarting)) == 1
    assert node.state.pool.available["CPU"] == UNIT


def test_actor_that_cannot_be_here_is_sent_back():
    node = Node()
    node.tell(p.StartActor(3, actor(placement={"GPU": UNIT})), GCS_ADDRESS)
    assert node.take(p.ActorRejected) == [p.ActorRejected(b"\1" * 16, 3)]


def test_waiting_actor_is_dropped_when_stopped():
    node = Node({"CPU": 1})
    node.lease()
    node.tell(p.StartActor(0, actor()), GCS_ADDRESS)
    node.tell(p.StopActor(b"\1" * 16, 0, True, "killed"), GCS_ADDRESS)
    assert node.state.requests == {}
    node.state.validate()


def test_gpu_numbers_are_told():
    node = Node({"CPU": 2, "GPU": 2})
    [lease] = node.lease(resources={"GPU": UNIT})
    assert lease.instances == {"GPU": [[0, UNIT]]}
    node.tell(p.StartActor(0, actor(resources={"GPU": UNIT // 2})), GCS_ADDRESS)
    assert node.take(p.InstallActor)[0].instances == {"GPU": [[1, UNIT // 2]]}


# ------------------------------------------------------------------ placement groups


def commit(node, bundles, attempt=1):
    node.tell(p.PrepareBundles(GROUP, attempt, bundles), GCS_ADDRESS)
    [answer] = node.take(p.BundlesPrepared)
    if answer.ok:
        node.tell(p.CommitBundles(GROUP, attempt), GCS_ADDRESS)
    return answer.ok


def inside(index=0):
    names = {f"CPU_group_{index}_{GROUP.hex()}": UNIT, f"CPU_group_{GROUP.hex()}": UNIT}
    return {"resources": names, "group_id": GROUP, "bundle": index}


@pytest.mark.parametrize("order", [(0, 1, -1), (-1, 1, 0), (-1, -1, 1)])
def test_a_bundle_and_its_group_are_one_room(order):
    """RES-5"""
    node = Node({"CPU": 2})
    commit(node, {0: {"CPU": UNIT}, 1: {"CPU": UNIT}})
    granted = []
    for number, index in enumerate(order):
        names = in_bundle({"CPU": UNIT}, GROUP, index)
        granted.append(node.lease(number=number, resources=names, group_id=GROUP, bundle=index))
    assert [len(leases) for leases in granted] == [1, 1, 0]
    node.state.validate()


def test_bundles_all_or_nothing():
    """BUNDLE-2"""
    node = Node({"CPU": 2})
    assert not commit(node, {0: {"CPU": UNIT}, 1: {"CPU": 2 * UNIT}})
    assert node.state.pool.available == node.state.pool.total
    assert commit(node, {0: {"CPU": UNIT}, 1: {"CPU": UNIT}})
    assert node.state.pool.available["CPU"] == 0
    assert node.state.pool.total[f"CPU_group_{GROUP.hex()}"] == 2 * UNIT


def test_who_asks_hears_which_accelerators_a_bundle_has():
    node = Node({"GPU": 3})
    commit(node, {4: {"GPU": UNIT}, 7: {"GPU": 2 * UNIT}})
    assert node.state.query_bundle_instances(GROUP) == {"4": {"GPU": [[0, UNIT]]}, "7": {"GPU": [[1, UNIT], [2, UNIT]]}}
    assert node.state.query_bundle_instances(b"o" * 18) == {}


def test_names_work_after_the_commit_only():
    """BUNDLE-1"""
    node = Node({"CPU": 1})
    node.tell(p.PrepareBundles(GROUP, 1, {0: {"CPU": UNIT}}), GCS_ADDRESS)
    assert node.lease(**inside()) == []
    node.tell(p.CommitBundles(GROUP, 1), GCS_ADDRESS)
    assert len(node.take(p.LeaseGranted, ME)) == 1


def test_release_of_an_attempt_leaves_the_others():
    node = Node({"CPU": 2})
    commit(node, {0: {"CPU": UNIT}}, attempt=1)
    node.tell(p.PrepareBundles(GROUP, 2, {1: {"CPU": UNIT}}), GCS_ADDRESS)
    node.tell(p.ReleaseBundles(GROUP, 2, False), GCS_ADDRESS)
    assert list(node.state.bundles) == [(GROUP, 0)]
    assert node.state.pool.available["CPU"] == UNIT


def test_release_kills_and_gives_back_when_all_are_gone():
    """BUNDLE-3"""
    node = Node({"CPU": 2})
    commit(node, {0: {"CPU": UNIT}})
    [lease] = node.lease(**inside())
    node.lease(OTHER, **inside())
    node.tell(p.ReleaseBundles(GROUP, -1), GCS_ADDRESS)
    assert [m.reason for m in node.take(p.LeaseRefused, OTHER)] == [p.LeaseRefusal.GROUP_REMOVED]
    assert node.state.pool.available["CPU"] == UNIT
    node.exit(lease.worker)
    assert node.take(p.LeaseRevoked)[0].cause.kind == "GROUP_REMOVED"
    assert node.state.pool.available == node.state.pool.total == {"CPU": 2 * UNIT}
    node.lease(THIRD, **inside())
    assert len(node.take(p.LeaseRefused, THIRD)) == 1


# ------------------------------------------------------------------ objects


def test_pull_is_done_once_and_announced():
    """COPY-1"""
    node = Node()
    node.see(1, 4)
    object_id = IdMinter(address_of(1, 20, 1), JOB).put_id()
    for asker in (ME, OTHER):
        node.tell(p.PullObject(object_id, 10, [[1, 7]]), asker)
    [allocate] = [a for a in node.actions if isinstance(a, e.AllocateCopy)]
    node.tell(e.CopyAllocated(allocate.transfer_id, 55), 0)
    [transfer] = node.take(p.TransferObject, address_of(0, LINK_LANE))
    assert (transfer.source_node, transfer.source_handle, transfer.handle) == (1, 7, 55)
    node.tell(p.TransferDone(transfer.transfer_id), address_of(0, LINK_LANE, 1))
    assert node.take(p.ObjectLocal) == [p.ObjectLocal(object_id, 55)] * 2
    assert node.take(p.AddPlace, address_of(1, 20, 1)) == [p.AddPlace(object_id, 0, 55)]
    node.tell(p.PullObject(object_id, 10, [[1, 7]]), THIRD)
    node.tell(e.CopyFound(object_id, 55, True), 0)
    assert node.take(p.ObjectLocal, THIRD) == [p.ObjectLocal(object_id, 55)]


def test_an_owner_that_waits_is_told_once():
    node = Node()
    node.see(1, 4)
    object_id = IdMinter(ME, JOB).put_id()
    for asker in (ME, OTHER):
        node.tell(p.PullObject(object_id, 10, [[1, 7]]), asker)
    node.tell(e.CopyAllocated(1, 55), 0)
    node.tell(p.TransferDone(1), address_of(0, LINK_LANE, 1))
    assert node.take(p.ObjectLocal) == [p.ObjectLocal(object_id, 55)] * 2
    assert node.take(p.AddPlace) == []


def test_failed_transfer_tries_the_next_place_then_says_so():
    """COPY-2, COPY-3"""
    node = Node()
    object_id = b"o" * 28
    node.tell(p.PullObject(object_id, 10, [[1, 7], [2, 8]]), ME)
    node.tell(e.CopyAllocated(1, 55), 0)
    node.tell(p.TransferDone(1, "gone"), 1)
    node.tell(p.TransferDone(1, "gone once more"), 1)  # late: nobody's
    node.tell(p.TransferDone(2, "gone too"), 1)
    assert [t.source_node for t in node.take(p.TransferObject)] == [1, 2]
    assert node.take(p.PullFailed) == [p.PullFailed(object_id, 2, "gone too")]
    assert isinstance(node.actions[-2], e.AbortCopy) or isinstance(node.actions[-1], e.AbortCopy)


def test_a_large_object_is_given_to_few_at_once_and_others_are_sent_on():
    """COPY-4"""
    node = Node()
    for other in range(1, 9):
        node.see(other, 4)
        node.tell(p.RequestCopy(100 + other, b"o" * 28, 7), raylet_address(other))
    assert node.take(p.CopyOffered) == [p.CopyOffered(100 + other, 0, 7) for other in (1, 2)]
    node.tell(p.CopyEnded(b"o" * 28, 99), raylet_address(1))
    sent_on = [m for m in node.take(p.CopyOffered) if m.node == 1]
    assert {(m.transfer_id, m.handle) for m in sent_on} == {(106, 99), (107, 99), (108, 99)}
    node.tell(p.NodeDied(2, b"", "lost"), GCS_ADDRESS)
    node.tell(p.CopyEnded(b"o" * 28, 0), raylet_address(3))
    assert node.take(p.CopyOffered) == [p.CopyOffered(104, 0, 7), p.CopyOffered(105, 0, 7)]
    for other in (4, 5):
        node.tell(p.CopyEnded(b"o" * 28, 0), raylet_address(other))
    assert not node.state.givings


def test_own_copy_is_found_at_once():
    node = Node()
    node.tell(p.PullObject(b"o" * 28, 10, [[0, 9]]), ME)
    node.tell(e.CopyFound(b"o" * 28, 9, True), 0)
    assert node.take(p.ObjectLocal) == [p.ObjectLocal(b"o" * 28, 9)]
    node.tell(p.PullObject(b"q" * 28, 10, [[0, 9]]), ME)
    node.tell(e.CopyFound(b"q" * 28, 9, False), 0)
    assert len(node.take(p.PullFailed)) == 1


def spills(node):
    """The SpillObjects since the last look, as (total, largest)."""
    found = [a for a in node.actions if isinstance(a, e.SpillObjects)]
    node.actions = [a for a in node.actions if not isinstance(a, e.SpillObjects)]
    return [(action.total, action.largest) for action in found]


def test_room_is_made_for_all_who_ask_one_spill_at_a_time():
    """ROOM-1, ROOM-2"""
    node = Node()
    node.tell(p.ArenaFullNotice(1, 300), ME)
    node.tell(p.ArenaFullNotice(2, 350), OTHER)
    node.tell(p.ArenaFullNotice(3, 400), ME)
    assert spills(node) == [(300, 300)]
    node.tell(e.ObjectsSpilled(500, 320), 0)
    assert node.take(p.ArenaRoom) == [p.ArenaRoom(1)]
    assert spills(node) == [(750, 400)]
    node.tell(e.ObjectsSpilled(300, 370), 0)
    assert node.take(p.ArenaRoom, OTHER) == [p.ArenaRoom(2)]
    assert node.take(p.ArenaRoom, ME) == [p.ArenaRoom(3, on_disk=True)]  # ROOM-3: the rest is in use
    assert spills(node) == [] and not node.state.wanting and not node.state.served


def test_what_is_larger_than_the_store_goes_to_a_file_at_once():
    node = Node()
    node.tell(p.ArenaFullNotice(1, node.state.arena_bytes + 1), ME)
    assert node.take(p.ArenaRoom) == [p.ArenaRoom(1, on_disk=True)] and spills(node) == []


def test_a_full_disk_is_told_to_those_who_got_no_room():
    node = Node()
    node.tell(p.ArenaFullNotice(1, 300), ME)
    node.tell(e.ObjectsSpilled(100, 200, "the disk is full", "OutOfDiskError"), 0)
    assert node.take(p.ArenaRoom) == [p.ArenaRoom(1, "the disk is full", "OutOfDiskError", True)]
    node.tell(p.ArenaFullNotice(2, 150), ME)
    node.tell(e.ObjectsSpilled(0, 200, "the disk is full", "OutOfDiskError"), 0)
    assert node.take(p.ArenaRoom) == [p.ArenaRoom(2)]


def test_who_died_waits_for_room_no_more():
    node = Node()
    node.tell(p.ArenaFullNotice(1, 300), ME)
    node.tell(p.ArenaFullNotice(2, 350), OTHER)
    node.state.forget_asker(OTHER)
    node.tell(e.ObjectsSpilled(300, 300), 0)
    assert len(spills(node)) == 1 and [m.request_id for m in node.take(p.ArenaRoom)] == [1]


def test_a_pull_without_room_spills_then_goes_to_a_file():
    node = Node()
    node.see(1, 4)
    object_id = b"o" * 28
    node.tell(p.PullObject(object_id, 10, [[1, 7]]), ME)
    for _ in range(3):  # others are faster each time
        node.tell(e.CopyAllocated(1, 0), 0)
        assert spills(node) == [(10, 10)]
        node.tell(e.ObjectsSpilled(10, 10), 0)
    node.tell(e.CopyAllocated(1, 0), 0)
    assert [a.on_disk for a in node.actions if isinstance(a, e.AllocateCopy)] == [False] * 4 + [True]
    node.tell(e.CopyAllocated(1, 55), 0)
    assert [t.handle for t in node.take(p.TransferObject)] == [55]
    other = b"q" * 28
    node.tell(p.PullObject(other, 10, [[1, 8]]), ME)
    node.tell(e.CopyAllocated(2, 0, "the disk is full"), 0)
    assert node.take(p.PullFailed) == [p.PullFailed(other, 0, "the disk is full")]


def test_orphans_go_to_their_owners():
    node = Node()
    away = address_of(3, 17, 1)
    node.tell(e.Reclaimed(ME, [(b"a" * 28, 1, away), (b"b" * 28, 2, ME), (b"c" * 28, 3, OTHER)]), 0)
    assert node.take(p.OrphanedObject, away) == [p.OrphanedObject(b"a" * 28, 1)]
    assert [a.handle for a in node.actions if isinstance(a, e.DeleteObject)] == [2, 3]


# ------------------------------------------------------------------ the rest


def test_reports_are_rate_limited():
    """RAYLET-2"""
    node = Node({"CPU": 4})
    node.take(p.ReportResources)
    node.pass_time(1)
    for number in range(4):
        node.lease(number=number)
    assert len(node.take(p.ReportResources)) == 1
    node.pass_time(0.2)
    [report] = node.take(p.ReportResources)
    assert report.available["CPU"] == 0


def test_shutdown_waits_for_workers():
    """RAYLET-3"""
    node = Node()
    [lease] = node.lease()
    node.tell(p.Shutdown("enough"), GCS_ADDRESS)
    assert len(node.take(p.Shutdown, lease.worker)) == 1
    assert node.lease(OTHER) == []
    node.pass_time(2.5)
    assert isinstance(node.asked[-1], p.KillProcess)
    node.exit(lease.worker)
    assert node.actions[-1] == Exit(0, "all workers have ended") or any(isinstance(a, Exit) for a in node.actions)


def test_wrong_version_is_turned_away():
    node = Node()
    node.tell(p.ProcessStarted(p.ProcessKind.DRIVER, b"d", 5, 0, version=99), ME)
    assert "version 99" in node.take(p.Welcome, ME)[0].refusal


def test_questions():
    node = Node()
    node.lease()
    for number, name in enumerate(("workers", "leases", "statistics", "nothing")):
        node.tell(p.Query(number, name, {}), ME)
    *good, bad = node.take(p.Answer)
    for answer in good:
        assert p.decode(p.encode(answer)) == answer
    assert "it has" in bad.error


def test_peers_hear_of_remote_deaths():
    node = Node()
    node.tell(p.ProcessStarted(p.ProcessKind.DRIVER, b"d", 5, 0), ME)
    away = address_of(1, 30, 1)
    [lease] = node.lease(away, redirected=True)
    node.sent.clear()
    notice = p.ProcessDied(away, b"", 3, 0, p.DeathCause("CRASHED"))
    node.tell(notice, GCS_ADDRESS)
    assert (ME, notice) in node.sent
    assert node.asked[-1] == p.KillProcess(node.state.by_address[lease.worker].pid, 9)
    assert node.lease(away, number=9) == []  # MACHINE-4


def test_logs_are_followed_on_all_nodes():
    node = Node()
    node.see(1, 4)
    node.tell(p.ProcessStarted(p.ProcessKind.DRIVER, b"d", 5, 0), ME)
    follow = p.FollowLogs(ME, JOB, True)
    node.tell(follow, ME)
    assert node.take(p.FollowLogs, raylet_address(1)) == [follow]
    node.see(2, 4)
    assert node.take(p.FollowLogs, raylet_address(2)) == [follow]
    node.tell(p.ProcessExited(5, 0, p.ProcessKind.DRIVER, ME), 0)
    assert node.asked[-1] == p.FollowLogs(ME, JOB, False)


# ------------------------------------------------------------------ any sequence

OWNERS = [ME, OTHER, address_of(1, 30, 1)]
steps = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 4), st.sampled_from([0, UNIT, 2 * UNIT]),
              st.sampled_from(["", "{}"]), st.booleans()),
    st.tuples(st.just("resize"), st.integers(0, 2), st.integers(0, 9), st.integers(0, 2)),
    st.tuples(st.just("return"), st.integers(0, 9), st.booleans()),
    st.tuples(st.sampled_from(["block", "unblock", "die"]), st.integers(0, 9)),
    st.tuples(st.just("actor"), st.integers(1, 3), st.sampled_from([0, UNIT])),
    st.tuples(st.just("stop"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("prepare"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["commit", "release"]), st.integers(-1, 3)),
    st.tuples(st.just("owner dies"), st.just(2)),
    st.tuples(st.just("view"), st.integers(0, 4)),
    st.tuples(st.just("time"), st.sampled_from([0.01, 1.0, 100.0])),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=40))
def test_any_sequence_keeps_the_invariants_and_replays(sequence):
    """RES-1, LEASE-2, WORKER-1, MACHINE-2."""
    node = Node({"CPU": 2, "GPU": 1})
    state = node.state
    numbers = iter(range(1000))
    for what, *rest in sequence:
        living = sorted(state.by_address)
        if what == "ask":
            owner, count, cpus, env, redirected = rest
            node.lease(OWNERS[owner], count, next(numbers), redirected, resources={"CPU": cpus}, runtime_env=env)
        elif what == "resize":
            node.tell(p.ResizeLeaseRequest(rest[1], rest[2]), OWNERS[rest[0]])
        elif what == "return" and state.leases:
            lease = list(state.leases.values())[rest[0] % len(state.leases)]
            node.tell(p.ReturnLease(lease.lease_id, rest[1]), lease.owner)
        elif what in ("block", "unblock", "die") and living:
            address = living[rest[0] % len(living)]
            if what == "die":
                node.exit(address)
            else:
                node.tell(p.WorkerBlocked() if what == "block" else p.WorkerUnblocked(), address)
        elif what == "actor" and bytes([rest[0]]) * 16 not in state.actors | state.waiting_actors:
            node.tell(p.StartActor(0, actor(rest[0], {"CPU": rest[1]})), GCS_ADDRESS)
        elif what == "stop":
            node.tell(p.StopActor(bytes([rest[0]]) * 16, 0, rest[1], "test"), GCS_ADDRESS)
        elif what == "prepare":
            node.tell(p.PrepareBundles(GROUP, rest[0], {rest[0]: {"CPU": UNIT}}), GCS_ADDRESS)
        elif what == "commit":
            node.tell(p.CommitBundles(GROUP, rest[0]), GCS_ADDRESS)
        elif what == "release":
            node.tell(p.ReleaseBundles(GROUP, rest[0]), GCS_ADDRESS)
        elif what == "owner dies":
            node.tell(p.ProcessDied(OWNERS[2], b"", 1, 0, p.DeathCause("CRASHED")), GCS_ADDRESS)
        elif what == "view":
            node.see(1, 4, free=rest[0])
        elif what == "time":
            node.pass_time(rest[0])
        state.validate()
    again = RayletState(state.config)
    again.replay_log(state.log)
    assert again.snapshot() == state.snapshot()


# ------------------------------------------------------------------ what is remembered


def test_left_histories_are_bounded():
    node = Node()
    for number in range(4):
        node.tell(p.LeaveHistory(MAX_LEFT_ROWS // 2, bytes([number])), ME)
    assert node.state.query_left_histories() == [b"\2", b"\3"]
    node.tell(p.LeaveHistory(2 * MAX_LEFT_ROWS, b"large"), ME)
    assert node.state.query_left_histories() == [b"large"]  # the latest stays, however large
    node.tell(p.LeaveHistory(1, b"next"), ME)
    assert node.state.query_left_histories() == [b"next"]


def test_dead_workers_are_remembered():
    node = Node()
    (lease,) = node.lease()
    node.pass_time(2.0)
    node.exit(lease.worker)
    node.pass_time(3.0)
    node.tell(p.Query(1, "dead_workers", {}), ME)
    (row,) = node.take(p.Answer, ME)[0].value
    assert (row["address"], row["pid"], row["kind"], row["cause"]) == (lease.worker, lease.pid, "WORKER", "CRASHED")
    assert (row["started_s"], row["died_s"]) == (5.0, 3.0)
    assert lease.worker not in [row["address"] for row in node.state.query_workers()]


def test_a_worker_hands_over_only_while_the_session_goes_on():
    node = Node()
    (lease,) = node.lease()
    node.tell(p.ReturnLease(lease.lease_id), ME)
    node.tell(p.JobFinished(JOB, ME), GCS_ADDRESS)
    assert [message.keep_history for message in node.take(p.Shutdown, lease.worker)] == [True]
    node = Node()
    (lease,) = node.lease()
    node.tell(p.Shutdown("over"), GCS_ADDRESS)
    assert [message.keep_history for message in node.take(p.Shutdown, lease.worker)] == [False]


def test_questions_about_logs_are_the_servers():
    node = Node()
    query = p.Query(7, "read_log", {"filename": "gcs.log"})
    node.tell(query, ME)
    assert node.actions[-1] == e.AnswerFromLogs(ME, query)


def test_log_folder(tmp_path):
    folder = LogFolder(str(tmp_path))
    (tmp_path / "a.out").write_bytes(b"1\n2\n3\n")
    (tmp_path / "b.err").write_bytes(b"x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert folder.list_logs("*.out") == ["a.out"] and "b.err" in folder.list_logs()
    assert folder.read_log("a.out") == (b"1\n2\n3\n", 6)
    assert folder.read_log("a.out", offset=4) == (b"3\n", 6)
    for tail, expected in ((0, b""), (1, b"3\n"), (2, b"2\n3\n"), (9, b"1\n2\n3\n")):
        assert folder.read_log("a.out", tail=tail) == (expected, 6)
    assert folder.read_log("b.err", tail=1) == (b"x", 1)
    for name in ("c.out", "../a.out", "/etc/passwd", "link", "."):
        with pytest.raises(ValueError, match="no log file"):
            folder.read_log(name)

"""Who may use which worker: requests, grants, spillback, contention, actors. The part of ``RayletState`` for that.

A request waits in the queue of its shape (with its job, strategy and environment); an actor to be made is a request
whose owner is the GCS. A queue serves its owners in turn, and a queue that cannot go on never holds up another one.

LEASE-1 (answered): each unit of a request is answered once: granted, redirected, refused, or taken back by its owner.
LEASE-2 (held together): a lease has its grant of resources and its worker until it is closed; after a return or the
worker's reaping, both are free. A worker has at most one lease.
LEASE-3 (fair): among the owners waiting for one shape, none gets two units while another waits for its first.
LEASE-4 (redirected rarely): a redirected request, which this node's total could meet, is redirected again only to a node that has room
now, and only after it has waited here for MOVE_S.
LEASE-5 (episodes): while there is waiting, a holder hears LeaseContended once after each lease that it was granted.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_ray.ids import GCS_ADDRESS, node_of
from hpc_ray.machine import handles
from hpc_ray.protocol import (
    ActorRejected,
    ActorSpec,
    ActorStarting,
    DeathCause,
    InstallActor,
    JobFinished,
    LeaseContended,
    LeaseGranted,
    LeaseRedirected,
    LeaseRefusal,
    LeaseRefused,
    LeaseRevoked,
    LogLines,
    RequestLease,
    ResizeLeaseRequest,
    Resources,
    ReturnLease,
    Shape,
    StartActor,
    StopActor,
    TerminateActor,
    WorkerBlocked,
    WorkerUnblocked,
)
from hpc_ray.raylet.part import Part
from hpc_ray.raylet.resources import Grant
from hpc_ray.raylet.workers import Worker, WorkerState
from hpc_ray.scheduling import (
    ANYWHERE,
    INFEASIBLE_S,
    PACK_UNTIL,
    Choice,
    Search,
    Verdict,
    choose,
    infeasible,
    matches,
    readable,
    utilisation,
)

MOVE_S = 0.2  # the other node may have no room any more, and then it waits there
UNKNOWN_NODE_S = 0.5  # how long a node that nobody has heard of may still turn up
TAKE_S = 0.3  # for so long a node counts as using what was just sent to it
_WAIT, _REFUSED, _ELSEWHERE = -1, -2, -3  # answers of _place that are no node

_canonical = msgspec.msgpack.Encoder(order="sorted").encode


class Request:
    """Units of one shape that one owner still waits for."""

    __slots__ = ("actor", "attempt", "count", "owner", "request_id", "since", "warned")

    def __init__(self, owner: int, request_id: int, count: int, now: float):
        self.owner = owner
        self.request_id = request_id
        self.count = count
        self.since = now
        self.warned = False
        self.actor: ActorSpec | None = None  # the request is for this actor
        self.attempt = 0


class Queue:
    """All requests of one shape. Owners in turn (LEASE-3), requests of an owner in order."""

    def __init__(self, key: bytes, shape: Shape, placement: Resources, redirected: bool, for_actor: bool):
        self.key = key
        self.shape = shape
        self.placement = placement  # what must be free
        self.demand = shape.resources  # what is taken; less than placement for most actors
        self.redirected = redirected
        self.for_actor = for_actor
        self.owners: dict[int, dict[int, Request]] = {}
        self.blocked = False  # waits for resources that others have, as of the last pass
        self.search = Search()
        self.stuck_view = -1  # version of the view in which no other node had room either

    def add(self, request: Request) -> None:
        self.owners.setdefault(request.owner, {})[request.request_id] = request

    def head(self) -> Request | None:
        for requests in self.owners.values():
            for request in requests.values():
                return request
        return None

    def units(self) -> int:
        return sum(request.count for requests in self.owners.values() for request in requests.values())

    def served(self, request: Request) -> None:
        """One unit is answered; the next owner is next."""
        request.count -= 1
        requests = self.owners.pop(request.owner)
        if request.count <= 0:
            del requests[request.request_id]
        if requests:
            self.owners[request.owner] = requests

    def drop(self, request: Request) -> None:
        requests = self.owners[request.owner]
        del requests[request.request_id]
        if not requests:
            del self.owners[request.owner]


class Lease:
    """A worker in use."""

    __slots__ = ("actor_id", "attempt", "grant", "key", "lease_id", "owner", "returned", "shape", "since", "worker")

    def __init__(self, lease_id: int, owner: int, queue: Queue, worker: Worker, grant: Grant, now: float):
        self.lease_id = lease_id
        self.owner = owner
        self.key = queue.key
        self.shape = queue.shape
        self.worker = worker
        self.grant = grant
        self.since = now
        self.returned = False  # the owner has let go; it lives until its worker is reaped
        self.actor_id = b""
        self.attempt = 0


class Leases(Part):
    """See the module's text."""

    def init_leases(self) -> None:
        self.queues: dict[bytes, Queue] = {}
        self.requests: dict[tuple[int, int], Queue] = {}  # (owner, request id) → where it waits
        self.leases: dict[int, Lease] = {}
        self.actors: dict[bytes, Lease] = {}
        self.waiting_actors: dict[bytes, Request] = {}
        self.removed_groups: dict[bytes, None] = {}
        self._told: set[int] = set()  # holders that heard LeaseContended in this episode (LEASE-5)
        self._next_lease = 1
        self._next_actor_request = -1
        self._turn = self.node
        self._taken: set[int] = set()  # nodes of whose room something was taken

    # -- requests

    @handles(RequestLease)
    def on_request_lease(self, event: RequestLease, source: int) -> None:
        if event.shape.group_id in self.removed_groups and event.shape.group_id:
            self.send(source, _group_removed(event.request_id))
            return
        if event.count <= 0:
            return
        known = self.requests.get((source, event.request_id))
        if known is not None:  # the same owner asks for more under the same number
            known.owners[source][event.request_id].count += event.count
        else:
            request = Request(source, event.request_id, event.count, self.now)
            self._enqueue(request, event.shape, event.shape.resources, event.redirected, False)
        self.dirty = True

    def _enqueue(self, request: Request, shape: Shape, placement: Resources, redirected: bool, for_actor: bool) -> None:
        key = _canonical([shape, placement, redirected, for_actor])
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = Queue(key, shape, placement, redirected, for_actor)
        queue.add(request)
        self.requests[request.owner, request.request_id] = queue

    @handles(ResizeLeaseRequest)
    def on_resize_lease_request(self, event: ResizeLeaseRequest, source: int) -> None:
        queue = self.requests.get((source, event.request_id))
        if queue is None:
            return  # all units were answered meanwhile
        request = queue.owners[source][event.request_id]
        request.count = event.count
        if event.count <= 0:
            self._drop(queue, request)
        self.dirty = True

    def _drop(self, queue: Queue, request: Request) -> None:
        queue.drop(request)
        del self.requests[request.owner, request.request_id]
        if request.actor is not None:
            self.waiting_actors.pop(request.actor.actor_id, None)
        if not queue.owners:
            self.queues.pop(queue.key, None)
        self.dirty = True

    def _refuse(self, queue: Queue, request: Request, reason: LeaseRefusal, text: str) -> None:
        self._drop(queue, request)
        if request.actor is not None:
            cause = DeathCause(reason.name, text, node_id=self.node_id)
            self.send(GCS_ADDRESS, ActorRejected(request.actor.actor_id, request.attempt, cause))
        else:
            self.send(request.owner, LeaseRefused(request.request_id, reason, text))

    def _refuse_all(self, chosen: Any, reason: LeaseRefusal, text: str) -> None:
        for queue in [queue for queue in self.queues.values() if chosen(queue)]:
            for requests in list(queue.owners.values()):
                for request in list(requests.values()):
                    self._refuse(queue, request, reason, text)

    def refuse_environment(self, env: str, text: str) -> None:
        self._refuse_all(lambda queue: queue.shape.runtime_env == env, LeaseRefusal.RUNTIME_ENV, text)

    # -- the pass over all queues

    def schedule(self) -> None:
        """Answer every unit that can be answered now."""
        if not self.dirty or self.stopping or self.drain is not None:
            return
        self.dirty = False
        short: dict[str, int] = {}
        room: Resources | None = None
        for queue in list(self.queues.values()):
            queue.blocked = False
            units = self._serve(queue)
            if units:  # it lacks nothing but workers
                room = dict(self.pool.available) if room is None else room
                env = queue.shape.runtime_env
                # What waits until its environment is made leaves the room to others.
                theirs = room if self.is_made(env) else dict(room)
                short[env] = short.get(env, 0) + _count_within(theirs, queue, units)
            if not queue.owners:
                self.queues.pop(queue.key, None)
        for env, units in short.items():
            if env or self.now >= self.paused_until:
                self.start_workers(env, units - self.starting(env))
        self._contend()

    def _serve(self, queue: Queue) -> int:
        """Answer units of one queue until it is stuck; how many of them only want a worker."""
        sent_on: dict[tuple[int, int, int], int] = {}  # owner, request id, node → units
        units = self._serve_units(queue, sent_on)
        for (owner, request_id, node), count in sent_on.items():
            self.send(owner, LeaseRedirected(request_id, node, count))
        return units

    def _serve_units(self, queue: Queue, sent_on: dict[tuple[int, int, int], int]) -> int:
        while (request := queue.head()) is not None:
            node = self._place(queue, request)
            if node == _WAIT:
                return 0
            if node == _REFUSED:
                continue
            if node == self.node:
                if not self.pool.fits(queue.placement):
                    queue.blocked = True
                    return 0
                worker = self.claim(
                    queue.shape.job_id, queue.shape.runtime_env, request.owner, unused_first=queue.for_actor
                )
                if worker is None:
                    return queue.units()
                self._grant(queue, request, worker)
            elif request.actor is not None:
                self.waiting_actors.pop(request.actor.actor_id, None)
                self.send(GCS_ADDRESS, ActorRejected(request.actor.actor_id, request.attempt))
            else:
                key = request.owner, request.request_id, node
                sent_on[key] = sent_on.get(key, 0) + 1
            queue.served(request)
            if request.count <= 0:
                del self.requests[request.owner, request.request_id]
        return 0

    def _place(self, queue: Queue, request: Request) -> int:
        """Where the head of the queue goes: a node, _ELSEWHERE, _WAIT or _REFUSED."""
        strategy = queue.shape.strategy
        if queue.for_actor:
            if self.pool.fits(queue.placement):
                return self.node
        elif queue.redirected:
            if self.pool.feasible(queue.placement) and not self._may_move(queue, request):
                return self.node
        elif strategy.kind == "DEFAULT":
            if self.pool.fits(queue.placement) and utilisation(self.pool.total, self.pool.available) < PACK_UNTIL:
                return self.node
            if queue.stuck_view == self.view_version and self.pool.feasible(queue.placement):
                return self.node  # nobody else has room: be granted here, or wait
        self._turn += strategy.kind == "SPREAD"
        search = queue.search.at(self.view_version, self.pool.gains)
        choice = choose(self.living, queue.placement, strategy, prefer=self.node, turn=self._turn, search=search)
        return self._follow(queue, request, choice)

    def _may_move(self, queue: Queue, request: Request) -> bool:
        """LEASE-4"""
        if self.pool.fits(queue.placement) or queue.stuck_view == self.view_version or len(self.living) == 1:
            return False
        if self.now < request.since + MOVE_S:
            self.set_timer("move", request.since + MOVE_S)
            return False
        return True

    def timer_move(self) -> None:
        self.dirty = True

    def _follow(self, queue: Queue, request: Request, choice: Choice) -> int:
        verdict, node = choice
        if verdict is Verdict.AVAILABLE:
            if node != self.node:
                self.views[node].take(queue.demand)
                self._taken.add(node)
                self.set_timer("takes", self.now + TAKE_S)
            return node
        if verdict is Verdict.FEASIBLE:
            if self._may_stay(queue):
                queue.stuck_view = self.view_version
                return self.node
            return node
        if verdict is Verdict.IMPOSSIBLE and not queue.for_actor:
            return self._affinity_lost(queue, request)
        if queue.for_actor:  # its room was here when it was sent; the GCS knows better than this view
            return _ELSEWHERE
        self.set_timer("infeasible", self.now + INFEASIBLE_S)
        return _WAIT

    def _may_stay(self, queue: Queue) -> bool:
        strategy = queue.shape.strategy
        if not self.pool.feasible(queue.placement):
            return False
        if strategy.kind == "LABELS":
            labels = self.views[self.node].labels
            return any(matches(labels, conditions) for conditions in (strategy.hard_labels, *strategy.fallbacks))
        return strategy.kind != "NODE" or strategy.node_id == self.node_id

    def _affinity_lost(self, queue: Queue, request: Request) -> int:
        wanted = queue.shape.strategy.node_id
        dead = any(view.node_id == wanted for view in self.views.values())
        if not dead and self.now < request.since + UNKNOWN_NODE_S:
            self.set_timer("affinity", request.since + UNKNOWN_NODE_S)
            return _WAIT
        text = (
            f"the node {wanted.hex()} that its scheduling strategy names (soft=False) "
            f"{'is dead' if dead else 'does not exist'}"
        )
        self._refuse(queue, request, LeaseRefusal.UNSCHEDULABLE, text)
        return _REFUSED

    def timer_takes(self) -> None:
        """A node that was sent a task and is as free as before does not say so: believe its last report again."""
        for node in self._taken:
            self.views[node].forget_takes()
        self._taken.clear()
        self.view_version += 1
        self.dirty = True

    def timer_affinity(self) -> None:
        self.dirty = True

    def timer_infeasible(self) -> None:
        """Tell owners, once for each request, what they ask for and what there is. Where a group is missing, the group is told of."""
        for queue in self.queues.values():
            if queue.for_actor or queue.shape.group_id:
                continue
            if any(view.alive and view.feasible(queue.placement) for view in self.views.values()):
                continue
            for requests in queue.owners.values():
                for request in requests.values():
                    if request.warned:
                        continue
                    request.warned = True
                    self.send(request.owner, self._warning(queue))

    def _warning(self, queue: Queue) -> LogLines:
        asks = f"a task asks for {readable(queue.placement)} (strategy {queue.shape.strategy.kind})"
        return infeasible(self.views.values(), asks, queue.shape.job_id)

    # -- grants

    def _grant(self, queue: Queue, request: Request, worker: Worker) -> None:
        grant = self.pool.grant(queue.demand)
        assert grant is not None, "fits() was asked before"
        lease = Lease(self._next_lease, request.owner, queue, worker, grant, self.now)
        self._next_lease += 1
        self.leases[lease.lease_id] = lease
        worker.lease = lease
        self._told.discard(lease.owner)  # what it hears is of the leases that it has
        if request.actor is None:
            self.step(worker, WorkerState.LEASED, f"lease {lease.lease_id} of {request.owner:#x}")
            self.send(
                request.owner,
                LeaseGranted(
                    request.request_id,
                    lease.lease_id,
                    worker.address,
                    worker.worker_id,
                    worker.pid,
                    grant.visible_instances(),
                ),
            )
            return
        spec = request.actor
        self.step(worker, WorkerState.ACTOR, f"actor {spec.actor_id.hex()}")
        lease.actor_id, lease.attempt = spec.actor_id, request.attempt
        self.actors[spec.actor_id] = lease
        self.waiting_actors.pop(spec.actor_id, None)
        self.send(GCS_ADDRESS, ActorStarting(spec.actor_id, request.attempt, worker.address, worker.pid))
        self.send(worker.address, InstallActor(request.attempt, spec, grant.visible_instances()))

    def close_lease(self, lease: Lease, cause: DeathCause) -> None:
        """Its worker is gone (LEASE-2)."""
        self.free(lease)
        if not lease.returned and not lease.actor_id:
            self.send(lease.owner, LeaseRevoked(lease.lease_id, cause))

    def free(self, lease: Lease) -> None:
        del self.leases[lease.lease_id]
        self.pool.give_back(lease.grant)
        lease.worker.lease = None
        if lease.actor_id and self.actors.get(lease.actor_id) is lease:
            del self.actors[lease.actor_id]
        self.dirty = True
        if lease.shape.group_id:
            self.finish_releases(lease.shape.group_id)

    @handles(ReturnLease)
    def on_return_lease(self, event: ReturnLease, source: int) -> None:
        lease = self.leases.get(event.lease_id)
        if lease is None or lease.owner != source or lease.returned or lease.actor_id:
            return  # revoked meanwhile
        lease.returned = True
        worker = lease.worker
        if worker.state is WorkerState.ENDING:
            return
        if worker.leaving or not event.reusable:
            self.end(worker, "retired", unless_used=True)  # its resources come back when it is gone, or says that it stays
            if worker.stays:
                self.free(lease)
            return
        self.free(lease)
        self.set_idle(worker)

    @handles(WorkerBlocked)
    def on_worker_blocked(self, event: WorkerBlocked, source: int) -> None:
        lease = self._lease_of(source)
        if lease is None or lease.actor_id:  # an actor keeps its CPUs while it waits, as in Ray
            return
        if self.pool.park_cpus(lease.grant):
            self.dirty = True

    @handles(WorkerUnblocked)
    def on_worker_unblocked(self, event: WorkerUnblocked, source: int) -> None:
        lease = self._lease_of(source)
        if lease is not None:
            self.pool.retake(lease.grant)

    def _lease_of(self, address: int) -> Lease | None:
        worker = self.by_address.get(address)
        return worker.lease if worker is not None else None

    def _contend(self) -> None:
        """Tell holders that others wait (LEASE-5)."""
        blocked = [queue for queue in self.queues.values() if queue.blocked]
        if not blocked:
            self._told.clear()
            return
        owners = {owner for queue in blocked for owner in queue.owners}
        keys = {queue.key for queue in blocked}
        for lease in self.leases.values():
            if lease.actor_id or lease.returned or lease.owner in self._told:
                continue
            if owners == {lease.owner} and keys == {lease.key}:
                continue  # it waits for itself
            self._told.add(lease.owner)
            self.send(lease.owner, LeaseContended())

    # -- deaths and ends

    def drop_owner(self, address: int) -> None:
        """The owner is gone: its requests too, and what runs for it."""
        for queue in [self.requests[key] for key in list(self.requests) if key[0] == address]:
            for request in list(queue.owners.get(address, {}).values()):
                self._drop(queue, request)
        for lease in list(self.leases.values()):
            if lease.owner == address and not lease.actor_id:
                self._cut_off(lease, DeathCause("OWNER_DIED", "the process that it worked for is gone"))
        self._told.discard(address)

    def drop_owners_of(self, node: int) -> None:
        addresses = {owner for owner, _ in self.requests} | {lease.owner for lease in self.leases.values()}
        for address in sorted(addresses):
            if node_of(address) == node and address != GCS_ADDRESS:
                self.drop_owner(address)

    def _cut_off(self, lease: Lease, cause: DeathCause) -> None:
        lease.returned = True
        self.kill(lease.worker, cause)

    @handles(JobFinished)
    def on_job_finished(self, event: JobFinished, source: int) -> None:
        for worker in list(self.workers.values()):
            if worker.job_id == event.job_id and (worker.state is WorkerState.IDLE or worker.stays):
                self.end(worker, "its job is over")
        if event.driver:
            self.drop_owner(event.driver)

    # -- actors

    @handles(StartActor)
    def on_start_actor(self, event: StartActor, source: int) -> None:
        spec = event.spec
        if spec.shape.group_id and spec.shape.group_id in self.removed_groups:
            cause = DeathCause("GROUP_REMOVED", "its placement group was removed", node_id=self.node_id)
            self.send(GCS_ADDRESS, ActorRejected(spec.actor_id, event.attempt, cause))
            return
        if self.stopping or not self.pool.feasible(spec.placement):
            self.send(GCS_ADDRESS, ActorRejected(spec.actor_id, event.attempt))
            return
        request = Request(GCS_ADDRESS, self._next_actor_request, 1, self.now)
        self._next_actor_request -= 1
        request.actor, request.attempt = spec, event.attempt
        self.waiting_actors[spec.actor_id] = request
        self._enqueue(request, spec.shape, spec.placement, True, True)
        self.dirty = True

    @handles(StopActor)
    def on_stop_actor(self, event: StopActor, source: int) -> None:
        waiting = self.waiting_actors.get(event.actor_id)
        if waiting is not None and waiting.attempt <= event.attempt:
            self._drop(self.requests[waiting.owner, waiting.request_id], waiting)
            return
        lease = self.actors.get(event.actor_id)
        if lease is None or lease.attempt > event.attempt:
            return
        if event.force:
            self.kill(lease.worker, DeathCause("KILLED", event.reason))
        else:
            self.send(lease.worker.address, TerminateActor(event.reason))

    # -- placement groups

    def drop_group(self, group_id: bytes) -> None:
        """Nobody shall wait for it or start in it any more."""
        if len(self.removed_groups) >= 10_000:
            del self.removed_groups[next(iter(self.removed_groups))]
        self.removed_groups[group_id] = None
        self._refuse_all(
            lambda queue: queue.shape.group_id == group_id,
            LeaseRefusal.GROUP_REMOVED,
            "its placement group was removed",
        )

    def kill_group(self, group_id: bytes) -> None:
        cause = DeathCause("GROUP_REMOVED", "its placement group was removed")
        for lease in list(self.leases.values()):
            if lease.shape.group_id == group_id:
                self.kill(lease.worker, cause)

    # -- questions

    def query_demand(self) -> list[tuple[Resources, int]]:
        """What waits here for room that any node may give: what one needs, and how many. See ``launcher.elastic``."""
        return [
            (queue.placement, queue.units())
            for queue in self.queues.values()
            if queue.shape.strategy.kind in ANYWHERE and not queue.shape.group_id and not queue.for_actor
        ]

    def waiting_shapes(self) -> list[Resources]:
        """What waits here, for the report; at most 20 kinds."""
        return [queue.placement for queue in list(self.queues.values())[:20]]


def _group_removed(request_id: int) -> LeaseRefused:
    return LeaseRefused(request_id, LeaseRefusal.GROUP_REMOVED, "its placement group was removed")


def _count_within(room: Resources, queue: Queue, units: int) -> int:
    """How many of the units fit into what is free; takes them from it."""
    count = 0
    while count < units and all(room.get(name, 0) >= n for name, n in queue.placement.items() if n):
        for name, n in queue.demand.items():
            room[name] = room.get(name, 0) - n
        count += 1
        if not queue.demand and count >= 4096:
            break
    return count

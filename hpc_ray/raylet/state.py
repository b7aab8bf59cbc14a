"""The raylet's decisions: every event of a node goes in, the actions come out.

Put together from its parts (``workers``, ``leases``, ``bundles``, ``copies``, ``room``, ``draining``), each a class in a file of its
own with its invariants; here are the node's membership, its view of the cluster, its end, and the questions it answers. Relies
on ``machine``, ``scheduling``, ``protocol``; called by ``raylet.server`` and the simulator.

RAYLET-1 (own view): ``views[node]`` shares the pool's tables, so the own node is never seen late.
RAYLET-2 (reports): the GCS has the present amounts at most one report interval after they changed, and sooner when bundles have gone,
for others may wait for their room.
RAYLET-3 (end): after Shutdown nothing is granted or started; the raylet leaves when its last worker is reaped.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_ray.config import NodeConfig
from hpc_ray.ids import GCS_ADDRESS, LINK_LANE, lane_of, node_of, raylet_address
from hpc_ray.machine import Exit, handles
from hpc_ray.protocol import (
    UNIT,
    Answer,
    ClusterView,
    Deaths,
    NodeDied,
    NodeInfo,
    NodeRegistered,
    ProcessKind,
    Query,
    RegisterNode,
    ReportResources,
    Resources,
    ResourcesSet,
    SetResources,
    Shutdown,
    Welcome,
)
from hpc_ray.raylet.draining import Draining
from hpc_ray.raylet.events import AnswerFromLogs, DeleteOwned, LimitStore
from hpc_ray.raylet.resources import ResourcePool
from hpc_ray.raylet.room import Room
from hpc_ray.raylet.workers import Workers, WorkerState
from hpc_ray.scheduling import NodeView, branches

SOON = 0.05  # of a report interval
REPORT_NODES = 512  # from this many nodes on reports become rarer, so that the GCS gets a bounded number of them
LOG_QUESTIONS = ("list_logs", "read_log")  # the server answers them (``raylet.logs``)
WHOLE_NODE = 0xFFFF << 32  # lane that stands for all lanes of a node in DeleteOwned


class RayletState(Workers, Draining, Room):
    """See the module's text.

    Args:
        config: the node.
        pid: of the raylet's process, for the list of nodes.
        build: version of the package.
    """

    def __init__(self, config: NodeConfig, *, pid: int = 0, build: str = "", keep_log: bool = False):
        super().__init__(keep_log=keep_log)
        self.config = config
        self.settings = config.settings
        self.node = config.node
        self.arena_bytes = config.arena_bytes
        self.node_id = bytes.fromhex(config.node_id)
        self.build = build
        self.pid = pid
        self.pool = ResourcePool({name: round(amount * UNIT) for name, amount in config.resources.items()})
        self.labels = config.labels
        self.dirty = True
        self.stopping = False
        self.stopped = False
        self.registered = False
        self.view_version = 0
        self.views = {self.node: self._own_view()}
        self._living: list[NodeView] | None = None  # as of the last look
        self.welcome = Welcome(
            self.node_id,
            self.node,
            config.ip,
            config.session,
            config.session_dir,
            msgspec.to_builtins(config.settings),
        )
        self.init_workers()
        self.init_leases()
        self.init_bundles()
        self.init_copies()
        self.init_room()
        self.init_draining()
        self._sequence = 0
        self._reported: tuple[Resources, Resources, list[Resources]] | None = None
        self._report_at = 0.0

    @property
    def address(self) -> int:
        return raylet_address(self.node)

    def _own_view(self) -> NodeView:
        view = NodeView(self.info())
        view.total, view.available = self.pool.total, self.pool.available  # RAYLET-1
        return view

    def info(self) -> NodeInfo:
        config = self.config
        return NodeInfo(
            self.node_id,
            self.node,
            config.hostname,
            config.ip,
            self.pid,
            dict(self.pool.total),
            dict(self.pool.available),
            self.labels,
            is_head=self.node == 0,
            arena_bytes=config.arena_bytes,
        )

    def on_start(self) -> None:
        self.send(GCS_ADDRESS, RegisterNode(self.info(), build=self.build))

    def settle(self) -> None:
        self.go_on_draining()
        self.schedule()
        self.replenish()
        self.report()

    def is_cut_off(self, event: Any, source: int) -> bool:
        view = self.views.get(node_of(source))
        return bool(source) and view is not None and not view.alive

    def knows(self, address: int) -> bool:
        """Is a living process registered there?"""
        return address in self.by_address or address in self.peers

    @handles(SetResources)
    def on_set_resources(self, event: SetResources, source: int) -> None:
        """A driver that is alone in a launched world says what its ``init`` was given."""
        configured = {name: round(amount * UNIT) for name, amount in self.config.resources.items()}
        kept = {name: amount for name, amount in configured.items() if name not in event.without}
        self.arena_bytes = min(event.object_store_memory or self.config.arena_bytes, self.config.arena_bytes)
        self.act(LimitStore(self.arena_bytes))
        kept["object_store_memory"] = self.arena_bytes * UNIT
        self.pool.change_total({**kept, **event.resources})
        self.labels = {**self.config.labels, **event.labels}
        self.views[self.node] = self._own_view()
        self.living_changed()
        self.dirty = True
        self._report_at = 0.0
        self.report()
        self.send(source, ResourcesSet(self.node, self.labels))

    # -- membership

    @handles(NodeRegistered)
    def on_node_registered(self, event: NodeRegistered, source: int) -> None:
        if event.refusal:
            self.act(Exit(1, f"the GCS refused this node: {event.refusal}"))
            return
        self.registered = True

    @handles(ClusterView)
    def on_cluster_view(self, event: ClusterView, source: int) -> None:
        self.view_version += 1
        for info in event.nodes:
            view = self.views.get(info.index)
            if info.index == self.node:
                continue
            if view is None:
                self.follow_on(info.index)
                self.views[info.index] = view = NodeView(info)
                self.living_changed()
            elif view.alive and event.number >= view.number:
                view.alive = info.alive
                view.update(info)
                if not info.alive:
                    self.living_changed()
            view.number = max(view.number, event.number)
        self.dirty = True
        for head, rest in branches(event.then):
            self.send(raylet_address(head), ClusterView(event.nodes, event.number, rest))

    @handles(Deaths)
    def on_deaths(self, event: Deaths, source: int) -> None:
        for node in event.nodes:
            self.on_node_died(node, source)
        for process in event.processes:
            if node_of(process.address) != self.node:
                self.on_process_died(process, source)

    @property
    def living(self) -> list[NodeView]:
        """Views of nodes that live, by index."""
        if self._living is None:
            self._living = sorted((view for view in self.views.values() if view.alive), key=lambda view: view.index)
        return self._living

    def living_changed(self) -> None:
        self._living = None
        self.view_version += 1

    @handles(NodeDied)
    def on_node_died(self, event: NodeDied, source: int) -> None:
        if event.node == self.node:
            self._begin_shutdown(event.text)
            return
        view = self.views.get(event.node)
        if view is not None:
            view.alive = False
        self.living_changed()
        self.dirty = True
        self.tell_local(event)
        self.unfollow(lambda driver: node_of(driver) == event.node)
        self.drop_owners_of(event.node)
        self.source_lost(event.node)
        self.forget_copies_of_node(event.node)
        self.act(DeleteOwned(event.node << 48 | WHOLE_NODE))

    def owner_died(self, address: int) -> None:
        """A process of this node is gone."""
        self.remember_gone(address)
        self.drop_owner(address)
        self.drop_asker(address)
        self.forget_asker(address)
        if lane_of(address) == LINK_LANE and not self.stopping:
            for node in [node for node, view in self.views.items() if node != self.node and view.alive]:
                self.source_lost(node)

    def remote_owner_died(self, address: int) -> None:
        self.remember_gone(address)
        self.drop_owner(address)
        self.forget_copies_of(address)
        self.act(DeleteOwned(address))

    # -- reports (RAYLET-2)

    @property
    def report_interval(self) -> float:
        return self.settings.report_interval_s * max(1.0, len(self.views) / REPORT_NODES)

    def report_soon(self) -> None:
        self._report_at = min(self._report_at, self.now + self.report_interval * SOON)

    def report(self) -> None:
        if not self.registered or self.stopping:
            return
        now = (self.pool.total, self.pool.available, self.waiting_shapes())
        if now == self._reported:
            return
        if self.now < self._report_at:
            self.set_timer("report", self._report_at)
            return
        self._reported = (dict(self.pool.total), dict(self.pool.available), now[2])
        self._sequence += 1
        self._report_at = self.now + self.report_interval
        self.send(GCS_ADDRESS, ReportResources(self.node, self._sequence, *self._reported))

    def timer_report(self) -> None:
        """``settle`` does it."""

    # -- end (RAYLET-3)

    @handles(Shutdown)
    def on_shutdown(self, event: Shutdown, source: int) -> None:
        self._begin_shutdown(event.reason or "the session ends")

    def _begin_shutdown(self, reason: str) -> None:
        if self.stopping:
            return
        self.stopping = True
        for peer in self.peers.values():
            if peer.kind != ProcessKind.LINK:  # it carries what is still said, and ends with the node
                self.send(peer.address, Shutdown(reason))
        for worker in list(self.workers.values()):
            self.end(worker, reason)
        self.set_timer("kill", self.now + self.settings.kill_on_exit_s)
        self.check_stopped()

    def timer_kill(self) -> None:
        """The grace is over."""
        from_now = self.now + self.settings.kill_on_exit_s
        for worker in self.workers.values():
            if worker.pid:
                self.kill_process(worker.pid)
        if self.workers:
            self.set_timer("give_up", from_now)

    def timer_give_up(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.act(Exit(0, "workers that do not end are left to the fork server"))

    def check_stopped(self) -> None:
        if self.stopping and not self.workers and not self.stopped:
            self.stopped = True
            self.act(Exit(0, "all workers have ended"))

    # -- questions

    @handles(Query)
    def on_query(self, event: Query, source: int) -> None:
        if event.name in LOG_QUESTIONS:
            self.act(AnswerFromLogs(source, event))
            return
        method = getattr(self, "query_" + event.name, None)
        if method is None:
            known = ", ".join([*LOG_QUESTIONS, *(name[6:] for name in dir(self) if name.startswith("query_"))])
            self.send(
                source, Answer(event.request_id, None, f"a raylet has no {event.name!r}; it has {known}", "ValueError")
            )
            return
        try:
            value = method(**event.arguments)
        except (TypeError, ValueError) as error:
            self.send(source, Answer(event.request_id, None, str(error), type(error).__name__))
            return
        self.send(source, Answer(event.request_id, value))

    def query_workers(self) -> list[dict[str, Any]]:
        rows = [
            {
                "worker_id": worker.worker_id,
                "pid": worker.pid,
                "state": worker.state.name,
                "kind": "WORKER",
                "job_id": worker.job_id,
                "runtime_env": worker.env,
                "address": worker.address,
                "actor_id": worker.lease.actor_id if worker.lease else b"",
                "asked_s": self.now - worker.asked_at,  # ago
                "started_s": self.now - worker.started_at if worker.started_at else 0.0,
            }
            for worker in self.workers.values()
        ]
        for peer in self.peers.values():
            rows.append(
                {
                    "worker_id": peer.worker_id,
                    "pid": peer.pid,
                    "state": "ALIVE",
                    "kind": ProcessKind(peer.kind).name,
                    "job_id": b"",
                    "runtime_env": "",
                    "address": peer.address,
                    "actor_id": b"",
                    "asked_s": 0.0,
                    "started_s": self.now - peer.started_at,
                }
            )
        return rows

    def query_dead_workers(self) -> list[dict[str, Any]]:
        return [
            {
                "worker_id": notice.worker_id,
                "address": notice.address,
                "pid": notice.pid,
                "kind": ProcessKind(notice.kind).name,
                "cause": notice.cause.kind,
                "text": notice.cause.text,
                "asked_s": self.now - asked_at if asked_at else 0.0,  # ago
                "started_s": self.now - started_at,
                "died_s": self.now - died_at,
            }
            for notice, asked_at, started_at, died_at in self.buried
        ]

    def query_left_histories(self) -> list[bytes]:
        """What processes that have ended remembered of tasks, each a packed History."""
        return [event.history for event in self.left]

    def query_leases(self) -> list[dict[str, Any]]:
        return [
            {
                "lease_id": lease.lease_id,
                "owner": lease.owner,
                "worker": lease.worker.address,
                "pid": lease.worker.pid,
                "job_id": lease.shape.job_id,
                "actor_id": lease.actor_id,
                "resources": dict(lease.grant.amounts),
                "blocked": bool(lease.grant.parked),
            }
            for lease in self.leases.values()
        ]

    def query_statistics(self) -> dict[str, Any]:
        states: dict[str, int] = {}
        for worker in self.workers.values():
            states[worker.state.name] = states.get(worker.state.name, 0) + 1
        return {
            "node": self.node,
            "events": dict(self.counts),
            "workers": states,
            "processes": len(self.peers),
            "leases": len(self.leases),
            "granted": self._next_lease - 1,  # ever
            "kept_by": self.kept_by(),
            "waiting": sum(queue.units() for queue in self.queues.values()),
            "bundles": len(self.bundles),
            "pulls": len(self.pulls),
            "copies": len(self.copies),
            "spilled_bytes": self.spilled_bytes,
            "total": dict(self.pool.total),
            "available": dict(self.pool.available),
        }

    def query_history(self, identity: str) -> list[str]:
        return self.history.of(identity)

    # -- checks

    def validate(self) -> None:
        """Every invariant that can be seen at rest; AssertionError if one is broken."""
        grants = [lease.grant for lease in self.leases.values()]
        grants += [bundle.grant for bundle in self.bundles.values()]
        self.pool.validate(grants)
        assert self.views[self.node].available is self.pool.available
        for lease in self.leases.values():
            assert lease.worker.lease is lease, f"lease {lease.lease_id}"
            assert lease.worker.state in (WorkerState.LEASED, WorkerState.ACTOR, WorkerState.ENDING)
        for token, worker in self.workers.items():
            assert worker.token == token and worker.state is not WorkerState.DEAD
            assert (worker.state is WorkerState.IDLE) == (token in self.idle)
            if worker.state in (WorkerState.LEASED, WorkerState.ACTOR):
                assert worker.lease is not None and self.leases[worker.lease.lease_id] is worker.lease
        for env, count in self._starting.items():
            real = sum(w.env == env and w.state is WorkerState.STARTING for w in self.workers.values())
            assert real == count, (env, real, count)
        for (owner, request_id), queue in self.requests.items():
            assert queue.owners[owner][request_id].count > 0
            assert self.queues[queue.key] is queue
        assert {
            r.actor.actor_id for q in self.queues.values() for rs in q.owners.values() for r in rs.values() if r.actor
        } == set(self.waiting_actors)
        assert set(self.transfers.values()) == set(self.pulls.values())

    def snapshot(self) -> dict[str, Any]:
        """All that decides, as plain values; equal for equal states (MACHINE-2)."""
        return {
            "workers": {
                token: (w.state.name, w.env, w.pid, w.address, w.job_id, w.last_owner, w.since, w.leaving)
                for token, w in self.workers.items()
            },
            "idle": list(self.idle),
            "peers": {address: (p.kind, p.pid, p.leaving) for address, p in self.peers.items()},
            "leases": {
                number: (x.owner, x.worker.token, x.grant.amounts, x.grant.instances, x.grant.parked, x.returned)
                for number, x in self.leases.items()
            },
            "queues": [
                (key, owner, [(r.request_id, r.count) for r in requests.values()])
                for key, q in self.queues.items()
                for owner, requests in q.owners.items()
            ],
            "bundles": {key: (b.state.name, b.attempt) for key, b in self.bundles.items()},
            "pulls": {key: (p.state.name, list(p.askers), p.places, p.handle) for key, p in self.pulls.items()},
            "copies": dict(self.copies),
            "givings": {key: (g.handle, sorted(g.fetching), list(g.waiting)) for key, g in self.givings.items()},
            "room": (dict(self.wanting), dict(self.served), self.spilled_bytes),
            "total": dict(self.pool.total),
            "available": dict(self.pool.available),
            "views": {i: (v.alive, v.total, v.available) for i, v in self.views.items()},
            "timers": dict(self._timers),
            "stopping": self.stopping,
            "drain": self.drain is not None,
        }

"""The GCS's decisions: every event of the control plane goes in, the actions come out.

Put together from its parts (``nodes``, ``jobs``, ``actors``, ``groups``, ``keys``), each a class in a file of its own
with its invariants; here are the questions, the deaths that concern several parts, the journal's way back, and the
end. Relies on ``machine``, ``scheduling``, ``protocol``; called by ``gcs.server`` and the simulator.

GCS-1 (off the path): no event comes here for a task or an actor call (the simulator counts).
GCS-2 (replay): ``replay`` of the journal's records gives equal ``durable()``, as it was before Shutdown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from hpc_ray.gcs.actors import ActorRecord, Actors
from hpc_ray.gcs.groups import Group, Groups, GroupState
from hpc_ray.gcs.jobs import Job, Jobs
from hpc_ray.gcs.keys import Keys
from hpc_ray.gcs.nodes import Nodes
from hpc_ray.gcs.part import DEFERRED
from hpc_ray.ids import node_of
from hpc_ray.machine import Exit, handles
from hpc_ray.protocol import ActorSpec, ActorState, Answer, DeathCause, Query, RegisterNode, Shutdown

LINGER_S = 5.0  # after Shutdown; the end of its node comes sooner, and ends it


class GcsState(Nodes, Jobs, Actors, Groups, Keys):
    """See the module's text.

    Args:
        epoch_offset: time of day minus the clock of events, in seconds.
        build: version of the package.
    """

    def __init__(self, *, epoch_offset: float = 0.0, build: str = "", keep_log: bool = False):
        super().__init__(keep_log=keep_log)
        self.epoch_offset = epoch_offset
        self.build = build
        self.stopping = False
        self.asker = (0, 0)
        self._restored = False
        self.init_nodes()
        self.init_jobs()
        self.init_actors()
        self.init_groups()
        self.init_keys()

    def on_start(self) -> None:
        if self._restored:
            self._resume()

    def settle(self) -> None:
        if self.view_changed and not self.stopping:
            self.view_changed = False
            if self.waiting_groups:
                self.place_groups()
            if self.waiting_actors:
                self.place_actors()

    # -- deaths

    def is_cut_off(self, event: Any, source: int) -> bool:
        view = self.views.get(node_of(source))
        return view is not None and not view.alive and not isinstance(event, RegisterNode)

    def process_died(self, address: int, cause: DeathCause) -> None:
        self.remember_gone(address)
        self.actor_process_died(address, cause)
        self.actor_owner_died(address, f"its owner died: {cause.text}" if cause.text else "its owner died")
        self.drop_subscriber(address)
        self.drop_group_waiter(lambda asker: asker == address)
        self.remove_groups_of_owner(lambda creator: creator == address)
        self.finish_jobs_where(lambda driver: driver == address, f"the driver ended: {cause.text}")

    def node_lost(self, node: int, node_id: bytes, text: str) -> None:
        self.actors_lose_node(node, node_id, text)
        for owner in [owner for owner in self.actors_of if node_of(owner) == node]:
            self.actor_owner_died(owner, f"its owner's node died: {text}")
        for process in [process for process in self.subscriptions if node_of(process) == node]:
            self.drop_subscriber(process)
        self.drop_group_waiter(lambda asker: node_of(asker) == node)
        self.groups_lose_node(node)
        self.remove_groups_of_owner(lambda creator: node_of(creator) == node)
        self.finish_jobs_where(lambda driver: node_of(driver) == node, f"the driver's node died: {text}")

    # -- questions

    @handles(Query)
    def on_query(self, event: Query, source: int) -> None:
        method = getattr(self, "query_" + event.name, None)
        if method is None:
            known = ", ".join(name[6:] for name in dir(self) if name.startswith("query_"))
            text = f"the GCS has no {event.name!r}; it has {known}"
            self.send(source, Answer(event.request_id, None, text, "ValueError"))
            return
        self.asker = (source, event.request_id)
        try:
            value = method(**event.arguments)
        except (TypeError, ValueError) as error:
            self.send(source, Answer(event.request_id, None, str(error), type(error).__name__))
            return
        if value is not DEFERRED:
            self.send(source, Answer(event.request_id, value))

    def query_demand(self) -> dict[str, Any]:
        """What waits here for room: of actors what one needs and how many, and placement groups. See ``launcher.elastic``."""
        return {"tasks": self.waiting_for_actors(), "groups": self.waiting_for_groups()}

    def query_statistics(self) -> dict[str, Any]:
        states: dict[str, int] = {}
        for actor in self.actors.values():
            states[actor.record.state.name] = states.get(actor.record.state.name, 0) + 1
        return {
            "events": dict(self.counts),
            "nodes": len(self.nodes),
            "nodes_alive": sum(view.alive for view in self.views.values()),
            "jobs": len(self.jobs),
            "actors": states,
            "actors_waiting": len(self.waiting_actors),
            "groups": len(self.groups),
            "keys": sum(map(len, self.keys.values())),
        }

    def query_history(self, identity: str) -> list[str]:
        return self.history.of(identity)

    # -- end

    @handles(Shutdown)
    def on_shutdown(self, event: Shutdown, source: int) -> None:
        if self.stopping:
            return
        self.stopping = True
        self.tell_raylets(event)
        self.set_timer("leave", self.now + LINGER_S)

    def timer_leave(self) -> None:
        self.act(Exit(0, "the session ends"))

    # -- the journal's way back

    def replay(self, records: Iterable[tuple[str, bytes, bytes]]) -> None:
        """Restore what a journal has (GCS-2). Before ``start``, which then resumes what was detached."""
        specs: dict[bytes, ActorSpec] = {}
        kept: dict[bytes, ActorRecord] = {}
        decode = msgspec.msgpack.decode
        for kind, key, value in records:
            self._restored = True
            if kind == "meta":
                self._next_job = int(value)
            elif kind == "job":
                self.jobs[key] = decode(value, type=Job)
            elif kind == "key":
                self.restore_key(key, value)
            elif kind == "group":
                self.restore_group(decode(value, type=Group))
            elif kind == "actor_spec":
                specs[key] = decode(value, type=ActorSpec)
            elif kind == "actor":
                kept[key] = decode(value, type=ActorRecord)
        for actor_id, spec in specs.items():
            self.restore_actor(spec, kept.get(actor_id) or ActorRecord())

    def _resume(self) -> None:
        for job in list(self.jobs.values()):
            self.finish_job(job, "the session that it belonged to is over")
        self.resume_actors()
        self.resume_groups()

    def durable(self) -> dict[str, Any]:
        """What the journal must bring back, as plain values."""
        return {
            "next_job": self._next_job,
            "jobs": {key: msgspec.to_builtins(job) for key, job in self.jobs.items()},
            "keys": {space: dict(table) for space, table in self.keys.items() if table},
            "groups": {key: msgspec.to_builtins(group) for key, group in self.groups.items()},
            "group_names": dict(self.group_names),
            "actors": {
                key: (msgspec.to_builtins(actor.spec), msgspec.to_builtins(actor.record))
                for key, actor in self.actors.items()
            },
            "names": dict(self.names),
        }

    # -- checks

    def snapshot(self) -> dict[str, Any]:
        """All that decides, as plain values; equal for equal states (MACHINE-2)."""
        return {
            **self.durable(),
            "nodes": {index: msgspec.to_builtins(info) for index, info in self.nodes.items()},
            "views": {index: (view.alive, view.total, view.available) for index, view in self.views.items()},
            "waiting_actors": list(self.waiting_actors),
            "waiting_groups": list(self.waiting_groups),
            "actor_at": dict(self.actor_at),
            "subscriptions": {process: list(held) for process, held in self.subscriptions.items()},
            "timers": dict(self._timers),
        }

    def validate(self) -> None:
        """Every invariant that can be seen at rest; AssertionError if one is broken."""
        for actor_id, actor in self.actors.items():
            record = actor.record
            assert (actor_id in self.dead_actors) == actor.is_dead
            waiting = actor_id in self.waiting_actors
            unready = record.state is ActorState.DEPENDENCIES_UNREADY
            assert waiting == (record.node < 0 and not actor.is_dead and not unready), (record, waiting)
            if record.state is ActorState.ALIVE:
                assert self.actor_at[record.address] == actor_id
                assert self.views[record.node].alive
            if actor.is_dead:
                assert record.cause is not None and not actor.subscribers
            elif not actor.spec.detached or unready:
                assert actor_id in self.actors_of[actor.spec.owner]
        for address, actor_id in self.actor_at.items():
            assert self.actors[actor_id].record.address == address
        for name, actor_id in self.names.items():
            actor = self.actors[actor_id]
            assert (actor.spec.namespace, actor.spec.name) == name  # ACTOR-4
            assert not actor.is_dead and not actor.record.stopping
        for group_id, group in self.groups.items():
            assert (group_id in self._attempts) == (group.state is GroupState.PREPARING)
            pending = group.state in (GroupState.PENDING, GroupState.RESCHEDULING)
            assert pending == (group_id in self.waiting_groups)
            if group.state is GroupState.CREATED:  # GROUP-3
                assert sorted(group.nodes) == list(range(len(group.bundles)))
                assert all(self.views[node].alive for node in group.nodes.values())
            assert not (group_id in self._waiters and group.state in (GroupState.CREATED, GroupState.REMOVED))

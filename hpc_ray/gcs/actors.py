"""Actors: names, states, where they live, when they come back. The part of ``GcsState`` that knows them.

ACTOR-1 (table): an actor goes through ACTOR_STEPS only; DEAD is final, and its cause is the first that was given.
ACTOR-2 (attempts): each placement has a number of its own; what is said about another one is ignored.
ACTOR-3 (durable first): creation and each change of state are journalled before anybody hears of them.
ACTOR-4 (one name): a name in a namespace belongs to at most one actor that is neither dead nor told to end.
ACTOR-5 (owned): an actor that is not detached, or still waits for arguments, outlives neither its owner nor its job.
ACTOR-6 (crashes only): only a crash, a lost node or kill(no_restart=False) uses up a restart.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_ray.gcs.part import Part
from hpc_ray.ids import node_of, raylet_address
from hpc_ray.machine import Table, handles
from hpc_ray.protocol import (
    ActorArguments,
    ActorCreated,
    ActorFailed,
    ActorInfo,
    ActorInitFailed,
    ActorOutOfScope,
    ActorReady,
    ActorRejected,
    ActorSpec,
    ActorStarting,
    ActorState,
    ActorUpdate,
    CreateActor,
    DeathCause,
    GetNamedActor,
    KillActor,
    NamedActor,
    Resources,
    StartActor,
    StopActor,
    SubscribeActor,
)
from hpc_ray.scheduling import ANYWHERE, INFEASIBLE_S, Search, Verdict, choose, infeasible, readable

MAX_DEAD_ACTORS = 100_000  # kept for questions about them
MAX_SEARCHES = 1000
RETRY_S = 0.02  # after a raylet sent an actor back

ACTOR_STEPS = Table(
    "actor",
    {
        ActorState.DEPENDENCIES_UNREADY: {ActorState.PENDING_CREATION, ActorState.DEAD},
        ActorState.PENDING_CREATION: {ActorState.ALIVE, ActorState.RESTARTING, ActorState.DEAD},
        ActorState.ALIVE: {ActorState.RESTARTING, ActorState.DEAD},
        ActorState.RESTARTING: {ActorState.ALIVE, ActorState.RESTARTING, ActorState.DEAD},
        ActorState.DEAD: (),
    },
)
_RESTARTABLE = frozenset({"CRASHED", "KILLED", "NODE_DIED", "OOM"})

_canonical = msgspec.msgpack.Encoder(order="sorted").encode


class ActorRecord(msgspec.Struct):
    """The part of an actor that changes, as journalled beside its spec."""

    state: ActorState = ActorState.PENDING_CREATION
    attempt: int = -1  # of the last placement; -1 before the first
    restarts: int = 0  # used up
    node: int = -1  # set from StartActor until the process is gone
    address: int = 0  # set from ActorStarting (or ActorReady) until the process is gone
    pid: int = 0
    cause: DeathCause | None = None  # while DEAD; while RESTARTING, of the last process
    stopping: bool = False  # told to end after the calls it has
    created_at: float = 0.0  # seconds of the epoch
    ready_at: float = 0.0  # of the last time that its constructor had ended well; 0: never


class Actor:
    def __init__(self, spec: ActorSpec, record: ActorRecord | None = None):
        self.spec = spec
        self.record = record or ActorRecord()
        self.subscribers: dict[int, None] = {}
        self.key = _canonical([spec.placement, spec.shape.strategy, spec.shape.group_id])  # equal: equally placeable

    @property
    def is_dead(self) -> bool:
        return self.record.state is ActorState.DEAD

    @property
    def restarts_left(self) -> int:
        most = self.spec.max_restarts
        return -1 if most < 0 else max(0, most - self.record.restarts)


class Actors(Part):
    """See the module's text."""

    def init_actors(self) -> None:
        self.actors: dict[bytes, Actor] = {}
        self.names: dict[tuple[str, str], bytes] = {}  # namespace, name → actor
        self.waiting_actors: dict[bytes, None] = {}  # no placement yet
        self.actor_at: dict[int, bytes] = {}  # address → actor
        self.actors_of: dict[int, set[bytes]] = {}  # owner → those that end with it
        self.subscriptions: dict[int, dict[bytes, None]] = {}  # process → actors
        self.dead_actors: dict[bytes, None] = {}  # oldest first
        self.actors_on: dict[int, dict[bytes, None]] = {}  # node → those whose record says so
        self._actor_turn = 0
        self._searches: dict[tuple[bytes, int], Search] = {}  # key of actors, preferred node → where to look on
        self._warned_actors: set[bytes] = set()  # waiting ones whose owner knows that no node can have them

    # -- making

    @handles(CreateActor)
    def on_create_actor(self, event: CreateActor, source: int) -> None:
        spec = event.spec
        if spec.actor_id in self.actors:
            self.send(source, ActorCreated(event.request_id))
            return
        if spec.name:
            holder = self.names.get((spec.namespace, spec.name))
            if holder is not None:
                other = self.actors[holder].spec
                text = "" if event.get_if_exists else taken_text(spec.name, spec.namespace)
                existing = other.handle if event.get_if_exists else b""
                self.send(source, ActorCreated(event.request_id, text, existing))
                return
            self.names[spec.namespace, spec.name] = spec.actor_id
        actor = Actor(spec)
        actor.record.created_at = self.now + self.epoch_offset
        self.actors[spec.actor_id] = actor
        if event.unready:
            actor.record.state = ActorState.DEPENDENCIES_UNREADY
        else:
            self.waiting_actors[spec.actor_id] = None
        if not spec.detached or event.unready:
            self.actors_of.setdefault(spec.owner, set()).add(spec.actor_id)
        self.journal("actor_spec", spec.actor_id, spec)
        self._save(actor, "created")
        self.send(source, ActorCreated(event.request_id))
        self._subscribe(actor, source)
        self.view_changed = True

    @handles(ActorArguments)
    def on_actor_arguments(self, event: ActorArguments, source: int) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is None or actor.record.state is not ActorState.DEPENDENCIES_UNREADY:
            return
        actor.spec = msgspec.structs.replace(actor.spec, dependencies=event.dependencies)
        self.journal("actor_spec", event.actor_id, actor.spec)
        if actor.spec.detached:
            self._disown(actor)
        self._step(actor, ActorState.PENDING_CREATION, "ActorArguments")
        self._wait(actor, "its arguments are ready")

    def place_actors(self) -> None:
        """Find a node for each that has none; those alike to one that found none are not tried again in this pass."""
        hopeless: set[bytes] = set()
        for actor_id in list(self.waiting_actors):
            actor = self.actors[actor_id]
            if actor.key in hopeless:
                continue
            if not self._place(actor):
                hopeless.add(actor.key)

    def _place(self, actor: Actor) -> bool:
        spec = actor.spec
        if spec.shape.group_id and self.group_is_gone(spec.shape.group_id):
            self.bury_actor(actor, DeathCause("GROUP_REMOVED", "its placement group was removed"))
            return True
        strategy = spec.shape.strategy
        self._actor_turn += strategy.kind == "SPREAD"
        prefer = node_of(spec.owner)
        search = self._searches.setdefault((actor.key, prefer), Search()).at(self.room_version)
        if len(self._searches) > MAX_SEARCHES:
            self._searches.clear()
        verdict, node = choose(
            self.living, spec.placement, strategy, prefer=prefer, turn=self._actor_turn, search=search
        )
        if verdict is Verdict.IMPOSSIBLE:
            text = f"the node {strategy.node_id.hex()} that its scheduling strategy names (soft=False) is not alive"
            self.bury_actor(actor, DeathCause("UNSCHEDULABLE", text))
            return True
        if verdict is Verdict.NOWHERE:
            if not spec.shape.group_id and spec.actor_id not in self._warned_actors:
                self.set_timer("infeasible_actors", self.now + INFEASIBLE_S)
            return False
        record = actor.record
        record.attempt += 1
        self._set_node(actor, node)
        del self.waiting_actors[spec.actor_id]
        self._warned_actors.discard(spec.actor_id)
        self.take(node, spec.shape.resources)
        self._save(actor, f"attempt {record.attempt} to node {node}")
        self.send(raylet_address(node), StartActor(record.attempt, spec))
        return True

    def timer_infeasible_actors(self) -> None:
        """Tell owners, once for each actor, what it needs and what there is. Where a group is missing, the group is told of."""
        self._warned_actors &= self.waiting_actors.keys()
        for actor_id in self.waiting_actors:
            spec = self.actors[actor_id].spec
            if spec.shape.group_id or actor_id in self._warned_actors:
                continue
            if choose(self.views.values(), spec.placement, spec.shape.strategy)[0] is Verdict.NOWHERE:
                self._warned_actors.add(actor_id)
                asks = f"the actor {spec.class_name} asks for {readable(spec.placement)} (strategy {spec.shape.strategy.kind})"
                self.send(spec.owner, infeasible(self.views.values(), asks, spec.shape.job_id))

    @handles(ActorRejected)
    def on_actor_rejected(self, event: ActorRejected, source: int) -> None:
        actor = self._current(event.actor_id, event.attempt)
        if actor is None or actor.record.address:
            return
        if event.cause is not None:
            self.bury_actor(actor, event.cause)
            return
        node = actor.record.node
        self._set_node(actor, -1)
        self._save(actor, f"rejected by node {node}")
        self.waiting_actors[event.actor_id] = None
        self.set_timer("actors", self.now + RETRY_S)

    def timer_actors(self) -> None:
        self.view_changed = True

    @handles(ActorStarting)
    def on_actor_starting(self, event: ActorStarting, source: int) -> None:
        actor = self._current(event.actor_id, event.attempt)
        if actor is None:
            return
        actor.record.pid = event.pid
        self._set_address(actor, event.address)
        self._save(actor, f"starting in process {event.pid}")
        if actor.record.state is ActorState.ALIVE:  # its own word came first
            self._publish(actor)

    @handles(ActorReady)
    def on_actor_ready(self, event: ActorReady, source: int) -> None:
        actor = self._current(event.actor_id, event.attempt)
        if actor is None or actor.record.state is ActorState.ALIVE:
            return
        self._set_address(actor, event.address)
        self._step(actor, ActorState.ALIVE, "ActorReady")
        actor.record.cause = None
        actor.record.ready_at = self.now + self.epoch_offset
        self._save(actor, "ready")
        self._publish(actor)

    @handles(ActorInitFailed)
    def on_actor_init_failed(self, event: ActorInitFailed, source: int) -> None:
        actor = self._current(event.actor_id, event.attempt)
        if actor is not None:
            self._stop(actor, event.cause.text or "its __init__ failed")
            self.bury_actor(actor, event.cause)

    @handles(ActorFailed)
    def on_actor_failed(self, event: ActorFailed, source: int) -> None:
        actor = self._current(event.actor_id, event.attempt)
        if actor is not None:
            self._stop(actor, event.text)
            self._process_gone(actor, DeathCause("CRASHED", event.text, pid=actor.record.pid))

    def _set_address(self, actor: Actor, address: int) -> None:
        if actor.record.address != address:
            self.actor_at.pop(actor.record.address, None)
        actor.record.address = address
        self.actor_at[address] = actor.spec.actor_id

    def _current(self, actor_id: bytes, attempt: int) -> Actor | None:
        """The actor, if this is about its present attempt (ACTOR-2)."""
        actor = self.actors.get(actor_id)
        if actor is None or actor.is_dead or actor.record.attempt != attempt or actor.record.node < 0:
            return None
        return actor

    # -- ending

    @handles(KillActor)
    def on_kill_actor(self, event: KillActor, source: int) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is None or actor.is_dead:
            return
        cause = DeathCause("KILLED", "it was killed by `ray.kill`", pid=actor.record.pid)
        if event.no_restart:
            self._stop(actor, cause.text)
            self.bury_actor(actor, cause)
        elif actor.record.address:
            self._stop(actor, cause.text)
            self._process_gone(actor, cause)

    @handles(ActorOutOfScope)
    def on_actor_out_of_scope(self, event: ActorOutOfScope, source: int) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is None or actor.is_dead or actor.record.stopping:
            return
        if actor.record.state is not ActorState.ALIVE:
            cause = DeathCause("OUT_OF_SCOPE", "all handles to it are gone")
            self._stop(actor, cause.text)
            self.bury_actor(actor, cause)
            return
        actor.record.stopping = True
        self._free_name(actor)
        self._save(actor, "out of scope")
        self._publish(actor)
        self._stop(actor, "all handles to it are gone", force=False)

    def _stop(self, actor: Actor, reason: str, *, force: bool = True) -> None:
        record = actor.record
        if record.node >= 0:
            message = StopActor(actor.spec.actor_id, record.attempt, force, reason)
            self.send(raylet_address(record.node), message)

    def _process_gone(self, actor: Actor, cause: DeathCause) -> None:
        """Its process is dead or dying: start anew, or not (ACTOR-6)."""
        record = actor.record
        if record.stopping:
            self.bury_actor(actor, DeathCause("OUT_OF_SCOPE", "all handles to it are gone", pid=record.pid))
        elif cause.kind not in _RESTARTABLE or actor.restarts_left == 0:
            self.bury_actor(actor, cause)
        else:
            record.restarts += 1
            self._detach(actor)
            self._step(actor, ActorState.RESTARTING, cause.kind)
            record.cause = cause
            self._wait(actor, f"restart {record.restarts}: {cause.kind} {cause.text}")
            self._publish(actor)

    def _wait(self, actor: Actor, text: str) -> None:
        self._save(actor, text)
        self.waiting_actors[actor.spec.actor_id] = None
        self.view_changed = True

    def _detach(self, actor: Actor) -> None:
        """It has no process any more."""
        record = actor.record
        if self.actor_at.get(record.address) == actor.spec.actor_id:
            del self.actor_at[record.address]
        self._set_node(actor, -1)
        record.address, record.pid = 0, 0

    def _set_node(self, actor: Actor, node: int) -> None:
        actor_id, before = actor.spec.actor_id, actor.record.node
        if before >= 0:
            del self.actors_on[before][actor_id]
        actor.record.node = node
        if node >= 0:
            self.actors_on.setdefault(node, {})[actor_id] = None

    def bury_actor(self, actor: Actor, cause: DeathCause) -> None:
        """The end of it (ACTOR-1)."""
        spec = actor.spec
        self._step(actor, ActorState.DEAD, cause.kind)
        if actor.record.node >= 0 and not cause.node_id and actor.record.node in self.views:
            cause = msgspec.structs.replace(cause, node_id=self.views[actor.record.node].node_id)
        actor.record.cause = cause
        pid = actor.record.pid
        self._detach(actor)
        actor.record.pid = pid
        self._free_name(actor)
        self.waiting_actors.pop(spec.actor_id, None)
        self._disown(actor)
        self._save(actor, f"dead: {cause.kind} {cause.text}")
        self._publish(actor)
        for process in actor.subscribers:
            held = self.subscriptions.get(process, {})
            held.pop(spec.actor_id, None)
            if not held:
                self.subscriptions.pop(process, None)
        actor.subscribers.clear()
        self.dead_actors[spec.actor_id] = None
        if len(self.dead_actors) > MAX_DEAD_ACTORS:
            oldest = next(iter(self.dead_actors))
            del self.dead_actors[oldest], self.actors[oldest]
            self.journal("actor", oldest, None)
            self.journal("actor_spec", oldest, None)

    def _disown(self, actor: Actor) -> None:
        owned = self.actors_of.get(actor.spec.owner)
        if owned is not None:
            owned.discard(actor.spec.actor_id)
            if not owned:
                del self.actors_of[actor.spec.owner]

    def _free_name(self, actor: Actor) -> None:
        key = (actor.spec.namespace, actor.spec.name)
        if self.names.get(key) == actor.spec.actor_id:
            del self.names[key]

    def actor_process_died(self, address: int, cause: DeathCause) -> None:
        actor_id = self.actor_at.get(address)
        if actor_id is not None:
            self._process_gone(self.actors[actor_id], cause)

    def actor_owner_died(self, address: int, text: str) -> None:
        for actor_id in sorted(self.actors_of.get(address, ())):
            self._end(self.actors[actor_id], DeathCause("OWNER_DIED", text))

    def actors_lose_node(self, node: int, node_id: bytes, text: str) -> None:
        for actor_id in list(self.actors_on.get(node, ())):
            actor = self.actors[actor_id]
            cause = DeathCause("NODE_DIED", f"its node died: {text}", node_id=node_id, pid=actor.record.pid)
            if actor.record.address:
                self._process_gone(actor, cause)
            else:  # nothing had begun there
                self._detach(actor)
                self._wait(actor, "its node died before it began")

    def end_actors_of_job(self, job_id: bytes) -> None:
        for actor in list(self.actors.values()):
            if actor.spec.job_id == job_id and not actor.spec.detached:
                self._end(actor, DeathCause("OWNER_DIED", "its job is over"))

    def end_actors_of_group(self, group_id: bytes) -> None:
        for actor in list(self.actors.values()):
            if actor.spec.shape.group_id == group_id:
                self._end(actor, DeathCause("GROUP_REMOVED", "its placement group was removed"))

    def _end(self, actor: Actor, cause: DeathCause) -> None:
        if not actor.is_dead:
            self._stop(actor, cause.text)
            self.bury_actor(actor, cause)

    # -- telling

    @handles(SubscribeActor)
    def on_subscribe_actor(self, event: SubscribeActor, source: int) -> None:
        actor = self.actors.get(event.actor_id)
        if actor is None:
            cause = DeathCause("UNKNOWN", "the GCS does not know it: it was never made, or it died long ago")
            self.send(source, ActorUpdate(ActorInfo(event.actor_id, ActorState.DEAD, cause=cause)))
            return
        if not actor.is_dead:
            self._subscribe(actor, source)
        self.send(source, ActorUpdate(self.actor_info(actor)))

    def _subscribe(self, actor: Actor, process: int) -> None:
        actor.subscribers[process] = None
        self.subscriptions.setdefault(process, {})[actor.spec.actor_id] = None

    def drop_subscriber(self, process: int) -> None:
        for actor_id in self.subscriptions.pop(process, {}):
            self.actors[actor_id].subscribers.pop(process, None)

    @handles(GetNamedActor)
    def on_get_named_actor(self, event: GetNamedActor, source: int) -> None:
        actor_id = self.names.get((event.namespace, event.name))
        if actor_id is None:
            self.send(source, NamedActor(event.request_id, b""))
            return
        actor = self.actors[actor_id]
        self.send(source, NamedActor(event.request_id, actor.spec.handle, self.actor_info(actor)))

    def _publish(self, actor: Actor) -> None:
        update = ActorUpdate(self.actor_info(actor))
        for process in actor.subscribers:
            self.send(process, update)

    def actor_info(self, actor: Actor) -> ActorInfo:
        record, spec = actor.record, actor.spec
        view = self.views.get(record.node)
        return ActorInfo(
            spec.actor_id,
            record.state,
            record.address if record.state is ActorState.ALIVE else 0,
            max(record.attempt, 0),
            view.node_id if view is not None else b"",
            record.pid,
            actor.restarts_left,
            record.cause,
            spec.class_name,
            spec.name,
            spec.namespace,
            record.stopping,
        )

    def waiting_for_actors(self) -> list[tuple[Resources, int]]:
        """Of the actors without a place, but those that only certain nodes may have: what one needs, and how many."""
        found: dict[bytes, tuple[Resources, int]] = {}
        for actor_id in self.waiting_actors:
            actor = self.actors[actor_id]
            shape = actor.spec.shape
            if shape.strategy.kind in ANYWHERE and not shape.group_id:
                _, count = found.get(actor.key, ({}, 0))
                found[actor.key] = (actor.spec.placement, count + 1)
        return list(found.values())

    def query_list_actors(self) -> list[dict[str, Any]]:
        return [self._row(actor) for actor in self.actors.values()]

    def query_get_actor(self, actor_id: bytes) -> dict[str, Any] | None:
        actor = self.actors.get(actor_id)
        return None if actor is None else self._row(actor)

    def query_list_named_actors(self, namespace: str = "", all_namespaces: bool = False) -> list[dict[str, str]]:
        return [
            {"name": name, "namespace": where} for where, name in self.names if all_namespaces or where == namespace
        ]

    def _row(self, actor: Actor) -> dict[str, Any]:
        record, spec = actor.record, actor.spec
        view = self.views.get(record.node)
        cause = record.cause
        return {
            "actor_id": spec.actor_id,
            "class_name": spec.class_name,
            "state": record.state.name,
            "name": spec.name,
            "namespace": spec.namespace,
            "job_id": spec.job_id,
            "owner": spec.owner,
            "detached": spec.detached,
            "node_id": view.node_id if view is not None else cause.node_id if cause is not None else b"",
            "address": record.address,
            "pid": record.pid,
            "attempt": max(record.attempt, 0),
            "restarts": record.restarts,
            "restarts_left": actor.restarts_left,
            "resources": spec.shape.resources,
            "runtime_env": spec.shape.runtime_env,
            "group_id": spec.shape.group_id,
            "call_site": spec.call_site,
            "recorded": spec.recorded,
            "creation_task_id": spec.creation_task_id,
            "created_at": record.created_at,
            "ready_at": record.ready_at,
            "death_kind": cause.kind if cause else "",
            "death_text": cause.text if cause else "",
        }

    # -- common

    def _save(self, actor: Actor, text: str) -> None:
        self._note(actor, text)
        self.journal("actor", actor.spec.actor_id, actor.record)

    def _note(self, actor: Actor, text: str) -> None:
        self.history.add(actor.spec.actor_id.hex(), self.now, text)

    def _step(self, actor: Actor, end: ActorState, event: str) -> None:
        ACTOR_STEPS.check(actor.spec.actor_id.hex(), actor.record.state, end, event, self.history)
        actor.record.state = end

    # -- after a restart of the session

    def restore_actor(self, spec: ActorSpec, record: ActorRecord) -> None:
        actor = Actor(spec, record)
        self.actors[spec.actor_id] = actor
        if actor.is_dead:
            self.dead_actors[spec.actor_id] = None
            return
        if spec.name and not record.stopping:
            self.names[spec.namespace, spec.name] = spec.actor_id
        unready = record.state is ActorState.DEPENDENCIES_UNREADY
        if not spec.detached or unready:
            self.actors_of.setdefault(spec.owner, set()).add(spec.actor_id)
        if record.address:
            self.actor_at[record.address] = spec.actor_id
        if record.node >= 0:
            self.actors_on.setdefault(record.node, {})[spec.actor_id] = None
        if record.node < 0 and not unready:
            self.waiting_actors[spec.actor_id] = None

    def resume_actors(self) -> None:
        """No process of the former session lives: detached actors start anew, the others are dead."""
        for actor in list(self.actors.values()):
            if actor.is_dead:
                continue
            if not actor.spec.detached or actor.record.state is ActorState.DEPENDENCIES_UNREADY:
                self.bury_actor(actor, DeathCause("OWNER_DIED", "the session that it belonged to is over"))
                continue
            self._detach(actor)
            if actor.record.state is ActorState.ALIVE:
                self._step(actor, ActorState.RESTARTING, "resume")
            self._wait(actor, "resumed from the journal")


def taken_text(name: str, namespace: str) -> str:
    return (
        f"The name {name} (namespace={namespace}) is already taken. Please use a different name or get the existing "
        f"actor using ray.get_actor('{name}', namespace='{namespace}')"
    )

"""The nodes of the session, and the view of them that everybody gets. The part of ``GcsState`` that keeps it.

NODE-1 (membership at once): a death is told to all raylets in the same step; others that follow it closely are told together, and so
are joins. How closely grows with the number of nodes: whatever happens, the GCS spends only a part of its time on telling.
NODE-2 (bounded): changes of amounts go out at most once per view interval, which grows with the number of nodes.
NODE-3 (final): a dead node's index and id never live again.
NODE-4 (passed on): where there are many raylets, the view goes to a few, and from those to others. Whom a dying one did not tell hears
all of it with the next view, for every death makes that one whole. Deaths themselves are told to all by the GCS.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import msgspec

from hpc_ray.gcs.part import DEFERRED, Deferred, Part
from hpc_ray.ids import address_of, node_of, raylet_address
from hpc_ray.machine import handles
from hpc_ray.protocol import (
    VERSION,
    Answer,
    ClusterView,
    Deaths,
    NodeDied,
    NodeInfo,
    NodeRegistered,
    ProcessDied,
    ProcessKind,
    RegisterNode,
    ReportResources,
    Resources,
    ResourcesSet,
    SetResources,
)
from hpc_ray.scheduling import FANOUT, NodeView, branches

VIEW_INTERVAL_S = 0.05
VIEW_NODES = 256  # from this many nodes on the interval grows
JOIN_WINDOW_S = 0.002
JOIN_NODES = 256  # from this many nodes on that grows
TELLING_S = 10e-6  # for each raylet, between two tellings of deaths; it takes a few to tell one
TAKE_S = 0.3  # a node that is as free as before does not say so; believe its last report again after this long


class Nodes(Part):
    """See the module's text."""

    def init_nodes(self) -> None:
        self.nodes: dict[int, NodeInfo] = {}
        self.views: dict[int, NodeView] = {}
        self.view_changed = False
        self._times: dict[int, tuple[float, float]] = {}  # from when to when (0: lives), seconds of the epoch
        self._sequences: dict[int, int] = {}
        self.living: list[NodeView] = []  # by index
        self.room_version = 0  # changes when some node may have more room than before
        self._taken: set[int] = set()  # nodes of whose room something was taken
        self._untold: dict[int, None] = {}  # nodes whose change has not been broadcast
        self._newcomers: dict[int, None] = {}  # have not heard of the others
        self._view_number = 0
        self._deaths: list[NodeDied | ProcessDied] = []  # to be told
        self._deaths_at = 0.0  # not before
        self._view_at = 0.0
        self._setting: dict[tuple[int, int], set[int]] = {}  # (asker, request) → nodes that have not set what it wants
        self._awaited: dict[tuple[int, int], int] = {}  # (asker, request) → how many nodes it waits for

    def take(self, node: int, demand: Resources) -> None:
        """Count something that was just sent to a node, until its next report or for ``TAKE_S``."""
        self.views[node].take(demand)
        self._taken.add(node)
        self.set_timer("takes", self.now + TAKE_S)

    def timer_takes(self) -> None:
        for node in self._taken:
            self.views[node].forget_takes()
        self._taken.clear()
        self._room_appeared()

    def _room_appeared(self) -> None:
        self.room_version += 1
        self.view_changed = True

    def raylets(self) -> Iterator[int]:
        for view in self.living:
            yield raylet_address(view.index)

    def tell_raylets(self, message: object) -> None:
        for address in self.raylets():
            self.send(address, message)

    @handles(RegisterNode)
    def on_register_node(self, event: RegisterNode, source: int) -> None:
        info = event.info
        refusal = self._refusal(event)
        if refusal:
            self.send(source, NodeRegistered(refusal))
            return
        self.history.add(f"node {info.index}", self.now, f"registered from {info.hostname}")
        self.nodes[info.index] = info
        self.views[info.index] = view = NodeView(info)
        bisect.insort(self.living, view, key=lambda view: view.index)
        self._sequences[info.index] = 0
        self._times[info.index] = (self.now + self.epoch_offset, 0.0)
        self._room_appeared()
        self.send(source, NodeRegistered())
        self._untold[info.index] = None
        self._newcomers[info.index] = None
        self.set_timer("join", self.now + JOIN_WINDOW_S * max(1.0, len(self.living) / JOIN_NODES))
        for (asker, request_id), count in list(self._awaited.items()):
            if len(self.nodes) >= count:
                del self._awaited[asker, request_id]
                self.send(asker, Answer(request_id, len(self.nodes)))

    def _refusal(self, event: RegisterNode) -> str:
        info = event.info
        if event.version != VERSION:
            return f"it speaks version {event.version} of the protocol, this session version {VERSION}"
        if event.build and self.build and event.build != self.build:
            return f"it runs build {event.build}, this session {self.build}: install the same one on all hosts"
        if info.index in self.nodes:
            known = self.nodes[info.index]
            state = "alive" if known.alive else f"dead ({known.death})"
            return f"node {info.index} is registered already, on {known.hostname}, {state}"
        return ""

    build = ""

    @handles(ReportResources)
    def on_report_resources(self, event: ReportResources, source: int) -> None:
        known = self.nodes.get(event.node)
        if known is None or not known.alive or event.sequence <= self._sequences[event.node]:
            return
        self._sequences[event.node] = event.sequence
        info = msgspec.structs.replace(known, total=event.total, available=event.available, pending=event.pending)
        self.nodes[event.node] = info
        if self.views[event.node].update(info):
            self._room_appeared()
        self._untold[event.node] = None
        self.set_timer("view", max(self._view_at, self.now))

    def timer_view(self) -> None:
        self._broadcast()

    def timer_join(self) -> None:
        self._broadcast()

    @property
    def view_interval(self) -> float:
        return VIEW_INTERVAL_S * max(1.0, len(self.views) / VIEW_NODES)

    def _broadcast(self) -> None:
        """What has changed, to all; everything to those who are new."""
        newcomers = [index for index in self._newcomers if self.views[index].alive]
        if newcomers:
            self._tell_view(list(self.nodes.values()), newcomers)
        if self._untold:
            others = [view.index for view in self.living if view.index not in self._newcomers]
            self._tell_view([self.nodes[index] for index in self._untold], others)
            self._untold.clear()
            self._view_at = self.now + self.view_interval
        self._newcomers.clear()

    def _tell_view(self, nodes: list[NodeInfo], to: list[int]) -> None:
        """NODE-4"""
        self._view_number += 1
        plain = ClusterView(nodes, self._view_number)
        for head, rest in branches(to):
            self.send(raylet_address(head), ClusterView(nodes, self._view_number, rest) if rest else plain)

    # -- deaths

    @handles(ProcessDied)
    def on_process_died(self, event: ProcessDied, source: int) -> None:
        node = node_of(event.address)
        if event.kind in (ProcessKind.RAYLET, ProcessKind.LINK):
            if event.kind == ProcessKind.LINK and node == 0:  # ours: from here, all the others are gone
                for other in [index for index in self.views if index]:
                    self.lose_node(other, f"the link of the head node died: {event.cause.text}")
            else:
                self.lose_node(node, f"its {ProcessKind(event.kind).name.lower()} died: {event.cause.text}")
            return
        self._tell_death(event)
        self.process_died(event.address, event.cause)

    def _tell_death(self, notice: NodeDied | ProcessDied) -> None:
        """NODE-1"""
        self._deaths.append(notice)
        if self.now >= self._deaths_at:
            self.timer_deaths()
        else:
            self.set_timer("deaths", self._deaths_at)

    def timer_deaths(self) -> None:
        deaths, self._deaths = self._deaths, []
        if not deaths:
            return
        self._deaths_at = self.now + TELLING_S * len(self.living)
        only = deaths[0] if len(deaths) == 1 else None
        nodes = [notice for notice in deaths if isinstance(notice, NodeDied)]
        message = only or Deaths(nodes, [notice for notice in deaths if isinstance(notice, ProcessDied)])
        own = node_of(deaths[0].address) if isinstance(deaths[0], ProcessDied) else -1
        if any(isinstance(notice, NodeDied) or node_of(notice.address) != own for notice in deaths):
            own = -1
        for view in self.living:
            if view.index != own:  # its raylet has told its processes
                self.send(raylet_address(view.index), message)

    @handles(NodeDied)
    def on_node_died(self, event: NodeDied, source: int) -> None:
        self.lose_node(event.node, event.text)

    def lose_node(self, index: int, text: str) -> None:
        """Everything that lived there is gone (NODE-3)."""
        info = self.nodes.get(index)
        if info is None or not info.alive:
            return
        self.history.add(f"node {index}", self.now, f"died: {text}")
        self.nodes[index] = msgspec.structs.replace(info, alive=False, death=text, available={}, pending=[])
        self.views[index].alive = False
        self.living.remove(self.views[index])
        self._times[index] = (self._times[index][0], self.now + self.epoch_offset)
        self._untold[index] = None
        if len(self.living) > FANOUT:  # some may not have heard of others from it
            self._untold.update(dict.fromkeys(self.nodes))
        self.set_timer("view", max(self._view_at, self.now))
        self._tell_death(NodeDied(index, info.node_id, text))
        self._room_appeared()  # places in the row of the living have changed
        self._node_is_set(index)
        self.node_lost(index, info.node_id, text)

    # -- questions

    def query_nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "node_id": info.node_id,
                "index": info.index,
                "alive": info.alive,
                "hostname": info.hostname,
                "ip": info.ip,
                "pid": info.pid,
                "total": info.total,
                "available": info.available,
                "labels": info.labels,
                "is_head": info.is_head,
                "arena_bytes": info.arena_bytes,
                "death": info.death,
                "raylet": address_of(info.index, 0),
                "start_time": self._times[info.index][0],
                "end_time": self._times[info.index][1],
            }
            for info in self.nodes.values()
        ]

    def query_wait_nodes(self, count: int) -> int | Deferred:
        """Answered, with their number, once that many nodes have registered."""
        if len(self.nodes) >= count:
            return len(self.nodes)
        self._awaited[self.asker] = count
        return DEFERRED

    def query_set_resources(self, resources: Resources, labels: dict[str, str], object_store_memory: int = 0) -> Deferred:
        """What a driver's ``init`` was given in a world that it has not started: the asker's node has these, no other node has
        any of these resources, each node's store has this many bytes, and all else is as it was configured. Answered when all
        nodes say so."""
        asker = self.asker[0]
        for index, view in self.views.items():
            if view.alive:
                mine = index == node_of(asker)
                given = (resources, labels, []) if mine else ({}, {}, list(resources))
                self.send(raylet_address(index), SetResources(*given, object_store_memory))
                self._setting.setdefault(self.asker, set()).add(index)
        return DEFERRED

    @handles(ResourcesSet)
    def on_resources_set(self, event: ResourcesSet, source: int) -> None:
        info = self.nodes[event.node]
        if info.labels != event.labels:
            self.nodes[event.node] = msgspec.structs.replace(info, labels=event.labels)
            self.views[event.node].update(self.nodes[event.node])
            self._room_appeared()
            self._untold[event.node] = None
        self._broadcast()
        self._node_is_set(event.node)

    def _node_is_set(self, node: int) -> None:
        for (asker, request_id), nodes in list(self._setting.items()):
            nodes.discard(node)
            if not nodes:
                del self._setting[asker, request_id]
                self.send(asker, Answer(request_id, None))

    def query_cluster_resources(self) -> Resources:
        return _sum(info.total for info in self.nodes.values() if info.alive)

    def query_available_resources(self) -> Resources:
        return _sum(info.available for info in self.nodes.values() if info.alive)

    def query_pending_resources(self) -> list[Resources]:
        """What waits for room on the nodes, as last reported."""
        return [demand for info in self.nodes.values() if info.alive for demand in info.pending]


def _sum(tables: Any) -> Resources:
    sums: Resources = {}
    for table in tables:
        for name, amount in table.items():
            sums[name] = sums.get(name, 0) + amount
    return sums

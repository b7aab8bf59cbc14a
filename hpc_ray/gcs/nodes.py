"""The nodes of the session, and the view of them that everybody gets. The part of ``GcsState`` that keeps it.

NODE-1 (membership at once): a death is told to all raylets in the same step; joins within 2 ms are told together.
NODE-2 (bounded): changes of amounts go out at most once per view interval, which grows with the number of nodes.
NODE-3 (final): a dead node's index and id never live again.
"""

from __future__ import annotations

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
from hpc_ray.scheduling import NodeView

VIEW_INTERVAL_S = 0.05
VIEW_NODES = 32  # from this many nodes on the interval grows
JOIN_WINDOW_S = 0.002
TAKE_S = 0.3  # a node that is as free as before does not say so; believe its last report again after this long


class Nodes(Part):
    """See the module's text."""

    def init_nodes(self) -> None:
        self.nodes: dict[int, NodeInfo] = {}
        self.views: dict[int, NodeView] = {}
        self.view_changed = False
        self._times: dict[int, tuple[float, float]] = {}  # from when to when (0: lives), seconds of the epoch
        self._sequences: dict[int, int] = {}
        self._untold: dict[int, None] = {}  # nodes whose change has not been broadcast
        self._view_at = 0.0
        self._setting: dict[tuple[int, int], set[int]] = {}  # (asker, request) → nodes that have not set what it wants
        self._awaited: dict[tuple[int, int], int] = {}  # (asker, request) → how many nodes it waits for

    def take(self, node: int, demand: Resources) -> None:
        """Count something that was just sent to a node, until its next report or for ``TAKE_S``."""
        self.views[node].take(demand)
        self.set_timer("takes", self.now + TAKE_S)

    def timer_takes(self) -> None:
        for view in self.views.values():
            view.forget_takes()
        self.view_changed = True

    def raylets(self) -> Iterator[int]:
        for index, view in self.views.items():
            if view.alive:
                yield raylet_address(index)

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
        self.views[info.index] = NodeView(info)
        self._sequences[info.index] = 0
        self._times[info.index] = (self.now + self.epoch_offset, 0.0)
        self.view_changed = True
        self.send(source, NodeRegistered())
        self.send(source, ClusterView([node for node in self.nodes.values() if node.index != info.index]))
        self._untold[info.index] = None
        self.set_timer("join", self.now + JOIN_WINDOW_S)
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
        self.views[event.node] = NodeView(info)
        self._untold[event.node] = None
        self.view_changed = True
        self.set_timer("view", max(self._view_at, self.now))

    def timer_view(self) -> None:
        self._broadcast()

    def timer_join(self) -> None:
        self._broadcast()

    @property
    def view_interval(self) -> float:
        return VIEW_INTERVAL_S * max(1.0, len(self.views) / VIEW_NODES)

    def _broadcast(self) -> None:
        if self._untold:
            self.tell_raylets(ClusterView([self.nodes[index] for index in self._untold]))
            self._untold.clear()
            self._view_at = self.now + self.view_interval

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
        for index, view in self.views.items():
            if view.alive and index != node:
                self.send(raylet_address(index), event)
        self.process_died(event.address, event.cause)

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
        self._times[index] = (self._times[index][0], self.now + self.epoch_offset)
        self._untold[index] = None
        self.set_timer("view", max(self._view_at, self.now))
        self.tell_raylets(NodeDied(index, info.node_id, text))
        self.view_changed = True
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
            self.views[event.node] = NodeView(self.nodes[event.node])
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

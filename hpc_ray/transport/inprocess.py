"""Nodes within one process: a transport for tests and the simulator. The clock is an argument; nothing waits."""

from __future__ import annotations

import heapq
import itertools
from typing import Any

from hpc_ray.clock import Clock
from hpc_ray.transport import Deliver, Event, Objects, PeerLost, TransferEnded, Transport


class Fabric:
    """What connects the nodes: a latency, a bandwidth, and losses on command."""

    def __init__(self, clock: Clock, *, latency_s: float = 0.0, bytes_per_s: float = float("inf")):
        self.clock = clock
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.ends: dict[int, InProcessTransport] = {}
        self._order = itertools.count()

    def cut(self, node: int, text: str = "cut by the test") -> None:
        """The node is gone, for all others at once."""
        gone = self.ends.pop(node)
        gone.queue.clear()
        for end in self.ends.values():
            end.lose(node, text)

    def post(self, source: int, destination: int, item: tuple[Any, ...], size: int) -> None:
        end = self.ends.get(destination)
        if end is None:
            return
        start = max(self.clock.monotonic(), end.free_at.get(source, 0.0))
        end.free_at[source] = start + size / self.bytes_per_s
        heapq.heappush(end.queue, (end.free_at[source] + self.latency_s, next(self._order), item))

    def next_arrival(self) -> float | None:
        """When the next thing arrives anywhere; for virtual clocks."""
        times = [end.queue[0][0] for end in self.ends.values() if end.queue]
        return min(times) if times else None


class InProcessTransport(Transport):
    """One node's end in a Fabric."""

    def __init__(self, fabric: Fabric, node: int, nodes: int, objects: Objects, deliver: Deliver):
        self.fabric = fabric
        self.node = node
        self.nodes = nodes
        self.queue: list[tuple[float, int, tuple[Any, ...]]] = []
        self.free_at: dict[int, float] = {}
        self._objects = objects
        self._deliver = deliver
        self._events: list[Event] = []
        self._transfers: dict[int, tuple[int, int]] = {}  # id → source node, handle
        fabric.ends[node] = self

    def send(self, node: int, source: int, destination: int, payload: bytes) -> None:
        self.fabric.post(self.node, node, ("message", self.node, source, destination, bytes(payload)), len(payload))

    def transfer(self, transfer_id: int, source_node: int, source_handle: int, handle: int, size: int) -> None:
        if source_node not in self.fabric.ends:
            self._events.append(TransferEnded(transfer_id, f"node {source_node} is gone"))
            return
        self._transfers[transfer_id] = (source_node, handle)
        self.fabric.post(self.node, source_node, ("fetch", self.node, transfer_id, source_handle, size), 64)

    def poll(self) -> list[Event]:
        now = self.fabric.clock.monotonic()
        while self.queue and self.queue[0][0] <= now:
            kind, node, *rest = heapq.heappop(self.queue)[2]
            if kind == "message":
                self._deliver(node, *rest)
            elif kind == "fetch":
                transfer_id, handle, size = rest
                data = self._objects.get(handle)
                if data is None or len(memoryview(data)) != size:
                    self.fabric.post(self.node, node, ("object", self.node, transfer_id, None), 64)
                else:
                    self.fabric.post(self.node, node, ("object", self.node, transfer_id, bytes(data)), size)
            else:
                transfer_id, data = rest
                known = self._transfers.pop(transfer_id, None)
                if known is None:
                    continue
                if data is None:
                    self._events.append(TransferEnded(transfer_id, "the object is not there any more"))
                else:
                    self._objects.write_buffer(known[1])[:] = data
                    self._events.append(TransferEnded(transfer_id, ""))
        events, self._events = self._events, []
        return events

    def lose(self, node: int, text: str) -> None:
        self._events.append(PeerLost(node, text))
        for transfer_id, (source, _) in list(self._transfers.items()):
            if source == node:
                del self._transfers[transfer_id]
                self._events.append(TransferEnded(transfer_id, f"node {node} is gone: {text}"))

    @property
    def busy(self) -> bool:
        return bool(self.queue or self._events)

    @property
    def backlog_bytes(self) -> int:
        return 0

    def close(self, timeout_s: float) -> bool:
        self.fabric.ends.pop(self.node, None)
        return True

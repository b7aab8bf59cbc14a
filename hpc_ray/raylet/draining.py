"""A node that is asked to leave. The part of ``RayletState`` that says whether it can, and goes.

DRAIN-1 (nothing is lost): a node goes only when nothing runs or waits on it, no driver is on it, none of its workers owns what others
use, and its arena holds nothing but copies of what is elsewhere.
DRAIN-2 (answered): whoever asks hears "" when the node goes, or what keeps it; then it is as before.
"""

from __future__ import annotations

from hpc_ray.machine import handles
from hpc_ray.protocol import Answer, DrainNode, ProcessKind, Shutdown
from hpc_ray.raylet.bundles import Bundles
from hpc_ray.raylet.copies import Copies
from hpc_ray.raylet.events import AskForkServer, ListObjects, ObjectsListed

ASIDE = (ProcessKind.LINK, ProcessKind.RAYLET, ProcessKind.GCS)  # processes that are on any node


class Draining(Bundles, Copies):
    """See the module's text."""

    def init_draining(self) -> None:
        self.drain: tuple[int, DrainNode] | None = None  # who asked, what; while it is looked whether it can be
        self.counting = False

    @handles(DrainNode)
    def on_drain_node(self, event: DrainNode, source: int) -> None:
        keeps = "it is asked already" if self.drain is not None else self.kept_by()
        if keeps:
            self.send(source, Answer(event.request_id, keeps))
            return
        self.drain = (source, event)
        self._look()

    def kept_by(self) -> str:
        """What the node is needed for, of what the raylet sees; "" for nothing."""
        if self.node == 0:
            return "it is the head"
        if self.stopping:
            return "it ends already"
        others = [peer for peer in self.peers.values() if peer.kind not in ASIDE]
        for what, count in (
            ("processes of others", len(others)),
            ("tasks or actors", len(self.leases)),
            ("requests", len(self.requests)),
            ("bundles of placement groups", len(self.bundles)),
            ("transfers of objects", len(self.pulls) + len(self.givings)),
            ("workers that own objects in use", sum(worker.stays for worker in self.workers.values())),
        ):
            if count:
                return f"it has {count} {what}"
        return ""

    def _look(self) -> None:
        self.counting = True
        self.act(ListObjects())

    @handles(ObjectsListed)
    def on_objects_listed(self, event: ObjectsListed, source: int) -> None:
        self.counting = False
        copies = set(self.copies.values())
        originals = sum(handle not in copies for handle in event.handles)
        if originals:
            self._stay(f"it has {originals} objects in use")
            return
        for worker in list(self.workers.values()):
            self.end(worker, "the node leaves", unless_used=True)

    def go_on_draining(self) -> None:
        """With every step of the raylet: something may have come that keeps the node; or its last worker is gone."""
        if self.drain is None or self.counting:
            return
        keeps = self.kept_by()
        if keeps:
            self._stay(keeps)
        elif not self.workers:
            source, event = self.drain
            self.drain = None
            self.send(source, Answer(event.request_id, ""))
            self.stopping = True
            self.act(AskForkServer(Shutdown(event.reason or "it was drained")))

    def _stay(self, keeps: str) -> None:
        assert self.drain is not None
        source, event = self.drain
        self.drain = None
        self.send(source, Answer(event.request_id, keeps))
        self.dirty = True

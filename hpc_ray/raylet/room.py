"""Room in the arena: who waits for it, and when objects go to files. The part of ``RayletState`` for that.

ROOM-1 (answered): each ArenaFullNotice is answered by one ArenaRoom, each pull without room goes on: in the arena, or in a file.
ROOM-2 (one at a time): at most one SpillObjects is under way; who asks meanwhile is in the next.
ROOM-3 (no waiting for others): when all that could go is in use, the object is made in a file instead, as there is no knowing when its
readers end.
"""

from __future__ import annotations

from hpc_ray.machine import handles
from hpc_ray.protocol import ArenaFullNotice, ArenaRoom
from hpc_ray.raylet.events import ObjectsSpilled, SpillObjects
from hpc_ray.raylet.part import Part


class Room(Part):
    """See the module's text."""

    def init_room(self) -> None:
        self.wanting: dict[tuple[int, int], int] = {}  # (asker, request id) → bytes; pulls ask as (0, transfer id)
        self.served: dict[tuple[int, int], int] = {}  # those whom the spill under way is for
        self.spilled_bytes = 0  # since the start, for statistics

    @handles(ArenaFullNotice)
    def on_arena_full_notice(self, event: ArenaFullNotice, source: int) -> None:
        if event.size > self.arena_bytes:
            self.send(source, ArenaRoom(event.request_id, on_disk=True))
            return
        self.want_room(source, event.request_id, event.size)

    def want_room(self, asker: int, number: int, size: int) -> None:
        self.wanting[asker, number] = size
        self._spill()

    def _spill(self) -> None:
        if self.wanting and not self.served:  # ROOM-2
            self.served, self.wanting = self.wanting, {}
            self.act(SpillObjects(min(sum(self.served.values()), self.arena_bytes), max(self.served.values())))

    @handles(ObjectsSpilled)
    def on_objects_spilled(self, event: ObjectsSpilled, source: int) -> None:
        self.spilled_bytes += event.freed
        served, self.served = self.served, {}
        for (asker, number), size in served.items():
            on_disk = size > event.largest_free
            error = event.error if on_disk else ""
            if asker:
                self.send(asker, ArenaRoom(number, error, event.error_kind if error else "", on_disk))
            else:
                self.room_made(number, on_disk, error)
        self._spill()

    def forget_asker(self, address: int) -> None:
        for asker, number in [key for key in self.wanting if key[0] == address]:
            del self.wanting[asker, number]

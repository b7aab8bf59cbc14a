"""Copies of objects from other nodes, and room in the arena. The part of ``RayletState`` that brings them here.

COPY-1 (one transfer): at most one transfer of an object is under way on a node; all who ask meanwhile get its outcome.
COPY-2 (answered): each PullObject is answered by ObjectLocal or PullFailed, also when the source dies.
COPY-3 (no half copies): a copy is sealed when its transfer is done, or aborted; never left as it is.
"""

from __future__ import annotations

import enum

from hpc_ray.ids import LINK_LANE, address_of, node_of, owner_of
from hpc_ray.machine import Table, handles
from hpc_ray.protocol import (
    AddPlace,
    ArenaFullNotice,
    ArenaRoom,
    DeleteCopies,
    ObjectLocal,
    OrphanedObject,
    PullFailed,
    PullObject,
    TransferDone,
    TransferObject,
)
from hpc_ray.raylet.events import (
    AbortCopy,
    AllocateCopy,
    CopyAllocated,
    CopyFound,
    DeleteObject,
    FindCopy,
    Reclaimed,
    SealCopy,
)
from hpc_ray.raylet.part import Part

FULL_WAITS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # between tries while the arena is full
FULL_MEMORY_S = 5.0  # a notice later than this after the last one starts afresh


class PullState(enum.Enum):
    LOOKING = 0  # is it here already?
    ALLOCATING = 1  # wants room; may wait for it
    MOVING = 2  # the link has it; ``handle`` is the block it writes to
    ENDED = 3


PULL_STEPS = Table(
    "pull",
    {
        PullState.LOOKING: {PullState.ALLOCATING, PullState.ENDED},
        PullState.ALLOCATING: {PullState.MOVING, PullState.ENDED},
        PullState.MOVING: {PullState.MOVING, PullState.ENDED},
        PullState.ENDED: (),
    },
)


class Pull:
    """One object on its way here."""

    def __init__(self, transfer_id: int, object_id: bytes, size: int):
        self.transfer_id = transfer_id
        self.object_id = object_id
        self.size = size
        self.state = PullState.LOOKING
        self.askers: dict[int, None] = {}
        self.places: dict[int, int] = {}  # node → handle, not tried yet
        self.source = -1  # while MOVING
        self.handle = 0  # while MOVING
        self.tries = 0  # for room


class Copies(Part):
    """See the module's text."""

    def init_copies(self) -> None:
        self.pulls: dict[bytes, Pull] = {}
        self.transfers: dict[int, Pull] = {}
        self.copies: dict[bytes, int] = {}  # object → handle of what was brought here
        self.copy_of: dict[int, bytes] = {}  # and back
        self._full: dict[tuple[int, int], tuple[int, float]] = {}  # (asker, size) → tries, time of the last
        self._full_answers: dict[int, tuple[int, int]] = {}  # number of the wait → asker, request id
        self._next_transfer = 1
        self._next_full = 1

    # -- pulls

    @handles(PullObject)
    def on_pull_object(self, event: PullObject, source: int) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is None:
            pull = Pull(self._next_transfer, event.object_id, event.size)
            self._next_transfer += 1
            self.pulls[event.object_id] = pull
            self.transfers[pull.transfer_id] = pull
            self._add_places(pull, event.places)
            pull.askers[source] = None
            here = pull.places.pop(self.node, 0) or self.copies.get(event.object_id, 0)
            if here:
                self.act(FindCopy(event.object_id, here))
            else:
                self._allocate(pull)
        else:
            pull.askers[source] = None
            self._add_places(pull, event.places)

    def _add_places(self, pull: Pull, places: list[list[int]]) -> None:
        for node, handle in places:
            if node == pull.source and pull.state is PullState.MOVING:
                continue
            pull.places[node] = handle

    @handles(CopyFound)
    def on_copy_found(self, event: CopyFound, source: int) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is None or pull.state is not PullState.LOOKING:
            return
        if event.present:
            self._succeed(pull, event.handle)
        else:
            self._forget_copy(event.handle)
            self._allocate(pull)

    def _allocate(self, pull: Pull) -> None:
        if not self._next_place(pull, "no copy of it is left anywhere", peek=True):
            return
        if pull.state is PullState.LOOKING:
            self._step_pull(pull, PullState.ALLOCATING)
        self.act(AllocateCopy(pull.transfer_id, pull.object_id, pull.size))

    @handles(CopyAllocated)
    def on_copy_allocated(self, event: CopyAllocated, source: int) -> None:
        pull = self.transfers.get(event.transfer_id)
        if pull is None or pull.state is not PullState.ALLOCATING:
            if event.handle:
                self.act(AbortCopy(event.handle))
            return
        if event.handle:
            pull.handle = event.handle
            self._move(pull)
        elif pull.tries < len(FULL_WAITS_S):
            self.set_timer(f"allocate:{pull.transfer_id}", self.now + FULL_WAITS_S[pull.tries])
            pull.tries += 1
        else:
            self._fail(pull, self.node, f"the object store of this node has no room for its {pull.size} bytes")

    def timer_allocate(self, transfer_id: str) -> None:
        pull = self.transfers.get(int(transfer_id))
        if pull is not None and pull.state is PullState.ALLOCATING:
            self._allocate(pull)

    def _move(self, pull: Pull) -> None:
        """Ask the link for it, from the next place that lives."""
        place = self._next_place(pull, "no copy of it is left anywhere")
        if place is None:
            return
        self._step_pull(pull, PullState.MOVING)
        pull.source, handle = place
        link = address_of(self.node, LINK_LANE)
        self.send(
            link,
            TransferObject(pull.transfer_id, pull.object_id, pull.source, handle, pull.handle, pull.size),
        )

    def _next_place(self, pull: Pull, text: str, *, peek: bool = False) -> tuple[int, int] | None:
        for node in list(pull.places):
            view = self.views.get(node)
            if node == self.node or (view is not None and not view.alive):
                del pull.places[node]
                pull.source = node
                continue
            return node, pull.places[node] if peek else pull.places.pop(node)
        self._fail(pull, pull.source, text)
        return None

    @handles(TransferDone)
    def on_transfer_done(self, event: TransferDone, source: int) -> None:
        pull = self.transfers.get(event.transfer_id)
        if pull is None or pull.state is not PullState.MOVING:
            return
        if not event.error:
            self.act(SealCopy(pull.handle))
            handle, pull.handle = pull.handle, 0
            self.copies[pull.object_id] = handle
            self.copy_of[handle] = pull.object_id
            self.send(owner_of(pull.object_id), AddPlace(pull.object_id, self.node, handle))
            self._succeed(pull, handle)
        elif pull.places:
            self._move(pull)
        else:
            self._fail(pull, pull.source, event.error)

    def _succeed(self, pull: Pull, handle: int) -> None:
        for asker in pull.askers:
            self.send(asker, ObjectLocal(pull.object_id, handle))
        self._end_pull(pull)

    def _fail(self, pull: Pull, node: int, text: str) -> None:
        for asker in pull.askers:
            self.send(asker, PullFailed(pull.object_id, max(node, 0), text))
        self._end_pull(pull)

    def _end_pull(self, pull: Pull) -> None:
        self._step_pull(pull, PullState.ENDED)
        if pull.handle:
            self.act(AbortCopy(pull.handle))
        del self.pulls[pull.object_id]
        del self.transfers[pull.transfer_id]

    def _step_pull(self, pull: Pull, end: PullState) -> None:
        identity = f"pull {pull.transfer_id}"
        PULL_STEPS.check(identity, pull.state, end, "", self.history)
        pull.state = end
        self.history.add(identity, self.now, end.name)

    # -- copies that go

    @handles(DeleteCopies)
    def on_delete_copies(self, event: DeleteCopies, source: int) -> None:
        for handle in event.handles:
            self._forget_copy(handle)
            self.act(DeleteObject(handle))

    def _forget_copy(self, handle: int) -> None:
        object_id = self.copy_of.pop(handle, None)
        if object_id is not None and self.copies.get(object_id) == handle:
            del self.copies[object_id]

    def forget_copies_of(self, address: int) -> None:
        """The owner is gone, and with it the reason for its copies; the arena's own are doomed by the core."""
        for object_id, handle in list(self.copies.items()):
            if owner_of(object_id) == address:
                self._forget_copy(handle)
                self.act(DeleteObject(handle))

    def forget_copies_of_node(self, node: int) -> None:
        for object_id, handle in list(self.copies.items()):
            if node_of(owner_of(object_id)) == node:
                self._forget_copy(handle)
                self.act(DeleteObject(handle))

    def drop_asker(self, address: int) -> None:
        for pull in self.pulls.values():
            pull.askers.pop(address, None)  # the transfer goes on; others may ask for it

    def source_lost(self, node: int) -> None:
        """A node died: transfers from it try the next place (COPY-2)."""
        for pull in list(self.pulls.values()):
            pull.places.pop(node, None)
            if pull.state is PullState.MOVING and pull.source == node:
                self._move(pull)

    @handles(Reclaimed)
    def on_reclaimed(self, event: Reclaimed, source: int) -> None:
        """What the dead process left goes to its owners, who know whether it is wanted."""
        for object_id, handle, owner in event.objects:
            if owner == event.address or (node_of(owner) == self.node and not self.knows(owner)):
                self.act(DeleteObject(handle))
            else:
                self.send(owner, OrphanedObject(object_id, handle))

    # -- room

    @handles(ArenaFullNotice)
    def on_arena_full_notice(self, event: ArenaFullNotice, source: int) -> None:
        """Let the asker try again after a while, in the hope of frees; give up when that does not help."""
        key = (source, event.size)
        tries, last = self._full.get(key, (0, self.now))
        if self.now - last > FULL_MEMORY_S:
            tries = 0
        if tries >= len(FULL_WAITS_S):
            del self._full[key]
            text = (
                f"the object store has no room for {event.size} bytes, and nothing was freed for "
                f"{sum(FULL_WAITS_S):.1f} s. Drop references that are not needed, or start the session with a larger "
                "object_store_memory."
            )
            self.send(source, ArenaRoom(event.request_id, text))
            return
        if len(self._full) > 1000:
            self._full = {k: v for k, v in self._full.items() if self.now - v[1] <= FULL_MEMORY_S}
        self._full[key] = (tries + 1, self.now + FULL_WAITS_S[tries])
        number = self._next_full
        self._next_full += 1
        self._full_answers[number] = (source, event.request_id)
        self.set_timer(f"room:{number}", self.now + FULL_WAITS_S[tries])

    def timer_room(self, number: str) -> None:
        source, request_id = self._full_answers.pop(int(number))
        self.send(source, ArenaRoom(request_id))

"""Copies of objects from other nodes. The part of ``RayletState`` that brings them here.

COPY-1 (one transfer): at most one transfer of an object is under way on a node; all who ask meanwhile get its outcome.
COPY-2 (answered): each PullObject is answered by ObjectLocal or PullFailed, also when the source dies.
COPY-3 (no half copies): a copy is sealed when its transfer is done, or aborted; never left as it is.
COPY-4 (a tree): a node gives a large object to at most ``LINES`` others at once. The others wait, and when one has its copy, half of
them are sent on to it; so the number of those who give doubles, and N nodes have the object after about log N times.
"""

from __future__ import annotations

import enum
from collections import deque

from hpc_ray.ids import LINK_LANE, address_of, node_of, owner_of, raylet_address
from hpc_ray.machine import Table, handles
from hpc_ray.protocol import (
    AddPlace,
    CopyEnded,
    CopyOffered,
    DeleteCopies,
    ObjectLocal,
    OrphanedObject,
    PullFailed,
    PullObject,
    RequestCopy,
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

ALONE_BYTES = 4 << 20  # objects up to this size are fetched without asking: that takes as long as moving a quarter of it
LINES = 2  # at one alone, a slow receiver would hold up all others
ROOM_TRIES = 3  # others may take the room that was made; then its bytes go to a file


class PullState(enum.Enum):
    LOOKING = 0  # is it here already?
    ALLOCATING = 1  # wants room; may wait for it
    ASKING = 2  # waits for its turn at ``source``; ``handle`` is the block that it will be in
    MOVING = 3  # the link has it, and writes to that block
    ENDED = 4


PULL_STEPS = Table(
    "pull",
    {
        PullState.LOOKING: {PullState.ALLOCATING, PullState.ENDED},
        PullState.ALLOCATING: {PullState.ASKING, PullState.MOVING, PullState.ENDED},
        PullState.ASKING: {PullState.ASKING, PullState.MOVING, PullState.ENDED},
        PullState.MOVING: {PullState.ASKING, PullState.MOVING, PullState.ENDED},
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
        self.source = -1  # while ASKING or MOVING
        self.source_handle = 0  # and the object's there
        self.handle = 0  # while ASKING or MOVING
        self.tries = 0  # for room in the arena


class Giving:
    """A large object on its way from here to others (COPY-4)."""

    def __init__(self, handle: int):
        self.handle = handle
        self.fetching: set[int] = set()  # nodes
        self.waiting: deque[tuple[int, int]] = deque()  # node, its transfer


class Copies(Part):
    """See the module's text."""

    def init_copies(self) -> None:
        self.pulls: dict[bytes, Pull] = {}
        self.transfers: dict[int, Pull] = {}
        self.copies: dict[bytes, int] = {}  # object → handle of what was brought here
        self.copy_of: dict[int, bytes] = {}  # and back
        self.givings: dict[bytes, Giving] = {}
        self._next_transfer = 1

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
            if node == pull.source and pull.state in (PullState.ASKING, PullState.MOVING):
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

    def _allocate(self, pull: Pull, *, on_disk: bool = False) -> None:
        if not self._next_place(pull, "no copy of it is left anywhere", peek=True):
            return
        if pull.state is PullState.LOOKING:
            self._step_pull(pull, PullState.ALLOCATING)
        self.act(AllocateCopy(pull.transfer_id, pull.object_id, pull.size, on_disk))

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
        elif event.error:
            self._fail(pull, self.node, event.error)
        elif pull.size > self.arena_bytes or pull.tries == ROOM_TRIES:
            self._allocate(pull, on_disk=True)
        else:
            pull.tries += 1
            self.want_room(0, pull.transfer_id, pull.size)

    def room_made(self, transfer_id: int, on_disk: bool, error: str) -> None:
        """What ``want_room`` comes to for a pull."""
        pull = self.transfers.get(transfer_id)
        if pull is None or pull.state is not PullState.ALLOCATING:
            return
        if error:
            self._fail(pull, self.node, error)
        else:
            self._allocate(pull, on_disk=on_disk)

    def _move(self, pull: Pull) -> None:
        """Fetch it from the next place that lives; a large one when that place says so."""
        place = self._next_place(pull, "no copy of it is left anywhere")
        if place is None:
            return
        pull.source, pull.source_handle = place
        if pull.state is not PullState.ALLOCATING:  # a late word about the place before is not about this one (PROTO-2)
            del self.transfers[pull.transfer_id]
            pull.transfer_id, self._next_transfer = self._next_transfer, self._next_transfer + 1
            self.transfers[pull.transfer_id] = pull
        if pull.size > ALONE_BYTES:
            self._step_pull(pull, PullState.ASKING)
            request = RequestCopy(pull.transfer_id, pull.object_id, pull.source_handle)
            self.send(raylet_address(pull.source), request)
        else:
            self._fetch(pull)

    def _fetch(self, pull: Pull) -> None:
        self._step_pull(pull, PullState.MOVING)
        message = TransferObject(
            pull.transfer_id, pull.object_id, pull.source, pull.source_handle, pull.handle, pull.size
        )
        self.send(address_of(self.node, LINK_LANE), message)

    @handles(CopyOffered)
    def on_copy_offered(self, event: CopyOffered, source: int) -> None:
        pull = self.transfers.get(event.transfer_id)
        if pull is None or pull.state is not PullState.ASKING or pull.source != node_of(source):
            return  # we have turned to another place, and said so
        if event.node == pull.source:
            self._fetch(pull)
        else:  # if that one has lost it meanwhile, there is still the one that sent us there
            pull.places = {event.node: event.handle, **pull.places, pull.source: pull.source_handle}
            self._move(pull)

    def _let_go(self, pull: Pull, handle: int) -> None:
        """It is not fetched from its source any more."""
        view = self.views.get(pull.source)
        asked = pull.size > ALONE_BYTES and pull.state in (PullState.ASKING, PullState.MOVING)
        if asked and (view is None or view.alive):
            self.send(raylet_address(pull.source), CopyEnded(pull.object_id, handle))

    # -- giving (COPY-4)

    @handles(RequestCopy)
    def on_request_copy(self, event: RequestCopy, source: int) -> None:
        giving = self.givings.get(event.object_id)
        if giving is None:
            giving = self.givings[event.object_id] = Giving(event.handle)
        giving.waiting.append((node_of(source), event.transfer_id))
        self._give(event.object_id, giving)

    @handles(CopyEnded)
    def on_copy_ended(self, event: CopyEnded, source: int) -> None:
        giving, node = self.givings.get(event.object_id), node_of(source)
        if giving is None:
            return
        if event.handle:
            for _ in range(len(giving.waiting) // 2):
                asker, transfer_id = giving.waiting.pop()
                self.send(raylet_address(asker), CopyOffered(transfer_id, node, event.handle))
        self._stop_giving(event.object_id, giving, node)

    def _stop_giving(self, object_id: bytes, giving: Giving, node: int) -> None:
        giving.fetching.discard(node)
        giving.waiting = deque(entry for entry in giving.waiting if entry[0] != node)
        self._give(object_id, giving)

    def _give(self, object_id: bytes, giving: Giving) -> None:
        while giving.waiting and len(giving.fetching) < LINES:
            node, transfer_id = giving.waiting.popleft()
            giving.fetching.add(node)
            self.send(raylet_address(node), CopyOffered(transfer_id, self.node, giving.handle))
        if not giving.fetching:
            del self.givings[object_id]

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
            self._let_go(pull, pull.handle)
            handle, pull.handle = pull.handle, 0
            self.copies[pull.object_id] = handle
            self.copy_of[handle] = pull.object_id
            owner = owner_of(pull.object_id)
            if owner not in pull.askers:  # else its answer says so
                self.send(owner, AddPlace(pull.object_id, self.node, handle))
            self._succeed(pull, handle)
            return
        self._let_go(pull, 0)
        if pull.places:
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
        identity = f"pull {pull.object_id.hex()}"
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
            if pull.state in (PullState.ASKING, PullState.MOVING) and pull.source == node:
                self._move(pull)
        for object_id, giving in list(self.givings.items()):
            self._stop_giving(object_id, giving, node)

    @handles(Reclaimed)
    def on_reclaimed(self, event: Reclaimed, source: int) -> None:
        """What the dead process left goes to its owners, who know whether it is wanted."""
        for object_id, handle, owner in event.objects:
            if owner == event.address or (node_of(owner) == self.node and not self.knows(owner)):
                self.act(DeleteObject(handle))
            else:
                self.send(owner, OrphanedObject(object_id, handle))

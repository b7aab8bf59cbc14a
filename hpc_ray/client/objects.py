"""The objects this process knows: those it owns and those it borrows, their values or places, and who else holds them.

Relied on by ``client`` (which feeds it messages, under its lock) and by the submitters of tasks and calls.

OBJ-1 (owner decides): an object lives until its owner counts no hold: no reference here, no task or object here that
uses it, no borrower. Only then are its copies deleted.
OBJ-2 (loans): a process that meets a reference in a message or in a value holds it on loan: whoever sent the message
keeps it alive. Before the loan ends (the task's reply, the end of ``get``) the process either has dropped it or is
registered as a borrower, acknowledged by the owner.
OBJ-3 (additions commute): the owner adds up AddBorrower and RemoveBorrower per borrower in any order; a borrower whose
sum is zero is gone.
OBJ-5 (lineage): a finished task is remembered as long as one of its results may be lost, or is an argument of such a task; an
argument keeps its entry for that, freed as it is (``Entry.lineage``). When the last of them goes, all that hangs on it goes.
OBJ-4 (always answered): whoever waits for an object is answered by its value, its error, or the death of its owner.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import ObjectLostError, ObjectReconstructionFailedError, OwnerDiedError
from hpc_ray.ids import PUT_INDEX, index_of, node_of, owner_of, raylet_address
from hpc_ray.protocol import (
    AddBorrower,
    AddPlace,
    BorrowerAdded,
    DeleteCopies,
    GetObject,
    ObjectLocal,
    ObjectLostAt,
    ObjectReady,
    OrphanedObject,
    PullFailed,
    PullObject,
    RemoveBorrower,
    Result,
    ResultKind,
)
from hpc_ray.serialize import Serialized, dumps

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

_BROUGHT = 1000  # objects whose copies on this node are remembered

INLINE, ARENA, ERROR = int(ResultKind.INLINE), int(ResultKind.ARENA), int(ResultKind.ERROR)


class State(enum.IntEnum):
    """Of an entry; READY and beyond do not wait."""

    UNKNOWN = 0  # borrowed, and nobody has asked the owner yet
    PENDING = 1  # owned: its task runs; borrowed: the owner was asked
    READY = 2  # ``result`` is set
    FREED = 3  # the entry is out of the table


UNKNOWN, PENDING, READY, FREED = State.UNKNOWN, State.PENDING, State.READY, State.FREED


class Entry(msgspec.Struct, eq=False, gc=False):
    """One object as this process knows it. Made for each call, so it is made fast, and unknown to Python's collector: it sees no cycle
    through an entry, so each ends where its reason ends (``waiters`` by the result, ``task`` by ``result_gone``, ``on_free`` by its call),
    at the latest in ``ObjectTable.let_go``."""

    id: bytes
    owned: bool
    state: State
    task: Any = None  # owned: what makes it (pending), or could make it again (OBJ-5)
    count: int = 0  # holds in this process: references, tasks, containers
    result: Result | None = None  # READY
    places: list[list[int]] | None = None  # READY in an ARENA: [[node, handle], …]
    waiters: list[Callable[[Entry], None]] | None = None  # not READY: called once, with it, under the lock
    borrowers: dict[int, int] | None = None  # owned: address → additions less removals
    added: int = 0  # borrowed: additions made in this process's name
    contained: list[Entry] | None = None  # held as long as this entry is
    lineage: int = 0  # owned: finished tasks that may run again, and then need it
    on_free: Callable[[], None] | None = None  # owned: called when the last hold is gone
    pulling: bool = False  # the raylet was asked for a copy here

    def __repr__(self) -> str:
        return f"<Entry {self.id.hex()} {self.state.name} count={self.count}>"


class ObjectTable:
    """See the module's text. All methods run under the client's lock unless they say otherwise."""

    def __init__(self, client: Client):
        self.client = client
        self.entries: dict[bytes, Entry] = {}
        self.lent: dict[bytes, Entry] = {}  # owned entries that have borrowers
        self.on_none_lent: Callable[[], None] | None = None  # called when there are none any more
        self.borrowed: dict[bytes, Entry] = {}  # entries of other owners
        self.unacknowledged: dict[bytes, list[Entry]] = {}  # borrowed id → entries kept until BorrowerAdded
        self.flushing: list[tuple[set[bytes], Callable[[], None]]] = []
        self.brought: dict[bytes, int] = {}  # the latest objects that the raylet has brought here: handles, perhaps of what is gone
        self.doomed: dict[int, list[int]] | None = None  # while ``gather_deletions``: node → handles
        client.handlers.update(
            {
                GetObject: self.on_get_object,
                ObjectReady: self.on_object_ready,
                AddBorrower: self.on_add_borrower,
                BorrowerAdded: self.on_borrower_added,
                RemoveBorrower: self.on_remove_borrower,
                ObjectLostAt: self.on_object_lost_at,
                AddPlace: self.on_add_place,
                OrphanedObject: self.on_orphaned_object,
                ObjectLocal: self.on_object_local,
                PullFailed: self.on_pull_failed,
            }
        )

    def let_go(self) -> None:
        """The session is over: nothing hangs on an entry any more."""
        for entry in self.entries.values():
            entry.task = entry.waiters = entry.contained = entry.on_free = None

    # -------------------------------------------------------------- making entries

    def own(self, object_id: bytes, state: State = PENDING) -> Entry:
        entry = self.entries[object_id] = Entry(object_id, True, state)
        return entry

    def meet(self, object_id: bytes) -> Entry:
        """The entry of an id that came from elsewhere."""
        entry = self.entries.get(object_id)
        if entry is None:
            owned = owner_of(object_id) == self.client.address
            entry = self.entries[object_id] = Entry(object_id, owned, UNKNOWN)
            if not owned:
                self.borrowed[object_id] = entry
            else:  # a reference that outlived its object
                self.set_error(entry, ObjectLostError(object_id.hex(), detail="It was freed by its owner before"))
        return entry

    def reference(self, entry: Entry) -> ObjectRef:
        entry.count += 1
        return ObjectRef(entry)

    def put(self, serialized: Serialized, contained: list[Entry]) -> Entry:
        """A new owned object with this value and one hold. Copies before it takes the lock."""
        object_id = self.client.minter.put_id()
        result = self.client.values.store_value(object_id, serialized, self.client.address)
        with self.client.lock:
            entry = self.own(object_id)
            entry.count = 1
            self.hold_contained(entry, contained)
            self.set_result(entry, result)
        return entry

    def hold_contained(self, entry: Entry, contained: Iterable[Entry]) -> None:
        inner = list(contained)
        if inner:
            for item in inner:
                item.count += 1
            entry.contained = inner

    # -------------------------------------------------------------- values arrive

    def set_result(self, entry: Entry, result: Result, places: list[list[int]] | None = None) -> None:
        """The value, place or error of an entry is known; wake whoever waits."""
        if entry.state >= READY:
            return
        entry.result = result
        if result.kind == ARENA:
            entry.places = places or [[result.node, result.handle]]
        entry.state = READY
        waiters = entry.waiters
        if waiters is not None:
            entry.waiters = None
            for wake in waiters:
                wake(entry)
        if entry.count <= 0:
            self.drop_if_unused(entry)

    def set_error(self, entry: Entry, error: BaseException) -> None:
        self.set_result(entry, Result(ERROR, dumps(error)))

    def receive_result(self, entry: Entry, result: Result) -> None:
        """A result of our own task, with references inside for which the sender has registered us."""
        if result.contained:
            inner = []
            for object_id in result.contained:
                item = self.meet(object_id)
                if not item.owned:
                    item.added += 1
                inner.append(item)
            self.hold_contained(entry, inner)
        if result.kind == ARENA and node_of(self.client.address) == result.node:
            self.client.store.claim(result.handle)
        self.set_result(entry, result)

    def discard(self, result: Result) -> None:
        """A result that nobody needs: free it if it lies in an arena, and the references inside, for which we are registered."""
        if result.kind == ARENA:
            self.delete_copy(result.node, result.handle)
        for object_id in result.contained:
            item = self.meet(object_id)
            if not item.owned:
                item.added += 1
            item.count += 1
            self.release(item)

    def ask(self, entry: Entry) -> None:
        """Make sure that a borrowed entry becomes READY one day."""
        if entry.state == UNKNOWN:
            entry.state = PENDING
            if not self.client.send(owner_of(entry.id), GetObject(entry.id)):
                self.owner_died(entry)

    def owner_died(self, entry: Entry) -> None:
        self.set_error(entry, OwnerDiedError(entry.id.hex(), owner_of(entry.id)))

    def on_ready(self, entry: Entry, wake: Callable[[Entry], None]) -> None:
        """Call ``wake(entry)`` when the entry is READY; at once if it is."""
        if entry.state >= READY:
            wake(entry)
            return
        if entry.waiters is None:
            entry.waiters = []
        entry.waiters.append(wake)
        self.ask(entry)

    # -------------------------------------------------------------- holds

    def release(self, entry: Entry) -> None:
        """One hold less."""
        entry.count -= 1
        if entry.count <= 0:
            self.drop_if_unused(entry)

    def drop_if_unused(self, entry: Entry) -> None:
        if entry.count > 0 or entry.borrowers or self.entries.get(entry.id) is not entry:
            return
        if entry.owned:
            if entry.state < READY:  # its task still runs; set_result comes back here
                return
            self.free(entry)
        else:
            if entry.waiters:
                return
            del self.entries[entry.id]
            del self.borrowed[entry.id]
            if entry.added:
                self.client.send(owner_of(entry.id), RemoveBorrower(entry.id, entry.added))
            entry.state = FREED
        inner = entry.contained
        if inner:
            entry.contained = None
            for item in inner:
                self.release(item)

    def free(self, entry: Entry) -> None:
        """Delete an owned object everywhere (OBJ-1)."""
        del self.entries[entry.id]
        entry.state = FREED
        if entry.places:
            self.delete_copies(entry)
        if not (entry.lineage and entry.result is not None and entry.result.kind == INLINE and not entry.result.contained):
            entry.result = None  # else it is small, and an argument
        if entry.task is not None and entry.lineage == 0:
            entry.task.result_gone(entry)
        then = entry.on_free
        if then is not None:
            entry.on_free = None
            then()

    def delete_copies(self, entry: Entry) -> None:
        result = entry.result
        for node, handle in entry.places or ():
            self.delete_copy(node, handle, brought=result is not None and result.node != node)
        entry.places = None

    def delete_copy(self, node: int, handle: int, brought: bool = False) -> None:
        """``brought``: the node's raylet has fetched it from elsewhere, and keeps a record of it."""
        if node == node_of(self.client.address) and not brought:
            self.client.files.delete(handle)
        elif self.doomed is not None:
            self.doomed.setdefault(node, []).append(handle)
        else:
            self.client.send(raylet_address(node), DeleteCopies([handle]))

    def gather_deletions(self) -> None:
        """From here on until ``send_deletions``, within one hold of the lock, one message for each node."""
        if self.doomed is None:
            self.doomed = {}

    def send_deletions(self) -> None:
        doomed, self.doomed = self.doomed, None
        if doomed:
            for node, handles in doomed.items():
                self.client.send(raylet_address(node), DeleteCopies(handles))

    # -------------------------------------------------------------- loans (OBJ-2)

    def register(self, loans: Iterable[Entry], keep: Iterable[Entry] = ()) -> set[bytes]:
        """Register this process for borrowed entries that are still held; the ids whose acknowledgement is due.

        ``keep`` (the containers that lent them) are held until then."""
        due: set[bytes] = set()
        for entry in loans:
            if entry.owned or entry.added or entry.count <= 0 or entry.state == FREED:
                continue
            entry.added += 1
            if self.client.send(owner_of(entry.id), AddBorrower(entry.id, self.client.address, True)):
                due.add(entry.id)
                holds = self.unacknowledged.setdefault(entry.id, [])
                for container in keep:
                    container.count += 1
                    holds.append(container)
        return due

    def introduce(self, contained: Iterable[Entry], receiver: int) -> set[bytes]:
        """Register ``receiver`` as a borrower of what a value sent to it contains; the ids whose acknowledgement is due."""
        due: set[bytes] = set()
        for entry in contained:
            owner = owner_of(entry.id)
            if owner == receiver:
                continue
            if entry.owned:
                self.add_borrower(entry, receiver, 1)
            elif self.client.send(owner, AddBorrower(entry.id, receiver, True)):
                due.add(entry.id)
                self.unacknowledged.setdefault(entry.id, [])
        return due

    def when_acknowledged(self, due: set[bytes], then: Callable[[], None]) -> None:
        """Call ``then`` when the owners of ``due`` have answered."""
        if due:
            self.flushing.append((due, then))
        else:
            then()

    def acknowledged(self, object_id: bytes) -> None:
        for container in self.unacknowledged.pop(object_id, ()):
            self.release(container)
        if self.flushing:
            still = []
            for due, then in self.flushing:
                due.discard(object_id)
                if due:
                    still.append((due, then))
                else:
                    then()
            self.flushing = still

    def add_borrower(self, entry: Entry, borrower: int, count: int) -> None:
        if entry.borrowers is None:
            entry.borrowers = {}
        total = entry.borrowers.get(borrower, 0) + count
        if total:
            entry.borrowers[borrower] = total
            self.lent[entry.id] = entry
        else:
            entry.borrowers.pop(borrower, None)
            if not entry.borrowers:
                self.lent.pop(entry.id, None)
                self.drop_if_unused(entry)
                if not self.lent and self.on_none_lent is not None:
                    self.on_none_lent()

    # -------------------------------------------------------------- messages

    def on_get_object(self, source: int, message: GetObject) -> None:
        entry = self.entries.get(message.object_id)
        if entry is None:
            error = ObjectLostError(message.object_id.hex(), detail="Its owner has freed it already")
            self.client.send(source, ObjectReady(message.object_id, Result(ERROR, dumps(error))))
            return
        self.on_ready(entry, lambda ready: self.answer(source, ready, message.value))

    def answer(self, receiver: int, entry: Entry, value: bool) -> None:
        """Tell a borrower about a READY entry. It registers for what is inside by itself, while it holds the entry."""
        result = entry.result
        assert result is not None
        if result.contained:
            result = Result(result.kind, result.payload, result.node, result.handle, result.size)
        self.client.send(receiver, ObjectReady(entry.id, result, entry.places or []))

    def on_object_ready(self, source: int, message: ObjectReady) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None and not entry.owned:
            self.set_result(entry, message.result, message.places)

    def on_add_borrower(self, source: int, message: AddBorrower) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None:
            self.add_borrower(entry, message.borrower, 1)
        if message.acknowledge:
            self.client.send(source, BorrowerAdded(message.object_id))

    def on_borrower_added(self, source: int, message: BorrowerAdded) -> None:
        self.acknowledged(message.object_id)

    def on_remove_borrower(self, source: int, message: RemoveBorrower) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None:
            self.add_borrower(entry, source, -message.count)

    def on_orphaned_object(self, source: int, message: OrphanedObject) -> None:
        entry = self.entries.get(message.object_id)
        place = [node_of(source), message.handle]
        if entry is None or entry.state != READY or place not in (entry.places or []):
            # Its creator's last messages are handled by now, so what is PENDING waits for another attempt's result.
            self.delete_copy(node_of(source), message.handle)

    def on_add_place(self, source: int, message: AddPlace) -> None:
        self.add_place(self.entries.get(message.object_id), message.node, message.handle)

    def add_place(self, entry: Entry | None, node: int, handle: int) -> None:
        """An object has been brought to a node; who owns it deletes the copy of one that it has freed meanwhile."""
        if entry is None or entry.places is None:
            self.delete_copy(node, handle, brought=True)
        elif [node, handle] not in entry.places:
            entry.places.append([node, handle])

    # -------------------------------------------------------------- copies on this node

    def local_handle(self, entry: Entry) -> int | None:
        here = node_of(self.client.address)
        for node, handle in entry.places or ():
            if node == here:
                return handle
        return None

    def pull(self, entry: Entry) -> None:
        """Ask the raylet for a copy on this node of an entry READY elsewhere; it becomes PENDING until then."""
        result = entry.result
        assert result is not None
        if entry.pulling:
            return
        entry.pulling = True
        self.client.send(self.client.raylet, PullObject(entry.id, result.size, entry.places or []))

    def on_object_local(self, source: int, message: ObjectLocal) -> None:
        entry = self.entries.get(message.object_id)
        owned = owner_of(message.object_id) == self.client.address
        if not owned:
            self.remember_brought(message.object_id, message.handle)
        if owned or (entry is not None and entry.places is not None):
            self.add_place(entry, node_of(self.client.address), message.handle)
        if entry is not None and entry.result is not None:
            entry.pulling = False
            self.client.values.pulled(entry)

    def remember_brought(self, object_id: bytes, handle: int) -> None:
        """For those who get the same reference again, without any hold in between."""
        brought = self.brought
        brought[object_id] = handle
        if len(brought) > _BROUGHT:
            del brought[next(iter(brought))]

    def on_pull_failed(self, source: int, message: PullFailed) -> None:
        entry = self.entries.get(message.object_id)
        if entry is None:
            return
        entry.pulling = False
        if entry.state == READY and entry.places:  # else the death of that node came first, and it has been made again, or is to be
            self.lost_at(entry, message.node)
        self.client.values.pulled(entry)

    def lost_at(self, entry: Entry, node: int) -> None:
        """A copy is not where it was said to be: try another, ask the owner, or make it again."""
        entry.places = [place for place in entry.places or () if place[0] != node]
        if not entry.owned:
            if not entry.places:
                entry.state = PENDING
                if not self.client.send(owner_of(entry.id), ObjectLostAt(entry.id, node)):
                    self.owner_died(entry)
            return
        if not entry.places:
            self.rebuild(entry)

    def rebuild(self, entry: Entry) -> None:
        """All copies of an owned object are gone: run its task again, or say that it is lost."""
        entry.state = PENDING
        task = entry.task
        reason = task.run_again() if task is not None else self.why_no_task(entry)
        if reason:
            self.set_error(entry, ObjectReconstructionFailedError(entry.id.hex(), reason, owner_address=owner_of(entry.id)))

    def why_no_task(self, entry: Entry) -> str:
        """Why nothing is remembered that could make this object again."""
        made_by_put = index_of(entry.id) & PUT_INDEX
        return f"OBJECT_UNRECONSTRUCTABLE_{'PUT' if made_by_put else 'LINEAGE_EVICTED'}"

    def revive(self, entry: Entry) -> None:
        """A freed object is wanted again, as an argument of a task that is going to run again (OBJ-5)."""
        self.entries[entry.id] = entry
        entry.state = PENDING if entry.result is None else READY

    def on_object_lost_at(self, source: int, message: ObjectLostAt) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None and entry.state == READY and entry.result is not None and entry.result.kind == ARENA:
            self.lost_at(entry, message.node)
        self.on_get_object(source, GetObject(message.object_id))

    # -------------------------------------------------------------- deaths

    def on_process_died(self, address: int) -> None:
        for entry in list(self.lent.values()):
            if entry.borrowers is not None and address in entry.borrowers:
                self.add_borrower(entry, address, -entry.borrowers[address])
        self.owners_gone(lambda owner: owner == address)

    def on_node_died(self, node: int) -> None:
        for entry in list(self.lent.values()):
            for borrower in [a for a in entry.borrowers or () if node_of(a) == node]:
                assert entry.borrowers is not None
                self.add_borrower(entry, borrower, -entry.borrowers[borrower])
        for entry in list(self.entries.values()):
            if entry.owned and entry.places and any(place[0] == node for place in entry.places):
                self.lost_at(entry, node)
        self.owners_gone(lambda owner: node_of(owner) == node)

    def owners_gone(self, gone: Callable[[int], bool]) -> None:
        """Borrowed objects that nobody has answered for yet get an error (OBJ-4); copies that are here stay good."""
        for entry in list(self.borrowed.values()):
            if gone(owner_of(entry.id)):
                if entry.state == PENDING:
                    self.owner_died(entry)
                if entry.id in self.unacknowledged:
                    self.acknowledged(entry.id)

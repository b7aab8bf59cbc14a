"""Values of objects: stored, awaited, loaded.

Relied on by the public API and the worker, as ``client.values``. ``objects`` says of each object where it is; this makes it be here.
What it costs: see ``load_all``, ``wait`` and ``meet``.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from hpc_ray import exceptions, serialize
from hpc_ray._core import ArenaFull
from hpc_ray.client import refs
from hpc_ray.client.objects import ARENA, ERROR, FREED, INLINE, READY, Entry
from hpc_ray.client.refs import ObjectRef, new_reference
from hpc_ray.client.waiting import Then, Waiter, check
from hpc_ray.exceptions import GetTimeoutError, ObjectStoreFullError, RaySystemError, RayTaskError
from hpc_ray.protocol import ArenaFullNotice, Dependency, Result

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

ROOM_TRIES = 5  # others may take the room that was made; then the object goes to a file


class _Loading(threading.local):
    loans: list[Entry] | None = None  # references met by the deserialisation under way


class ObjectValues:
    """See the module's text. Methods may be called from any thread, without the client's lock, unless they say otherwise."""

    def __init__(self, client: Client):
        self.client = client
        self.objects = client.objects
        self.in_wait = False  # a thread is in ``wait``, for those who list tasks
        self._pull_waiters: dict[bytes, list[Callable[[], None]]] = {}
        self._loading = _Loading()

    def put(self, value: Any) -> ObjectRef:
        """Store a value; its reference. Raises what ``serialize`` raises, and ``store_value``."""
        self.client.work_off_released()
        try:
            serialized = serialize.serialize(value)
        except TypeError as error:
            where = serialize.explain(value, "value")
            raise TypeError(f"Could not serialize the value: {error}. The part at fault: {where}") from error
        entry = self.objects.put(serialized, [reference._entry for reference in serialized.contained])
        return ObjectRef(entry)

    def store_value(self, object_id: bytes, serialized: serialize.Serialized, owner: int) -> Result:
        """Put bytes where they belong by their size: into a message, or into the arena.

        Raises:
            ObjectStoreFullError, OutOfDiskError: neither the arena nor the disk has room for it.
        """
        if serialized.size <= self.client.settings.inline_bytes:
            return Result(INLINE, serialized.to_bytes(), size=serialized.size)
        store = self.client.store
        handle = self._create(object_id, serialized.size, owner)
        on_disk = handle is None
        if handle is None:
            handle = self._create_on_disk(object_id, serialized.size, owner)
        try:
            if on_disk:
                self.client.files.write(handle, serialized.size, serialized.pieces())
            else:
                for offset, data in serialized.pieces():
                    store.write(handle, offset, data)
        except BaseException:
            store.abort(handle)
            raise
        store.seal(handle)
        return Result(ARENA, b"", self.client.node, handle, serialized.size)

    def _create(self, object_id: bytes, size: int, owner: int) -> int | None:
        """Room in the arena, after a wait for the raylet to make some if need be; None if the object shall go to a file."""
        for _ in range(ROOM_TRIES):
            try:
                return self.client.store.create(object_id, size, owner)
            except ArenaFull:
                self.client.work_off_released()
            answer = self.client.request(self.client.raylet, lambda request_id: ArenaFullNotice(request_id, size))
            check(answer)
            if answer.on_disk:
                break
        return None

    def _create_on_disk(self, object_id: bytes, size: int, owner: int) -> int:
        try:
            return self.client.store.create_on_disk(object_id, size, owner)
        except ArenaFull as error:
            raise ObjectStoreFullError(f"The object store of node {self.client.node} has more objects than it can count: {error}") from None

    def get_one(self, reference: ObjectRef, timeout_s: float | None = None) -> Any:
        """The value of a reference; raises its error. Blocks."""
        entry = reference._entry
        result = entry.result
        if entry.state != READY or result is None or result.kind == ARENA:
            self.make_available([entry], timeout_s)
        return self.load(entry)

    def get_many(self, references: Sequence[ObjectRef], timeout_s: float | None = None) -> list[Any]:
        """The values of references; raises the error of the first that has one, as soon as it is known. Blocks."""
        entries = [reference._entry for reference in references]
        self.make_available(entries, timeout_s)
        for entry in entries:
            result = entry.result
            if result is not None and result.kind == ERROR and entry.state is READY:
                self.load(entry)
        return self.load_all(entries)

    def make_ready(self, entries: Sequence[Entry], timeout_s: float | None = None) -> None:
        """Wait until all entries have a value, a place or an error. Blocks.

        Raises:
            GetTimeoutError: not in time.
        """
        with self.client.lock:
            unready = [entry for entry in entries if entry.state != READY]
            waiter = Waiter(len(unready))
            self._wake_when_ready(waiter, waiter.one_ready, unready)
        try:
            if not self.client.block(waiter, timeout_s):
                raise GetTimeoutError(f"not ready after {timeout_s:g} s")
        finally:
            self.withdraw(waiter)

    def make_available(self, entries: Sequence[Entry], timeout_s: float | None) -> None:
        """Wait until all entries can be loaded here, or one is an error. Blocks.

        Raises:
            GetTimeoutError: not in time.
        """
        if refs.released:
            self.client.work_off_released()
        deadline = None if timeout_s is None else self.client.now() + timeout_s
        while True:
            waiter = self._missing(entries)
            if waiter is None:
                return
            left = None if deadline is None else max(0.0, deadline - self.client.now())
            try:
                in_time = self.client.block(waiter, left)
            finally:
                self.withdraw(waiter)
            if not in_time:
                late = sum(entry.state != READY for entry in entries)
                raise GetTimeoutError(
                    f"Get timed out: {late or 'some'} of {len(entries)} object(s) not ready after {timeout_s:g} s."
                )

    def _missing(self, entries: Sequence[Entry], kind: type[Waiter] = Waiter) -> Waiter | None:
        """A waiter for what is not here yet; None if all is here, or one has an error. Of the results of one task that follow one another
        it waits for the first: they come together, and whoever waits looks again."""
        with self.client.lock:
            missing: dict[Entry, None] = {}  # each once
            elsewhere: dict[Entry, None] = {}
            objects = self.objects
            task: Any = None
            for entry in entries:
                result = entry.result
                if entry.state is READY and result is not None and result.kind == INLINE:
                    continue
                if objects.entries.get(entry.id) is not entry:
                    raise exceptions.ObjectLostError(entry.id.hex(), detail="The reference is from another session")
                if entry.state is not READY:
                    if task is None or entry.task is not task:
                        missing[entry] = None
                        task = entry.task
                else:
                    assert result is not None
                    if result.kind == ERROR:
                        return None
                    if result.kind == ARENA and objects.local_handle(entry) is None:
                        elsewhere[entry] = None
            for entry in elsewhere:
                objects.pull(entry)
            if not missing and not elsewhere:
                return None
            waiter = kind(len(missing) + len(elsewhere))

            def one_ready(entry: Entry) -> None:
                result = entry.result
                if result is not None and result.kind == ARENA and objects.local_handle(entry) is None:
                    objects.pull(entry)  # it comes while others are made; the next look waits for it
                waiter.one_available(entry)

            self._wake_when_ready(waiter, one_ready, missing)
            for entry in elsewhere:
                self._pull_waiters.setdefault(entry.id, []).append(waiter.one)
            return waiter

    def _wake_when_ready(self, waiter: Waiter, wake: Callable[[Entry], None], entries: Collection[Entry]) -> None:
        waiter.wake, waiter.entries = wake, entries
        for entry in entries:
            self.objects.on_ready(entry, wake)

    def withdraw(self, waiter: Waiter) -> None:
        """Nobody waits for it any more: take back the wakes that it has left with entries. Takes the lock."""
        if waiter.left <= 0:
            return  # all were used
        with self.client.lock:
            wake = waiter.wake
            for entry in waiter.entries:
                if entry.waiters is not None and wake in entry.waiters:
                    entry.waiters.remove(wake)
                    if entry.count <= 0:
                        self.objects.drop_if_unused(entry)

    def pulled(self, entry: Entry) -> None:
        """A pull ended, well or not; whoever waits looks again."""
        for wake in self._pull_waiters.pop(entry.id, ()):
            wake()

    def give_up(self, error: BaseException) -> None:
        """No message will come any more: who waits for an object, and be it a future, is answered with this. Under the lock."""
        awaited = [entry for entry in self.objects.entries.values() if entry.waiters]
        data = serialize.dumps(error) if awaited else b""
        for entry in awaited:
            self.objects.set_result(entry, Result(ERROR, data))
        waiting, self._pull_waiters = self._pull_waiters, {}
        for wakes in waiting.values():
            for wake in wakes:
                wake()

    def load(self, entry: Entry) -> Any:
        """The value of an entry that is available here; raises its error."""
        result = entry.result
        assert result is not None
        if result.kind == ARENA:
            handle = self.objects.local_handle(entry)
            data: Any = None if handle is None else self.client.files.read(handle)
            if data is None:
                with self.client.lock:
                    if entry.state == READY:
                        self.objects.lost_at(entry, self.client.node)
                self.make_available([entry], None)
                return self.load(entry)
        else:
            data = result.payload
        value, loans = self.load_with_loans(data)
        if loans:
            with self.client.lock:
                self.objects.register(loans, [entry])
        if result.kind == ERROR:
            raise value.as_instanceof_cause() if isinstance(value, RayTaskError) else value
        return value

    def load_all(self, entries: Sequence[Entry]) -> list[Any]:
        """``load`` of each; 0.4 µs for a small value."""
        loading = self._loading
        outer = loading.loans
        loans: list[Entry] = []
        loading.loans = loans
        values = []
        try:
            for entry in entries:
                result = entry.result
                if result is None or result.kind != INLINE:
                    values.append(self.load(entry))
                    continue
                try:
                    values.append(serialize.deserialize(result.payload))
                except Exception as error:
                    raise RaySystemError(str(error), traceback.format_exc()) from error
                if loans:
                    with self.client.lock:
                        self.objects.register(loans, [entry])
                    loans = loading.loans = []
        finally:
            loading.loans = outer
        return values

    def load_with_loans(self, data: Any) -> tuple[Any, list[Entry]]:
        """A value, and the borrowed references met in it for which this process is not registered yet.

        Raises:
            RaySystemError: it cannot be made here, for instance because a module is missing.
        """
        outer = self._loading.loans
        loans = self._loading.loans = []
        try:
            return serialize.deserialize(data), loans
        except Exception as error:
            raise RaySystemError(str(error), traceback.format_exc()) from error
        finally:
            self._loading.loans = outer

    def pack_value(self, value: Any, slot: int) -> tuple[Dependency, ObjectRef | None]:
        """A value for a message to another process; with it a reference to be held until it has been read, if that is needed.

        Raises:
            TypeError: it cannot be pickled.
            ObjectStoreFullError: no room for it.
        """
        try:
            serialized = serialize.serialize(value)
        except Exception as error:
            where = serialize.explain(value, "value")
            raise TypeError(f"Could not serialize the value: {error}. The part at fault: {where}") from error
        if serialized.size <= self.client.settings.inline_bytes and not serialized.contained:
            return Dependency(b"", Result(INLINE, serialized.to_bytes(), size=serialized.size), slot), None
        self.client.work_off_released()
        entry = self.objects.put(serialized, [reference._entry for reference in serialized.contained])
        assert entry.result is not None
        return Dependency(entry.id, entry.result, slot, entry.places or []), ObjectRef(entry)

    def value_of(self, dependency: Dependency) -> tuple[Any, list[Entry]]:
        """A value that came in a message, and the references in it that are on loan. Blocks while it is on another node.

        Raises:
            RayError: it is an error, or lost.
        """
        result = dependency.result
        if result.kind != ARENA:
            value, loans = self.load_with_loans(result.payload)
            if result.kind == ERROR:
                raise value
            return value, loans
        here = self.client.node
        handles = [handle for node, handle in dependency.places if node == here]
        if not handles and (brought := self.objects.brought.get(dependency.object_id)):
            handles.append(brought)
        for handle in handles:
            pin = self.client.files.read(handle)
            if pin is not None:
                return self.load_with_loans(pin)
        with self.client.lock:  # on another node: borrow it, on the caller's loan, and wait for a copy
            entry = self.objects.meet(dependency.object_id)
            entry.count += 1
            if not entry.owned:
                self.objects.set_result(entry, result, [list(place) for place in dependency.places if place[0] != here])
        try:
            self.make_available([entry], None)
            local = self.objects.local_handle(entry)
            pin = self.client.files.read(local) if local is not None else None
            if pin is None:
                return self.load(entry), []
            return self.load_with_loans(pin)
        finally:
            with self.client.lock:
                self.objects.release(entry)

    def wait(self, references: Sequence[Any], num_returns: int, timeout_s: float | None, fetch_local: bool) -> list[int]:
        """Wait until ``num_returns`` are ready or the time is over; the positions of the first that are ready, at most so
        many. Blocks. 50 ns for each reference where enough are ready.

        Raises:
            ValueError: a reference is there twice.
            ObjectLostError: one is from another session.
        """
        if refs.released:
            self.client.work_off_released()
        try:
            entries: list[Entry] = list(map(_entry_of, references))
        except AttributeError:  # some are generators
            with self.client.lock:
                entries = [item._entry if isinstance(item, ObjectRef) else item._head() for item in references]
        if len(set(entries)) != len(entries):
            raise ValueError("Wait requires a list of unique object refs.")
        ready = _first_ready(entries, num_returns)
        if len(ready) < num_returns:
            self._await_some(entries, num_returns, timeout_s)
            ready = _first_ready(entries, num_returns)
        if fetch_local and (large := [entry for entry in entries if entry.places is not None]):
            with self.client.lock:
                for entry in large:
                    result = entry.result
                    if result is not None and result.kind == ARENA and entry.state is READY and self.objects.local_handle(entry) is None:
                        self.objects.pull(entry)
        return ready

    def _await_some(self, entries: list[Entry], count: int, timeout_s: float | None) -> None:
        """Wait until ``count`` entries are READY or the time is over. Blocks."""
        with self.client.lock:
            unready = [entry for entry in entries if entry.state is not READY]
            for entry in unready:
                if entry.state is FREED:
                    raise exceptions.ObjectLostError(entry.id.hex(), detail="The reference is from another session")
            waiter = Waiter(count - (len(entries) - len(unready)))
            if not waiter.done:
                self._wake_when_ready(waiter, waiter.one_ready, unready)
        if waiter.done:
            return
        self.in_wait = True
        try:
            self.client.block(waiter, timeout_s)
        finally:
            self.in_wait = False
            waiter.left = len(unready)  # some were not waited for
            self.withdraw(waiter)

    def add_done_callback(self, entry: Entry, callback: Callable[[], None]) -> None:
        """Call back, without the lock, once the entry can be loaded here without waiting."""

        def look() -> None:
            waiter = self._missing([entry], Then) if self.client.broken is None else None
            if waiter is None:
                self.client.callbacks.append(finished)
            else:
                assert isinstance(waiter, Then)
                waiter.then = look

        def finished() -> None:
            self.client.lane.eager -= 1
            callback()

        with self.client.lock:
            self.client.lane.eager += 1
            look()
        if self.client.lane.eager:
            self.client.lane.wake_background()
        self.client.run_callbacks()

    def meet(self, object_ids: Iterable[bytes]) -> list[ObjectRef]:
        """References that came from elsewhere, 0.2 µs each; those that are borrowed are on loan (OBJ-2)."""
        objects = self.objects
        known, meet = objects.entries.get, objects.meet
        entries, borrowed = [], []
        with self.client.lock:
            for object_id in object_ids:
                entry = known(object_id) or meet(object_id)
                entry.count += 1
                entries.append(entry)
                if not entry.owned and not entry.added:
                    borrowed.append(entry)
            if borrowed:
                if self._loading.loans is not None:
                    self._loading.loans.extend(borrowed)
                else:
                    objects.register(borrowed)
        references = []
        for entry in entries:  # without the lock: the collector may run here, and finalisers of the user's
            reference = new_reference(ObjectRef)
            reference._entry = entry
            references.append(reference)
        return references

    def leak(self, entry: Entry) -> None:
        with self.client.lock:
            entry.count += 1


_entry_of = attrgetter("_entry")


def _first_ready(entries: list[Entry], count: int) -> list[int]:
    """The positions of the first ``count`` entries that are READY."""
    found = []
    for position, entry in enumerate(entries):
        if entry.state is READY:
            found.append(position)
            if len(found) == count:
                break
    return found

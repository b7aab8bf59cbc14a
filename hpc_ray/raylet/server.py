"""The raylet's process: performs what ``raylet.state`` decides. Started by the launcher, one on each node."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hpc_ray._core import Lane, Segment, Store
from hpc_ray.config import NodeConfig
from hpc_ray.exceptions import RayError
from hpc_ray.ids import GCS_LANE, LINK_LANE, RAYLET_LANE, node_of, owner_of
from hpc_ray.protocol import Answer, ProcessExited, encode
from hpc_ray.raylet.events import (
    AbortCopy,
    AllocateCopy,
    AnswerFromLogs,
    AskForkServer,
    CopyAllocated,
    CopyFound,
    DeleteObject,
    DeleteOwned,
    FindCopy,
    LimitStore,
    ListObjects,
    MarkDead,
    ObjectsListed,
    ObjectsSpilled,
    Reclaim,
    Reclaimed,
    SealCopy,
    SpillObjects,
)
from hpc_ray.raylet.logs import LogFolder
from hpc_ray.raylet.state import WHOLE_NODE, RayletState
from hpc_ray.serving import Server
from hpc_ray.spilling import ObjectFiles
from hpc_ray.version import __version__

UNREAD_RETRY_S = 1e-3
STUCK_S = 10.0  # who has not read for so long is not waited for


def main(segment: Segment, config: NodeConfig, fork_server: socket.socket) -> None:
    """Serve until the node ends. Blocks; leaves by SystemExit."""
    lane = segment.open_lane(RAYLET_LANE)
    state = RayletState(config, pid=os.getpid(), build=__version__)
    code = RayletServer(state, segment, lane, ObjectFiles(Store(segment, lane), config.spill_dir), fork_server).run()
    lane.close()
    raise SystemExit(code)


class RayletServer(Server):
    """Knows the segment, the store with its files, and the fork server's socket. Files are written by a thread of their own."""

    def __init__(self, state: RayletState, segment: Segment, lane: Lane, files: ObjectFiles, fork_server: socket.socket):
        performers: dict[type, Callable[[Any], Any]] = {
            AskForkServer: lambda action: self._ask_fork_server(action.message),
            MarkDead: self._mark_dead,
            Reclaim: self._reclaim,
            DeleteObject: lambda action: self.files.delete(action.handle),
            DeleteOwned: self._delete_owned,
            LimitStore: lambda action: segment.limit_objects(action.size),
            SpillObjects: self._spill,
            AllocateCopy: self._allocate,
            SealCopy: self._seal,
            AbortCopy: self._abort,
            FindCopy: self._find,
            ListObjects: lambda action: ObjectsListed([handle for _, handle, *_ in self.store.list_objects()]),
            AnswerFromLogs: self._answer_from_logs,
        }
        super().__init__(state, lane, performers=performers)
        self.segment = segment
        self.files = files
        self.store = files.store
        self._spills: queue.SimpleQueue[SpillObjects] = queue.SimpleQueue()
        self._spilled: deque[ObjectsSpilled] = deque()
        self._disk: threading.Thread | None = None
        self.fork_server = fork_server
        fork_server.setblocking(True)  # one that does not read is one that ends the node
        self._lane = lane
        self._silent: list[int] = []
        self._exits: list[tuple[int, ProcessExited, float]] = []  # since then they wait for what was sent before them to be read
        self._logs = LogFolder(os.path.join(state.config.session_dir, "logs"))
        self._raylet = state

    def arrange(self, batch: list[tuple[int, bytes]]) -> list[tuple[int, Any]]:
        """Deaths last, each after all that its subject had sent (PROTO-3)."""
        messages = super().arrange(batch)
        while self._spilled:
            messages.append((0, self._spilled.popleft()))
        now = time.monotonic()
        self._exits += [(source, event, now) for source, event in messages if isinstance(event, ProcessExited)]
        if not self._exits:
            return messages
        messages = [(source, event) for source, event in messages if not isinstance(event, ProcessExited)]
        exits, self._exits = self._exits, []
        for source, event, since in exits:
            addresses = self._addresses(event)
            if not self._raylet.stopping and now - since < STUCK_S and any(self._unread(address) for address in addresses):
                self._exits.append((source, event, since))
                continue
            self._silent += addresses
            for address in addresses:
                for data in self._lane.receive_from(address):
                    message = self.decode(address, data)
                    if message is not None:
                        messages.append((address, message))
            messages.append((source, event))
        return messages

    def _unread(self, address: int) -> bool:
        """Whether what a dead process has sent to others might be overtaken by what we say of it."""
        return self.segment.unread(address, GCS_LANE) or self.segment.unread(address, LINK_LANE)

    def _timeout(self) -> float | None:
        timeout = super()._timeout()
        if self._exits:
            timeout = UNREAD_RETRY_S if timeout is None else min(timeout, UNREAD_RETRY_S)
        return timeout

    def step(self) -> None:
        super().step()
        if self._silent:
            self._bury_silent()

    def _bury_silent(self) -> None:
        """Lanes of processes that died before they said a word; the state has never heard of them."""
        for address in self._silent:
            if not self._raylet.knows(address):
                self.segment.mark_dead(address)
                self.segment.reclaim(address)
        self._silent.clear()

    def _addresses(self, event: ProcessExited) -> list[int]:
        known = event.address or self._raylet.address_of_worker(event.pid)  # one that left in order has no lane any more
        return [known] if known else [address for address, _, pid in self.segment.lanes() if pid == event.pid]

    def _ask_fork_server(self, message: Any) -> None:
        try:
            self.fork_server.send(encode(message))
        except OSError as error:  # it is the supervisor: gone, it takes the node with it
            print(f"the fork server is gone: {error}", file=sys.stderr)

    def _mark_dead(self, action: MarkDead) -> None:
        self.segment.mark_dead(action.address)

    def _reclaim(self, action: Reclaim) -> Reclaimed:
        objects = self.segment.reclaim(action.address)
        self.files.sweep()
        return Reclaimed(action.address, objects)

    def _delete_owned(self, action: DeleteOwned) -> None:
        whole = action.owner & WHOLE_NODE == WHOLE_NODE
        for _, handle, _, owner, _, sealed, _ in self.store.list_objects():
            if sealed and (node_of(owner) == node_of(action.owner) if whole else owner == action.owner):
                self.files.delete(handle)

    def _allocate(self, action: AllocateCopy) -> CopyAllocated:
        owner = owner_of(action.object_id)
        try:
            if not action.on_disk:
                return CopyAllocated(action.transfer_id, self.store.create(action.object_id, action.size, owner))
            handle = self.store.create_on_disk(action.object_id, action.size, owner)
        except MemoryError as error:
            return CopyAllocated(action.transfer_id, 0, str(error) if action.on_disk else "")
        try:
            self.files.reserve(handle, action.size)
        except RayError as error:
            self.store.abort(handle)
            return CopyAllocated(action.transfer_id, 0, str(error))
        return CopyAllocated(action.transfer_id, handle)

    def _spill(self, action: SpillObjects) -> None:
        if self._disk is None:
            self._disk = threading.Thread(target=self._run_disk, name="hpc_ray-disk", daemon=True)
            self._disk.start()
        self._spills.put(action)

    def _run_disk(self) -> None:
        while True:
            self._spilled.append(self._make_room(self._spills.get()))
            self._lane.wake()

    def _make_room(self, action: SpillObjects) -> ObjectsSpilled:
        freed, error, error_kind = 0, "", ""
        for handle, _ in self.store.victims():
            free, largest = self.store.room()
            if (free >= action.total and largest >= action.largest) or freed >= 2 * action.total:  # the rest is scattered
                break
            try:
                freed += self.files.spill(handle)
            except RayError as failure:
                error, error_kind = str(failure), type(failure).__name__
                break
        return ObjectsSpilled(freed, self.store.room()[1], error, error_kind)

    def _seal(self, action: SealCopy) -> None:
        self.store.seal(action.handle)
        self.store.claim(action.handle)

    def _abort(self, action: AbortCopy) -> None:
        self.store.abort(action.handle)
        self.files.remove(action.handle)

    def _answer_from_logs(self, action: AnswerFromLogs) -> None:
        query = action.query
        try:
            answer = Answer(query.request_id, getattr(self._logs, query.name)(**query.arguments))
        except (OSError, TypeError, ValueError) as error:
            answer = Answer(query.request_id, None, str(error), "ValueError")
        self._send(action.asker, encode(answer))

    def _find(self, action: FindCopy) -> CopyFound:
        found = self.store.info(action.handle)
        present = found is not None and found[0] == action.object_id and found[3]
        return CopyFound(action.object_id, action.handle, present)

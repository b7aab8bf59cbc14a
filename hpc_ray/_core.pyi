"""The native core: one node's shared memory, its lanes (messages) and its arena (objects).

Bytes, never policy: no MPI, no CUDA, no knowledge of tasks. Built from ``hpc_ray/native/``, where each header states
who owns memory, which thread may call, and the invariants by name (``LANE-1``, ``STORE-1`` …).

Used by the transport, the client and worker (hot path), the raylet (``mark_dead``, ``reclaim``) and the link
(``forward_frames``, ``receive_frames``).

Addresses are integers: ``node (16 bits) << 48 | lane index (16) << 32 | incarnation (32)``. Indices below 16 are for
well-known roles; to those, incarnation 0 means "whoever is there now or comes next". Handles of objects are integers
that never mean another object later.

After a fork the child must open a lane of its own: every call on the parent's Lane or Store raises RuntimeError there.
"""

from collections.abc import Callable
from typing import Final, final

from typing_extensions import Buffer

WELL_KNOWN_LANES: Final[int]
"""Lane indices below this are claimed by name only."""
LINK_LANE: Final[int]
"""Frames for other nodes go to this lane of the own node."""
OBJECT_ID_BYTES: Final[int]
LANE_OPEN: Final[int]
LANE_DEAD: Final[int]

def make_address(node: int, index: int, incarnation: int) -> int: ...
def split_address(address: int, /) -> tuple[int, int, int]:
    """(node, lane index, incarnation)."""

def pack_frame(src: int, dest: int, payload: Buffer) -> bytes:
    """A message as it travels between nodes."""

def split_frames(frames: Buffer) -> tuple[int, list[tuple[int, int, bytes]]]:
    """(Bytes taken, [(source, destination, payload)]) of frames one after the other, of which the last one need not be whole."""

def call_or_put_off(
    untimely: Callable[[object], bool], handler: Callable[[int, object], object], number: int, frame: object
) -> None:
    """What is called for a signal: its ``handler``, unless that is ``untimely`` in this frame. Then Python, once it has returned, takes the
    signal for one that has just come."""

def check_signals() -> None:
    """Call the handlers of the signals that have come, as Python does between any two instructions. Raises what they raise."""

def set_parent_death_signal(signal: int) -> None:
    """The calling process gets `signal` when the *thread* that forked it ends; 0 turns that off."""

def set_child_subreaper() -> None:
    """Orphaned descendants become children of the calling process."""

class ArenaFull(MemoryError):
    """No free block of the arena is large enough."""

    asked_bytes: int
    largest_free_bytes: int
    free_bytes: int
    capacity_bytes: int

@final
class Segment:
    """One node's shared memory, mapped whole; sparse, so that only touched pages count.

    It lives as long as a process maps it or holds its fd, and leaves nothing behind.

    Args:
        node: 0 to 65535.
        arena_bytes: size of the object arena.
        max_lanes: how many processes at once, a multiple of 64 up to 1024.
        ring_bytes: size of the ring between two lanes, a power of two. Payloads larger than a quarter of it travel
            through the arena.

    Raises:
        ValueError: a size that cannot be.
        RuntimeError: the system refuses.
    """

    def __new__(cls, *, node: int, arena_bytes: int, max_lanes: int = 1024, ring_bytes: int = 65536) -> Segment: ...
    @staticmethod
    def attach(fd: int) -> Segment:
        """Map an existing segment; the fd stays the caller's (a duplicate is kept).

        Raises:
            ValueError: the fd is no segment, or one of another layout version.
        """

    @property
    def fd(self) -> int:
        """The memfd, close-on-exec: forks inherit it; pass it on with ``pass_fds`` or over a Unix socket."""

    @property
    def node(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def max_lanes(self) -> int: ...
    @property
    def ring_bytes(self) -> int: ...
    def open_lane(self, index: int = -1) -> Lane:
        """Claim lane `index`, or the lowest free one from 16 on; its incarnation is one higher than the last.

        Raises:
            RuntimeError: the lane is taken, or dead and not reclaimed yet, or none is left.
        """

    def limit_objects(self, size: int) -> None:
        """Objects may fill so much of the arena from now on, at most what it was made with; those that are there stay."""

    def mark_dead(self, address: int) -> bool:
        """From now on sends to this lane answer -1. False when it was not open. Any process may call."""

    def unread(self, address: int, reader: int) -> bool:
        """Whether the open lane with the index ``reader`` has still to read what another lane, whose process has ended, sent it."""

    def reclaim(self, address: int) -> list[tuple[bytes, int, int]]:
        """Free what a dead lane held: rings, pins, unsealed objects, objects it owned; its index can be used again.

        Call it after `mark_dead`, and only when the process is gone for good (waited for). May be repeated, also after
        a reclaimer was killed half way. What the dead process had sent is still received.

        Returns:
            (object_id, handle, owner) of the objects that it created and sealed, that nobody claimed, and whose owner
            is not known to be dead. They stay; the caller decides. Empty when there is nothing (more) to reclaim.

        Raises:
            ValueError: the lane is open.
        """

    def is_open(self, address: int) -> bool:
        """True while that incarnation (0: any) of a lane of this node is open."""

    def lanes(self) -> list[tuple[int, int, int]]:
        """(address, LANE_OPEN or LANE_DEAD, pid) of all lanes in use."""

    def statistics(self) -> dict[str, int]:
        """total_bytes, resident_bytes, arena_bytes, arena_used_bytes, repairs, lanes_open, lanes_dead, rings_used,
        rings_capacity, slots_used, slots_capacity."""

    def validate(self) -> list[str]:
        """Walk all structures; the invariants that do not hold. For tests."""

@final
class MpiStream:
    """Frames from the lanes of one node to those of others, as messages of MPI (``native/mpi_stream.h``). Of one thread.

    Args:
        mpi: see ``transport.mpi``.
        ranks: by node, those of the links.
        node: whose end this is.
        chunk_bytes: at most so many in a message of MPI.
        slots: receives that are posted.
        window: sends to one peer that it has not taken yet.
        tag: of all messages.
        quiet_s: when nothing was exchanged with a peer for so long, ``ring(node)`` comes before a message to it.

    Raises:
        RuntimeError: a receive cannot be posted.
    """

    def __new__(
        cls,
        mpi: dict[str, int],
        ranks: list[int],
        node: int,
        *,
        chunk_bytes: int,
        slots: int,
        window: int,
        tag: int,
        quiet_s: float,
        ring: Callable[[int], None] | None = None,
    ) -> MpiStream: ...
    def queue(self, node: int, frames: Buffer) -> None:
        """Frames that leave with the next turn; dropped if the peer is lost."""

    def turn(
        self, inbox: Lane | None, local: Lane | None, spin_s: float, slept: bool
    ) -> tuple[bool, list[tuple[int, int, int, bytes]], list[tuple[int, int]]]:
        """Takes what the inbox has for other nodes along, sends, receives, and delivers to the lanes of `local`'s node; looks again and
        again for `spin_s`, letting others have the core in between, until something moves. Does not release the GIL.

        Args:
            slept: MPI may have taken what is found now at any time since the last turn.

        Returns:
            Whether anything moved; (node that it is from, source, destination, payload) of what is for no lane of this node or for the
            link itself; (node, or -1 for all, MPI's error code) of what failed.

        Raises:
            ValueError: an address cannot be.
        """

    def forsake(self, node: int) -> None:
        """What an inbox has for that node is dropped from now on."""

    def lose(self, node: int) -> None:
        """The same, and what is queued for it goes."""

    def close(self) -> None:
        """Cancels the receives."""

    def has_moved(self) -> None:
        """Something else has moved just now, as far as ``silent_s`` goes."""

    @property
    def arrived_bytes(self) -> int:
        """In the last turn."""

    @property
    def queued_bytes(self) -> int:
        """That wait for room."""

    @property
    def sending(self) -> bool:
        """Something is queued, or not taken by its receiver yet."""

    @property
    def looked_s(self) -> float:
        """When the last turn looked for the last time; the clock is ``time.monotonic``'s."""

    @property
    def silent_s(self) -> float:
        """How long before that something had moved."""

@final
class Lane:
    """This process's inbox, and its way to all other lanes. Made by `Segment.open_lane`.

    Thread-safe. FIFO for each pair of lanes, no order across pairs. A lane that is dropped without `close` stays open
    until it is marked dead and reclaimed.
    """

    @property
    def address(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def eager(self) -> int:
        """Above 0, `receive_background` drains at once instead of giving the foreground thread a millisecond first."""

    @eager.setter
    def eager(self, value: int) -> None: ...
    def send(self, dest: int, payload: Buffer) -> int:
        """Copy `payload` on its way to `dest`. Never waits for another process.

        A destination on another node is reached through the link (lane 1). A well-known lane that is not open yet gets
        its frames when it opens.

        Returns:
            Bytes that wait in this process for room in the ring (0 normally). -1: the destination is dead, nothing was
            sent. 0 is no promise of delivery: the destination may die later.

        Raises:
            ArenaFull: the payload is larger than the whole arena. (One that has no room now waits for it.)
            ValueError: the address cannot be.
        """

    def forward_frames(self, frames: Buffer) -> tuple[int, list[tuple[int, int, bytes]]]:
        """`send` for the link: frames as `receive_frames` gives them, from other nodes, to lanes of this node, where their sources count
        as the senders. The last frame need not be whole.

        Returns:
            How many bytes the whole frames took; and (source, destination, payload) of those for the link's own lane or another node.

        Raises:
            ValueError: an address cannot be. The frames before it have been sent.
        """

    def flush(self) -> int:
        """Move waiting frames into the rings as far as there is room; bytes left. Every receive does it as needed."""

    def receive(
        self, timeout_s: float | None = None, limit: int = 256, spin: bool = True
    ) -> list[tuple[int, bytes]]:
        """Wait for frames; [(source address, payload)], at most `limit`.

        Blocks without the GIL: spins up to 50 µs as long as that pays, then sleeps. One thread at a time; others wait
        for their turn. Signal handlers run while it waits, and their exceptions come out of it.

        Args:
            timeout_s: None waits for ever, 0 only looks.

        Returns:
            [] on time-out, after `wake`, and when the lane is closed meanwhile.
        """

    def receive_frames(self, timeout_s: float | None = None, limit: int = 256, spin: bool = True) -> list[tuple[int, bytes]]:
        """`receive` for the link, by the node that frames are for: [(node, frames)], its own node's too. See `split_frames`."""

    def receive_background(self, deadline: float | None = None, limit: int = 1024) -> list[tuple[int, bytes]]:
        """The io thread's receive: takes what the foreground thread leaves lying. Call it from one thread only.

        Sleeps while nothing happens. With traffic it looks every millisecond, and drains when frames are there and no
        foreground thread has drained since the last look; with `eager` > 0 it drains at once.

        Args:
            deadline: seconds from now after which to return.

        Returns:
            [] at the deadline, after `wake_background`, and when the lane is closed meanwhile.
        """

    def wait_background(self, deadline: float | None = None) -> bool:
        """`receive_background` without the receiving: True when it is the io thread's turn to drain.

        For processes in which whoever drains must also dispatch before anyone else drains."""

    def receive_from(self, src: int) -> list[bytes]:
        """All payloads in the ring from `src`, which may be dead; never waits. Stops before frames of its successor."""

    def wake(self) -> None:
        """End the current `receive`, or else the next one that would wait. Any thread, also a signal handler."""

    def wake_background(self) -> None:
        """End the current `receive_background`, or else the next one."""

    def close(self, timeout_s: float = 1.0) -> list[tuple[bytes, int, int]]:
        """Leave in order: flush for up to `timeout_s`, then free what the lane held; returns what `reclaim` returns.

        Receives in other threads end with []. Buffers got from this process's Store keep their address but the arena
        may use the memory again. Later calls on the lane raise RuntimeError; a second close does nothing.
        """

    def statistics(self) -> dict[str, int]:
        """sent, received, backlog_bytes, backlogged, dropped, lost, parks, spins, wakes, background_ticks."""

@final
class Pin(Buffer):
    """Read-only bytes of an object in the arena, aligned to 64. Keeps them alive; so does anything made from it."""

    @property
    def handle(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class MappedFile(Buffer):
    """A whole file as a buffer, without an open descriptor; good as long as it is referred to, also when the file is unlinked.
    Blocks no other thread while it is opened.

    Raises:
        OSError: it cannot be opened or mapped.
    """

    def __init__(self, path: str, *, writable: bool = False) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Store:
    """The node's object arena, as this process sees it. Thread-safe.

    An object is created, written by its creator, sealed, read by anyone, deleted by anyone; its memory is free again
    when it is deleted and nobody holds a pin.

    Args:
        lane: must have been opened in this very `segment` object.
    """

    def __init__(self, segment: Segment, lane: Lane) -> None: ...
    def create(self, object_id: bytes, size: int, owner: int) -> int:
        """A new object of `size` bytes; its handle. `owner` is a lane's address: when it dies, the object goes.

        Raises:
            ArenaFull: no block is large enough.
        """

    def create_on_disk(self, object_id: bytes, size: int, owner: int) -> int:
        """The same for an object whose bytes the caller writes to a file; `seal` when they are there.

        Raises:
            ArenaFull: the node has no slot left.
        """

    def write_buffer(self, handle: int) -> memoryview:
        """Writable memory of an object that this process is creating (the link: that any process of its node is
        creating); not to be used after seal or abort."""

    def prepare(self, handle: int, offset: int, size: int) -> None:
        """So many bytes of a ``write_buffer`` are about to be written: map their pages now, which is faster than by faults. A hint:
        nothing happens to what is not being created in the arena."""

    def write(self, handle: int, offset: int, buffer: Buffer) -> None:
        """Copy into an object that this process is creating; large copies run in parallel and without the GIL."""

    def seal(self, handle: int) -> None:
        """The object is complete: readable by all, never written again. If its owner has died, it is deleted."""

    def abort(self, handle: int) -> None:
        """Give up an object that is being created."""

    def get(self, handle: int) -> Pin | None:
        """Pin a sealed object; None when it is gone (or not sealed)."""

    def delete(self, handle: int) -> int:
        """No new pins; freed when the last pin goes. 0: it was gone already; 2: its bytes are in a file, which the caller
        removes; 1 otherwise."""

    def spill(self, handle: int) -> bool:
        """Its bytes are in a file by now: free the memory, and keep the handle. False when it is pinned or gone."""

    def victims(self) -> list[tuple[int, int]]:
        """(handle, size) of the sealed objects in the arena that nobody has pinned, least recently used first."""

    def room(self) -> tuple[int, int]:
        """Bytes that are free for objects, and those of the largest object that could be created now."""

    def claim(self, handle: int) -> bool:
        """Its owner knows of it: `reclaim` of the creator will not report it. False when it is gone."""

    def info(self, handle: int) -> tuple[bytes, int, int, bool, bool] | None:
        """(object_id, size, owner, sealed, on_disk), or None when it is gone."""

    def list_objects(self) -> list[tuple[bytes, int, int, int, int, bool, bool]]:
        """(object_id, handle, size, owner, creator, sealed, claimed) of all objects of the node."""

    def statistics(self) -> dict[str, int]:
        """capacity_bytes, used_bytes, largest_free_bytes, objects, creating, doomed, pinned, frames, spilled."""

    def trim(self) -> int:
        """Give the pages of free memory back to the system; bytes given back."""

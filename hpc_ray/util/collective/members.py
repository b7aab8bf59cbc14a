"""The members of a group: how they find one another, and arrays on their way between them.

They meet in a named actor, which tells each the address of all. From then on an array is one message from rank to rank, with the bytes
in it or, where they are many, in the arena, from which the receiver reads them without a copy.

MEMBER-1 (whoever waits is answered): the death of a member ends every wait of the others with an error that names it; a member that
has left ends the waits for it; and every wait has a deadline, whose error names who did not come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_ray.api import get, remote
from hpc_ray.client import context
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.waiting import Waiter
from hpc_ray.exceptions import ActorDiedError, GetTimeoutError, RayError, WorkerCrashedError
from hpc_ray.protocol import Dependency, Result, ResultKind, Values
from hpc_ray.session import ensure_connected

if TYPE_CHECKING:
    import asyncio

    import numpy as np

_LEFT = 1 << 60  # instead of the number of a message: the sender has left the group
_READ = 1 << 62  # added to the number of a message, which is much smaller: it has been read


class Member(NamedTuple):
    """One rank."""

    address: int
    inbox: bytes
    actor_id: str  # "" if it is no actor
    label: str


class _Round:
    def __init__(self, size: int, complete: asyncio.Event):
        self.size = size
        self.complete = complete
        self.members: dict[int, Member] = {}


class Meeting:
    """The actor in which the members of a group meet; again and again, if the group is made again."""

    def __init__(self) -> None:
        self.round: _Round | None = None

    async def join(self, rank: int, size: int, member: Member, timeout_s: float) -> list[Member]:
        """All members, by rank, when all have come.

        Raises:
            ValueError: others say another size, or this rank is taken.
            GetTimeoutError: not all came in time.
        """
        import asyncio

        if self.round is None:
            self.round = _Round(size, asyncio.Event())
        meeting = self.round
        if meeting.size != size:
            raise ValueError(f"rank {rank} says that the group has {size} members, others say {meeting.size}")
        if rank in meeting.members:
            raise ValueError(f"rank {rank} is taken by {meeting.members[rank].label}")
        meeting.members[rank] = member
        if len(meeting.members) == size:
            self.round = None
            meeting.complete.set()
        try:
            await asyncio.wait_for(meeting.complete.wait(), timeout_s)
        except asyncio.TimeoutError:
            absent = [other for other in range(size) if other not in meeting.members]
            del meeting.members[rank]
            raise GetTimeoutError(f"ranks {absent} did not come to the group within {timeout_s:g} s") from None
        return [meeting.members[other] for other in range(size)]


class Members:
    """The group as one member sees it; the ``Wire`` of its algorithms. One operation at a time."""

    def __init__(self, name: str, size: int, rank: int, timeout_s: float):
        self.client = ensure_connected()
        self.name = name
        self.rank = rank
        self.timeout_s = timeout_s
        self.inbox = os.urandom(8)
        self.arrived: dict[tuple[int, int], Dependency] = {}  # (rank, number)
        self.awaited: dict[tuple[int, int], Waiter] = {}
        self.unread: dict[tuple[int, int], ObjectRef] = {}
        self.settled: Waiter | None = None
        self.left: set[int] = set()
        self.error: RayError | None = None
        self.members: list[Member] = []
        with self.client.lock:
            self.client.inboxes[self.inbox] = self.on_values
        try:
            self.members = self.meet(size)
        except BaseException:
            self.close()
            raise
        with self.client.lock:
            self.client.mourners.append(self.on_death)
            self.on_death(lambda address: address in self.client.dead)

    def meet(self, size: int) -> list[Member]:
        actor = context.actor
        actor_id = actor.spec.actor_id.hex() if actor is not None else ""
        who = f"actor {actor.spec.class_name} {actor_id}" if actor is not None else "a process"
        me = Member(self.client.address, self.inbox, actor_id, f"{who} (pid {os.getpid()})")
        deadline = time.monotonic() + self.timeout_s
        while True:
            place = remote(Meeting).options(name=f"_collective_{self.name}", get_if_exists=True, num_cpus=0).remote()
            try:
                found: list[Member] = get(place.join.remote(self.rank, size, me, max(0.0, deadline - time.monotonic())))
            except ActorDiedError:  # it was of a group that ended just now
                if time.monotonic() > deadline:
                    raise
                continue
            self.place = place
            return found

    def close(self) -> None:
        """Leave the group; the others are told."""
        client = self.client
        with client.lock:
            client.inboxes.pop(self.inbox, None)
            if self.on_death in client.mourners:
                client.mourners.remove(self.on_death)
        for other in self.members:
            if other.inbox != self.inbox:
                client.send(other.address, Values(other.inbox, _LEFT, [self.sign()]))

    def sign(self) -> Dependency:
        return Dependency(b"", Result(ResultKind.INLINE), self.rank)

    # -------------------------------------------------------------- messages (under the client's lock)

    def on_values(self, message: Values) -> None:
        (dependency,) = message.values
        rank = int(dependency.slot)
        if message.number > _READ // 2:
            self.unread.pop((rank, message.number - _READ), None)
            if not self.unread and self.settled is not None:
                self.settled.finish()
        elif message.number == _LEFT:
            self.left.add(rank)
            for (source, _), waiter in self.awaited.items():
                if source == rank:
                    waiter.finish()
        else:
            self.arrived[rank, message.number] = dependency
            awaited = self.awaited.get((rank, message.number))
            if awaited is not None:
                awaited.finish()

    def on_death(self, is_dead: Callable[[int], bool]) -> None:
        for rank, member in enumerate(self.members):
            if is_dead(member.address) and rank not in self.left and self.error is None:
                text = f"rank {rank} of the collective group {self.name!r} died: {member.label}"
                self.error = ActorDiedError(member.actor_id, text) if member.actor_id else WorkerCrashedError(text)
                for waiter in [*self.awaited.values(), *([self.settled] if self.settled is not None else [])]:
                    waiter.finish()

    # -------------------------------------------------------------- the wire

    def send(self, rank: int, tag: int, array: np.ndarray) -> None:
        if self.error is not None:
            raise self.error
        member = self.members[rank]
        dependency, reference = self.client.values.pack_value(array, self.rank)
        if reference is not None:
            with self.client.lock:
                self.unread[rank, tag] = reference
        self.client.send(member.address, Values(member.inbox, tag, [dependency]))

    def receive(self, rank: int, tag: int, use: Callable[[np.ndarray], Any]) -> None:
        key = rank, tag
        client = self.client
        waiter = Waiter()
        with client.lock:
            if key not in self.arrived and self.error is None and rank not in self.left:
                self.awaited[key] = waiter
            else:
                waiter.finish()
        try:
            in_time = client.block(waiter, self.timeout_s, gives_way=False)
        finally:
            with client.lock:
                self.awaited.pop(key, None)
                dependency = self.arrived.pop(key, None)
        if dependency is None:
            self.explain(rank, in_time)
        assert dependency is not None
        value, _ = client.values.value_of(dependency)
        use(value)
        del value
        if dependency.object_id:
            member = self.members[rank]
            client.send(member.address, Values(member.inbox, _READ + tag, [self.sign()]))

    def settle(self) -> None:
        if not self.unread:
            return
        client = self.client
        with client.lock:
            waiter = self.settled = Waiter(len(self.unread))
            if self.error is not None:
                waiter.finish()
        try:
            in_time = client.block(waiter, self.timeout_s, gives_way=False)
        finally:
            self.settled = None
        if self.unread:
            waiting = next(iter(self.unread))[0]
            self.unread.clear()
            self.explain(waiting, in_time)

    def explain(self, rank: int, in_time: bool) -> None:
        """Raise the reason why there is nothing from a rank."""
        if self.error is not None:
            raise self.error
        who = f"rank {rank} of the collective group {self.name!r} ({self.members[rank].label})"
        if rank in self.left:
            raise RuntimeError(f"{who} has left the group")
        assert not in_time
        raise GetTimeoutError(
            f"{who} did not come within {self.timeout_s:g} s: all ranks must call the same operations in the same order. "
            "The time limit is gloo_timeout, in milliseconds."
        )

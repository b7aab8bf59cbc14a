"""The loop of a role's performing half: receive, decode, decide, perform. One thread, no asyncio.

Relied on by ``gcs.server`` and ``raylet.server``; relies on ``machine`` and ``protocol``. The lane is an argument.

SERVING-1 (durable first): the Journal actions of a batch are committed before any other action of it is performed.
SERVING-2 (order): messages to one destination leave in the order in which they were decided, also when the arena is
full.
SERVING-3 (bugs end the node): an exception in the state is written to stderr and ends the process with code 70; a
message that cannot be decoded is written down and dropped.
"""

from __future__ import annotations

import heapq
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from hpc_ray.ids import name_of
from hpc_ray.machine import Action, Exit, Journal, Machine, Send, SetTimer, TimerFired
from hpc_ray.protocol import decode, encode

BUG = 70  # exit code (EX_SOFTWARE)
UNSENT_RETRY_S = 0.01


class Inbox(Protocol):
    """A lane, as ``_core.Lane``."""

    def send(self, dest: int, payload: bytes) -> int: ...

    def receive(self, timeout_s: float | None = None) -> list[tuple[int, bytes]]: ...


class Timers:
    """Names and times; a name set again replaces its time."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def set(self, name: str, at: float) -> None:
        self._at[name] = at
        heapq.heappush(self._heap, (at, name))

    def next(self) -> float | None:
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterable[str]:
        while (at := self.next()) is not None and at <= now:
            _, name = heapq.heappop(self._heap)
            del self._at[name]
            yield name


class Server:
    """Runs one machine on one lane.

    Args:
        performers: what to do for actions other than Send, SetTimer, Journal and Exit; each may return an event, which
            is handed in before the next message.
        commit: makes Journal records durable.
    """

    def __init__(
        self,
        state: Machine,
        lane: Inbox,
        *,
        performers: dict[type, Callable[[Any], Any]] | None = None,
        commit: Callable[[list[Journal]], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.state = state
        self.lane = lane
        self.timers = Timers()
        self.exit_code: int | None = None
        self._performers = performers or {}
        self._commit = commit
        self._now = now
        self._unsent: deque[tuple[int, bytes]] = deque()

    def run(self) -> int:
        """Until the state says Exit; its code. Blocks."""
        try:
            self.perform(self.state.start(self._now()))
            while self.exit_code is None:
                self.step()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(BUG)
        return self.exit_code

    def step(self) -> None:
        """One round: what has come, then what is due."""
        batch = self.lane.receive(self._timeout())
        now = self._now()
        actions: list[Action] = []
        for source, event in self.arrange(batch):
            actions += self.state.handle(event, source, now)
        for name in self.timers.due(now):
            actions += self.state.handle(TimerFired(name), 0, now)
        if self._unsent:
            self._send_rest()
        self.perform(actions)

    def _timeout(self) -> float | None:
        at = self.timers.next()
        timeout = None if at is None else max(0.0, at - self._now())
        if self._unsent:
            timeout = UNSENT_RETRY_S if timeout is None else min(timeout, UNSENT_RETRY_S)
        return timeout

    def arrange(self, batch: list[tuple[int, bytes]]) -> list[tuple[int, Any]]:
        """The messages of a batch, in the order in which the state shall see them."""
        messages = []
        for source, data in batch:
            message = self.decode(source, data)
            if message is not None:
                messages.append((source, message))
        return messages

    def decode(self, source: int, data: bytes) -> Any:
        try:
            return decode(data)
        except msgspec.MsgspecError as error:
            print(f"dropped {len(data)} bytes from {name_of(source)} that are no message: {error}", file=sys.stderr)
            return None

    def perform(self, actions: list[Action]) -> None:
        """Do all of it, and what follows from it."""
        while actions:
            following: list[Action] = []
            records = [action for action in actions if type(action) is Journal]
            if records and self._commit is not None:
                self._commit(records)
            message, data = None, b""
            for action in actions:
                kind = type(action)
                if kind is Send:
                    if action.message is not message:  # type: ignore[attr-defined]
                        message = action.message  # type: ignore[attr-defined]
                        data = encode(message)
                    self._send(action.destination, data)  # type: ignore[attr-defined]
                elif kind is SetTimer:
                    self.timers.set(action.name, action.at)  # type: ignore[attr-defined]
                elif kind is Exit:
                    print(f"leaving: {action.reason}", file=sys.stderr)  # type: ignore[attr-defined]
                    self.exit_code = action.code  # type: ignore[attr-defined]
                elif kind is not Journal:
                    event = self._performers[kind](action)
                    if event is not None:
                        following += self.state.handle(event, 0, self._now())
            actions = following

    def _send(self, destination: int, data: bytes) -> None:
        """A dead destination is no error here: its death is told to whoever must know by its own notice."""
        if not self._unsent:
            try:
                self.lane.send(destination, data)
                return
            except MemoryError:  # _core.ArenaFull: the message is large, and must wait for room
                pass
        self._unsent.append((destination, data))

    def _send_rest(self) -> None:
        waiting, self._unsent = self._unsent, deque()
        for destination, data in waiting:
            self._send(destination, data)

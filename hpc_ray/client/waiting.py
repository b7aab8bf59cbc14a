"""What threads wait for. ``Client.block`` makes them wait.

Relied on by all of the client and by the worker. Waiters change under the client's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

from hpc_ray import exceptions
from hpc_ray.client.objects import ERROR, Entry


class Waiter:
    """What a thread waits for: done after ``left`` calls of ``one``."""

    __slots__ = ("done", "entries", "left", "sleeper", "wake")

    def __init__(self, left: int = 1):
        self.left = left
        self.done = left <= 0
        self.entries: Collection[Entry] = ()  # that ``wake`` was left with; see ``ObjectValues.withdraw``
        self.wake: Callable[[Entry], None] = _nothing
        self.sleeper: threading.Event | None = None  # set while the owner sleeps instead of draining

    def one(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.finish()

    def one_ready(self, entry: Entry) -> None:
        self.one()

    def one_available(self, entry: Entry) -> None:
        """An error ends the wait: nobody wants the others then."""
        result = entry.result
        if result is not None and result.kind == ERROR:
            self.finish()
        else:
            self.one()

    def finish(self) -> None:
        self.done = True
        if self.sleeper is not None:
            self.sleeper.set()


def _nothing(entry: Entry) -> None:
    pass


class Then(Waiter):
    """A waiter that nobody waits for; it calls ``then`` instead."""

    __slots__ = ("then",)

    then: Callable[[], None]

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self.then()


class Request(Waiter):
    """A message that will be answered."""

    __slots__ = ("answer", "destination")

    def __init__(self, destination: int):
        super().__init__()
        self.destination = destination
        self.answer: Any = None


def check(answer: Any) -> None:
    """Raises the error that an answer names, if it names one."""
    if answer.error:
        name = answer.error_kind
        found = getattr(exceptions, name, None) or {"ValueError": ValueError, "KeyError": KeyError, "TypeError": TypeError}.get(name)
        raise (found or exceptions.RayError)(answer.error)

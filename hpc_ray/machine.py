"""The frame of a role's deciding half: actions, transition tables, histories, the event log.

Relied on by ``gcs.state`` and ``raylet.state``; relies on ``protocol`` and ``exceptions``. Nothing here does I/O.

MACHINE-1 (closed tables): a step that its table lacks raises IllegalTransition with the story of the id.
MACHINE-2 (replay): a machine's state follows from its construction and its event log alone; ``replay_log`` on a fresh
machine gives an equal ``snapshot()``.
MACHINE-3 (one handler): a message class has at most one handling method in a machine; making a second one is a
TypeError.
MACHINE-4 (late words): a notice of death may overtake what its subject had sent to us by another way; what comes from
somebody who is known to be dead is dropped, as if it had died before it spoke.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import msgspec

from hpc_ray.exceptions import IllegalTransition
from hpc_ray.protocol import ENDED_BY_MPIRUN

# ------------------------------------------------------------------ actions and events


class Action(msgspec.Struct, frozen=True, gc=False):
    """Something that a server performs."""


class Send(Action, frozen=True, gc=False):
    """Put the message into a lane, of this node or another."""

    destination: int
    message: Any


class SetTimer(Action, frozen=True, gc=False):
    """Hand in ``TimerFired(name)`` at that time; replaces the timer of the same name."""

    name: str
    at: float


class Journal(Action, frozen=True, gc=False):
    """Make the record durable before any Send of the same batch; ``value`` None deletes it."""

    kind: str
    key: bytes
    value: bytes | None


class Exit(Action, frozen=True, gc=False):
    """End this process, after everything before it has been performed."""

    code: int
    reason: str


class TimerFired(msgspec.Struct, frozen=True, tag=1001, array_like=True, gc=False):
    """Event: the time asked for by SetTimer has come."""

    name: str


# ------------------------------------------------------------------ histories and tables


class History:
    """The last few things that happened to each id, for people and for IllegalTransition."""

    def __init__(self, *, per_id: int = 24, ids: int = 20_000):
        self._per_id = per_id
        self._ids = ids
        self._lines: OrderedDict[str, deque[str]] = OrderedDict()

    def add(self, identity: str, now: float, text: str) -> None:
        lines = self._lines.get(identity)
        if lines is None:
            if len(self._lines) >= self._ids:
                self._lines.popitem(last=False)
            lines = self._lines[identity] = deque(maxlen=self._per_id)
        lines.append(f"{now:.6f} {text}")

    def of(self, identity: str) -> list[str]:
        return list(self._lines.get(identity, ()))


StateT = TypeVar("StateT", bound=enum.Enum)


class Table:
    """Legal steps of one kind of thing; upholds MACHINE-1."""

    def __init__(self, name: str, steps: Mapping[Any, Iterable[Any]]):
        self.name = name
        self.steps = {start: frozenset(ends) for start, ends in steps.items()}

    def check(self, identity: str, start: enum.Enum, end: enum.Enum, event: str, history: History) -> None:
        if end not in self.steps[start]:
            raise IllegalTransition(
                f"{self.name} {identity}", start.name, f"{event} (to {end.name})", history.of(identity)
            )


# ------------------------------------------------------------------ the machine

MAX_GONE = 100_000  # dead addresses to remember; a word that is later than so many deaths is not to be expected

Handler = TypeVar("Handler", bound=Callable[..., None])


def handles(event_class: type) -> Callable[[Handler], Handler]:
    """Marks the one method of a machine that takes this class of event."""

    def mark(method: Handler) -> Handler:
        method._handles = event_class  # type: ignore[attr-defined]
        return method

    return mark


class Machine:
    """Base of the two states. ``handle`` is the only way in; the list of actions the only way out."""

    _handlers: ClassVar[dict[type, Callable[..., None]]] = {}

    def __init_subclass__(cls) -> None:
        handlers: dict[type, Callable[..., None]] = {}
        for base in reversed(cls.__mro__):
            for name, method in vars(base).items():
                event_class = getattr(method, "_handles", None)
                if event_class is None:
                    continue
                other = handlers.get(event_class)
                if other is not None and other.__name__ != name:
                    raise TypeError(f"{cls.__name__}: {other.__name__} and {name} both handle {event_class.__name__}")
                handlers[event_class] = method
        cls._handlers = handlers

    def __init__(self, *, keep_log: bool = False):
        self.now = 0.0
        self.history = History()
        self.log: list[tuple[Any, int, float]] | None = [] if keep_log else None
        self.counts: dict[str, int] = {}  # events by class, for statistics
        self.gone: dict[int, None] = {}  # addresses that are dead; they are never used again
        self._actions: list[Action] = []
        self._timers: dict[str, float] = {}

    def start(self, now: float) -> list[Action]:
        """The actions to perform before the first event."""
        self.now = now
        actions: list[Action] = []
        self._actions = actions
        if self.log is not None:
            self.log.append((None, 0, now))
        self.on_start()
        self.settle()
        return actions

    def handle(self, event: Any, source: int, now: float) -> list[Action]:
        """Take one event from ``source`` (an address; 0 for the server's own); return what to do about it.

        Raises:
            IllegalTransition: a bug in this machine; nothing a peer sends may cause it.
        """
        self.now = now
        actions: list[Action] = []
        self._actions = actions
        if self.log is not None:
            self.log.append((event, source, now))
        kind = type(event)
        self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
        handler = self._handlers.get(kind)
        if source in self.gone or self.is_cut_off(event, source):
            return actions
        if handler is None:
            self.history.add("misdirected", now, f"{kind.__name__} from {source:#x}")
            return actions
        handler(self, event, source)
        self.settle()
        return actions

    def replay_log(self, log: Iterable[tuple[Any, int, float]]) -> None:
        """Feed a recorded log (MACHINE-2); the actions are dropped, they were performed already."""
        for event, source, now in log:
            if event is None:
                self.start(now)
            else:
                self.handle(event, source, now)

    # -- for subclasses

    def on_start(self) -> None:
        """Before the first event."""

    def settle(self) -> None:
        """After every event: what follows from the new state whatever the event was."""

    def is_cut_off(self, event: Any, source: int) -> bool:
        """Is the source on a node that is dead?"""
        return False

    def remember_gone(self, address: int) -> None:
        if len(self.gone) >= MAX_GONE:
            del self.gone[next(iter(self.gone))]
        self.gone[address] = None

    def act(self, action: Action) -> None:
        self._actions.append(action)

    def send(self, destination: int, message: Any) -> None:
        self._actions.append(Send(destination, message))

    def set_timer(self, name: str, at: float) -> None:
        """Ask for TimerFired(name) at ``at``, or keep an earlier one that is already set."""
        current = self._timers.get(name)
        if current is not None and current <= at:
            return
        self._timers[name] = at
        self._actions.append(SetTimer(name, at))

    @handles(TimerFired)
    def on_timer_fired(self, event: TimerFired, source: int) -> None:
        """Calls ``timer_<name>``; what follows a colon in the name is its argument."""
        if self._timers.pop(event.name, None) is None:
            return  # replaced meanwhile
        name, _, argument = event.name.partition(":")
        method = getattr(self, "timer_" + name)
        method(argument) if argument else method()


def death_text(status: int) -> tuple[str, str]:
    """Kind and text of a DeathCause from the status of a ProcessExited."""
    if status == ENDED_BY_MPIRUN:
        return "KILLED", "its mpirun has ended it"
    number = status & 0x7F
    if number:
        return "CRASHED", f"killed by {_signal_name(number)}"
    return "CRASHED", f"exit code {(status >> 8) & 0xFF}"


_SIGNALS = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    13: "SIGPIPE",
    14: "SIGALRM",
    15: "SIGTERM",
    24: "SIGXCPU",
    31: "SIGSYS",
}  # Linux's numbers, so that a log replays alike everywhere


def _signal_name(number: int) -> str:
    return _SIGNALS.get(number, f"signal {number}")

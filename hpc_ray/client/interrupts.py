"""Signals that user code handles, or that end it: none spoils the books.

SIGINT is Ctrl-C in a driver and the cancelling of a task in a worker. In a Slurm job SIGTERM and SIGUSR1 end a driver in the same way, by
SystemExit with 128 and the signal's number. The user's own handlers, of time limits by SIGALRM for example, raise what they like.

Python calls a signal's handler between any two instructions of the main thread. An exception in the middle of a dispatch
would lose messages, and in the middle of a submission leave half a task. Relied on by ``client`` (which looks into
``pending`` where it waits), ``session`` and the worker.

INT-1 (nothing lost): a handler is called in user code or at a look of ``Client.block``; while the main thread runs
the client's own code, holds its lock or drains, it is put off. The user's own is taken up by the first wait after it was set.
INT-2 (at once): what is put off is tried again before the next instruction that looks for signals, so user code sees it no later than
without us. In a wait it is the next look; there the background thread wakes a main thread that sleeps.
"""

from __future__ import annotations

import functools
import signal
import threading
from _signal import getsignal  # type: ignore[import-not-found] # without the enumerations of ``signal``, which cost a microsecond each
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray import _core
from hpc_ray.slurm import signals

if TYPE_CHECKING:
    from hpc_ray.client.client import Client
    from hpc_ray.client.waiting import Waiter

AGAIN_S = 0.001
WATCHED = tuple(
    map(int, (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM))
)  # whose handlers raise; looking at all 64 would cost as much as what is waited for

_OURS = ("hpc_ray.client.", "hpc_ray.api", "hpc_ray.remote_function", "hpc_ray.actor", "hpc_ray.serialize")  # the client's own code


class Held(functools.partial):
    """A handler that is called when it is timely. Equal to it, for those who look whether theirs is set.

    Nothing of it is written in Python: what it asks for, to be called again, would happen within itself.
    """

    interrupts: Interrupts
    handler: Callable[[int, Any], Any]

    def __new__(cls, interrupts: Interrupts, handler: Callable[[int, Any], Any]) -> Held:
        self = super().__new__(cls, _core.call_or_put_off, interrupts.untimely, handler)
        self.interrupts, self.handler = interrupts, handler
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or self.handler == other

    def __hash__(self) -> int:
        return hash(self.handler)


class Interrupts:
    """One for each client. ``deliver`` runs in the background thread, all else in the main thread."""

    def __init__(self, client: Client):
        self.client = client
        self.main = threading.main_thread().ident
        self.waiting: Waiter | None = None  # while the main thread is in ``block``
        self.pending = False  # something was put off
        self._now = False  # the next handler is timely, wherever it strikes
        self._ending: dict[int, Any] = {}  # signals that end the driver, with the handlers before ours
        self._watched: tuple[int, ...] = ()
        self._seen: list[Any] = []  # their handlers
        self.wanted: Callable[[], bool] = lambda: True  # a worker asks whether its task is still the cancelled one
        self.on_signal = Held(self, self._interrupt)

    def install(self) -> None:
        """Take SIGINT over from Python's own handler, and put the user's off where they are untimely."""
        if threading.get_ident() != self.main:
            return
        before = signal.getsignal(signal.SIGINT)
        ours = type(before) is Held and getattr(before.handler, "__func__", None) is Interrupts._interrupt  # of a session that is over
        if before is signal.default_int_handler or ours:
            signal.signal(signal.SIGINT, self.on_signal)
        if signals.in_job():
            for number in signals.DRAINING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._ending[number] = signal.signal(number, self.on_signal)
        self.watch()

    def remove(self) -> None:
        if threading.get_ident() != self.main:
            return
        if signal.getsignal(signal.SIGINT) is self.on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, before in self._ending.items():
            if signal.getsignal(number) is self.on_signal:
                signal.signal(number, before)
        self._ending.clear()
        for number in self._watched:
            handler = getsignal(number)
            if type(handler) is Held and handler.interrupts is self:
                signal.signal(number, handler.handler)
        self._watched, self._seen = (), []

    def watch(self) -> None:
        """The user's handlers are put off, too, from now on."""
        self._watched = WATCHED
        self.look()

    def look(self) -> None:
        """Take up handlers that the user has set since. 0.3 us if there are none."""
        if list(map(getsignal, self._watched)) == self._seen:
            return
        for number in self._watched:
            handler: Any = getsignal(number)
            if type(handler) is Held and handler.interrupts is not self:
                handler = handler.handler  # one of a session that is over
            if type(handler) is Held or not callable(handler) or handler is signal.default_int_handler:
                continue
            if getattr(handler, "__module__", "").partition(".")[0] not in ("asyncio", "uvloop"):  # these do nothing, and count
                signal.signal(number, Held(self, handler))
        self._seen = list(map(getsignal, self._watched))

    def untimely(self, frame: Any) -> bool:
        """Whether an exception would do harm where the main thread is. Takes no lock: a signal may strike inside of any."""
        client = self.client
        self._now, now = False, self._now
        if now or not (
            self.waiting is not None
            or client.lock._is_owned()  # type: ignore[attr-defined]
            or (frame is not None and frame.f_globals.get("__name__", "").startswith(_OURS))
        ):
            self.pending = False
            return False
        if client.closed:
            return False
        if not self.pending:
            self.pending = True
            client.lane.wake()
            client.lane.wake_background()
        return True

    def _interrupt(self, number: int, frame: Any) -> None:
        """Our handler.

        Raises:
            KeyboardInterrupt: unless it is not wanted any more.
            SystemExit: for a signal that ends the driver. Once: what the driver still does then is left in peace.
        """
        if number in self._ending:
            for other in self._ending:
                signal.signal(other, signal.SIG_IGN)
            raise SystemExit(128 + number)
        if self.wanted():
            raise KeyboardInterrupt

    def strike(self) -> None:
        """What was put off is timely now: the main thread waits.

        Raises:
            BaseException: what a handler raises. If there are several, the others are put off again.
        """
        waiting, self.waiting = self.waiting, None  # a handler may itself wait
        self.pending, self._now = False, True
        try:
            _core.check_signals()
        finally:
            self.waiting, self._now = waiting, False

    def deliver(self) -> None:
        """See that a main thread that sleeps looks (INT-2)."""
        waiter = self.waiting
        sleeper = waiter.sleeper if waiter is not None else None
        if sleeper is not None:
            sleeper.set()
        self.client.lane.wake()

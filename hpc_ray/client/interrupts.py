"""SIGINT: Ctrl-C in a driver, the cancelling of a task in a worker. It may end user code, and never spoils the books.
In a Slurm job SIGTERM and SIGUSR1 end a driver in the same way, by SystemExit with 128 and the signal's number.

Python calls a signal's handler between any two instructions of the main thread. KeyboardInterrupt in the middle of a dispatch
would lose messages, and in the middle of a submission leave half a task. Relied on by ``client`` (which looks into
``pending`` where it waits), ``session`` and the worker.

INT-1 (nothing lost): an exception is raised in user code or at a look of ``Client.block``; while the main thread runs
the client's own code, holds its lock or drains, it is put off.
INT-2 (soon): what was put off is delivered by the background thread every millisecond until it has struck.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.slurm import signals

if TYPE_CHECKING:
    from hpc_ray.client.client import Client
    from hpc_ray.client.waiting import Waiter

AGAIN_S = 0.001


class Interrupts:
    """One for each client. ``on_signal`` runs in the main thread, ``deliver`` in the background thread."""

    def __init__(self, client: Client):
        self.client = client
        self.main = threading.main_thread().ident
        self.waiting: Waiter | None = None  # while the main thread is in ``block``
        self.pending = 0  # the signal that was put off
        self._ending: dict[int, Any] = {}  # signals that end the driver, with the handlers before ours
        self.wanted: Callable[[], bool] = lambda: True  # a worker asks whether its task is still the cancelled one

    def install(self) -> None:
        """Take SIGINT over from Python's own handler; the user's own is left alone."""
        before = signal.getsignal(signal.SIGINT)
        ours = getattr(before, "__func__", None) is Interrupts.on_signal  # of a session that is over
        if threading.get_ident() == self.main and (before is signal.default_int_handler or ours):
            signal.signal(signal.SIGINT, self.on_signal)
        if threading.get_ident() == self.main and signals.in_job():
            for number in signals.DRAINING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._ending[number] = signal.signal(number, self.on_signal)

    def remove(self) -> None:
        if threading.get_ident() != self.main:
            return
        if signal.getsignal(signal.SIGINT) == self.on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, before in self._ending.items():
            if signal.getsignal(number) == self.on_signal:
                signal.signal(number, before)
        self._ending.clear()

    def on_signal(self, number: int, frame: Any) -> None:
        """The handler. Takes no lock: it may have struck the main thread inside of any."""
        client = self.client
        if not client.closed and (
            self.waiting is not None
            or client.lock._is_owned()  # type: ignore[attr-defined]
            or (frame is not None and frame.f_globals.get("__name__", "").startswith("hpc_ray.client."))
        ):
            self.pending = number
            client.lane.wake()
            client.lane.wake_background()
            return
        self.strike(number)

    def strike(self, number: int = 0) -> None:
        """In the main thread where it may be interrupted, for this signal or the one that was put off.

        Raises:
            KeyboardInterrupt: unless it is not wanted any more.
            SystemExit: for a signal that ends the driver. Once: what the driver still does then is left in peace.
        """
        number = number or self.pending
        self.pending = 0
        if number in self._ending:
            for other in self._ending:
                signal.signal(other, signal.SIG_IGN)
            raise SystemExit(128 + number)
        if self.wanted():
            raise KeyboardInterrupt

    def deliver(self) -> None:
        """See that what was put off strikes (INT-2)."""
        number, waiter = self.pending, self.waiting
        if not number:
            return  # it has struck meanwhile
        if waiter is None:
            signal.pthread_kill(self.main, number)  # type: ignore[arg-type]
            return
        sleeper = waiter.sleeper
        if sleeper is not None:
            sleeper.set()
        self.client.lane.wake()

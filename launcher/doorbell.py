"""What wakes a link that sleeps on its lane when something comes by a descriptor: a thread that sleeps on these.

Relied on by ``member``. The thread runs only while the bell is armed and something is there, so in traffic, when the link does not
sleep, it costs nothing.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable


class Doorbell:
    """``ring`` is called by the thread, once for each ``arm`` at most."""

    def __init__(self, ring: Callable[[], None]):
        self._sources = select.epoll()
        self._armed = select.epoll()
        self._armed.register(self._sources.fileno(), select.EPOLLONESHOT)
        self._ring = ring
        threading.Thread(target=self._run, name="hpc_ray-doorbell", daemon=True).start()

    def add(self, fd: int) -> None:
        """Rings while it is readable. A descriptor that is closed is gone from here."""
        self._sources.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """For one whose end has been seen; harmless when it has been closed."""
        try:
            self._sources.unregister(fd)
        except (OSError, ValueError):
            pass

    def arm(self) -> None:
        """Before one sleeps: what is there already rings at once, so nothing is missed."""
        self._armed.modify(self._sources.fileno(), select.EPOLLIN | select.EPOLLONESHOT)

    def disarm(self) -> None:
        self._armed.modify(self._sources.fileno(), select.EPOLLONESHOT)

    def wait(self, timeout_s: float) -> None:
        """Blocks the caller instead, until something is there."""
        self._sources.poll(timeout_s, 1)

    def _run(self) -> None:
        while True:
            if self._armed.poll():
                self._ring()

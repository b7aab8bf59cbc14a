"""The event loop of an asyncio actor: where it would sleep in ``epoll`` it waits for messages, and handles them itself.

Used by ``hosting``. So a call goes from the lane to the coroutine in one thread, like that of a plain actor. Once user code has
opened files or sockets in the loop, or asked it for signals, the loop waits for those, as any other does, and the background
thread drains at once.

LOOP-1 (no lost wake-up): a thread that puts something into the loop finishes ``waiter``, which is the one that the loop waits with
next or now: a new one is made only between a wait and the work that follows it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

from hpc_ray.client.client import Client
from hpc_ray.client.waiting import Waiter


class _Selector(selectors.DefaultSelector):
    """Waits for messages as long as the loop's own wake-up is the only file."""

    def __init__(self, client: Client):
        super().__init__()
        self.client = client
        self.waiter = Waiter()
        self.files_only = False  # something else than messages may wake it: ``epoll`` has to be asked
        self.signals = False

    def select(self, timeout: float | None = None) -> Any:
        files_only = self.signals or len(self.get_map()) > 1
        if files_only is not self.files_only:
            self.files_only = files_only
            self.client.lane.eager += 1 if files_only else -1
            if files_only:
                self.client.lane.wake_background()
        if files_only:
            return super().select(timeout)
        waiter = self.waiter
        self.client._drain(waiter, timeout if timeout is None or timeout > 0 else 0.0)
        self.waiter = Waiter()  # LOOP-1
        return []


class ActorLoop(asyncio.SelectorEventLoop):
    """See the module's text. For the main thread of a worker."""

    def __init__(self, client: Client):
        self._messages = _Selector(client)
        super().__init__(self._messages)

    def _write_to_self(self) -> None:
        """Wake the loop; any thread."""
        super()._write_to_self()  # type: ignore[misc]
        self._messages.waiter.finish()
        self._messages.client.lane.wake()

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        self._messages.signals = True
        super().add_signal_handler(sig, callback, *args)

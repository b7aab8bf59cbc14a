"""The threads that run the calls of a threaded actor.

Used by ``hosting``. Not ``ThreadPoolExecutor``: nobody asks it for the outcome of a call here, and its futures, with a lock and a
condition each, take longer than all else that a small call costs (15 µs of 25).
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class Threads:
    """Up to ``size`` threads, started as they are needed; calls begin in the order in which one thread gives them.

    A call raises nothing: should it, the process says so and ends, as then somebody would wait for its outcome for ever.
    """

    def __init__(self, size: int, name: str):
        self.size = size
        self.name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle: deque[None] = deque()  # at most as many as there are threads that no call given so far will take
        self._threads: list[threading.Thread] = []
        self._ended = False

    def run(self, call: Callable[[], None]) -> None:
        """Run a call as soon as a thread is free. Never blocks."""
        self._calls.put(call)
        if len(self._threads) == self.size:
            return
        try:
            self._idle.pop()
        except IndexError:
            thread = threading.Thread(target=self._work, name=f"{self.name}_{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not self._threads:
                    raise
                self.size = len(self._threads)  # these have to do
                print(f"hpc_ray: {self.name} has {self.size} threads and no more: {error}", file=sys.stderr, flush=True)
                return
            self._threads.append(thread)

    def end(self) -> None:
        """No call begins from now on, and of those that run nobody wants to know. Does not wait for them."""
        self._ended = True
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        calls, idle = self._calls, self._idle
        try:
            while (call := calls.get()) is not None and not self._ended:
                call()
                call = None  # it may hold values
                if len(self._threads) < self.size and calls.empty():
                    idle.append(None)
        except BaseException:
            if self._ended:
                return
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

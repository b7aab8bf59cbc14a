"""Who has an address, and the cores that processes share."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.ids import node_of

if TYPE_CHECKING:
    from hpc_ray.simulator.cluster import Simulator


OTHERS_S = 3e-3  # other programs have a core for so long at a time
SLICE_S = 1e-3  # and ours while others wait
FORGOTTEN_S = 0.5e-3  # after so much work of others on each core nothing of a process is left in the caches
ASLEEP_S = 0.3  # after so long without any work a machine, or a process, is as slow to wake as it ever is


class Host:
    """Cores. Of the processes that are ready who has had least gets the next free one, as the kernel has it, until it has nothing to do
    or has had it for a slice. Of each core other programs have all but the share ``ours``."""

    def __init__(self, simulator: Simulator, cores: int, ours: float):
        assert simulator.prices is not None
        self.simulator = simulator
        self.free = cores
        self.ready: list[tuple[float, int, Process]] = []  # heap, by what they have had
        prices = simulator.prices
        self._cold_s, self._idle_s, self._awake_s, self._stale_s = prices.cold_s, prices.idle_s, prices.awake_s, prices.stale_s
        self._code_s = prices.code_s
        self._ran_at: dict[type[Process], float] = {}  # when one of this kind last had a core
        self._cores = cores
        self._ran_s = 0.0  # all of them
        self._running = 0
        self._rested_at = simulator.now  # when the last of them was done
        self._asleep = 0.0  # how far the machine sleeps: 0 … 1
        self._had_s = 0.0  # by who got a core last: who has slept does not make up for it
        self._order = itertools.count()
        self._away_s = OTHERS_S * ours / (1 - ours) if ours < 1 else 0.0
        self._others = 0  # that want a core
        for _ in range(cores if ours < 1 else 0):
            simulator.after(simulator.random.random() * (OTHERS_S + self._away_s), self._other_comes)

    def _other_comes(self) -> None:
        self._others += 1
        self.dispatch()

    def _other_goes(self) -> None:
        self.free += 1
        self.simulator.after(self._away_s * 2 * self.simulator.random.random(), self._other_comes)
        self.dispatch()

    def add(self, process: Process) -> None:
        process.had_s = max(process.had_s, self._had_s)
        self._wait(process)
        self.dispatch()

    def _wait(self, process: Process) -> None:
        heapq.heappush(self.ready, (process.had_s, next(self._order), process))

    def dispatch(self) -> None:
        while self.free and self._others:
            self._others -= 1
            self.free -= 1
            self.simulator.after(OTHERS_S, self._other_goes)
        while self.free and self.ready:
            had_s, _, process = heapq.heappop(self.ready)
            self._had_s = max(self._had_s, had_s)
            if process.alive:
                self.free -= 1
                process.slice_s = 0.0
                self._run(process, self._waking_s(process))

    def _waking_s(self, process: Process) -> float:
        """What it takes more, since others have run meanwhile, or nobody."""
        if not self._running:
            self._asleep = min(1.0, self._asleep + (self.simulator.now - self._rested_at) / ASLEEP_S)
        others_s = (self._ran_s - process.saw_s) / self._cores
        away_s = self.simulator.now - process.ran_at
        nobody_s = max(0.0, away_s - others_s)
        unused_s = self.simulator.now - self._ran_at.get(type(process), 0.0)
        return (
            self._cold_s * min(1.0, others_s / FORGOTTEN_S)
            + self._stale_s * min(1.0, away_s / ASLEEP_S)
            + self._code_s * min(1.0, unused_s / ASLEEP_S)
            + self._idle_s * self._asleep * min(1.0, nobody_s / ASLEEP_S)
        )

    def _run(self, process: Process, cold_s: float) -> None:
        self._running += 1
        if not process.left_s:
            process.left_s = process.take_turn()
        seconds = min(process.left_s, SLICE_S)
        process.left_s -= seconds
        seconds += cold_s
        process.had_s += seconds
        process.busy_s += seconds
        process.slice_s += seconds
        self.simulator.after(seconds, lambda: self._end(process, seconds))

    def _end(self, process: Process, seconds: float) -> None:
        self._ran_s += seconds
        self._running -= 1
        self._rested_at = self.simulator.now
        self._asleep *= math.exp(-seconds / self._awake_s)
        process.saw_s, process.ran_at = self._ran_s, self.simulator.now
        self._ran_at[type(process)] = self.simulator.now
        if process.alive:
            if not process.left_s:
                process.end_turn()
            if not process.left_s and not process.inbox and not process.is_restless:
                process.awake = False
                process.rest()
            elif process.slice_s < SLICE_S and not self._others:
                self._run(process, 0.0)
                return
            else:
                self._wait(process)
        self.free += 1
        self.dispatch()


class Process:
    """Somebody with an address. With prices: one thread, which takes what is in its queue in turns."""

    most = 64  # messages in a turn
    turn_s = 0.0

    def __init__(self, simulator: Simulator, address: int):
        self.simulator = simulator
        self.address = address
        self.alive = True
        self.busy_s = 0.0
        self.had_s = 0.0  # of its host's cores, since everybody has had as much
        self.left_s = 0.0  # of its turn
        self.slice_s = 0.0  # it has had its core for so long now
        self.ran_at = simulator.now  # when it last had a core
        self.saw_s = 0.0  # and what its host's processes had run by then
        simulator.processes[address] = self
        if simulator.prices is not None:
            self.wake_s = simulator.prices.wake_s
            self.host = simulator.host_of(node_of(address))
            self.inbox: deque[tuple[float, Callable[[], None]]] = deque()
            self.outbox: list[tuple[int, Any]] = []
            self.awake = False
            self._in_turn = False
            self._spent = 0.0
            self._waking_s = 0.0
            self._encoded: Any = None

    def send(self, destination: int, message: Any) -> None:
        simulator = self.simulator
        if simulator.prices is None:
            simulator.post(self.address, destination, message)
        elif self._in_turn:
            self._spent += simulator.send_price(message, again=message is self._encoded)
            self._encoded = message
            self.outbox.append((destination, message))
        else:
            self.do_later(0.0, lambda: self.send(destination, message))

    def receive(self, source: int, message: Any) -> None:
        """A message is here. A process that is nothing but work, as a fork server is, gets none."""
        raise AssertionError(f"nobody here for {type(message).__name__} of {source:#x}")

    # -- with prices

    def do_later(self, seconds: float, what: Callable[[], None]) -> None:
        """When its turn comes; it will take so long, and what it sends meanwhile leaves at the end."""
        self.inbox.append((seconds, what))
        self.wake()

    def wake(self) -> None:
        if not self.awake:
            self.awake = True
            self._waking_s = self.wake_s
            self.host.add(self)

    def take_turn(self) -> float:
        self._in_turn, self._spent, self._encoded = True, self.turn_s + self._waking_s, None
        self._waking_s = 0.0
        for _ in range(min(self.most, len(self.inbox))):
            seconds, what = self.inbox.popleft()
            self._spent += seconds
            what()
        self._in_turn = False
        return self._spent

    def end_turn(self) -> None:
        outbox, self.outbox = self.outbox, []
        for destination, message in outbox:
            self.simulator.post(self.address, destination, message)

    @property
    def is_restless(self) -> bool:
        """It goes on though its queue is empty."""
        return False

    def rest(self) -> None:
        """Its queue is empty."""

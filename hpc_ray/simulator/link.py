"""The model of a link: moves messages and objects between nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpc_ray.ids import LINK_LANE, address_of, node_of
from hpc_ray.protocol import TransferDone, TransferObject
from hpc_ray.simulator.process import Process
from hpc_ray.transport.bells import FIRST_PARK_S, LIVELY_S, QUIET_S, next_spin_s

if TYPE_CHECKING:
    from hpc_ray.simulator.cluster import Simulator
    from hpc_ray.simulator.roles import Raylet


LOOKS_S = 10e-6  # while it looks without a pause: so many looks are one turn


class Link(Process):
    """Moves objects; and with prices messages, which else are the simulator's own business. It hears at once of what its
    node sends, and of what comes from others when it looks, or is woken for it (LINK-1)."""

    def __init__(self, simulator: Simulator, raylet: Raylet):
        super().__init__(simulator, address_of(raylet.node, LINK_LANE, 0))
        self.raylet = raylet
        self._out: dict[int, list[tuple[int, int, Any]]] = {}
        self._arrived: list[tuple[float, Callable[[], None]]] = []
        self._quiet_since = -1.0
        self._spin_s = 0.0
        self._giving = 0  # objects of ours that are on their way
        self._taken: list[Link] = []  # of these links, with this turn
        self._told: dict[int, float] = {}  # when it last exchanged something with each node
        self._looks = 0  # number of the look that is planned; when something comes before, another one is
        self._watching = False  # a look is planned
        if simulator.prices is not None:
            self.turn_s, self.wake_s = simulator.prices.link_turn_s, simulator.prices.link_wake_s

    # -- messages

    def carry(self, source: int, destination: int, message: Any) -> None:
        """From a process of our node to another node."""
        prices = self.simulator.prices
        assert prices is not None
        self.do_later(prices.link_out_s, lambda: self._carry(source, destination, message, prices.link_chunk_s))

    def _carry(self, source: int, destination: int, message: Any, chunk_s: float) -> None:
        self._moved()
        node = node_of(destination)
        if node not in self._out:
            self._out[node] = []
            self._spent += chunk_s
            if self.simulator.now - self._told.get(node, -1.0) > QUIET_S:
                assert self.simulator.prices is not None
                self._spent += self.simulator.prices.ring_s
            self._told[node] = self.simulator.now
        self._out[node].append((source, destination, message))

    def tell_all(self, heard: Callable[[], None]) -> None:
        """Our node is gone; ``heard`` is what follows from it at the head."""
        prices = self.simulator.prices
        assert prices is not None

        def say() -> None:
            for node, link in self.simulator.links.items():
                if link is not self:
                    self._spent += prices.link_out_s + prices.link_chunk_s + prices.ring_s
                    then = heard if node == 0 else _nothing
                    seconds = prices.link_chunk_s + prices.link_in_s
                    self.simulator.after(self.simulator.costs.network_s, functools.partial(link.notice, seconds, then))

        self.do_later(0.0, say)

    def take_turn(self) -> float:
        if self._arrived:
            self.inbox.extend(self._arrived)
            self._arrived.clear()
        found = bool(self.inbox)
        seconds = super().take_turn()
        return seconds if found else max(seconds, LOOKS_S)

    @property
    def is_restless(self) -> bool:
        """It looks without a pause, which takes a core from others where they share one. Giving way each time helps them little: the
        kernel gives it back soon."""
        return self.simulator.shared and (self._giving > 0 or self.simulator.now - self._quiet_since < self._spin_s)

    def _moved(self) -> None:
        self._spin_s = next_spin_s(self._spin_s, self.simulator.now - self._quiet_since)
        self._quiet_since = self.simulator.now

    def end_turn(self) -> None:
        super().end_turn()
        while self._taken:
            self._taken.pop()._giving -= 1
        out, self._out = self._out, {}
        simulator = self.simulator
        for node, messages in out.items():
            link = simulator.links.get(node)
            if link is not None and link.alive:
                size = sum(simulator.size_of(message) for _, _, message in messages)
                delay = simulator.costs.network_s + size / simulator.costs.bytes_per_s
                simulator.after(delay, lambda link=link, messages=messages: link.arrive(messages))  # type: ignore[misc]

    def arrive(self, messages: list[tuple[int, int, Any]]) -> None:
        prices = self.simulator.prices
        assert prices is not None
        seconds = prices.link_chunk_s + len(messages) * prices.link_in_s
        self.notice(seconds, lambda: self._deliver(messages))

    def _deliver(self, messages: list[tuple[int, int, Any]]) -> None:
        self._moved()
        self._told[node_of(messages[0][0])] = self.simulator.now
        for source, destination, message in messages:
            self.simulator.hand_over(source, destination, message)

    def notice(self, seconds: float, what: Callable[[], None]) -> None:
        """MPI has something for us."""
        if self.awake:
            self.inbox.append((seconds, what))
            return
        self._arrived.append((seconds, what))
        if self._watching:  # it is found with the next look
            return
        simulator = self.simulator
        quiet = simulator.now - self._quiet_since
        if quiet < max(LIVELY_S, self._spin_s):
            simulator.after(0.0 if quiet < self._spin_s else FIRST_PARK_S * simulator.random.random(), self.wake)
        else:  # its doorbell's thread wakes it, which has slept as long
            assert simulator.prices is not None
            self._arrived.append((simulator.prices.link_wake_s + simulator.prices.cold_s, _nothing))
            self.wake()

    def rest(self) -> None:
        """Nothing to do: the next look at MPI, where looking takes cores from others."""
        self._looks += 1
        self._watching = self.simulator.shared and self.simulator.now - self._quiet_since < LIVELY_S
        if self._watching:
            number = self._looks
            self.simulator.after(FIRST_PARK_S, lambda: self._look(number))

    def _look(self, number: int) -> None:
        if self.alive and number == self._looks:
            self.wake()

    # -- objects

    def receive(self, source: int, message: Any) -> None:
        assert isinstance(message, TransferObject), message
        self._moved()
        simulator = self.simulator
        if simulator.prices is None:
            delay = simulator.costs.network_s + message.size / simulator.costs.bytes_per_s
            simulator.after(delay, lambda: self._done(message))
            return
        end = simulator.reserve_network(message.source_node, self.raylet.node, message.size)
        seconds = message.size * simulator.prices.link_byte_s
        simulator.at(end, lambda: self.notice(seconds, lambda: self._done(message)))
        giver = simulator.links[message.source_node]
        giver._giving += 1
        if giver.alive:
            giver.wake()

    def _done(self, message: TransferObject) -> None:
        self._moved()
        origin = self.simulator.raylets.get(message.source_node)
        if self.simulator.prices is not None:
            self._taken.append(self.simulator.links[message.source_node])
        error = ""
        if origin is None or not origin.alive:
            error = f"node {message.source_node} is dead"
        elif not origin.arena.has(message.source_handle):
            error = f"node {message.source_node} has no such object"
        self.send(self.raylet.address, TransferDone(message.transfer_id, error))


def _nothing() -> None: ...

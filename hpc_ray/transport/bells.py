"""How a node that sleeps hears that a message is coming by a transport whose library has to be looked at: a datagram beside it.

Relied on by ``mpi``. Whoever has not exchanged anything with a peer for ``QUIET_S`` rings before it sends. So a node may sleep long once
all has been quiet for longer than that, and it has looked once more since.

BELLS-1 (held up): any process may lose its core between any two steps. So who sends counts from before it sent, and asks once more
afterwards whether it should ring; who receives counts from the earliest moment at which its library can have taken the message. And who
wants to sleep counts from the latest: when it saw that something had moved, also that a message of its own had been taken.
BELLS-2 (slow networks): a message may be under way for longer than that allows for. So who sends rings again, more and more rarely, for
as long as it has not been taken. (Where the network itself takes messages for a process that sleeps, there is nothing to be seen of that:
there a message that was under way for longer than QUIET_S, which such networks hardly know, waits for the next look.)

Datagrams may be dropped, or not let through between hosts. Whoever finds ``MISSES`` messages in a row that did not ring believes no
bell any more, and looks at short intervals.
"""

from __future__ import annotations

import secrets
import socket

QUIET_S = 200e-6
LIVELY_S = 2 * QUIET_S  # after a message: more may come without a ring
SPIN_S = 500e-6  # so long one looks without a pause, at most
FIRST_PARK_S = 50e-6  # and then with pauses, which grow from here
MISSES = 3
_TOKEN_BYTES = 8

Bell = tuple[str, int, bytes]  # host, port, and what a datagram must say


def next_spin_s(spin_s: float, silence_s: float) -> float:
    """How long to look without a pause from now on, after something came that had been waited for so long."""
    return min(SPIN_S, max(spin_s, 2 * silence_s)) if silence_s < SPIN_S else spin_s / 2


class Bells:
    """One node's own bell, and those of its peers once ``hang`` has said where they are."""

    def __init__(self, host: str):
        """Raises OSError: one cannot listen at this address."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind((host, 0))
        except OSError:
            self._socket.close()
            raise
        self.own: Bell = (host, self._socket.getsockname()[1], secrets.token_bytes(_TOKEN_BYTES))
        self._peers: list[Bell | None] = []
        self._missed = 0

    def hang(self, peers: list[Bell | None]) -> None:
        """By node; None: that node has none, and looks at short intervals."""
        self._peers = peers

    @property
    def believed(self) -> bool:
        return self._missed < MISSES

    def fileno(self) -> int:
        return self._socket.fileno()

    def ring(self, node: int) -> None:
        """Does not block; it may get lost."""
        bell = self._peers[node]
        if bell is not None:
            try:
                self._socket.sendto(bell[2], bell[:2])
            except OSError:
                pass  # the peer will see that nobody rang

    def heard(self) -> bool:
        """Whether somebody has rung since this was last asked."""
        rung = False
        while True:
            try:
                rung = self._socket.recv(2 * _TOKEN_BYTES) == self.own[2] or rung
            except OSError:  # nothing more
                return rung

    def judge(self, came: bool, rung: bool) -> None:
        """After a long sleep: whether messages lay there, and whether somebody had rung."""
        if rung:
            self._missed = 0
        elif came and self.believed:
            self._missed += 1

    def close(self) -> None:
        self._socket.close()

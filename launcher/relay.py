"""What mpirun prints, passed on, and in it the script's exit code, where rank 0 is on another host than mpirun.

Neither mpirun's exit code can be believed (Open MPI's is 0 after a host was lost) nor need there be a way for a connection from a
compute node to here; what ranks print is what every mpirun carries. Rank 0's last words are a line that is meant for us.
"""

from __future__ import annotations

import os
import re
import select
import socket
from typing import Any

_START = b"\x1ehpc-ray:exit:"


def say(text: str) -> None:
    """A line of ours, at once and whole."""
    os.write(2, f"hpc-ray: {text}\n".encode())


def last_words(tag: str, code: int, lost: str) -> bytes:
    """The line by which rank 0 says the script's exit code, and what the session was lost with; ``tag`` is the session's name."""
    return _START + f"{tag}:{code}:{' '.join(lost.split())}\n".encode()


class Relay:
    """Passes on what comes through a pipe, at once, but for the last words. ``note`` is None until they have come."""

    def __init__(self, source: int, target: int, tag: str):
        """``source`` becomes non-blocking and is closed by ``close``."""
        self.note: dict[str, Any] | None = None  # as rank 0 would send it
        self._source, self._target = source, target
        self._pattern = re.compile(re.escape(_START + f"{tag}:".encode()) + rb"(\d+):([^\r\n]*)\r?\n")
        self._held = b""
        self._ended = False
        os.set_blocking(source, False)

    def pass_on(self, wait_s: float = 0.0, *others: socket.socket) -> None:
        """What has come, and what comes first within ``wait_s``, or until there is something to read at the others."""
        if wait_s:
            sources = [self._source] * (not self._ended) + [other.fileno() for other in others]
            select.select(sources, [], [], wait_s)
        if self._ended:
            return
        while True:
            try:
                data = os.read(self._source, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self._ended = True
                return
            _write_all(self._target, self.sift(data))

    def sift(self, data: bytes) -> bytes:
        """What of it, and of what was held back before, is for people."""
        text = self._held + data
        found = self._pattern.search(text)
        if found:
            self.note = {"exit": int(found.group(1)), "lost": found.group(2).decode(errors="replace")}
            text = text[: found.start()] + text[found.end() :]
        # Held back: a line that may be the last words but is not whole yet, or the beginning of their beginning.
        at = text.rfind(_START)
        if at < 0 or b"\n" in text[at:]:
            at = next((len(text) - n for n in range(len(_START) - 1, 0, -1) if text.endswith(_START[:n])), len(text))
        self._held = text[at:]
        return text[:at]

    def close(self) -> None:
        self.pass_on()
        _write_all(self._target, self._held)
        os.close(self._source)


def _write_all(target: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(target, data) :]
    except OSError:
        pass  # nobody reads it any more

"""The log files of a node, for those who read them from elsewhere. Used by ``server``.

LOGS-1 (inside): nothing outside of the folder is read, whatever the name says.
"""

from __future__ import annotations

import fnmatch
import os

MAX_BYTES = 1 << 20  # of one answer


class LogFolder:
    """A folder of log files; its methods are the questions that it answers."""

    def __init__(self, path: str):
        self.path = os.path.realpath(path)

    def list_logs(self, pattern: str = "*") -> list[str]:
        """The names that match, sorted."""
        return sorted(name for name in os.listdir(self.path) if fnmatch.fnmatch(name, pattern))

    def read_log(self, filename: str, offset: int = 0, tail: int = -1) -> tuple[bytes, int]:
        """Up to ``MAX_BYTES`` from ``offset`` on, and the offset behind them. With ``tail`` >= 0 it starts at the last so many
        lines instead.

        Raises:
            ValueError: there is no such file in the folder.
        """
        path = os.path.realpath(os.path.join(self.path, filename))
        if os.path.dirname(path) != self.path or not os.path.isfile(path):
            raise ValueError(f"there is no log file {filename!r} on this node")
        with open(path, "rb") as file:
            if tail >= 0:
                offset = _start_of_last_lines(file.read(), tail)
            file.seek(offset)
            data = file.read(MAX_BYTES)
        return data, offset + len(data)


def _start_of_last_lines(data: bytes, count: int) -> int:
    position = len(data) - data.endswith(b"\n")
    if count == 0:
        return len(data)
    for _ in range(count):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return position + 1

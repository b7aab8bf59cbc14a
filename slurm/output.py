"""A job's output file while it grows, on a file system that may show it late."""

from __future__ import annotations

import codecs
import os

_MOST_BYTES = 1 << 20


class Tail:
    """Reads on where it was. The file need not be there yet; one that became shorter was begun anew (a requeued job)."""

    def __init__(self, path: str):
        self.path = path
        self.position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> str:
        """What is new, "" if nothing is. Never blocks."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.position:
                    self.position = 0
                file.seek(self.position)
                data = file.read(_MOST_BYTES)
        except OSError:
            return ""
        self.position += len(data)
        return self._decoder.decode(data)

    def read_all(self) -> str:
        """All that is new, in pieces of any size."""
        parts = []
        while text := self.read():
            parts.append(text)
        return "".join(parts)

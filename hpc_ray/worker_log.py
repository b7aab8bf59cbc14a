"""How a worker says, within its own output, who prints.

Workers write the record of ``mark`` to stdout and stderr whenever the task, actor or job behind the output changes; the
fork server takes it out again (``OutputSplitter``) and names the lines that follow. Standard library only; used by
``worker`` and ``launcher``, which may not import one another.

LOG-1 (nothing lost): what was written comes out once, marks aside, whatever the pieces it was read in.
"""

from __future__ import annotations

import re

_SEPARATOR = b"\x1e"
_MARK = re.compile(rb"\x1e([^\x1e\n]{0,1000})\x1e((?:[0-9a-f]{8})?)\n")
_LONGEST_MARK = 1012


def mark(name: str, job_id: bytes) -> bytes:
    """The record to write before output of ``name`` (task or actor) for this 4-byte job. Write it in one call."""
    clean = name.encode("utf-8", "replace")[:400].replace(_SEPARATOR, b"?").replace(b"\n", b" ")
    return _SEPARATOR + clean + _SEPARATOR + job_id.hex().encode() + b"\n"


class OutputSplitter:
    """Cuts one stream of a worker into named complete lines; upholds LOG-1."""

    def __init__(self) -> None:
        self.name = ""
        self.job_id = b""
        self._held = b""  # perhaps the start of a mark
        self._line = b""  # an unfinished line

    def feed(self, data: bytes, *, end: bool = False) -> tuple[bytes, list[tuple[str, bytes, list[str]]]]:
        """Returns the bytes for the log file, and groups (name, job, lines) for those who follow.

        With ``end`` an unfinished line counts as a line.
        """
        data = self._held + data
        self._held = b""
        if not end:
            cut = data.rfind(_SEPARATOR, max(0, len(data) - _LONGEST_MARK))
            if cut >= 0:
                before = data.rfind(_SEPARATOR, max(0, cut - _LONGEST_MARK), cut)
                start = before if before >= 0 and b"\n" not in data[before:cut] else cut
                if b"\n" not in data[start:]:
                    self._held, data = data[start:], data[:start]
        if _SEPARATOR not in data:
            groups: list[tuple[str, bytes, list[str]]] = []
            self._take(data, groups, end)
            return data, groups
        groups, kept, position = [], [], 0
        for match in _MARK.finditer(data):
            piece = data[position : match.start()]
            kept.append(piece)
            self._take(piece, groups, True)
            self.name = match.group(1).decode("utf-8", "replace")
            self.job_id = bytes.fromhex(match.group(2).decode())
            position = match.end()
        kept.append(data[position:])
        self._take(data[position:], groups, end)
        return b"".join(kept), groups

    def _take(self, data: bytes, groups: list[tuple[str, bytes, list[str]]], end: bool) -> None:
        if self._line:
            data, self._line = self._line + data, b""
        if not end or data.endswith(b"\n"):
            complete, newline, rest = data.rpartition(b"\n")
            self._line = rest
            if not newline:
                return
            data = complete
        elif not data:
            return
        lines = data.decode("utf-8", "replace").split("\n")
        groups.append((self.name, self.job_id, lines))

"""Who printed it: marks in a worker's output that say which task the following lines belong to (see ``worker_log``).

A mark is written only when something is printed after the task's name has changed, or a process is started that may print.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from hpc_ray.worker_log import mark

_name = ""
_job = b""
_streams: list[NamedStream] = []  # of this process
_unfinished = False  # the beginning of some line was written, which streams keep until its end comes


def set_task_name(name: str) -> None:
    """What this process runs now."""
    global _name
    _name = name


def set_job(job_id: bytes) -> None:
    global _job
    _job = job_id


def show_unfinished() -> None:
    """What was printed by now leaves this process, also a line without an end."""
    global _unfinished
    if _unfinished:
        _unfinished = False
        for stream in _streams:
            with contextlib.suppress(OSError, ValueError):  # user code has closed it
                stream.flush()


class NamedStream(io.TextIOBase):
    """A text stream that writes a record ahead of the first output of each task."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._last: tuple[str, bytes] | None = None
        self._at_start = True

    def write(self, text: str) -> int:
        if not text:
            return 0
        self.announce()
        self._at_start = text.endswith("\n")
        if not self._at_start:
            global _unfinished
            _unfinished = True
        return self._stream.write(text)

    def announce(self) -> None:
        """Write the mark if the name has changed since the last one."""
        if self._last != (_name, _job) and self._at_start:
            self._last = (_name, _job)
            self._stream.write(mark(_name, _job).decode())

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        return self._stream.buffer


def name_streams() -> None:
    """Make stdout and stderr of this process line-buffered NamedStreams."""
    for number in (1, 2):  # open as long as the process
        _streams.append(NamedStream(open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)))  # noqa: SIM115
    sys.stdout, sys.stderr = _streams
    sys.addaudithook(_on_audit)


_SPAWNS = frozenset({"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec"})


def _on_audit(event: str, arguments: tuple) -> None:
    if event in _SPAWNS:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, NamedStream):
                stream.announce()

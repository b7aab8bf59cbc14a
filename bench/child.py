"""The runner's side of a measurement: one engine in a process of its own, which measures what it is told to and is stopped else."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from bench import engines


class Gone(Exception):
    """The engine did not start, died, or did not answer in time; says which, with its last words."""


class Child:
    """An engine that has started.

    Args:
        name: of the engine.
        python: its interpreter.
        arguments: more of them for its script.
        limit_s: how long the start may take.

    Raises:
        Gone: it did not start.
    """

    def __init__(self, name: str, python: Path, *arguments: str, limit_s: float = 120):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
        self._process = subprocess.Popen(
            engines.command(name, python, list(arguments)),
            env=engines.environment(name, python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.told: dict[str, Any] = self._next(limit_s)
        self.rows: dict[str, dict[str, Any]] = self.told.pop("rows")
        self.pause()

    @property
    def pid(self) -> int:
        return self._process.pid

    def pause(self) -> None:
        """Stop all processes of the engine, so that while it waits it takes nothing from the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run, as before each measurement."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended; who waits for its answer hears of that
            first = psutil.Process(self.pid)
            for process in reversed([first, *first.children(recursive=True)]):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _next(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.stop()
            raise Gone(f"no answer within {limit_s:.0f} s") from None
        if not line:
            self._errors.seek(0)
            words = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
            self.stop()
            raise Gone(f"it ended; its last words: {words[-1] if words else 'none'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, row: str, seconds: float, limit_s: float) -> dict[str, float]:
        """The figures of a row. Blocks for about twice ``seconds``.

        Raises:
            Gone: the engine died or hangs; it is ended.
            RuntimeError: the row failed in it.
        """
        assert self._process.stdin is not None
        self.resume()
        self._process.stdin.write(json.dumps({"row": row, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer = self._next(limit_s)
        self.pause()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        figures: dict[str, float] = answer["figures"]
        return figures

    def stop(self) -> None:
        """End the engine: politely, then with all of its process group."""
        self.resume()
        for ask in (self._process.stdin.close, self._process.terminate):  # type: ignore[union-attr]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                ask()
                self._process.wait(8)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

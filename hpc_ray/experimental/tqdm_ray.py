"""Progress bars that may be used in tasks and actors: one line of text now and then, which reaches the driver with the output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from hpc_ray.client import context

FLUSH_INTERVAL_S = 1.0


def safe_print(*args: Any, **kwargs: Any) -> None:
    """``print``; a bar is a line of its own, so it is not disturbed."""
    print(*args, **kwargs)


class tqdm:  # noqa: N801 - the name that programs know
    """A bar with the main methods of ``tqdm.tqdm``.

    Args:
        iterable: what to go through, if anything.
        desc, unit: for the text.
        total: how many there will be; default: the length of ``iterable``.
        position: for compatibility; each bar has its own lines.
        flush_interval_s: at most one line in this time.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: int | None = None,
        unit: str | None = None,
        position: int | None = None,
        flush_interval_s: float | None = None,
    ):
        self._iterable = iterable
        self._desc = desc or ""
        self._total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)  # type: ignore[arg-type]
        self._unit = unit or "it"
        self._interval = FLUSH_INTERVAL_S if flush_interval_s is None else flush_interval_s
        self._count = 0
        self._started = self._shown_at = time.monotonic()
        self._shown = -1
        self._closed = False

    @property
    def n(self) -> int:
        """How many were done."""
        return self._count

    @n.setter
    def n(self, count: int) -> None:
        self._count = count

    @property
    def total(self) -> int | None:
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        self._total = total

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def update(self, n: int = 1) -> None:
        """So many more are done. Prints if it is time."""
        self._count += n
        if time.monotonic() - self._shown_at >= self._interval:
            self.refresh()

    def refresh(self) -> None:
        """Print the line now."""
        now = time.monotonic()
        self._shown_at, self._shown = now, self._count
        elapsed = now - self._started
        total = "?" if self._total is None else str(self._total)
        rate = self._count / elapsed if elapsed > 0 else 0.0
        label = f"{self._desc}: " if self._desc else ""
        stream = sys.stdout if context.is_worker else sys.stderr
        print(f"{label}{self._count}/{total} {self._unit} [{elapsed:.1f} s, {rate:.1f} {self._unit}/s]", file=stream, flush=True)

    def close(self) -> None:
        """Print the last state, once."""
        if not self._closed:
            self._closed = True
            if self._shown != self._count:
                self.refresh()

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise TypeError("this bar was made without an iterable")
        try:
            for item in self._iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def trange(*args: int, **kwargs: Any) -> tqdm:
    """``tqdm(range(*args))``."""
    return tqdm(range(*args), **kwargs)

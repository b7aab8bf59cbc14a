"""Defaults of compiled graphs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar


def _setting(name: str, default: int) -> int:
    return field(default_factory=lambda: int(os.environ.get(f"RAY_CGRAPH_{name}", default)))


@dataclass
class DAGContext:
    """What ``experimental_compile`` uses where it is not told otherwise; each from the environment: RAY_CGRAPH_submit_timeout ….

    ``submit_timeout``, ``get_timeout`` and ``teardown_timeout`` are seconds; -1 waits for ever."""

    submit_timeout: int = _setting("submit_timeout", 10)
    get_timeout: int = _setting("get_timeout", 10)
    teardown_timeout: int = _setting("teardown_timeout", 30)
    max_inflight_executions: int = _setting("max_inflight_executions", 10)
    max_buffered_results: int = _setting("max_buffered_results", 1000)

    _current: ClassVar[DAGContext | None] = None

    @staticmethod
    def get_current() -> DAGContext:
        """The one of this process; what is changed in it holds for graphs compiled later."""
        if DAGContext._current is None:
            DAGContext._current = DAGContext()
        return DAGContext._current

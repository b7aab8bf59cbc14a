"""Saying something once."""

from __future__ import annotations

import threading
import time

PERIOD_S = 60.0

_lock = threading.Lock()
_said: set[str] = set()
_disabled = False
_periodic = False
_cleared_at = 0.0


def log_once(key: str) -> bool:
    """Whether this is the first time that this process asks about ``key``."""
    global _cleared_at
    with _lock:
        if _disabled:
            return False
        if _periodic and time.monotonic() - _cleared_at > PERIOD_S:
            _said.clear()
            _cleared_at = time.monotonic()
        if key in _said:
            return False
        _said.add(key)
        return True


def disable_log_once_globally() -> None:
    """``log_once`` says no from now on, in this process."""
    global _disabled
    _disabled = True


def enable_periodic_logging() -> None:
    """``log_once`` says yes once a minute from now on, in this process."""
    global _disabled, _periodic
    _disabled, _periodic = False, True


def reset_log_once(key: str | None = None) -> None:
    """``log_once`` says yes again, for ``key`` or for all."""
    with _lock:
        if key is None:
            _said.clear()
        else:
            _said.discard(key)

"""Counters, gauges and histograms of a program.

Values are kept in the process that records them; ``collect`` gives what this process has, and the dashboard's /metrics what all
have. Series of equal name, kind and tags
are one series, however many objects record it.
"""

from __future__ import annotations

import re
import threading
import warnings
from bisect import bisect_left
from typing import Any

from hpc_ray.client import context

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_lock = threading.Lock()
_series: dict[tuple[str, str], dict[tuple[tuple[str, str], ...], Any]] = {}  # (kind, name) → tags → value
_described: dict[tuple[str, str], Metric] = {}


class Metric:
    """What the three kinds share.

    Args:
        name: letters, digits, "_" and ":"; one that is none is warned of, and its values are not kept.
        description: for people.
        tag_keys: which tags its values have.

    Raises:
        TypeError: a name, description or tag key that is no str, or tag keys that are no tuple.
        ValueError: an empty name.
    """

    _kind = ""

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None):
        if not isinstance(name, str):
            raise TypeError(f"a metric's name must be a str, not {type(name).__name__}")
        if name == "":
            raise ValueError("a metric's name must not be empty")
        if not isinstance(description, str):
            raise TypeError(f"a metric's description must be a str, not {type(description).__name__}")
        if tag_keys is not None and not isinstance(tag_keys, tuple):
            raise TypeError(f"tag_keys should be a tuple type, got: {type(tag_keys)}")
        for key in tag_keys or ():
            if not isinstance(key, str):
                raise TypeError(f"Tag keys must be str, got {type(key)}.")
        self._name = name
        self._description = description
        self._tag_keys = tag_keys or ()
        self._default_tags: dict[str, str] = {}
        self._kept = _NAME.fullmatch(name) is not None
        if not self._kept:
            warnings.warn(
                f"{name!r} is no name for a metric, its values are not kept: use letters, digits, '_' and ':'", stacklevel=3
            )
        else:
            with _lock:
                _described[self._kind, name] = self

    def set_default_tags(self, default_tags: dict[str, str]) -> Metric:
        """Tags for values that do not say otherwise; the metric itself.

        Raises:
            ValueError: a key that is not in ``tag_keys``.
            TypeError: a value that is no str.
        """
        for key, value in default_tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key}.")
            if not isinstance(value, str):
                raise TypeError(f"Tag values must be str, got {type(value)}.")
        self._default_tags = default_tags
        return self

    @property
    def info(self) -> dict[str, Any]:
        """Name, description, tag keys and default tags."""
        return {
            "name": self._name,
            "description": self._description,
            "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }

    def _series_for(self, tags: dict[str, str] | None) -> tuple[tuple[str, str], ...]:
        for value in (tags or {}).values():
            if not isinstance(value, str):
                raise TypeError(f"Tag values must be str, got {type(value)}.")
        final = {**self._default_tags, **(tags or {})}
        missing = [key for key in self._tag_keys if key not in final]
        if missing:
            raise ValueError(f"Missing value for tag key(s): {','.join(missing)}.")
        return tuple(sorted(final.items()))

    def _table(self) -> dict[tuple[tuple[str, str], ...], Any]:
        if not self._kept:
            return {}
        return _series.setdefault((self._kind, self._name), {})

    def __reduce__(self) -> Any:
        return type(self), (self._name, self._description, self._tag_keys)


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"value must be int or float, got {type(value)}.")
    return value


class Counter(Metric):
    """A number that grows."""

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Add to it.

        Raises:
            ValueError: not above zero, or a tag is missing.
            TypeError: not a number, or a tag that is no str.
        """
        if _number(value) <= 0:
            raise ValueError(f"value must be >0, got {value}")
        series = self._series_for(tags)
        with _lock:
            table = self._table()
            table[series] = table.get(series, 0.0) + value


class Gauge(Metric):
    """A number that changes."""

    _kind = "gauge"

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        """It is this now; None changes nothing.

        Raises:
            ValueError: a tag is missing.
            TypeError: not a number, or a tag that is no str.
        """
        if value is None:
            return
        _number(value)
        series = self._series_for(tags)
        with _lock:
            self._table()[series] = float(value)


class Histogram(Metric):
    """How often values fell between boundaries.

    Raises:
        ValueError: no boundaries, or one that is not positive.
    """

    _kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: list[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ):
        super().__init__(name, description, tag_keys)
        if not boundaries:
            raise ValueError(f"a histogram needs boundaries, for example Histogram({name!r}, boundaries=[1.0, 2.0])")
        for i, boundary in enumerate(boundaries):
            if boundary <= 0:
                raise ValueError(f"Invalid `boundaries` argument at index {i}, {boundaries}. Use positive values.")
        self.boundaries = boundaries

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Note a value.

        Raises:
            ValueError: a tag is missing.
            TypeError: not a number, or a tag that is no str.
        """
        _number(value)
        series = self._series_for(tags)
        bounds = sorted(self.boundaries)
        with _lock:
            row = self._table().setdefault(
                series, {"boundaries": bounds, "counts": [0] * (len(bounds) + 1), "sum": 0.0, "count": 0}
            )
            row["counts"][bisect_left(row["boundaries"], value)] += 1
            row["sum"] += value
            row["count"] += 1

    @property
    def info(self) -> dict[str, Any]:
        return {**super().info, "boundaries": self.boundaries}

    def __reduce__(self) -> Any:
        return type(self), (self._name, self._description, self.boundaries, self._tag_keys)


def collect() -> list[dict[str, Any]]:
    """What was recorded in this process: a dict for each series (name, kind, description, tags, value).

    The value of a histogram is a dict: ``boundaries``, ``counts`` (one more), ``sum``, ``count``.
    """
    with _lock:
        return [
            {
                "name": name,
                "kind": kind,
                "description": _described[kind, name]._description,
                "tags": dict(tags),
                "value": {**value, "counts": list(value["counts"])} if isinstance(value, dict) else value,
            }
            for (kind, name), table in _series.items()
            for tags, value in table.items()
        ]


context.questions["metrics"] = collect

__all__ = ["Counter", "Gauge", "Histogram", "collect"]

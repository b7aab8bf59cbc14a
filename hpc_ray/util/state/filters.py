"""Which rows a list has: filters, limit, detail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

from hpc_ray.protocol import ActorState as ActorLife
from hpc_ray.util.state.common import MAX_LIMIT, ActorState, NodeState, Row, TaskState
from hpc_ray.util.state.exception import RayStateApiException

Filters = list[tuple[str, str, Any]]
R = TypeVar("R", bound=Row)
_HEXADECIMAL: dict[type[Row], tuple[str, ...]] = {
    ActorState: ("actor_id", "job_id"),
    NodeState: ("node_id",),
    TaskState: ("task_id", "job_id", "actor_id"),
}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def chosen(rows: list[R], kind: type[R], filters: Filters | None, limit: int, detail: bool) -> list[R]:
    """The rows that pass all filters, at most ``limit``; without ``detail`` some fields are None.

    Raises:
        RayStateApiException: a column or value that cannot be, or a limit out of range.
        ValueError: not a list of (column, "=" or "!=", value).
    """
    wishes = [_parts(item) for item in _listed(filters)]
    checks = [_check(kind, *wish) for wish in wishes]
    if not 0 <= limit <= MAX_LIMIT:
        raise RayStateApiException(f"a list has from 0 to {MAX_LIMIT} rows; the limit given is {limit}")
    if _contradict(wishes):
        return []
    found = [row for row in rows if all(check(row) for check in checks)][:limit]
    if not detail:
        more = kind.columns() - kind.base_columns()
        for row in found:
            for name in more:
                setattr(row, name, None)
    return found


def _listed(filters: Any) -> list[Any]:
    if filters is not None and not isinstance(filters, (list, tuple)):
        raise ValueError(f"filters must be a list of (column, predicate, value), not {filters!r}")
    return list(filters or ())


def _parts(item: Any) -> tuple[str, str, Any]:
    if not isinstance(item, (list, tuple)) or len(item) != 3:
        raise ValueError(f"a filter is (column, predicate, value), not {item!r}")
    column, predicate, value = item
    if predicate not in ("=", "!="):
        raise ValueError(f"Unsupported filter predicate {predicate} is given. Available predicates: =, !=.")
    if not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"the value of a filter is a str, bool, int or float, not a {type(value).__name__}: {value!r}")
    return str(column).lower(), predicate, value


def _contradict(wishes: Filters) -> bool:
    wanted: dict[str, Any] = {}
    for column, predicate, value in wishes:
        if predicate == "=" and wanted.setdefault(column, value) != value:
            warnings.warn(f"the filters want {column} to be both {wanted[column]!r} and {value!r}: no row can", stacklevel=5)
            return True
    return False


def _check(kind: type[Row], column: str, predicate: str, value: Any) -> Callable[[Row], bool]:
    if column not in kind.filterable_columns():
        raise RayStateApiException(
            f"The given filter column {column} is not supported. Supported filter columns: {sorted(kind.filterable_columns())}"
        )
    value = _converted(kind, column, value)
    equal = predicate == "="
    return lambda row: (_folded(row[column]) == value) is equal


def _converted(kind: type[Row], column: str, value: Any) -> Any:
    if column in _HEXADECIMAL.get(kind, ()):
        try:
            bytes.fromhex(str(value))
        except ValueError:
            raise RayStateApiException(f"{column} is hexadecimal, unlike {value!r}") from None
    if kind is ActorState and column == "state" and str(value).upper() not in ActorLife.__members__:
        raise RayStateApiException(f"Invalid actor state for filtering: {value}; there are {', '.join(ActorLife.__members__)}")
    if isinstance(value, str):
        hint = str(get_type_hints(kind)[column])
        try:
            if "bool" in hint:
                return _BOOLEANS[value.lower()]
            if "int" in hint:
                return int(value)
        except (KeyError, ValueError):
            raise RayStateApiException(f"the column {column} has no values like {value!r}") from None
    return _folded(value)


def _folded(value: Any) -> Any:
    """Texts are compared whatever their case."""
    return value.lower() if isinstance(value, str) else value

"""Results as they come: ``as_completed`` and ``map_unordered``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hpc_ray.api import get, wait
from hpc_ray.client.refs import ObjectRef


def as_completed(
    refs: Sequence[ObjectRef], *, chunk_size: int = 10, yield_obj_refs: bool = False, **kwargs: Any
) -> Iterator[Any]:
    """The values of references in the order in which they are ready. The iterator blocks.

    Args:
        chunk_size: how many are waited for and fetched at a time.
        yield_obj_refs: give the references instead of the values.
        kwargs: passed on to ``wait``.

    Raises (from the iterator):
        ValueError: ``chunk_size`` below 1, or references that are not distinct.
        RayTaskError …: a task failed.
    """
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    left = list(refs[:])
    while left:
        ready, left = wait(left, num_returns=min(chunk_size, len(left)), **kwargs)
        yield from ready if yield_obj_refs else get(ready)


def map_unordered(
    fn: Any,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = 100,
    chunk_size: int = 10,
    yield_obj_refs: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """``fn.remote(item)`` for each item; the values in the order in which they are ready. The iterator blocks.

    Args:
        fn: a remote function, or an actor's method.
        items: taken as there is room, so it may be endless.
        backpressure_size: how many may be under way; None: no limit.
        chunk_size, yield_obj_refs, kwargs: as for ``as_completed``.

    Raises (from the iterator):
        ValueError: a size that is not positive.
        RayTaskError …: a task failed.
    """
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    if backpressure_size is None:
        backpressure_size = -1
    elif backpressure_size <= 0:
        raise ValueError("backpressure_size must be positive.")
    source = iter(items)
    under_way = [fn.remote(item) for item in (source if backpressure_size < 0 else itertools.islice(source, backpressure_size))]
    while under_way:
        ready, under_way = wait(under_way, num_returns=min(chunk_size, len(under_way)), **kwargs)
        under_way.extend(fn.remote(item) for item in itertools.islice(source, len(ready)))
        yield from ready if yield_obj_refs else get(ready)

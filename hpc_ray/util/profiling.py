"""Naming spans of a program's own code in the timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpc_ray.client import context
from hpc_ray.client.records import now_ns


@contextmanager
def profile(event_type: str, extra_data: dict[str, Any] | None = None) -> Iterator[None]:
    """Show what happens within as a span of ``hpc_ray.timeline()``, in drivers, tasks and actors.

    Args:
        event_type: what it is called there.
        extra_data: shown with it, values as JSON has them; "name" and "cname" change its text and its colour.

    Without a session nothing is recorded.
    """
    client, task = context.client, context.task.get()
    started = now_ns()
    try:
        yield
    finally:
        if client is not None:
            client.records.spans.append((event_type, task.task_id if task else b"", started, now_ns(), dict(extra_data or {})))

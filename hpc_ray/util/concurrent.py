"""A ``concurrent.futures.Executor`` whose calls run as tasks in the cluster."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hpc_ray.api import cancel, remote
from hpc_ray.client.refs import ObjectRef


def _call(function: Callable, args: tuple, kwargs: dict) -> Any:
    return function(*args, **kwargs)


def _call_chunk(function: Callable, chunk: list[tuple]) -> list[Any]:
    return [function(*args) for args in chunk]


class TaskFuture(concurrent.futures.Future):
    """The future of a task. ``cancel`` also stops a task that runs."""

    def __init__(self, reference: ObjectRef):
        super().__init__()
        self.reference = reference  # of the value
        self._end = threading.Lock()

    def cancel(self) -> bool:
        """Stop the task, as ``hpc_ray.cancel`` does; False if it is done."""
        with self._end:
            if self.cancelled():
                return True
            if not super().cancel():
                return False
            self.set_running_or_notify_cancel()
        cancel(self.reference)
        return True

    def _settle(self, done: concurrent.futures.Future) -> None:
        with self._end:
            if self.cancelled():
                return
            self.set_running_or_notify_cancel()
        error = done.exception()
        if error is None:
            self.set_result(done.result())
        else:
            self.set_exception(error)


class TaskExecutor(concurrent.futures.Executor):
    """Each call is a task, so there is no pool to size: what may run at once is what the cluster has room for.

    Args:
        options: of the tasks, such as ``num_cpus`` or ``max_retries``.
    """

    def __init__(self, **options: Any):
        self._function = remote(**options)(_call) if options else remote(_call)
        self._lock = threading.Lock()
        self._pending: weakref.WeakSet[TaskFuture] = weakref.WeakSet()
        self._closed = False

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> TaskFuture:
        """``fn(*args, **kwargs)`` as a task. Does not wait.

        References among the arguments stay references.

        Raises:
            RuntimeError: after ``shutdown``.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future = TaskFuture(self._function.remote(fn, args, kwargs))
            self._pending.add(future)
        future.reference.future().add_done_callback(future._settle)
        return future

    def map(self, fn: Callable, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1) -> Iterator[Any]:
        """The results in order, ``chunksize`` calls in a task. Submits at once; the iterator blocks.

        Raises (from the iterator):
            TimeoutError: not there ``timeout`` seconds after the call of ``map``.
            What a call raised.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        arguments = zip(*iterables, strict=False)
        chunks = iter(lambda: list(itertools.islice(arguments, chunksize)), [])
        return itertools.chain.from_iterable(super().map(functools.partial(_call_chunk, fn), chunks, timeout=timeout))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. Blocks until all are done, if ``wait``."""
        with self._lock:
            self._closed = True
            pending = list(self._pending)
        if cancel_futures:
            for future in pending:
                future.cancel()
        if wait:
            concurrent.futures.wait(pending)


__all__ = ["TaskExecutor", "TaskFuture"]

"""The pool: the interface of ``multiprocessing.Pool``, with an actor for each process.

Three parts. ``Pool`` is what programs use. ``_Dispatcher`` is a thread that gives chunks of work to free actors, in the order
they came, and takes the results; user's callbacks run in it. A result (``AsyncResult``, ``IMapIterator``) is what a caller waits for.

MPOOL-1 (one each): an actor has at most one chunk at a time, so work goes to whoever is free.
MPOOL-2 (answered): every chunk ends with its results or an error, also when its actor dies or the pool is terminated.
MPOOL-3 (replaced): an actor that died, or has had ``maxtasksperchild`` chunks, is replaced before the next chunk.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import TimeoutError  # noqa: A004 - the one that callers of a pool catch
from typing import Any

from hpc_ray.actor import ActorHandle
from hpc_ray.api import cluster_resources, get, kill, put, remote, wait
from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import RayActorError
from hpc_ray.session import init, is_initialized

logger = logging.getLogger("hpc_ray")
_CHUNKS_PER_PROCESS = 4
_JOIN_S = 30.0  # for an actor that is asked to leave
_TERMINATE_S = 5.0  # for the thread to come back from a user's callback
_LOOK_S = 0.1  # meanwhile: how often to look whether it shall go at once


class PoolTaskError(Exception):
    """A function of the pool raised; ``underlying`` is what it raised."""

    def __init__(self, underlying: BaseException):
        super().__init__(underlying)
        self.underlying = underlying


class PoolActor:
    """Stands for a process of the pool."""

    def __init__(self, initializer: Callable | None = None, initargs: Iterable[Any] | None = None):
        if initializer:
            initializer(*(initargs or ()))

    def ping(self) -> None:
        """Answers once the initializer is done."""

    def run_batch(self, func: Callable, batch: list[tuple[Any, Any]]) -> list[Any]:
        """Results of ``func`` for each (args, kwargs); in place of those that it raised, a PoolTaskError."""
        results: list[Any] = []
        for args, kwargs in batch:
            try:
                results.append(func(*args, **kwargs))
            except Exception as error:
                results.append(PoolTaskError(error))
        return results


_PoolActor = remote(PoolActor)


# ------------------------------------------------------------------ what callers wait for


class _Chunk:
    """A piece of work on its way."""

    __slots__ = ("batch", "func", "index", "sink")

    def __init__(self, sink: Any, index: int, func: Any, batch: list[tuple[Any, Any]]):
        self.sink = sink
        self.index = index
        self.func = func  # the function, or a reference to it
        self.batch = batch


class AsyncResult:
    """What an asynchronous call of the pool returns."""

    def __init__(
        self, chunks: int, callback: Callable | None = None, error_callback: Callable | None = None, single_result: bool = False
    ):
        self._left = chunks
        self._results: list[list[Any]] = [[] for _ in range(chunks)]
        self._callback = callback
        self._error_callback = error_callback
        self._single = single_result
        self._error: BaseException | None = None
        self._done = threading.Event()
        if not chunks:
            self._done.set()

    def _receive(self, index: int, results: list[Any], error: BaseException | None) -> None:
        """A chunk ended. In the dispatcher's thread."""
        self._results[index] = results
        self._error = self._error or error or _first_error(results)
        self._left -= 1
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        self._done.set()
        callback, argument = (self._callback, self._value) if self._error is None else (self._error_callback, lambda: self._error)
        if callback is not None:
            try:
                callback(argument())
            except Exception:
                logger.exception("a callback of a pool raised")

    def _value(self) -> Any:
        return self._results[0][0] if self._single else list(itertools.chain.from_iterable(self._results))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is done, at most ``timeout`` seconds. Blocks."""
        self._done.wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The value. Blocks.

        Raises:
            multiprocessing.TimeoutError: not within ``timeout`` seconds.
            What the function raised.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the result was not there within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value()

    def ready(self) -> bool:
        """Whether it is done."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Whether it ended without an error.

        Raises:
            ValueError: it is not done.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None


def _first_error(results: list[Any]) -> BaseException | None:
    return next((item.underlying for item in results if isinstance(item, PoolTaskError)), None)


class IMapIterator(ABC):
    """Results of ``imap`` and ``imap_unordered``. An iterable with a length is submitted at once, one without as results
    are taken, so that it may be endless."""

    def __init__(self, pool: Pool, func: Callable, iterable: Iterable[Any], chunksize: int):
        self._dispatcher = pool._dispatcher
        self._func = func
        self._chunks = _chunked(((item,) for item in iterable), chunksize)
        self._window = None if hasattr(iterable, "__len__") else _CHUNKS_PER_PROCESS * pool._processes
        self._submitted = 0
        self._taken = 0  # chunks whose results have been handed to the caller
        self._arrived: dict[int, list[Any]] = {}
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._submit_more()

    def _submit_more(self) -> None:
        while self._window is None or self._submitted - self._taken < self._window:
            batch = next(self._chunks, None)
            if batch is None:
                return
            self._submitted += 1
            self._dispatcher.submit(_Chunk(self, self._submitted - 1, self._func, batch))

    def _receive(self, index: int, results: list[Any], error: BaseException | None) -> None:
        with self._changed:
            self._arrived[index] = results if error is None else [PoolTaskError(error)]
            self._changed.notify_all()

    @abstractmethod
    def _pick(self) -> int | None:
        """Which chunk to hand out now; None if it is not there. Under ``_changed``."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result. Blocks.

        Raises:
            StopIteration: that was all.
            multiprocessing.TimeoutError: not there within ``timeout`` seconds; it can be asked for again.
            What the function raised for this item.
        """
        if not self._items:
            self._submit_more()
            if self._taken == self._submitted:
                raise StopIteration
            with self._changed:
                if not self._changed.wait_for(lambda: self._pick() is not None, timeout):
                    raise TimeoutError(f"the next result was not there within {timeout} s")
                index = self._pick()
                assert index is not None
                self._items.extend(self._arrived.pop(index))
            self._taken += 1
        item = self._items.popleft()
        if isinstance(item, PoolTaskError):
            raise item.underlying
        return item


class OrderedIMapIterator(IMapIterator):
    """In the order of the items."""

    def _pick(self) -> int | None:
        return self._taken if self._taken in self._arrived else None


class UnorderedIMapIterator(IMapIterator):
    """As they are done."""

    def _pick(self) -> int | None:
        return next(iter(self._arrived), None)


# ------------------------------------------------------------------ who gives the work to actors


class _Worker:
    """An actor of the pool."""

    __slots__ = ("actor", "chunk", "reference", "started")

    def __init__(self, actor: ActorHandle):
        self.actor = actor
        self.started = 0
        self.chunk: _Chunk | None = None
        self.reference: ObjectRef | None = None


class _Dispatcher:
    """See the module's text. Other threads only put into ``inbox``; all else belongs to its thread."""

    def __init__(self, actors: list[ActorHandle], new_actor: Callable[[], ActorHandle], max_chunks: int | None):
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.workers = [_Worker(actor) for actor in actors]
        self.new_actor = new_actor
        self.max_chunks = max_chunks
        self.idle = deque(self.workers)
        self.backlog: deque[_Chunk] = deque()
        self.closing = False
        run = contextvars.copy_context().run  # replacements belong to the task that made the pool
        self.thread = threading.Thread(target=run, args=(self._serve,), name="hpc_ray-pool", daemon=True)
        self.thread.start()

    def submit(self, chunk: _Chunk) -> None:
        """Work to be done. From any thread; never blocks."""
        if not self.thread.is_alive():
            raise ValueError("Pool not running")
        self.inbox.put(chunk)

    def close(self) -> None:
        """End after the work that was submitted. From any thread."""
        self.inbox.put("close")

    def terminate(self) -> None:
        """End now: what is not done fails. From any thread."""
        self.inbox.put("terminate")

    def _serve(self) -> None:
        while True:
            item = self.inbox.get()
            if item == "terminate":
                self._abandon()
                return
            if item == "forget":  # a copy of the pool is collected; the actors are not its own
                return
            if item == "close":
                self.closing = True
            elif isinstance(item, _Chunk):
                self.backlog.append(item)
            else:
                self._collect(item)
            while self.backlog and self.idle:
                self._start(self.idle.popleft(), self.backlog.popleft())
            if self.closing and not self.backlog and len(self.idle) == len(self.workers):
                self._leave()
                return

    def _start(self, worker: _Worker, chunk: _Chunk) -> None:
        try:
            if self.max_chunks and worker.started >= self.max_chunks:
                worker.actor.__ray_terminate__.remote()
                self._replace(worker)
            worker.started += 1
            reference = worker.actor.run_batch.remote(chunk.func, chunk.batch)
        except Exception as error:  # e.g. something that cannot be pickled
            self.idle.append(worker)
            chunk.sink._receive(chunk.index, [], error)
            return
        worker.chunk, worker.reference = chunk, reference
        reference.future().add_done_callback(lambda _: self.inbox.put(worker))

    def _collect(self, worker: _Worker) -> None:
        chunk, reference = worker.chunk, worker.reference
        assert chunk is not None and reference is not None
        worker.chunk = worker.reference = None
        results: list[Any] = []
        failure: Exception | None = None
        try:
            results = get(reference)
        except Exception as error:
            failure = error
            if isinstance(error, RayActorError):
                self._replace(worker)
        self.idle.append(worker)
        chunk.sink._receive(chunk.index, results, failure)

    def _replace(self, worker: _Worker) -> None:
        worker.actor = self.new_actor()
        worker.started = 0

    def _leave(self) -> None:
        """The actors end in order, unless they are told to end at once."""
        deadline = time.monotonic() + _JOIN_S
        try:
            left = [worker.actor.__ray_terminate__.remote() for worker in self.workers]
            while left and self.inbox.empty() and time.monotonic() < deadline:
                _, left = wait(left, num_returns=len(left), timeout=_LOOK_S)
        except Exception:  # the session is over, and the actors with it
            logger.debug("a pool could not end its actors in order", exc_info=True)
        self._abandon()

    def _abandon(self) -> None:
        for worker in self.workers:
            try:
                kill(worker.actor)
            except Exception:  # the session is over, and the actor with it
                logger.debug("an actor of a pool could not be killed", exc_info=True)
        error = RuntimeError("the pool was terminated")
        lost = [worker.chunk for worker in self.workers if worker.chunk is not None]
        while not self.inbox.empty():
            item = self.inbox.get()
            if isinstance(item, _Chunk):
                self.backlog.append(item)
        for chunk in [*lost, *self.backlog]:
            chunk.sink._receive(chunk.index, [], error)


# ------------------------------------------------------------------ the pool


class Pool:
    """A pool of actors with the interface of ``multiprocessing.Pool``. Starts a session if there is none.

    Args:
        processes: how many actors; default: one for each CPU of the cluster.
        initializer, initargs: called in each actor first.
        maxtasksperchild: an actor is replaced after so many chunks of work.
        context: for compatibility; ignored.
        ray_address: of the cluster, if there is no session yet.
        ray_remote_args: options of the actors, such as ``num_cpus`` (default 0) or ``resources``.

    Raises:
        ValueError: ``processes`` is not positive, or more than the CPUs of the cluster.
        ActorDiedError: the initializer failed.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: dict[str, Any] | None = None,
    ):
        self._closed = False
        self._initializer = initializer
        self._initargs = tuple(initargs or ())
        self._max_chunks = maxtasksperchild
        self._options = {"num_cpus": 0, **(ray_remote_args or {})}
        if processes is not None and processes <= 0:
            raise ValueError("Processes in the pool must be >0.")
        if not is_initialized():
            address = ray_address or os.environ.get("RAY_ADDRESS")
            if address:
                init(address)
            else:
                init(num_cpus=processes)
        cpus = int(cluster_resources().get("CPU", 0))
        if processes is not None and processes > cpus:
            raise ValueError(f"a pool of {processes} processes is too large for a cluster of {cpus} CPUs")
        self._processes = cpus if processes is None else processes
        actors = [self._new_actor() for _ in range(self._processes)]
        get([actor.ping.remote() for actor in actors])
        self._attach(actors)

    def _new_actor(self) -> ActorHandle:
        return _PoolActor.options(**self._options).remote(self._initializer, self._initargs)

    def _attach(self, actors: list[ActorHandle], end: str = "terminate") -> None:
        kind, arguments = _PoolActor.options(**self._options), (self._initializer, self._initargs)
        self._dispatcher = _Dispatcher(actors, lambda: kind.remote(*arguments), self._max_chunks)  # must not refer to the pool
        self._finalizer = weakref.finalize(self, self._dispatcher.inbox.put, end)
        self._finalizer.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("_dispatcher", "_finalizer")}
        return {**state, "_actors": [worker.actor for worker in self._dispatcher.workers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy that uses the same actors and does not end them."""
        actors = state.pop("_actors")
        self.__dict__.update(state)
        self._attach(actors, "forget")

    def _check_running(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")

    # -- one call

    def apply(self, func: Callable, args: tuple | None = None, kwargs: dict | None = None) -> Any:
        """``func(*args, **kwargs)`` in the pool. Blocks; raises what it raised."""
        return self.apply_async(func, args, kwargs).get()

    def apply_async(
        self,
        func: Callable,
        args: tuple | None = None,
        kwargs: dict | None = None,
        callback: Callable[[Any], None] | None = None,
        error_callback: Callable[[BaseException], None] | None = None,
    ) -> AsyncResult:
        """The same without waiting. ``callback`` gets the value, ``error_callback`` the exception."""
        self._check_running()
        result = AsyncResult(1, callback, error_callback, single_result=True)
        self._dispatcher.submit(_Chunk(result, 0, func, [(tuple(args or ()), dict(kwargs or {}))]))
        return result

    # -- many calls

    def map(self, func: Callable, iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """``func`` of each item, a list in their order. Blocks; raises the first error.

        Args:
            chunksize: how many items an actor gets at a time; default: a quarter of an even share.
        """
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable,
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list], None] | None = None,
        error_callback: Callable[[BaseException], None] | None = None,
    ) -> AsyncResult:
        """The same without waiting."""
        return self._map(func, [(item,) for item in iterable], chunksize, callback, error_callback)

    def starmap(self, func: Callable, iterable: Iterable[Iterable[Any]], chunksize: int | None = None) -> list[Any]:
        """``func(*item)`` for each item, a list in their order. Blocks; raises the first error."""
        return self._map(func, list(iterable), chunksize, None, None).get()

    def starmap_async(
        self,
        func: Callable,
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list], None] | None = None,
        error_callback: Callable[[BaseException], None] | None = None,
    ) -> AsyncResult:
        """The same without waiting."""
        return self._map(func, list(iterable), chunksize, callback, error_callback)

    def _map(
        self,
        func: Callable,
        arguments: list[Any],
        chunksize: int | None,
        callback: Callable | None,
        error_callback: Callable | None,
    ) -> AsyncResult:
        self._check_running()
        if chunksize is None:
            chunksize = max(1, -(-len(arguments) // (_CHUNKS_PER_PROCESS * self._processes)))
        assert chunksize > 0, f"chunksize must be positive, it is {chunksize}"
        chunks = list(_chunked(iter(arguments), chunksize))
        result = AsyncResult(len(chunks), callback, error_callback)
        function = put(func) if len(chunks) > 1 else func  # pickled once
        for index, batch in enumerate(chunks):
            self._dispatcher.submit(_Chunk(result, index, function, batch))
        return result

    def imap(self, func: Callable, iterable: Iterable[Any], chunksize: int | None = 1) -> OrderedIMapIterator:
        """An iterator over the results, in order. Does not wait; the iterator does."""
        return OrderedIMapIterator(self, func, iterable, self._checked(chunksize))

    def imap_unordered(self, func: Callable, iterable: Iterable[Any], chunksize: int | None = 1) -> UnorderedIMapIterator:
        """An iterator over the results as they are done."""
        return UnorderedIMapIterator(self, func, iterable, self._checked(chunksize))

    def _checked(self, chunksize: int | None) -> int:
        self._check_running()
        if chunksize is None:
            return 1
        if chunksize < 1:
            raise ValueError(f"chunksize must be positive, it is {chunksize}")
        return chunksize

    # -- ends

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *error: object) -> None:
        self.terminate()

    def close(self) -> None:
        """Take no more work; the actors end after what they have. Does not wait."""
        if not self._closed:
            self._closed = True
            self._dispatcher.close()

    def terminate(self) -> None:
        """End the actors at once; what is not done fails with RuntimeError."""
        self._closed = True
        self._finalizer.detach()
        self._dispatcher.terminate()
        if threading.current_thread() is not self._dispatcher.thread:
            self._dispatcher.thread.join(_TERMINATE_S)

    def join(self) -> None:
        """Wait until the actors of a closed pool have done their work. Blocks.

        Raises:
            ValueError: the pool is still running.
        """
        if not self._closed:
            raise ValueError("Pool is still running")
        self._dispatcher.thread.join()


def _chunked(arguments: Iterator[Any], size: int) -> Iterator[list[tuple[Any, Any]]]:
    """Batches of (args, kwargs)."""
    batch: list[tuple[Any, Any]]
    while batch := [(args, {}) for args in itertools.islice(arguments, size)]:
        yield batch

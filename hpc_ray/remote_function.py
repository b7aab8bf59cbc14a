"""Remote functions: what ``@remote`` makes of a function."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from hpc_ray import packing, serialize
from hpc_ray.client import context
from hpc_ray.client.calls import Function, Template
from hpc_ray.client.client import Client
from hpc_ray.client.streams import code_of
from hpc_ray.dag.function_node import FunctionNode
from hpc_ray.options import amounts, check_task, gang_of, led_by_one, shape_of
from hpc_ray.protocol import Gang
from hpc_ray.session import ensure_connected


def yields(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def check_generator(num_returns: Any, generator: bool, name: str) -> None:
    """Raises ValueError where a stream is asked of what yields nothing."""
    if num_returns in ("dynamic", "streaming") and not generator:
        raise ValueError(f'num_returns="{num_returns}" needs a generator; {name} has no yield')


def export(target: Any, name: str, what: str) -> Function:
    """A function or class pickled for the workers.

    Raises:
        TypeError: it refers to something that cannot be pickled; the text says to what.
    """
    try:
        blob = serialize.dumps(target)
    except TypeError as error:
        where = serialize.explain(target, name)
        raise TypeError(
            f"Could not serialize the {what} {name}: {error}. The part at fault: {where}. "
            "Create it inside the function, or pass something that can be pickled."
        ) from error
    import hashlib  # brings OpenSSL

    return Function(hashlib.sha1(blob, usedforsecurity=False).digest()[:16], blob, name)


class Signature:
    """Checks the arguments of a call before it is sent; quickly where they are plain.

    Made from ``parameters``, what of a function's signature matters to a caller: name, kind, whether there is a default.
    """

    __slots__ = ("_full", "_least", "_most", "parameters")

    def __init__(self, parameters: list[tuple[str, int, bool]] | None):
        self.parameters = parameters
        self._full: inspect.Signature | None = None
        self._least, self._most = 1, 0  # nothing passes the quick check
        if parameters is None:  # a builtin that does not tell
            self._least, self._most = 0, sys.maxsize
            return
        kinds = inspect.Parameter
        if any(kind == kinds.KEYWORD_ONLY and not default for _, kind, default in parameters):
            return
        positional = [default for _, kind, default in parameters if kind <= kinds.POSITIONAL_OR_KEYWORD]
        self._least = positional.count(False)
        endless = any(kind == kinds.VAR_POSITIONAL for _, kind, _ in parameters)
        self._most = sys.maxsize if endless else len(positional)

    @classmethod
    def of(cls, function: Any, skip: int = 0) -> Signature:
        """``skip``: leading parameters that the caller does not give (``self``)."""
        try:
            found = list(inspect.signature(function).parameters.values())[skip:]
        except (TypeError, ValueError):
            return cls(None)
        return cls([(p.name, int(p.kind), p.default is not p.empty) for p in found])

    def check(self, args: tuple, kwargs: dict) -> None:
        """Raises TypeError for arguments that the function would not take."""
        if not kwargs and self._least <= len(args) <= self._most:
            return
        if self.parameters is None:
            return
        if self._full is None:
            self._full = inspect.Signature(
                [
                    inspect.Parameter(name, inspect._ParameterKind(kind), default=None if default else inspect.Parameter.empty)
                    for name, kind, default in self.parameters
                ]
            )
        self._full.bind(*args, **kwargs)


class RemoteFunction:
    """A function that runs as tasks: ``f.remote(...)`` gives references to its results."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        check_task(options)
        check_generator(options.get("num_returns"), yields(function), getattr(function, "__name__", "this"))
        if options.get("num_gpus") and not options.get("mpi_ranks"):
            options = {"max_calls": 1, **options}  # as in Ray: what a library keeps on the GPU goes with the process
        self._function = function
        self._options = options
        self._ranks = options.get("mpi_ranks")  # of a gang
        self.leads = True  # its ranks run the function; False: the function starts them
        self.gang: Gang | None = None  # once it is prepared
        if self._ranks and yields(function):
            raise ValueError(f"a gang cannot yield, and {function.__name__} does: return a list instead")
        self._per_rank = options.get("num_returns") == "per_rank"
        self._num_returns = code_of(self._ranks if self._per_rank else options.get("num_returns"), yields(function))
        self._client: Client | None = None
        self._template: Template | None = None
        self._exported: Function | None = None
        self._captured = b""  # the placement group that the template inherited
        self._signature = Signature.of(function)
        functools.update_wrapper(self, function, updated=())

        @functools.wraps(function)
        def remote(*args: Any, **kwargs: Any) -> Any:
            return self._submit(args, kwargs)

        self.remote = remote

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._function.__name__
        raise TypeError(
            f"Remote functions cannot be called directly. Instead of running '{name}()', try '{name}.remote()'."
        )

    def options(self, **options: Any) -> Changed:
        """The same function with other options; the result can be called, not changed again. An empty ``runtime_env``, or None,
        leaves the function its own, as in Ray.

        Raises:
            ValueError: an unknown option, or ``max_calls``, which counts the runs of one function.
        """
        if "max_calls" in options:
            raise ValueError("max_calls can only be given in the decorator, since it counts the runs of one function")
        if not options.get("runtime_env", True):
            del options["runtime_env"]
        other = RemoteFunction(self._function, {"max_calls": 0, **self._options, **options})
        other._exported = self._exported
        return Changed(other)

    def _remote(self, args: Any = None, kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        """``options`` and ``remote`` in one, as older programs and libraries write it."""
        return (self.options(**options) if options else self).remote(*args or (), **kwargs or {})

    def bind(self, *args: Any, **kwargs: Any) -> FunctionNode:
        """A node of a task graph: this call, to be made by ``execute``. See ``hpc_ray.dag``."""
        return FunctionNode(self, args, kwargs, self._options)

    def prepare(self) -> Client:
        """What is done once in a session, and again in another placement group. May block."""
        client = context.client
        if client is None or client is not self._client or context.captured != self._captured:
            self._prepare(ensure_connected())
            client = self._client
            assert client is not None
        return client

    def _submit(self, args: tuple, kwargs: dict) -> Any:
        client = context.client
        if client is None or client is not self._client or context.captured != self._captured:
            client = self.prepare()
        self._signature.check(args, kwargs)
        template = self._template
        assert template is not None
        made = client.tasks.submit(template, args, kwargs)
        return [made] if template.listed else made

    def _prepare(self, client: Client) -> None:
        """Everything that is the same for each call in this session."""
        options = self._options
        if self._exported is None:
            self._exported = export(self._function, self._function.__name__, "remote function")
        retries = options.get("max_retries")
        retry_exceptions = options.get("retry_exceptions") or False
        extras: dict[str, Any] = {}
        if retry_exceptions:
            extras["retry_exceptions"] = retry_exceptions if isinstance(retry_exceptions, bool) else list(retry_exceptions)
        if options.get("max_calls"):
            extras["max_calls"] = options["max_calls"]
        limit = options.get("_generator_backpressure_num_objects") or 0
        if limit > 0:
            extras["backpressure"] = limit
        recorded = options.get("enable_task_events", True)
        if not recorded:
            extras["unrecorded"] = True
        if self._ranks:
            self.gang, shape = gang_of(f"{options.get('name') or self._function.__name__}()", options, client)
            if self.leads:
                extras["gang"] = self.gang
                shape = led_by_one(shape, self._ranks)
        else:
            shape = shape_of(amounts(options, 1), options, client)
        self._template = Template(
            self._exported,
            options.get("name") or self._function.__name__,
            shape,
            num_returns=self._num_returns,
            max_retries=3 if retries is None else retries,
            retry_exceptions=bool(retry_exceptions),
            extras=serialize.dumps(extras) if extras else b"",
            limited=limit > 0,
            listed=self._per_rank and self._ranks == 1,
            recorded=recorded,
        )
        self._client = client
        self._captured = context.captured

    def __reduce__(self) -> Any:
        return _rebuild, (self._function, packing.portable(self._options))


class Changed:
    """What ``options`` returns."""

    __slots__ = ("_target",)

    def __init__(self, target: Any):
        self._target = target

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._target.remote(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return self._target.bind(*args, **kwargs)


def _rebuild(function: Callable, options: dict[str, Any]) -> RemoteFunction:
    return RemoteFunction(function, options)

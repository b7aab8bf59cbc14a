"""Actors: what ``@remote`` makes of a class, and the handles through which they are called."""

from __future__ import annotations

import inspect
import os
import types
from typing import Any, TypeVar, cast

from hpc_ray import packing, serialize
from hpc_ray.client import context
from hpc_ray.client.actors import ActorLink
from hpc_ray.client.calls import Function, Task, Template
from hpc_ray.client.client import Client
from hpc_ray.client.objects import READY
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.streams import code_of
from hpc_ray.dag.class_node import ClassNode, bind_method
from hpc_ray.exceptions import ActorAlreadyExistsError, ActorHandleNotFoundError
from hpc_ray.ids import GCS_ADDRESS, ActorID
from hpc_ray.options import METHOD_OPTIONS, amounts, check_actor, check_method, check_returns, gang_of, shape_of
from hpc_ray.protocol import ActorSpec, Gang, Shape
from hpc_ray.remote_function import Changed, Signature, check_generator, export, yields
from hpc_ray.session import ensure_connected

_MARK = "__ray_method_options__"
_GENERATOR = "__generator__"  # among a method's options: it yields
_ASYNC_CONCURRENCY = 1000
_T = TypeVar("_T")


def method(*args: Any, **options: Any) -> Any:
    """Decorator for an actor's methods: ``@method(num_returns=2)``, ``concurrency_group``, ``max_task_retries``,
    ``retry_exceptions``.

    Raises:
        AssertionError: positional arguments, or an option that methods do not have.
        ValueError, TypeError: a value that an option cannot have.
    """
    if len(args) == 1 and not options and callable(args[0]):
        return args[0]  # a bare @method changes nothing
    known = sorted(METHOD_OPTIONS.keys() - {"name"})  # that is of a call
    assert not args and options.keys() <= set(known), (
        "The @ray.method decorator must be applied with keyword arguments, for example '@ray.method(num_returns=2)'; "
        f"it knows {', '.join(known)}."
    )
    check_method(options)

    def mark(function: Any) -> Any:
        check_generator(options.get("num_returns"), yields(function), function.__name__)
        setattr(function, _MARK, options)
        if "concurrency_group" in options:
            function.__ray_concurrency_group__ = options["concurrency_group"]
        return function

    return mark


def exit_actor() -> None:
    """End the actor that calls it, in order: the calls before it are answered, exit handlers run, it is not restarted.

    Raises:
        TypeError: the caller is no actor.
    """
    if context.actor is None:
        raise TypeError("exit_actor called on a non-actor worker.")
    context.leaving = "exit_actor"
    current = context.task.get()
    if current is not None:
        current.leaves = True
    raise context.LeaveProcess(context.leaving)


class ActorMethod:
    """A method of an actor: ``handle.method.remote(...)``."""

    __slots__ = ("_handle", "_name", "_options", "_signature", "_template")

    def __init__(
        self, handle: ActorHandle, name: str, template: Template, signature: Signature, options: dict[str, Any] | None = None
    ):
        self._handle = handle
        self._name = name
        self._template = template
        self._signature = signature
        self._options = options or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"Actor methods cannot be called directly. Instead of running 'object.{self._name}()', try "
            f"'object.{self._name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; one reference, a list of them, or None, by ``num_returns``."""
        handle = self._handle
        template = self._template
        self._signature.check(args, kwargs)
        client = handle._client
        if client is not context.client:
            handle._connect()
            client = handle._client
        made = client.actors.call(handle._link, template, args, kwargs)
        return [made] if template.listed else made

    def _remote(self, args: Any = None, kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        """``options`` and ``remote`` in one, as older programs and libraries write it."""
        return (self.options(**options) if options else self).remote(*args or (), **kwargs or {})

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a task graph: this call, to be made by ``execute``; several nodes if it has several return values.
        See ``hpc_ray.dag``."""
        self._signature.check(args, kwargs)
        return bind_method(self._handle, self._name, args, kwargs, self._options, self._template.num_returns)

    def options(self, **options: Any) -> ActorMethod:
        """The same method with other options."""
        check_method(options)
        handle = self._handle
        return ActorMethod(handle, self._name, handle._make_template(self._name, options), self._signature, options)


class ActorHandle:
    """A handle on an actor. It can be passed to tasks and other actors; while a counted one exists the actor lives."""

    __class_getitem__: Any = classmethod(types.GenericAlias)  # for annotations: ActorHandle[Model]

    def __init__(
        self,
        actor_id: bytes,
        class_name: str,
        methods: dict[str, tuple[list | None, dict[str, Any]]],
        defaults: dict[str, Any],
        scope: ObjectRef | None,
    ):
        self._ray_actor_id = ActorID(actor_id)
        self._class_name = class_name
        self._methods = methods
        self._defaults = defaults
        self._scope = scope
        self._twin: ActorHandle  # set with the first method that is asked for
        self._link: ActorLink
        self._client: Client = None  # type: ignore[assignment]
        self._connect()

    def _connect(self) -> None:
        client = context.client
        if client is None or self._client is not None:
            raise ActorHandleNotFoundError(
                f"The handle on actor {self._ray_actor_id.hex()} ({self._class_name}) belongs to a session that is over. "
                "Make the actor again in this session."
            )
        self._client = client
        with client.lock:
            self._link = client.actors.link(
                self._ray_actor_id.binary(),
                self._class_name,
                self._defaults.get("out_of_order", False),
                self._defaults.get("max_pending_calls", -1),
            )
        if self._scope is not None:
            client.actors.set_scope(self._link, self._scope)

    @property
    def _actor_id(self) -> ActorID:
        return self._ray_actor_id

    def _make_template(self, name: str, options: dict[str, Any]) -> Template:
        marked = {**self._methods[name][1], **{key: value for key, value in options.items() if value is not None}}
        generator = marked.get(_GENERATOR, False)
        returns, ranks = marked.get("num_returns"), self._defaults.get("mpi_ranks")
        check_returns(ranks, returns)
        check_generator(returns, generator, name)
        listed = returns == "per_rank" and ranks == 1
        retry = marked.get("retry_exceptions") or False
        extras: dict[str, Any] = {}
        if retry:
            extras["retry_exceptions"] = retry if isinstance(retry, bool) else list(retry)
        if marked.get("concurrency_group"):
            extras["concurrency_group"] = marked["concurrency_group"]
        retries = marked.get("max_task_retries")
        limit = marked.get("_generator_backpressure_num_objects") or 0
        if limit > 0:
            extras["backpressure"] = limit
        if marked.get("name"):
            extras["task_name"] = marked["name"]
        if listed:
            extras["single"] = True
        recorded = marked.get("enable_task_events", self._defaults.get("enable_task_events", True))
        if not recorded:
            extras["unrecorded"] = True
        return Template(
            _NO_FUNCTION,
            name,
            None,
            num_returns=code_of(ranks if returns == "per_rank" else returns, generator),
            max_retries=self._defaults.get("max_task_retries", 0) if retries is None else retries,
            retry_exceptions=bool(retry),
            extras=serialize.dumps(extras) if extras else b"",
            limited=limit > 0,
            listed=listed,
            recorded=recorded,
        )

    def __getattr__(self, name: str) -> ActorMethod:
        if name.startswith("_ray") or name not in self.__dict__.get("_methods", ()):
            raise AttributeError(f"'{self.__dict__.get('_class_name', 'actor')}' object has no attribute '{name}'")
        if "_twin" not in self.__dict__:
            twin = object.__new__(ActorHandle)  # so that methods can be kept here and make no cycle
            twin.__dict__.update(self.__dict__)
            self._twin = twin
        found = self.__dict__[name] = ActorMethod(
            self._twin, name, self._make_template(name, {}), Signature(self._methods[name][0])
        )
        return found

    def __dir__(self) -> list[str]:
        return list(self._methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._ray_actor_id == other._ray_actor_id

    def __hash__(self) -> int:
        return hash(self._ray_actor_id)

    def __repr__(self) -> str:
        return f"Actor({self._class_name}, {self._ray_actor_id.hex()})"

    def __reduce__(self) -> Any:
        return _rebuild_handle, (*self._description(), self._scope)

    def _description(self) -> tuple[bytes, str, dict, dict]:
        return self._ray_actor_id.binary(), self._class_name, self._methods, self._defaults


_NO_FUNCTION = Function(b"", b"", "")


def _rebuild_handle(actor_id: bytes, class_name: str, methods: dict, defaults: dict, scope: ObjectRef | None) -> ActorHandle:
    return ActorHandle(actor_id, class_name, methods, defaults, scope)


def weak_handle(description: bytes) -> ActorHandle:
    """A handle that is not counted, from what ``ActorSpec.handle`` carries."""
    actor_id, class_name, methods, defaults = serialize.loads(description)
    return ActorHandle(actor_id, class_name, methods, defaults, None)


_HEAP_TYPE = 1 << 9  # a flag of types: defined by a class statement


def _blank(kind: type) -> Any:
    """An instance that no code of the class has seen. The class may be an exception's, or a dict's."""
    builtin: Any = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE)
    return builtin.__new__(kind)


ActorProxy: Any = ActorHandle[_T] | type[_T]  # type: ignore[misc]  # what programs annotate a handle with, so that editors know the methods


class ActorClassInheritanceException(TypeError):
    """A class was derived from an actor class."""


class ActorClass:
    """A class whose instances live in processes of their own: ``Class.remote(...)`` makes one and gives a handle."""

    __name__: str
    _cls: type
    _options: dict[str, Any]
    _exported: Function | None
    _description: Description | None

    __class_getitem__: Any = classmethod(types.GenericAlias)  # for annotations: ActorClass[Model]

    def __init__(self, name: str, bases: tuple, attr: dict[str, Any]):
        """What ``class B(A)`` calls for an actor class A."""
        base = next(base.__name__ for base in bases if isinstance(base, ActorClass))
        raise ActorClassInheritanceException(
            f"Attempted to define subclass '{name}' of actor class '{base}'. Actor classes cannot be inherited from: "
            "derive from the plain class, and make the derived class an actor class with @remote."
        )

    @classmethod
    def _wrap(cls, target: type, options: dict[str, Any]) -> ActorClass:
        """The actor class of a plain class: an object whose type also derives from that class, so that names and
        documentation are found where they were."""
        check_actor(options)
        modified = _with_runtime_methods(target)
        kind = type(f"ActorClass({target.__name__})", (cls, modified), {"__init__": cls.__init__})
        made = _blank(kind)
        made._cls = modified
        made._options = options
        made._exported = None
        made._description = None
        made.__name__ = target.__name__
        made.__doc__ = target.__doc__
        return cast("ActorClass", made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._cls.__name__
        raise TypeError(f"Actors cannot be instantiated directly. Instead of '{name}()', use '{name}.remote()'.")

    def options(self, **options: Any) -> Changed:
        """The same class with other options; the result makes actors, it is not changed again.

        Raises:
            ValueError, TypeError: options that an actor cannot have.
        """
        if "concurrency_groups" in options:
            raise ValueError("concurrency_groups can only be given in the decorator, since methods refer to them")
        check_actor(options)
        other = _blank(type(self))
        other.__dict__.update(self.__dict__)
        other._options = {**self._options, **options}
        check_actor(other._options)
        return Changed(other)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Make an actor. Returns when the cluster has accepted it; its constructor runs meanwhile.

        Raises:
            TypeError: wrong arguments for the constructor, or one that cannot be pickled.
            ActorAlreadyExistsError: the name is taken.
        """
        client = ensure_connected()
        options = self._options
        cls = self._cls
        if self._description is None:
            self._description = Description(cls)
        description = self._description
        description.constructor.check(args, kwargs)
        if self._exported is None:
            self._exported = export(cls, cls.__name__, "actor class")
        exported: Function = self._exported
        running = amounts(options, 0)
        placed = amounts(options, 1) if options.get("num_cpus") is None and not running else running
        is_async = description.is_async
        concurrency = options.get("max_concurrency") or (_ASYNC_CONCURRENCY if is_async else 1)
        restarts = options.get("max_restarts") or 0
        task_retries = options.get("max_task_retries") or 0
        groups = options.get("concurrency_groups") or {}
        out_of_order = options.get("allow_out_of_order_execution")
        free_order = bool(out_of_order) if out_of_order is not None else is_async or concurrency > 1 or bool(groups)
        actor_id = os.urandom(12) + client.job_id
        defaults = {"max_task_retries": task_retries, "out_of_order": free_order}
        ranks = options.get("mpi_ranks")
        gang: Gang | None = None
        shape: Shape | None = None
        if ranks:
            _check_methods(cls)
            gang, shape = gang_of(f"{cls.__name__}()", options, client)
            running = placed = shape.resources
            defaults["mpi_ranks"] = ranks
        if options.get("max_pending_calls"):
            defaults["max_pending_calls"] = options["max_pending_calls"]
        if not options.get("enable_task_events", True):
            defaults["enable_task_events"] = False
        detached = _is_detached(options.get("lifetime"), client)
        portrait = (actor_id, cls.__qualname__, description.methods, defaults)
        creation = Template(exported, f"{cls.__name__}.__init__", None)
        task = Task(client.actors, creation, client.minter.task_id())
        client.packer.pack(task, args, kwargs)
        with client.lock:
            unready = any(entry.state < READY for _, entry in task.dependencies)
            dependencies = [] if unready else client.packer.resolved(task)
        for name, (_, marked) in description.methods.items():
            group = marked.get("concurrency_group")
            assert group is None or group in groups, (
                f"{cls.__name__}.{name} is in the concurrency group {group!r}, and the class has {sorted(groups)}"
            )
        if shape is None:
            shape = shape_of(running, options, client)
        spec = ActorSpec(
            actor_id,
            cls.__qualname__,
            exported.id,
            exported.blob,
            task.arguments,
            dependencies,
            [entry.id for entry in task.contained],
            shape,
            placed if shape.resources == running else shape_of(placed, options, client).resources,
            client.address,
            client.job_id,
            name=options.get("name") or "",
            namespace=options.get("namespace") or context.namespace,
            program_namespace=context.namespace,
            logging=context.logging,
            detached=detached,
            max_restarts=restarts,
            max_task_retries=task_retries,
            max_concurrency=concurrency,
            concurrency_groups=groups,
            is_async=is_async,
            out_of_order=free_order,
            max_pending_calls=defaults.get("max_pending_calls", -1),
            handle=serialize.dumps(portrait),
            creation_task_id=task.id,
            gang=gang,
            recorded=options.get("enable_task_events", True),
        )
        scope = None if detached else client.actors.new_scope(actor_id)
        answer = client.actors.create(spec, task, bool(options.get("get_if_exists")), unready)
        if answer.existing:
            return weak_handle(answer.existing)
        if answer.error:
            raise ActorAlreadyExistsError(answer.error)
        return ActorHandle(*portrait, scope)

    def _remote(self, args: Any = None, kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        """``options`` and ``remote`` in one, as older programs and libraries write it."""
        return (self.options(**options) if options else self).remote(*args or (), **kwargs or {})

    def bind(self, *args: Any, **kwargs: Any) -> ClassNode:
        """A node of a task graph: an actor, to be made by ``execute``. See ``hpc_ray.dag``."""
        return ClassNode(self, self._cls, args, kwargs, self._options)

    def __del__(self) -> None:
        """Stands before that of the class, of which this is no instance."""

    def __reduce__(self) -> Any:
        return _rebuild_class, (self._cls.__mro__[1], packing.portable(self._options))


def _rebuild_class(target: type, options: dict[str, Any]) -> ActorClass:
    return ActorClass._wrap(target, options)


def _is_detached(lifetime: str | None, client: Client) -> bool:
    """By the option, or by what the program said for all its actors (``JobConfig.default_actor_lifetime``)."""
    if lifetime is None:
        if context.detached is None:  # a worker's first actor
            settings = client.query(GCS_ADDRESS, "job_config", job_id=client.job_id)
            context.detached = settings.get("default_actor_lifetime") == "detached"
        return context.detached
    return lifetime == "detached"


def _with_runtime_methods(target: type) -> type:
    """A subclass with the methods that every actor has, under the same name."""

    class Modified(target):  # type: ignore[misc]
        __ray_actor_class__ = target

        def __ray_ready__(self) -> bool:
            return True

        def __ray_call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        def __ray_terminate__(self) -> None:
            raise context.LeaveProcess("__ray_terminate__")

    Modified.__name__ = target.__name__
    Modified.__qualname__ = target.__qualname__
    Modified.__module__ = target.__module__
    Modified.__doc__ = target.__doc__
    return Modified


_BUILTIN_METHODS = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.BuiltinMethodType,
    types.ClassMethodDescriptorType,
)


def _functions(cls: type) -> dict[str, tuple[Any, int]]:
    """Name → (function, how many leading parameters the runtime gives)."""
    found = {}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name, None)
        skip = 1
        if isinstance(value, (staticmethod, classmethod)):
            skip = int(isinstance(value, classmethod))
            value = value.__func__
        if inspect.isroutine(value) and not isinstance(value, _BUILTIN_METHODS):
            found[name] = value, skip
    return found


class Description:
    """What those who make and call actors have to know of their class."""

    __slots__ = ("constructor", "is_async", "methods")

    def __init__(self, cls: type):
        functions = _functions(cls)
        self.constructor = Signature([]) if cls.__init__ is object.__init__ else Signature.of(cls.__init__, 1)  # type: ignore[misc]
        self.is_async = any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f, _ in functions.values())
        # Method name → its parameters, and the options of its ``@method``.
        self.methods: dict[str, tuple[list | None, dict[str, Any]]] = {
            name: (Signature.of(function, skip).parameters, {**getattr(function, _MARK, {}), **_kind(function)})
            for name, (function, skip) in functions.items()
        }


def _check_methods(cls: type) -> None:
    """Raises ValueError for methods that a gang cannot have."""
    for name, (function, _) in _functions(cls).items():
        if inspect.iscoroutinefunction(function) or yields(function):
            raise ValueError(
                f"{cls.__name__} cannot be a gang: its ranks run each method to its end, in one order, and {name} "
                f"{'yields' if yields(function) else 'is asynchronous'}"
            )


def _kind(function: Any) -> dict[str, Any]:
    """A method that a decorator with ``functools.wraps`` has around it is what it is below that, as in Ray."""
    return {_GENERATOR: True} if yields(inspect.unwrap(function)) else {}


def handle_of_current_actor() -> ActorHandle:
    """A weak handle on the actor that calls it."""
    assert context.actor is not None
    return weak_handle(context.actor.spec.handle)

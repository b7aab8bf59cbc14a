"""The public surface of a package as data: names, kinds, parameters.

``python tests/state/surface.py ray > tests/state/ray_2_60.json``, with Ray installed, makes the table that ``test_surface.py``
compares hpc_ray with. Facts only: names, and how parameters are named, given and defaulted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from types import ModuleType
from typing import Any

# Below the package; "" is the package itself.
MODULES = [
    "",
    "actor",
    "cluster_utils",
    "cross_language",
    "dag",
    "exceptions",
    "experimental",
    "experimental.compiled_dag_ref",
    "experimental.internal_kv",
    "experimental.locations",
    "experimental.tqdm_ray",
    "job_config",
    "remote_function",
    "runtime_context",
    "runtime_env",
    "util",
    "util.accelerators",
    "util.actor_pool",
    "util.check_serialize",
    "util.collective",
    "util.collective.types",
    "util.dask",
    "util.debug",
    "util.joblib",
    "util.metrics",
    "util.multiprocessing",
    "util.placement_group",
    "util.queue",
    "util.scheduling_strategies",
    "util.serialization",
    "util.state",
    "util.state.exception",
]
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: "keyword only",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_ORDER = list(_KINDS.values())


def parameters(function: Any) -> list[list[str]] | None:
    """[name, kind, default] of each, as far as they matter to a caller: of ``self``, ``*args`` and ``**kwargs`` the names do not,
    of what is given by name the order does not. None where Python cannot tell."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if found and found[0].name in ("self", "cls"):
        del found[0]
    rows = [
        ["" if one.kind in _STARRED else one.name, _KINDS[one.kind], "" if one.default is one.empty else _default(one.default)]
        for one in found
    ]
    return sorted(rows, key=lambda row: (_ORDER.index(row[1]), row[0] if row[1] == "keyword only" else ""))


def _default(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, list, dict))
    return repr(value) if plain and len(repr(value)) <= 60 else "..."


def _members(cls: type, package: str) -> dict[str, Any]:
    """Constructor, methods (their parameters) and properties (None) that the package itself defines."""
    found: dict[str, Any] = {}
    for name in dir(cls):
        if name.startswith("_") and name != "__init__":
            continue
        home = next((base for base in cls.__mro__ if name in vars(base)), None)
        if home is None or home.__module__.partition(".")[0] != package:
            continue
        value = inspect.getattr_static(cls, name)
        static = isinstance(value, (staticmethod, classmethod))
        function = value.__func__ if static else value
        if callable(function):
            found[name] = parameters(function)
        elif isinstance(value, property):
            found[name] = None
    return found


def describe(value: Any, package: str) -> Any:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return {"class": _members(value, package)}
    if callable(value):
        return {"function": parameters(value)}
    return "value"


def names_of(module: ModuleType) -> list[str]:
    """What it declares, or what it defines without an underscore."""
    declared = getattr(module, "__all__", None)
    if declared is not None:
        return sorted(set(declared))
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isroutine(value))
    )


def surface(package: str, modules: list[str]) -> dict[str, dict[str, Any]]:
    """Module → public name → description; a module that cannot be imported is missing."""
    found = {}
    for name in modules:
        try:
            module = importlib.import_module(f"{package}.{name}" if name else package)
        except ImportError:
            continue
        found[name] = {}
        for public in names_of(module):
            try:
                found[name][public] = describe(getattr(module, public), package)
            except (AttributeError, ImportError, RuntimeError):
                found[name][public] = "declared only"  # and refused, with a text that says why
    return found


if __name__ == "__main__":
    json.dump(surface(sys.argv[1], MODULES), sys.stdout, indent=0, sort_keys=True)
    print()

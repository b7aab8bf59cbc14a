"""Which part of a value keeps it from being pickled."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from hpc_ray import serialize

_RULE = "=" * 80


class FailureTuple:
    """A part that cannot be pickled: ``obj``, the ``path`` of names that leads to it, and the ``parent`` that refers to it."""

    def __init__(self, obj: Any, path: tuple[str, ...], parent: Any):
        self.obj = obj
        self.path = path
        self.parent = parent

    @property
    def name(self) -> str:
        return self.path[-1]

    def __repr__(self) -> str:
        return f"FailureTuple({self.name} [path={' -> '.join(self.path)}, obj={self.obj!r}, parent={self.parent!r}])"


class _Search:
    """One walk over what a value refers to."""

    def __init__(self, print_file: Any):
        self.file = print_file
        self.failures: dict[int, FailureTuple] = {}

    def say(self, indent: int, text: str) -> None:
        print("    " * indent + text, file=self.file)

    def visit(self, value: Any, path: tuple[str, ...], parent: Any, depth: int, indent: int) -> bool:
        """Whether the value can be pickled; notes the innermost parts that cannot."""
        problem = _problem(value)
        if problem is None:
            return True
        self.say(indent, f"!!! FAIL serialization: {problem}")
        if depth > 0 and self.search_parts(value, path, depth, indent):
            return False
        if depth > 0:
            where = serialize.explain(value, path[-1])
            self.say(indent, f"Nothing that it refers to fails by itself; look at {where or path[-1]}.")
        self.failures.setdefault(id(value), FailureTuple(value, path, parent))
        return False

    def search_parts(self, value: Any, path: tuple[str, ...], depth: int, indent: int) -> bool:
        """Whether a part was found that fails."""
        if inspect.isfunction(value):
            return self.search_function(value, path, depth, indent)
        for name, part in _members(value):
            if _problem(part) is not None:
                self.say(indent + 1, f"Serializing '{name}' {part!r}...")
                self.visit(part, (*path, name), value, depth - 1, indent + 1)
                return True
        return False

    def search_function(self, function: Any, path: tuple[str, ...], depth: int, indent: int) -> bool:
        used = inspect.getclosurevars(function)
        found = False
        for kind, names in (("global", used.globals), ("nonlocal", used.nonlocals)):
            if names:
                self.say(indent, f"'{function.__qualname__}' uses {len(names)} {kind} variables.")
            for name, part in names.items():
                if _problem(part) is not None:
                    self.say(indent + 1, f"Serializing '{name}' {part!r}...")
                    self.visit(part, (*path, name), function, depth - 1, indent + 1)
                    found = True
        return found


def _problem(value: Any) -> Exception | None:
    try:
        serialize.serialize(value)
    except Exception as error:
        return error
    return None


def _members(value: Any) -> list[tuple[str, Any]]:
    """Functions first, then the rest; not what every object has, nor what a container holds."""
    found: dict[str, Any] = {}
    for name in dir(value):
        static = inspect.getattr_static(value, name, None)
        if inspect.isfunction(static) or name in getattr(value, "__dict__", ()):
            found[name] = static if inspect.isclass(value) else getattr(value, name, None)
    functions = [(name, part) for name, part in found.items() if inspect.isfunction(part)]
    return functions + [(name, part) for name, part in found.items() if not inspect.isroutine(part) and not name.startswith("__")]


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: Any = None
) -> tuple[bool, set[FailureTuple]]:
    """Whether a value can be pickled, and which parts of it cannot. Prints what it finds on the way.

    Args:
        name: what to call the value in the report.
        depth: how far to follow what it refers to.
        print_file: default: standard output.
    """
    file = print_file if print_file is not None else sys.stdout
    search = _Search(file)
    print(f"{_RULE}\nChecking Serializability of {base_obj!r}\n{_RULE}", file=file)
    path = (name,) if name is not None else (getattr(base_obj, "__name__", None) or type(base_obj).__name__,)
    good = search.visit(base_obj, path, None, depth, 0)
    failures = set(search.failures.values())
    if not good:
        listed = "\n".join(f"    {failure!r}" for failure in search.failures.values())
        print(
            f"{_RULE}\nThese cannot be pickled; there may be more behind them:\n\n{listed}\n\n"
            f"Make them inside the function or actor that uses them, or leave them out of what is sent.\n{_RULE}",
            file=file,
        )
    return good, failures

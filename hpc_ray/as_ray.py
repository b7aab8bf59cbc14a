"""``import ray`` means hpc_ray: for programs and libraries that were written for Ray and cannot be changed.

``hpc_ray.install_as_ray()`` at the top of a program, or ``hpc-ray run --as-ray``, puts a finder first on ``sys.meta_path`` there
and in all workers. ``ray.x.y`` is the very module ``hpc_ray.x.y``, so classes and exceptions are the same under both names.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any

from hpc_ray.version import RAY_VERSION, __commit__

VARIABLE = "HPC_RAY_AS_RAY"  # set: every Python process of the session does this at its start

_LIBRARIES = frozenset({"air", "llm", "rllib", "serve", "train", "tune", "workflow"})
# Modin and others import names from it at their top, whether they use them or not.
_UNUSABLE = "data"
# What libraries take from Ray's private modules, for which there is a public place here.
_PRIVATE = {
    "_private.services": {"get_node_ip_address": "hpc_ray.util"},
    "_raylet": dict.fromkeys(
        ("ActorID", "DynamicObjectRefGenerator", "JobID", "NodeID", "ObjectID", "ObjectRef", "ObjectRefGenerator", "TaskID", "WorkerID"),
        "hpc_ray",
    ),
}


class _Finder:
    """Finds and loads ``ray`` and all below it. Without the base classes of ``importlib.abc``, which imports tempfile, hashlib and
    more: every program that imports hpc_ray would pay for that."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        head, _, rest = fullname.partition(".")
        if head != "ray":
            return None
        if rest.partition(".")[0] in _LIBRARIES:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: hpc_ray stands in for Ray Core; Ray's libraries above it are not part of it",
                name=fullname,
            )
        if rest and not _is_made_here(rest) and importlib.util.find_spec(f"hpc_ray.{rest}") is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        _, _, rest = spec.name.partition(".")
        if not rest:
            return _Ray("ray", sys.modules["hpc_ray"].__doc__)
        if rest == _UNUSABLE:
            return _Unusable(spec.name, "Nothing in here can be used.")
        if _is_made_here(rest):
            module = types.ModuleType(spec.name, "Some of what libraries take from Ray's own module of this name.")
            for name, source in _PRIVATE.get(rest, {}).items():
                setattr(module, name, getattr(importlib.import_module(source), name))
            return module
        module = importlib.import_module(f"hpc_ray.{rest}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:
            module.__spec__ = spec.loader_state  # it stays hpc_ray's


def _is_made_here(name: str) -> bool:
    return name == _UNUSABLE or any(private == name or private.startswith(name + ".") for private in _PRIVATE)


class _Unusable(types.ModuleType):
    """A module that can be imported from; using what came from it is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                f"{self.__name__}.{name} is not there: hpc_ray stands in for Ray Core; Ray's libraries above it are not part of it"
            )

        return type(name, (), {"__module__": self.__name__, "__init__": refuse})

    def __reduce__(self) -> Any:
        return importlib.import_module, (self.__name__,)


class _Ray(types.ModuleType):
    """The module ``ray``: hpc_ray, with the version of Ray that it follows."""

    __version__ = RAY_VERSION
    __commit__ = __commit__
    __path__: list[str] = []  # noqa: RUF012 - it is a package without a folder: all below it comes from the finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        try:
            return getattr(sys.modules["hpc_ray"], name)
        except AttributeError as error:
            raise AttributeError(f"module 'ray' (which is hpc_ray here) has no attribute {name!r}: {error}") from None

    def __dir__(self) -> list[str]:
        return dir(sys.modules["hpc_ray"])

    def __reduce__(self) -> Any:
        """By name, as modules go: functions of the main program take along the ``ray`` that they use."""
        return importlib.import_module, (self.__name__,)


def install() -> None:
    """Put the finder in place, here and in the processes that this one starts; a second call does nothing."""
    os.environ[VARIABLE] = "1"
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def main() -> None:
    """Runs the script that is the first argument, in a process where ``ray`` is hpc_ray; ``hpc-ray run --as-ray`` starts it."""
    install()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")

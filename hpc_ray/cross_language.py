"""Functions and actors in other languages: there are none here, and these say what to use instead."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class Language:
    """What a task is written in. hpc_ray runs ``Language.PYTHON`` only."""

    PYTHON: ClassVar[Language]
    JAVA: ClassVar[Language]
    CPP: ClassVar[Language]
    _NAMES = ("PYTHON", "JAVA", "CPP")

    def __init__(self, number: int):
        self._number = number

    def value(self) -> int:
        """The number that stands for it."""
        return self._number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Language) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return self._NAMES[self._number]

    def __reduce__(self) -> Any:
        return Language, (self._number,)


Language.PYTHON, Language.JAVA, Language.CPP = map(Language, range(3))


def _refuse(what: str, language: str, instead: str) -> NoReturn:
    raise RuntimeError(f"{what}: hpc_ray's workers are Python processes, there are no {language} workers. {instead}")


def java_function(class_name: str, function_name: str) -> NoReturn:
    """There are no Java tasks here.

    Raises:
        RuntimeError: always; the text says what to use instead.
    """
    instead = "Call the class from a Python task, through JPype or a subprocess."
    _refuse(f"java_function({class_name!r}, {function_name!r})", "Java", instead)


def java_actor_class(class_name: str) -> NoReturn:
    """There are no Java actors here.

    Raises:
        RuntimeError: always; the text says what to use instead.
    """
    _refuse(f"java_actor_class({class_name!r})", "Java", "Keep the object in a Python actor, through JPype or a subprocess.")


def cpp_function(function_name: str) -> NoReturn:
    """There are no C++ tasks here.

    Raises:
        RuntimeError: always; the text says what to use instead.
    """
    _refuse(f"cpp_function({function_name!r})", "C++", "Bind the function to Python (nanobind, ctypes) and call it from a Python task.")


__all__ = ["cpp_function", "java_actor_class", "java_function"]

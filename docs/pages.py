"""Makes ``docs/api.md`` from the docstrings, and ``docs/ray.md`` from the table of Ray's names: ``python docs/pages.py``.

It reads the installed package, so install first. ``tests/state/test_surface.py`` fails when a page is out of date.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from differences import BETTER, REASONS, TABLE, differences

HERE = Path(__file__).parent
_SECTIONS = ("Args", "Returns", "Raises", "Yields", "Example")
_ITEM = re.compile(r"(?!\s)([\w.*, …()]+): +(\S.*)")


# ------------------------------------------------------------------ api.md


def api() -> str:
    """Every public name with its parameters and docstring, module by module."""
    lines = [
        "# The public names",
        "",
        "Made from the docstrings by `make docs`. [ray.md](ray.md) compares them with Ray's.",
        "",
    ]
    parts, contents = [], []
    seen: dict[int, str] = {}
    theirs: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    for name in theirs:
        full = f"hpc_ray.{name}" if name else "hpc_ray"
        module = importlib.import_module(full)
        contents.append(f"[{full}](#{_anchor(full)})")
        parts += [f"## {full}", "", _markdown(inspect.getdoc(module) or ""), ""]
        for public in sorted(_names(module, theirs[name])):
            parts += _entry(full, public, getattr(module, public), seen)
    return "\n".join([*lines, " · ".join(contents), "", *parts]).rstrip() + "\n"


def _names(module: Any, theirs: dict[str, Any]) -> list[str]:
    """What the module declares; where it declares nothing, what of Ray's it has."""
    declared = getattr(module, "__all__", None)
    if declared is not None:
        return [name for name in set(declared) if not name.startswith("__")]
    return [name for name in theirs if name in vars(module)]


def _entry(module: str, name: str, value: Any, seen: dict[int, str]) -> list[str]:
    title = f"{module}.{name}"
    if inspect.ismodule(value):
        return []
    if not callable(value):
        return [f"### {title}", "", f"`{value!r}`" if isinstance(value, (int, str)) else f"A {type(value).__name__}.", ""]
    if id(value) in seen:
        first = seen[id(value)]
        return [f"### {title}", "", f"Is [{first}](#{_anchor(first)}).", ""]
    seen[id(value)] = title
    lines = [f"### {title}", ""]
    if not inspect.isclass(value):
        return [*lines, *_code(f"{name}{_signature(value)}"), _markdown(inspect.getdoc(value) or ""), ""]
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    own = "__init__" in vars(value) and not issubclass(value, BaseException)
    lines += _code(f"class {name}{_signature(value) if own else f'({bases})' if bases else ''}")
    lines += [_markdown(inspect.cleandoc(value.__doc__ or "")), ""]
    for member in vars(value):
        static = inspect.getattr_static(value, member)
        text = inspect.getdoc(static)
        if (
            member.startswith("_")
            or not text
            or not (callable(static) or isinstance(static, (property, classmethod, staticmethod)))
        ):
            continue
        function = static.__func__ if isinstance(static, (classmethod, staticmethod)) else static
        parameters = "" if isinstance(static, property) or inspect.isclass(static) else _signature(function, drop_self=True)
        lines += [f"- `{member}{parameters}`", textwrap.indent(_markdown(text), "  ")]
    return [*lines, ""]


def _code(text: str) -> list[str]:
    return ["```python", text, "```"]


def _signature(function: Any, drop_self: bool = False) -> str:
    """As it is called: parameters with types and defaults."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    chosen = list(found.parameters.values())
    if drop_self and chosen and chosen[0].name in ("self", "cls"):
        chosen = chosen[1:]
    returns = found.return_annotation
    shown = returns if returns is found.empty else _Text(returns)
    return re.sub(r" at 0x[0-9a-f]+", "", str(found.replace(parameters=[_plain(one) for one in chosen], return_annotation=shown)))


class _Text:
    """Shown as it is, without quotes: an annotation, or the dots of a default that is no plain value."""

    def __init__(self, value: Any):
        self.text = value if isinstance(value, str) else inspect.formatannotation(value)

    def __repr__(self) -> str:
        return self.text


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if (
        default is not parameter.empty
        and default is not None
        and not isinstance(default, (bool, int, float, str, tuple, list, dict))
    ):
        default = _Text("...")
    kind = parameter.annotation
    return parameter.replace(default=default, annotation=kind if kind is parameter.empty else _Text(kind))


def _markdown(text: str) -> str:
    """A docstring of Google's kind as Markdown: its sections become lists."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        heading = line.strip().removesuffix(":")
        if line.endswith(":") and heading in _SECTIONS and not line.startswith(" "):
            lines += ["", f"*{heading}*", ""]
            inside = True
            continue
        if inside and line and not line.startswith(" "):
            inside = False
        if inside and line.strip():
            body = line[4:] if line.startswith("    ") else line.strip()
            item = _ITEM.match(body)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else f"  {body.strip()}" if body.startswith(" ") else body)
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("``", "`").strip()


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ------------------------------------------------------------------ ray.md


def ray() -> str:
    """Ray's public names, and what each is here."""
    theirs: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    differ = differences()
    lines = [
        "# Ray's names, and what each is here",
        "",
        "Every public name of Ray Core 2.60. *same*: the same name at the same place, with the same parameters and meaning.",
        "*better*: the same, and how it is better.",
        "*differs*: there, except for what is named. *not here*: why, or what to use instead.",
        "Made by `make docs` from a comparison that a test repeats; the reasons are in [differences.py](differences.py).",
        "",
    ]
    counts = dict.fromkeys(("same", "better", "differs", "not here"), 0)
    tables = []
    for module, names in theirs.items():
        title = f"ray.{module}" if module else "ray"
        tables += ["", f"## {title}", "", "| name | here | |", "|---|---|---|"]
        for name, wanted in sorted(names.items()):
            if wanted == "declared only":  # Ray has it not either
                continue
            verdict, text = _verdict(f"{module}:{name}", differ)
            counts[verdict] += 1
            tables.append(f"| `{name}` | {verdict} | {_cell(text)} |")
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*lines, f"{sum(counts.values())} names: {total}.", *tables]) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)[|*]", lambda found: "\\" + found[0], text)


def _verdict(name: str, differ: list[str]) -> tuple[str, str]:
    if name in differ:
        return "not here", _reason(name)
    texts: dict[str, list[str]] = {}  # reason → members
    for one in differ:
        if one.startswith(name + "."):
            texts.setdefault(_reason(one), []).append(one[len(name) + 1 :])
    better = next((text for pattern, text in BETTER.items() if fnmatch.fnmatchcase(name, pattern)), "")
    told = [f"{', '.join(f'`{member}`' for member in members)}: {text}" for text, members in texts.items()]
    if better:
        return "better", "; ".join([better, *told])
    return ("differs", "; ".join(told)) if told else ("same", "")


def _reason(difference: str) -> str:
    return next(text for pattern, text in REASONS.items() if fnmatch.fnmatchcase(difference, pattern))


PAGES: dict[str, Callable[[], str]] = {"api.md": api, "ray.md": ray}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make())
        print(f"made {HERE / page}", file=sys.stderr)

"""Which files of a folder are left out of its package: patterns as in ``.gitignore``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

IGNORE_FILES = (".gitignore", ".rayignore")


class Rules:
    """Patterns that hold below one folder. Of those that match, the last decides; ``!`` takes back."""

    def __init__(self, base: str, lines: Sequence[str]):
        self.base = base  # relative to the package's root, "" or with a slash at the end
        self._rules = [rule for rule in map(_rule, lines) if rule is not None]

    def leaves_out(self, path: str, is_folder: bool) -> bool:
        """``path``: relative to the package's root."""
        inner = path[len(self.base) :]
        for pattern, negated, folders_only in reversed(self._rules):
            if (is_folder or not folders_only) and pattern.fullmatch(inner):
                return not negated
        return False


def _rule(line: str) -> tuple[re.Pattern[str], bool, bool] | None:
    """Pattern, whether it takes back, whether it is for folders only."""
    line = line.rstrip("\r\n")
    text = line.rstrip(" ") if not line.endswith("\\ ") else line
    if not text or text.startswith("#"):
        return None
    negated = text.startswith("!")
    text = text[1:] if negated else text
    text = text.removeprefix("./")
    folders_only = text.endswith("/")
    text = text.rstrip("/")
    if not text:
        return None
    anywhere = "/" not in text
    return re.compile(("(?:.*/)?" if anywhere else "") + _expression(text.lstrip("/"))), negated, folders_only


def _expression(text: str) -> str:
    found, at = "", 0
    while at < len(text):
        rest = text[at:]
        if rest.startswith("**/"):
            found, at = found + "(?:.*/)?", at + 3
        elif rest == "**":
            found, at = found + ".*", at + 2
        elif rest[0] == "*":
            found, at = found + "[^/]*", at + 1
        elif rest[0] == "?":
            found, at = found + "[^/]", at + 1
        elif rest[0] == "[" and (end := rest.find("]", 2)) > 0:
            inner = rest[1:end].replace("\\", "\\\\")
            found, at = found + "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]", at + end + 1
        else:
            step = 2 if rest[0] == "\\" and len(rest) > 1 else 1
            found, at = found + re.escape(rest[step - 1]), at + step
    return found


def travel(folder: Path, excludes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The files of a folder that are not left out, and its empty folders (with a slash at the end), as (relative path, path),
    in a fixed order. Links are followed, but for those that lead into a circle."""
    yield from _travel(folder, "", [Rules("", excludes)], (os.path.realpath(folder),))


def _travel(folder: Path, inside: str, rules: list[Rules], parents: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for name in IGNORE_FILES:
        file = folder / name
        if file.is_file():
            rules = [*rules, Rules(inside, file.read_text(errors="replace").splitlines())]
    for path in sorted(folder.iterdir()):
        relative = inside + path.name
        is_folder = path.is_dir()
        if any(rule.leaves_out(relative, is_folder) for rule in rules):
            continue
        if is_folder:
            real = os.path.realpath(path)
            if real in parents:
                continue
            yield relative + "/", path
            yield from _travel(path, relative + "/", rules, (*parents, real))
        elif path.is_file():
            yield relative, path

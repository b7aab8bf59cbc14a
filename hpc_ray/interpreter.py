"""How this package starts Python processes."""

from __future__ import annotations

import sys

# Python 3.10 has no -P.
_AS_M = "import sys; del sys.path[0]; import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
_AS_C = "import sys; del sys.path[0]\n"


def python_command(how: str, what: str, *arguments: str) -> list[str]:
    """The command that runs a module (``how`` "-m") or a program ("-c") in this Python, and imports nothing from the current folder."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", how, what, *arguments]
    return [sys.executable, "-c", *([_AS_M, what] if how == "-m" else [_AS_C + what]), *arguments]

"""How a worker gets into its runtime environment, between its fork and its first word to the raylet.

What it needs is made on this node by the first worker that wants it, under a lock; the others find it.

Variables, folders and modules are set in the process that the fork server forked: milliseconds. Some things only a new
interpreter can have: another one (``py_executable``), installed packages (``pip``, ``uv``), since this process has loaded
versions of the driver's already, modules whose names are loaded already, and variables that the loader or the interpreter
reads when it starts. Then the process becomes one by exec: it stays the same process, so its parent, its group, its output
and its death are as before.

ENV-1 (before user code): a worker is in its environment before it can be given anything to run.
ENV-2 (answered): whatever goes wrong reaches the raylet as EnvironmentFailed, and those who wait as RuntimeEnvSetupError.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_ray import serialize
from hpc_ray.client.client import Client
from hpc_ray.config import DEFAULT_SETUP_TIMEOUT_S, RUNTIME_ENV_VARIABLE, encode_config
from hpc_ray.environments import packages
from hpc_ray.environments.install import Installer, python_of, site_packages
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import EnvironmentFailed

_AT_START = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")  # variables that a running interpreter would not notice
_SITES = ("site-packages", "dist-packages")


class Environment:
    """The runtime environment of this worker.

    Args:
        text: JSON, as in ``protocol.Shape``.
        client: not registered yet.
    """

    def __init__(self, text: str, client: Client):
        self.text = text
        self.fields: dict[str, Any] = json.loads(text)
        self.client = client
        self.root = Path(client.config.session_dir, "runtime_envs")
        self.timeout_s = self.fields.get("config", {}).get("setup_timeout_seconds", DEFAULT_SETUP_TIMEOUT_S)

    def ask(self, name: str, /, **arguments: Any) -> Any:
        return self.client.query(GCS_ADDRESS, name, **arguments)

    @contextlib.contextmanager
    def time_limit(self) -> Iterator[None]:
        """Raises TimeoutError into what runs longer than ``setup_timeout_seconds``; the raylet ends what does not hear of it."""

        def late(*_: object) -> None:
            raise TimeoutError(f"it was not ready within its setup_timeout_seconds of {self.timeout_s} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, max(self.timeout_s, 0))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def enter(self) -> None:
        """Make it and go into it. Blocks; does not return if this takes a new interpreter (``fresh`` goes on there).

        Raises:
            Exception: it cannot be made.
        """
        fields = self.fields
        variables = fields.get("env_vars", {})
        for name, text in variables.items():
            os.environ[name] = _expanded(text)
        if "TZ" in variables:
            time.tzset()
        modules = [packages.place(self.ask, uri, self.root) for uri in fields.get("py_modules", [])]
        path = [str(place) for place in modules if place.is_dir()]
        if fields.get("working_dir"):
            folder = str(packages.place(self.ask, fields["working_dir"], self.root))
            os.chdir(folder)
            path.append(folder)
        given = os.environ["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in variables else []
        self._set_path([*path, *filter(None, given)])
        installed = self._install([str(place) for place in modules if not place.is_dir()])
        if installed is not None or self._needs_fresh(variables, path):
            self._become_fresh(installed, path)
        if path:
            importlib.invalidate_caches()

    def call_hook(self) -> None:
        """The ``worker_process_setup_hook``, if there is one.

        Raises:
            RuntimeError: it raised.
        """
        name = self.fields.get("worker_process_setup_hook")
        if not name:
            return
        try:
            uri = self.fields.get("_setup_hook")
            if uri:
                hook = serialize.loads(packages.read(self.ask, uri))
            else:
                module, _, function = name.rpartition(".")
                hook = getattr(importlib.import_module(module), function)
            hook()
        except TimeoutError:
            raise
        except BaseException as error:
            raise RuntimeError(f"the worker_process_setup_hook {name} failed:\n{traceback.format_exc()}") from error

    def failed(self, error: BaseException) -> None:
        """Tell the raylet (ENV-2), and the log."""
        text = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        try:
            with Path(self.client.config.session_dir, "logs", "runtime_env.log").open("a") as log:
                print(f"{self.text}\n{traceback.format_exc()}", file=log)
        except OSError:
            traceback.print_exc()
        self.client.send(self.client.raylet, EnvironmentFailed(self.client.token, text))
        self.client.lane.flush()

    # -- parts

    def _set_path(self, first: list[str]) -> None:
        """Here, and in what this process starts."""
        if first:
            sys.path[:0] = first
            inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            entries = [*first, *(entry for entry in inherited if entry and entry not in first)]
            os.environ["PYTHONPATH"] = os.pathsep.join(entries)

    def _install(self, wheels: list[str]) -> Path | None:
        """The virtual environment for ``pip`` or ``uv``, and for wheels among ``py_modules``."""
        kind = "uv" if "uv" in self.fields else "pip"
        wish = dict(self.fields.get(kind) or {"packages": []})
        wish["packages"] = [*(self._local(item) for item in wish["packages"]), *wheels]
        if not wish["packages"]:
            return None
        config = self.client.config
        below = [entry for entry in config.python_path if entry.rstrip("/").endswith(_SITES)]
        installer = Installer(self.root, below, os.getcwd(), Path(config.session_dir, "logs"))
        return installer.install(kind, wish)

    def _local(self, requirement: str) -> str:
        if not requirement.startswith(packages.GCS):
            return requirement
        return str(packages.place(self.ask, requirement, self.root))

    def _needs_fresh(self, variables: dict[str, str], path: list[str]) -> bool:
        if self.fields.get("py_executable"):
            return True
        if any(name.startswith(_AT_START) and name != "PYTHONPATH" for name in variables):
            return True
        names = {Path(name).stem for folder in path for name in os.listdir(folder) if name.endswith(".py") or "." not in name}
        return any(name in sys.modules for name in names - sys.stdlib_module_names - {"hpc_ray"})

    def _become_fresh(self, installed: Path | None, first: list[str]) -> None:
        """Exec another interpreter, which goes on in ``fresh``. Its import path: this one's, with what was installed first
        among the packages; another executable has its own before this one's."""
        own = bool(self.fields.get("py_executable"))
        command = shlex.split(self.fields["py_executable"]) if own else [sys.executable]
        if installed is not None:
            site = next((at for at, entry in enumerate(sys.path) if entry.rstrip("/").endswith(_SITES)), len(sys.path))
            sys.path.insert(site, str(site_packages(installed)))
            os.environ["VIRTUAL_ENV"] = str(installed)
            os.environ["PATH"] = f"{installed / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
            if not own:
                command = [str(python_of(installed))]
        program = shutil.which(command[0])
        if program is None:
            raise FileNotFoundError(f"py_executable: there is no {command[0]!r} on {self.client.config.hostname}")
        client = self.client
        os.set_inheritable(client.segment.fd, True)
        note = {
            "fd": client.segment.fd,
            "token": client.token,
            "config": encode_config(client.config),
            "path": sys.path,
            "first": first,
            "own": own,
        }
        script = Path(__file__).with_name("fresh.py")
        os.environ[RUNTIME_ENV_VARIABLE] = self.text
        client.close()
        client.lane.close()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would outlive its handler
        os.execv(program, [program, *command[1:], str(script), json.dumps(note)])


def without_ranks(text: str) -> str:
    """What the tasks of a worker hand on: how many ranks it leads (``options.of_ranks``) is not part of that."""
    fields = json.loads(text) if text else {}
    fields.pop("_mpi_ranks", None)
    return json.dumps(fields, sort_keys=True) if fields else ""


def _expanded(text: str) -> str:
    """With ``${NAME}`` replaced by what this process has, or nothing."""
    return re.sub(r"\$\{[A-Za-z0-9_]+\}", "", os.path.expandvars(text))

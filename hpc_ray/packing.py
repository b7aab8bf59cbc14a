"""From a runtime environment as it is given to one that travels: files become packages, and what is not said is inherited.

Used by ``init``, remote functions and actors. What it makes is JSON with sorted keys (``protocol.Shape.runtime_env``): equal
environments are equal texts, and share workers.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from hpc_ray import serialize
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.environments import packages
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.runtime_env import RuntimeEnv

MAX_BYTES = 100_000  # of the text: it travels with every worker that is asked for

_INSTEAD = {
    "conda": "compute nodes rarely reach its channels. Use py_executable='/path/of/the/environment/bin/python', or load a module "
    "in the job script",
    "container": "a worker is forked on its node and shares its memory. Start the whole program in the container (apptainer exec "
    "image ... python program.py)",
    "image_uri": "a worker is forked on its node and shares its memory. Start the whole program in the container (apptainer exec "
    "image ... python program.py)",
    "_nsight": "use py_executable='nsys profile python'",
    "_rocprof_sys": "use py_executable='rocprof-sys-python'",
    "java_jars": "there is no Java here",
}


def check(given: Any) -> RuntimeEnv:
    """The environment, checked.

    Raises:
        TypeError, ValueError: it cannot be, or is not offered here.
    """
    if not isinstance(given, dict):
        raise TypeError(f"runtime_env must be dict or RuntimeEnv, but got: {type(given)}")
    env = RuntimeEnv(**given)
    for name, instead in _INSTEAD.items():
        if name in env:
            raise ValueError(f"runtime_env[{name.lstrip('_')!r}] is not offered by hpc_ray: {instead}.")
    unknown = sorted(name for name, _ in env.plugins())
    if unknown:
        logging.getLogger("hpc_ray").warning("runtime_env does not know %s, which changes nothing", ", ".join(unknown))
    return env


def packed(given: dict[str, Any] | None, client: Client, inherited: str = "") -> str:
    """The environment as text, "" for the plain one. Uploads the packages that the session does not have; a folder is read once
    in a session. Blocks.

    Raises:
        TypeError, ValueError: it cannot be; among these, a package that is too large.
    """
    if not given:
        return inherited
    key = inherited + json.dumps(given, sort_keys=True, default=id)
    known = client.environments.get(key)
    if known is None:
        known = client.environments[key] = _merged(inherited, _Upload(client).fields(check(given))), dict(given)
    return known[0]


def portable(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a function or class for another process: with packages instead of this node's files."""
    env, client = options.get("runtime_env"), context.client
    if not env or client is None:
        return options
    return {**options, "runtime_env": json.loads(packed(env, client))}


def _merged(inherited: str, own: dict[str, Any]) -> str:
    """Own fields instead of inherited ones; variables one by one."""
    parent = json.loads(inherited) if inherited else {}
    if "worker_process_setup_hook" in own:
        parent.pop("_setup_hook", None)
    if "pip" in own or "uv" in own:  # one of the two
        parent = {name: value for name, value in parent.items() if name not in ("pip", "uv")}
    fields = {**parent, **own}
    if "env_vars" in parent and "env_vars" in own:
        fields["env_vars"] = {**parent["env_vars"], **own["env_vars"]}
    text = json.dumps(fields, sort_keys=True) if fields else ""
    if len(text) > MAX_BYTES:
        raise ValueError(f"this runtime_env has {len(text)} characters; at most {MAX_BYTES} can be. Put long texts into a file.")
    return text


class _Upload:
    """Turns what is local into packages."""

    def __init__(self, client: Client):
        self.client = client

    def ask(self, name: str, /, **arguments: Any) -> Any:
        return self.client.query(GCS_ADDRESS, name, **arguments)

    def fields(self, env: RuntimeEnv) -> dict[str, Any]:
        fields = {name: value for name, value in env.items() if name != "excludes"}
        excludes = env.get("excludes", [])
        if "working_dir" in env:
            fields["working_dir"] = self._working_dir(str(env["working_dir"]), excludes)
        if "py_modules" in env:
            fields["py_modules"] = [self._module(item, excludes) for item in env["py_modules"]]
        for kind in ("pip", "uv"):
            if kind in env:
                fields[kind] = {**env[kind], "packages": [self._requirement(item) for item in env[kind]["packages"]]}
        hook = env.get("worker_process_setup_hook")
        if callable(hook):
            fields["worker_process_setup_hook"] = getattr(hook, "__name__", type(hook).__name__)
            fields["_setup_hook"] = packages.upload_bytes(self.ask, serialize.dumps(hook), "hook")
        return fields

    def _upload(self, path: Path, excludes: list[str], with_name: bool) -> str:
        limit = self.client.settings.package_bytes
        return packages.upload(self.ask, path, excludes=excludes, with_name=with_name, limit=limit)

    def _working_dir(self, text: str, excludes: list[str]) -> str:
        if packages.is_uri(text):
            packages.check_uri(text, packages.ARCHIVES)
            return text
        path = Path(text).expanduser().absolute()
        if not path.is_dir() and not path.name.endswith(packages.ARCHIVES):
            raise ValueError(f"working_dir must be a folder or one of {', '.join(packages.ARCHIVES)}, not {path}")
        return self._upload(path, excludes, False)

    def _module(self, item: Any, excludes: list[str]) -> str:
        endings = (*packages.ARCHIVES, ".whl")
        if isinstance(item, ModuleType):
            path = _folder_of(item)
        elif packages.is_uri(str(item)):
            packages.check_uri(item, endings)
            return str(item)
        else:
            path = Path(item).expanduser().absolute()
        if not path.is_dir() and not path.name.endswith((*endings, ".py")):
            raise ValueError(f"py_modules must be folders, .py files, or one of {', '.join(endings)}, not {path}")
        return self._upload(path, excludes, True)

    def _requirement(self, text: str) -> str:
        if text.endswith(".whl") and not packages.is_uri(text) and Path(text).expanduser().is_file():
            return self._upload(Path(text).expanduser(), [], False)
        return text


def _folder_of(module: ModuleType) -> Path:
    """What of a module that the driver has imported is to be sent."""
    folders = list(getattr(module, "__path__", []))
    if len(folders) > 1:
        raise ValueError(f"py_modules: {module.__name__} lies in several folders: {', '.join(folders)}")
    if folders:
        return Path(folders[0])
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise ValueError(f"py_modules: {module.__name__} has no Python file of its own")
    return Path(file)

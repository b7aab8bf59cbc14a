"""The local files of a runtime environment become packages of the session.

Used by ``packing``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from hpc_ray import serialize
from hpc_ray.client.client import Client
from hpc_ray.environments import packages
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.runtime_env import RuntimeEnv


class Upload:
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

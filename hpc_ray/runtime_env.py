"""Runtime environments: what the processes of a task, an actor or a program shall find. Here they are checked.

Relied on by programs, which may as well give a plain dict, and by ``packing``, which sends them to where they are made.
"""

from __future__ import annotations

import json
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any, ClassVar

from hpc_ray.config import DEFAULT_SETUP_TIMEOUT_S


class RuntimeEnvConfig(dict):
    """How an environment is made.

    Args:
        setup_timeout_seconds: how long it may take; -1: as long as it takes.
        eager_install: make it when the program starts, not when the first task needs it.
        log_files: for compatibility.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    def __init__(
        self, setup_timeout_seconds: int = DEFAULT_SETUP_TIMEOUT_S, eager_install: bool = True, log_files: list[str] | None = None
    ):
        super().__init__()
        if not isinstance(setup_timeout_seconds, int):
            raise TypeError(f"setup_timeout_seconds must be of type int, got: {type(setup_timeout_seconds)}")
        if setup_timeout_seconds <= 0 and setup_timeout_seconds != -1:
            raise ValueError(f"setup_timeout_seconds must be greater than zero or equals to -1, got: {setup_timeout_seconds}")
        if not isinstance(eager_install, bool):
            raise TypeError(f"eager_install must be a boolean. got {type(eager_install)}")
        if log_files is not None and not (isinstance(log_files, list) and all(isinstance(file, str) for file in log_files)):
            raise TypeError(f"log_files must be a list of strings or None, got {log_files} with type {type(log_files)}.")
        self.update(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install, log_files=log_files or [])

    @staticmethod
    def parse_and_validate_runtime_env_config(config: dict[str, Any]) -> RuntimeEnvConfig:
        """From a dict; what is one already stays as it is."""
        if isinstance(config, RuntimeEnvConfig):
            return config
        if not isinstance(config, dict):
            raise TypeError(f"runtime_env['config'] must be of type dict or RuntimeEnvConfig, got: {type(config)}")
        unknown = sorted(set(config) - {"setup_timeout_seconds", "eager_install", "log_files"})
        if unknown:
            logging.getLogger("hpc_ray").warning("runtime_env['config'] does not know %s, which changes nothing", ", ".join(unknown))
        return RuntimeEnvConfig(**{name: value for name, value in config.items() if name not in unknown})

    @classmethod
    def default_config(cls) -> RuntimeEnvConfig:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.xz")


def _is_remote(path: str) -> bool:
    return "://" in path


def _check_working_dir(value: Any) -> str:
    if not isinstance(value, (str, pathlib.Path)):
        raise TypeError(f"`working_dir` must be a string, got {type(value)}.")
    path = str(value)
    if _is_remote(path) and not path.partition("?")[0].endswith(_ARCHIVES):
        raise ValueError(f"Only {', '.join(_ARCHIVES)} files are supported for working_dir URIs; got {path}.")
    if not _is_remote(path) and not pathlib.Path(path).expanduser().exists():
        raise ValueError(f"{path} is not a valid path.")
    return path


def _check_py_modules(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"`py_modules` must be a list of strings, got {type(value)}.")
    for item in value:
        if isinstance(item, types.ModuleType):
            continue
        if not isinstance(item, (str, pathlib.Path)):
            raise TypeError(f"`py_module` must be a string, got {type(item)}.")
        if not _is_remote(str(item)) and not pathlib.Path(item).expanduser().exists():
            raise ValueError(f"{item} is not a valid path.")
    return value


def _check_env_vars(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict):
        raise TypeError(f"runtime_env['env_vars'] must be of type Dict[str, str], got {type(value)}")
    for key, text in value.items():
        if not isinstance(key, str):
            raise TypeError(f"runtime_env['env_vars'] must be of type Dict[str, str], but the key {key} is of type {type(key)}")
        if not isinstance(text, str):
            raise TypeError(
                f"runtime_env['env_vars'] must be of type Dict[str, str], but the value {text} is of type {type(text)}"
            )
    return value or None


def _packages(kind: str, value: Any) -> dict[str, Any] | None:
    """What ``pip`` and ``uv`` may be: a list of requirements, a file of them, or a dict with ``packages``. None: no package."""
    check, version, options = f"{kind}_check", f"{kind}_version", _INSTALL_OPTIONS[kind]
    if isinstance(value, str):
        value = {"packages": _requirements(value)}
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = {"packages": value}
    if not isinstance(value, dict):
        raise TypeError(f"runtime_env['{kind}'] must be of type str or List[str], got {type(value)}")
    unknown = sorted(set(value) - {"packages", check, version, options})
    if unknown:
        raise ValueError(
            f"runtime_env['{kind}'] can only have these fields: packages, {check}, {version} and {options}, but got: {unknown}"
        )
    if "packages" not in value:
        raise ValueError(f"runtime_env['{kind}'] must include field 'packages', but got {value}")
    found = {check: False, **value}
    if kind == "uv":
        found.setdefault(options, ["--no-cache"])
    if isinstance(value["packages"], str):
        found["packages"] = _requirements(value["packages"])
    elif not isinstance(value["packages"], list):
        raise ValueError(f"runtime_env['{kind}']['packages'] must be of type str or list, got {type(value['packages'])}")
    if not isinstance(found[check], bool):
        raise TypeError(f"runtime_env['{kind}']['{check}'] must be of type bool, got {type(found[check])}")
    if not isinstance(found.get(version, ""), str):
        raise TypeError(f"runtime_env['{kind}']['{version}'] must be of type str, got {type(found[version])}")
    for name in ("packages", options):
        if not isinstance(found.get(name, []), list) or not all(isinstance(item, str) for item in found.get(name, [])):
            raise TypeError(f"runtime_env['{kind}']['{name}'] must be of type list[str], got {found[name]!r}")
    found["packages"] = list(dict.fromkeys(found["packages"]))
    return found if found["packages"] else None


_INSTALL_OPTIONS = {"pip": "pip_install_options", "uv": "uv_pip_install_options"}


def _requirements(path: str) -> list[str]:
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"{path} is not a valid file")
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _check_executable(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"runtime_env['py_executable'] must be the path of a Python executable or a command, got {value!r}")
    return value


def _check_hook(value: Any) -> Any:
    if not callable(value) and not (isinstance(value, str) and "." in value):
        raise TypeError(f"worker_process_setup_hook must be a function, or 'module.function', got {value!r}")
    return value


def _check_conda(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise TypeError(f"runtime_env['conda'] must be of type str or dict, got {type(value)}.")
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and not pathlib.Path(value).is_file():
        raise ValueError(f"Can't find conda YAML file {value}.")
    return value


def _check_strings(name: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"runtime_env['{name}'] must be of type List[str], got {type(value)}")
        return value or None

    return check


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "working_dir": _check_working_dir,
    "py_modules": _check_py_modules,
    "env_vars": _check_env_vars,
    "pip": lambda value: _packages("pip", value),
    "uv": lambda value: _packages("uv", value),
    "conda": _check_conda,
    "excludes": _check_strings("excludes"),
    "py_executable": _check_executable,
    "worker_process_setup_hook": _check_hook,
    "config": RuntimeEnvConfig.parse_and_validate_runtime_env_config,
}


class RuntimeEnv(dict):
    """A runtime environment: a dict that was checked. Fields that are not given are not in it.

    What a task or actor does not say it has from whoever starts it; ``env_vars`` are merged one by one, other fields replace.
    Local files are sent to the nodes, at most ``package_bytes`` (512 MiB) a folder, once in a session.

    Args:
        working_dir: a folder, an archive (.zip, .tar.gz, .tgz, .tar.xz), or the URI of one (file, http, https): workers start in
            a copy of it, which is also on their import path.
        py_modules: folders of packages, .py files, imported modules, wheels or archives, for the import path.
        excludes (keyword): patterns as in .gitignore of what is not sent; .gitignore and .rayignore in the folders hold as well.
        pip: requirements, a file of them, or a dict with packages, pip_check, pip_version, pip_install_options. They are installed
            once on a node, on top of what the driver has. Local wheels are sent.
        uv: the same by uv: packages, uv_check, uv_version, uv_pip_install_options. One of the two.
        env_vars: environment variables; ``${NAME}`` is what the worker has, or nothing.
        worker_process_setup_hook: a function, or "module.function", called in each worker before anything else, and before the
            worker is part of the session.
        py_executable: what to start workers with, a Python of the same version, as a path or a command ("nsys profile python").
        config: how to make it, see ``RuntimeEnvConfig``.
        conda, container, image_uri, nsight, rocprof_sys: Ray's; tasks, actors and ``init`` refuse them and say what to use.

    Raises:
        TypeError, ValueError: a field that cannot be, or two that exclude each other.
    """

    known_fields: ClassVar[set[str]] = {
        "py_modules",
        "py_executable",
        "java_jars",
        "working_dir",
        "conda",
        "pip",
        "uv",
        "container",
        "excludes",
        "env_vars",
        "config",
        "worker_process_setup_hook",
        "_setup_hook",  # the package with the hook, where it was given as a function
        "_nsight",
        "_rocprof_sys",
        "image_uri",
    }

    def __init__(
        self,
        *,
        py_modules: list[str] | None = None,
        py_executable: str | None = None,
        working_dir: str | None = None,
        pip: Any = None,
        conda: dict[str, Any] | str | None = None,
        container: dict[str, Any] | None = None,
        env_vars: dict[str, str] | None = None,
        worker_process_setup_hook: Callable | str | None = None,
        nsight: dict[str, str] | str | None = None,
        rocprof_sys: Any = None,
        config: dict[str, Any] | None = None,
        _validate: bool = True,
        image_uri: str | None = None,
        uv: Any = None,
        **kwargs: Any,
    ):
        super().__init__()
        fields = {
            "py_modules": py_modules,
            "py_executable": py_executable,
            "working_dir": working_dir,
            "pip": pip,
            "uv": uv,
            "conda": conda,
            "_nsight": nsight,
            "_rocprof_sys": rocprof_sys,
            "container": container,
            "env_vars": env_vars,
            "worker_process_setup_hook": worker_process_setup_hook,
            "config": config,
            "image_uri": image_uri,
            **kwargs,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        installers = [name for name in ("pip", "conda", "uv") if name in given]
        if len(installers) > 1:
            raise ValueError(
                f"The fields {' and '.join(installers)} of runtime_env cannot be given at the same time. To use pip packages "
                "with conda, name them among the dependencies of the conda environment."
            )
        for name in ("container", "image_uri"):
            others = sorted(set(given) - {name, "config", "env_vars"})
            if name in given and others:
                raise ValueError(f"The '{name}' field of runtime_env cannot be used together with {', '.join(others)}")
        for name, value in given.items():
            checked = self._checked(name, value) if _validate else value
            if checked is not None:  # empty ones are not given
                super().__setitem__(name, checked)

    @staticmethod
    def _checked(name: str, value: Any) -> Any:
        check = _CHECKS.get(name)
        return value if check is None else check(value)

    def __setitem__(self, name: str, value: Any) -> None:
        checked = self._checked(name, value)
        if checked is not None:
            super().__setitem__(name, checked)

    def set(self, name: str, value: Any) -> None:
        """Set a field; raises as the constructor does."""
        self[name] = value

    def get(self, name: str, default: Any = None, data_class: Any = None) -> Any:
        """A field, as ``data_class`` if one is given."""
        value = super().get(name, default)
        return value if data_class is None or value is default else data_class(**value)

    @classmethod
    def deserialize(cls, serialized_runtime_env: str) -> RuntimeEnv:
        return cls(_validate=False, **json.loads(serialized_runtime_env))

    def serialize(self) -> str:
        """As JSON, with sorted keys."""
        return json.dumps(dict(self), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, list) else value for name, value in self.items()}

    def __reduce__(self) -> Any:
        return _rebuild, (dict(self),)

    # -- fields by name, with an empty value for those that are not given

    def working_dir(self) -> str:
        return self.get("working_dir", "")

    def has_working_dir(self) -> bool:
        return bool(self.get("working_dir"))

    def working_dir_uri(self) -> str | None:
        return self.get("working_dir")

    def py_modules_uris(self) -> list[str]:
        return self.py_modules()

    def py_modules(self) -> list[str]:
        return list(self.get("py_modules", []))

    def py_executable(self) -> str | None:
        return self.get("py_executable", None)

    def env_vars(self) -> dict[str, str]:
        return self.get("env_vars", {})

    def has_conda(self) -> bool:
        return bool(self.get("conda"))

    def conda_env_name(self) -> str | None:
        """None without one, or where ``conda`` describes an environment."""
        return self["conda"] if isinstance(self.get("conda"), str) else None

    def conda_config(self) -> str | None:
        """The description of a conda environment as JSON."""
        return json.dumps(self["conda"], sort_keys=True) if isinstance(self.get("conda"), dict) else None

    def conda_uri(self) -> str | None:
        return self._uri("conda")

    def has_pip(self) -> bool:
        return bool(self.get("pip"))

    def pip_uri(self) -> str | None:
        """A name for what ``pip`` asks for; the same for the same."""
        return self._uri("pip")

    def virtualenv_name(self) -> str | None:
        """None: ``pip`` never names an environment here, it makes one."""
        return None

    def has_uv(self) -> bool:
        return bool(self.get("uv"))

    def uv_uri(self) -> str | None:
        return self._uri("uv")

    def _uri(self, kind: str) -> str | None:
        if kind not in self:
            return None
        import hashlib  # brings OpenSSL

        return f"{kind}://{hashlib.sha1(json.dumps(self[kind], sort_keys=True).encode()).hexdigest()}"

    def pip_config(self) -> dict[str, Any]:
        return dict(self.get("pip", {})) if self.has_pip() else {}

    def uv_config(self) -> dict[str, Any]:
        return dict(self.get("uv", {})) if self.has_uv() else {}

    def image_uri(self) -> str | None:
        return self.get("image_uri")

    def has_py_container(self) -> bool:
        return bool(self.get("container"))

    def py_container_image(self) -> str | None:
        return self["container"].get("image", "") if self.has_py_container() else None

    def py_container_worker_path(self) -> str | None:
        return self["container"].get("worker_path", "") if self.has_py_container() else None

    def py_container_run_options(self) -> list[str] | None:
        return self["container"].get("run_options", []) if self.has_py_container() else None

    def java_jars(self) -> list[str]:
        return list(self.get("java_jars", []))

    def nsight(self) -> Any:
        return self.get("_nsight")

    def rocprof_sys(self) -> Any:
        return self.get("_rocprof_sys")

    def plugins(self) -> list[tuple[str, Any]]:
        """The fields that are not known."""
        return [(name, value) for name, value in self.items() if name not in self.known_fields]

    def plugin_uris(self) -> list[str]:
        return []


def _rebuild(fields: dict[str, Any]) -> RuntimeEnv:
    return RuntimeEnv(_validate=False, **fields)


__all__ = ["RuntimeEnv", "RuntimeEnvConfig"]

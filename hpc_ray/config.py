"""What a session is made with: the fixed description of a node, and the settings that a site or user may change.

Nothing below reads the environment on its own: ``Settings.from_environment`` is called once where a session is made, and
the result travels to every process of it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from hpc_ray.exceptions import ConfigurationError

ENVIRONMENT_PREFIX = "HPC_RAY_"
DEFAULT_SETUP_TIMEOUT_S = 600  # for a runtime environment that does not say another
RUNTIME_ENV_VARIABLE = "HPC_RAY_RUNTIME_ENV"  # JSON of StartWorker.runtime_env, in a worker that starts


CONFIG_VARIABLE = "HPC_RAY_CONFIG"  # a file; empty: none
CONFIG_NAME = "hpc_ray.toml"
_TABLES = ("settings", "submit")


def site_file() -> str:
    """The file of site defaults: that of HPC_RAY_CONFIG, else ./hpc_ray.toml, else ~/.config/hpc_ray.toml; "" if there is none."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named is not None:
        return named
    for path in (CONFIG_NAME, os.path.expanduser(f"~/.config/{CONFIG_NAME}")):
        if os.path.isfile(path):
            return path
    return ""


def site_table(name: str) -> tuple[str, dict[str, Any]]:
    """The site's file and one of its tables, ``settings`` or ``submit``; both empty where there is no file.

    Raises:
        ConfigurationError: the file cannot be read, or has something else in it; names file and key.
    """
    path = site_file()
    if not path:
        return "", {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path} ({CONFIG_VARIABLE}) cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    for key, value in tables.items():
        if key not in _TABLES or not isinstance(value, dict):
            raise ConfigurationError(f"{path}: {key!r} is not known; there are the tables [settings] and [submit]")
    return path, tables.get(name, {})


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tunables. Each can be set in [settings] of hpc_ray.toml, by ``HPC_RAY_<NAME>`` or ``init(_system_config={...})``."""

    inline_bytes: int = 64 * 1024  # results and arguments up to this size travel in messages
    ring_bytes: int = 64 * 1024  # memory of one lane between two processes
    max_processes: int = 1024  # lanes per node
    lease_idle_s: float = 0.02  # an owner keeps an idle worker this long
    pipeline_s: float = 0.002  # work sent ahead to one worker, at the task's usual run time
    pipeline_tasks: int = 256  # and at most this many tasks
    idle_worker_s: float = 60.0  # idle workers beyond the number of CPUs end after this
    prestart_workers: int = -1  # -1: as many as CPUs, at most 8
    report_interval_s: float = 0.1  # resource reports to the GCS
    task_history: int = 10_000  # tasks that a process remembers for ``list_tasks`` and ``timeline``; 0: none
    transport: str = "mpi"  # between the nodes that we start: "mpi", or "tcp", over which a lost node is not the end
    heartbeat_s: float = 1.0  # over tcp: the head and each node give a sign of life so often
    heartbeat_timeout_s: float = 10.0  # over tcp: a node from which nothing has come for so long is lost
    network_interface: str = ""  # this host's interface (ib0) or address to be reached at: over tcp, and to be woken at; "": found
    start_timeout_s: float = 60.0  # for nodes and workers to come up
    max_lineage_bytes: int = 256 << 20  # of records in each process of how its large results were made
    log_to_driver: bool = True
    package_bytes: int = 512 << 20  # a folder of a runtime environment, packed
    object_spilling_directory: str = ""  # node-local disk for objects that the store has no room for; "": the session's folder
    bind_to_gpus: bool = True  # a worker with GPUs runs on the CPUs next to them, where these are enough for what it asked for
    gang_idle_s: float = 30.0  # the ranks of a gang that has ended wait so long for the next one
    gang_grace_s: float = 1.0  # when a rank of a gang has failed, the others have so long to come back
    kill_on_exit_s: float = 2.0  # grace between an orderly end and SIGKILL

    @classmethod
    def from_environment(cls, overrides: dict[str, Any] | None = None) -> Settings:
        """Defaults, then the site's file, then ``HPC_RAY_*``, then ``overrides``.

        Raises:
            ConfigurationError: a value has the wrong type, or an override has no such name.
        """
        path, values = site_table("settings")
        known = ", ".join(field.name for field in msgspec.structs.fields(cls))
        for name in values:
            if name not in cls.__struct_fields__:
                raise ConfigurationError(f"{path}: [settings] has {name!r}, which is not a setting. The settings are: {known}")
        try:
            msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{path}: [settings]: {error}") from None
        for field in msgspec.structs.fields(cls):
            text = os.environ.get(ENVIRONMENT_PREFIX + field.name.upper())
            if text is not None:
                values[field.name] = text
        values.update(overrides or {})
        try:
            settings = msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"bad setting: {error}. The settings are: {known}") from None
        folder = settings.object_spilling_directory
        if folder and not os.path.isabs(folder):
            raise ConfigurationError(f"object_spilling_directory must be an absolute path, as every node uses it; it is {folder!r}")
        if settings.transport not in ("mpi", "tcp"):
            raise ConfigurationError(f'transport must be "mpi" or "tcp", not {settings.transport!r}')
        if not 0 < settings.heartbeat_s * 2 <= settings.heartbeat_timeout_s:
            raise ConfigurationError(
                f"heartbeat_timeout_s must be at least twice heartbeat_s, else a node is lost because one heartbeat comes late; they "
                f"are {settings.heartbeat_timeout_s:g} and {settings.heartbeat_s:g}"
            )
        return settings


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a session, as its fork server, raylet and workers see it. Sent as JSON."""

    session: str  # unique: uid, job and step where there is a scheduler, start time and random part
    session_dir: str  # node-local folder, mode 0700, removed at the end
    node: int  # index in the session; 0 has the GCS
    node_id: str  # 28 bytes, hexadecimal
    hostname: str
    ip: str
    resources: dict[str, float]  # CPU, GPU, memory, object_store_memory, node:IP and custom ones
    labels: dict[str, str] = {}
    arena_bytes: int
    nodes: int = 1  # how many nodes the launcher promised
    has_link: bool = False
    settings: Settings = Settings()
    environment: dict[str, str] = {}  # variables for workers, above the inherited ones
    python_path: list[str] = []  # the driver's sys.path, for workers
    working_dir: str = ""
    journal: str = ""  # SQLite file of the GCS; "" = in memory

    @property
    def spill_dir(self) -> str:
        """Folder of spilled objects, made when it is needed; the fork server removes it."""
        base = self.settings.object_spilling_directory
        if not base:
            return f"{self.session_dir}/spilled"
        return os.path.join(base, f"hpc_ray-{os.getuid()}", self.session, f"node-{self.node}")

    @property
    def socket_name(self) -> str:
        """Abstract Unix socket of the node's fork server: no file, gone with its owner."""
        return f"\0hpc_ray/{os.getuid()}/{self.session}/{self.node}"


def encode_config(config: NodeConfig) -> str:
    return msgspec.json.encode(config).decode()


def decode_config(text: str) -> NodeConfig:
    return msgspec.json.decode(text, type=NodeConfig)

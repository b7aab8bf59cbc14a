"""The settings of a job, for ``init(job_config=...)``."""

from __future__ import annotations

from typing import Any

from hpc_ray.runtime_env import RuntimeEnv


class JobConfig:
    """What a program says about itself.

    Args:
        runtime_env: of all its tasks and actors.
        metadata: text by name, shown with the job.
        ray_namespace: of its named actors.
        default_actor_lifetime: "non_detached" or "detached".
        jvm_options, code_search_path: Ray's for Java; ``init`` refuses them.

    Raises:
        ValueError: a lifetime that there is not.
    """

    def __init__(
        self,
        jvm_options: list[str] | None = None,
        code_search_path: list[str] | None = None,
        runtime_env: dict[str, Any] | None = None,
        _client_job: bool = False,
        metadata: dict[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        _py_driver_sys_path: list[str] | None = None,
    ):
        self.jvm_options = jvm_options or []
        self.code_search_path = code_search_path or []
        self.metadata = metadata or {}
        self.ray_namespace = ray_namespace
        self._client_job = _client_job
        self._py_driver_sys_path = _py_driver_sys_path or []
        self.set_runtime_env(runtime_env)
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_metadata(self, key: str, value: str) -> None:
        self.metadata[key] = value

    def set_runtime_env(self, runtime_env: dict[str, Any] | None, validate: bool = False) -> None:
        """With ``validate`` it is checked now; raises what ``RuntimeEnv`` raises."""
        self.runtime_env = RuntimeEnv(**(runtime_env or {})) if validate else runtime_env or {}

    def set_ray_namespace(self, ray_namespace: str) -> None:
        self.ray_namespace = ray_namespace

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """Raises ValueError for a lifetime that there is not."""
        if default_actor_lifetime not in ("detached", "non_detached"):
            raise ValueError("Default actor lifetime must be one of `detached`, `non_detached`")
        self._default_actor_lifetime = default_actor_lifetime

    @classmethod
    def from_json(cls, job_config_json: dict[str, Any]) -> JobConfig:
        """From a dict with some of the arguments."""
        known = ("jvm_options", "code_search_path", "runtime_env", "metadata", "ray_namespace", "default_actor_lifetime")
        return cls(**{name: job_config_json[name] for name in known if name in job_config_json})


__all__ = ["JobConfig"]

"""joblib's ``Parallel`` over the cluster: ``register_ray()``, then ``with joblib.parallel_config("ray"):``."""

from __future__ import annotations

from typing import Any

from hpc_ray.api import cluster_resources
from hpc_ray.session import ensure_connected
from hpc_ray.util.multiprocessing.pool import Pool

try:
    import joblib  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from joblib._parallel_backends import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        FallbackToBackend,
        MultiprocessingBackend,
        SequentialBackend,
    )
except ImportError:  # optional; register_ray says so
    joblib = None
    MultiprocessingBackend = object


class RayBackend(MultiprocessingBackend):  # type: ignore[misc]
    """joblib's own backend for pools of processes, with a pool of actors.

    Args:
        ray_remote_args: options of the actors.
    """

    supports_sharedmem = False

    def __init__(self, *args: Any, ray_remote_args: dict[str, Any] | None = None, **kwargs: Any):
        self.ray_remote_args = ray_remote_args
        super().__init__(*args, **kwargs)

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many actors: of the cluster's CPUs, -1 means all and None one.

        Raises:
            ValueError: 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        ensure_connected()
        cpus = int(cluster_resources().get("CPU", 1))
        return max(cpus + 1 + n_jobs, 1) if n_jobs < 0 else min(n_jobs, max(cpus, 1))

    def configure(self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **kwargs: Any) -> int:
        """Make the pool; how many actors it has. What else joblib gives is about memory maps, which are not needed."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self._pool = Pool(n_jobs, ray_remote_args=self.ray_remote_args)
        self.parallel = parallel
        return n_jobs


def register_ray() -> None:
    """Make the backend known to joblib as "ray".

    Raises:
        ImportError: joblib is not installed.
    """
    if joblib is None:
        raise ImportError("register_ray() needs the package joblib: pip install joblib")
    joblib.register_parallel_backend("ray", RayBackend)


__all__ = ["register_ray"]

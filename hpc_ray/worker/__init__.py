"""The worker: a client that also runs other people's tasks. ``main`` is what the fork server calls in a new process."""

from hpc_ray.worker.process import main

__all__ = ["main"]

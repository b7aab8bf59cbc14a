"""``multiprocessing.Pool`` with actors in place of processes, so that it reaches over all nodes."""

from multiprocessing import JoinableQueue, TimeoutError  # noqa: A004 - as in multiprocessing

from hpc_ray.util.multiprocessing.pool import Pool

__all__ = ["JoinableQueue", "Pool", "TimeoutError"]

"""What the parts of ``RayletState`` share. Each is a class of its own file; ``raylet.state`` puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ray.machine import Machine

if TYPE_CHECKING:
    from hpc_ray.config import Settings
    from hpc_ray.protocol import DeathCause, Welcome
    from hpc_ray.raylet.leases import Lease
    from hpc_ray.raylet.resources import ResourcePool
    from hpc_ray.raylet.workers import Peer, Worker, WorkerState
    from hpc_ray.scheduling import NodeView


class Part(Machine):
    """Names that cross the files' borders."""

    node: int
    node_id: bytes
    settings: Settings
    pool: ResourcePool
    welcome: Welcome
    views: dict[int, NodeView]
    view_version: int
    dirty: bool  # something changed that may let a waiting request go on
    stopping: bool
    leases: dict[int, Lease]
    workers: dict[int, Worker]
    idle: dict[int, Worker]
    paused_until: float  # no plain workers are started before
    by_address: dict[int, Worker]
    peers: dict[int, Peer]

    if TYPE_CHECKING:

        def refuse_environment(self, env: str, text: str) -> None: ...
        def close_lease(self, lease: Lease, cause: DeathCause) -> None: ...
        def owner_died(self, address: int) -> None: ...
        def remote_owner_died(self, address: int) -> None: ...
        def check_stopped(self) -> None: ...
        def finish_releases(self, group_id: bytes) -> None: ...
        def step(self, worker: Worker, end: WorkerState, event: str = "") -> None: ...
        def start_workers(self, env: str, count: int) -> int: ...
        def starting(self, env: str) -> int: ...
        def is_made(self, env: str) -> bool: ...
        def claim(self, job_id: bytes, env: str, owner: int, *, unused_first: bool) -> Worker | None: ...
        def kill(self, worker: Worker, cause: DeathCause) -> None: ...
        def end(self, worker: Worker, reason: str) -> None: ...
        def set_idle(self, worker: Worker) -> None: ...
        def knows(self, address: int) -> bool: ...
        def tell_local(self, message: object) -> None: ...

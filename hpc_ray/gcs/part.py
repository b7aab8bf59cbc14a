"""What the parts of ``GcsState`` share. Each part is a class of its own file; ``gcs.state`` puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from hpc_ray.machine import Journal, Machine

if TYPE_CHECKING:
    from hpc_ray.protocol import DeathCause, Resources
    from hpc_ray.scheduling import NodeView


class Part(Machine):
    """Names that cross the files' borders."""

    stopping = False  # the session ends
    epoch_offset = 0.0  # time of day minus the clock of events
    views: dict[int, NodeView]
    living: list[NodeView]
    room_version: int
    view_changed: bool  # room may have appeared: try again what waits
    asker: tuple[int, int]  # address and request id of the Query being answered

    def journal(self, kind: str, key: bytes, value: msgspec.Struct | bytes | None) -> None:
        """Make it durable before anything of this event is sent (JOURNAL-1). Once the session ends that is over: processes end with it,
        and the next one is to have what they kept alive."""
        if self.stopping:
            return
        if value is not None and not isinstance(value, bytes):
            value = msgspec.msgpack.encode(value)
        self.act(Journal(kind, key, value))

    if TYPE_CHECKING:

        def raylets(self) -> Iterator[int]: ...
        def take(self, node: int, demand: Resources) -> None: ...
        def tell_raylets(self, message: object) -> None: ...
        def end_actors_of_job(self, job_id: bytes) -> None: ...
        def end_actors_of_group(self, group_id: bytes) -> None: ...
        def remove_groups_of_job(self, job_id: bytes) -> None: ...
        def process_died(self, address: int, cause: DeathCause) -> None: ...
        def node_lost(self, node: int, node_id: bytes, text: str) -> None: ...
        def group_is_gone(self, group_id: bytes) -> bool: ...


class Deferred:
    """Returned by a ``query_…`` method that answers later."""


DEFERRED = Deferred()

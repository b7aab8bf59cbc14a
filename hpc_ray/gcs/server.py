"""The GCS's process: performs what ``gcs.state`` decides. Started by the launcher, on node 0 only."""

from __future__ import annotations

import time

from hpc_ray._core import Segment
from hpc_ray.config import NodeConfig
from hpc_ray.gcs.journal import open_journal
from hpc_ray.gcs.state import GcsState
from hpc_ray.ids import GCS_LANE
from hpc_ray.serving import Server
from hpc_ray.version import __version__


def main(segment: Segment, config: NodeConfig) -> None:
    """Serve until the session ends. Blocks; leaves by SystemExit."""
    journal = open_journal(config.journal)
    state = GcsState(epoch_offset=time.time() - time.monotonic(), build=__version__)
    state.replay(journal.load())
    lane = segment.open_lane(GCS_LANE)
    code = Server(state, lane, commit=journal.commit).run()
    journal.close()
    lane.close()
    raise SystemExit(code)

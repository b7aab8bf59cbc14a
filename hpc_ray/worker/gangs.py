"""Gangs: tasks that run on several MPI ranks at once.

A gang is an ordinary task with the resources of all its ranks. So it waits for them, all or nothing, in the raylet's queue, and is
cancelled, retried and listed as any other task. The worker that it is given, the leader, starts a job step of that many ranks
(``launcher.steps``), sends each the call as it came, and returns what they return. The ranks are processes of the node like others:
arguments and results travel through lanes and arena, and never through the leader's heap on the way in.

GANG-1 (answered): each rank's call is answered by its reply or by its end; the first failure is the gang's. That another rank has ended,
as MPI tells a rank, is no failure yet: the news of that end follows, with who it was.
GANG-2 (clean): the ranks of a step serve another call only if all of them have returned from this one; after any failure, the
leader ends the step, and the next call gets a new one.
GANG-3 (a failure is not waited for): when a rank has failed, the others are interrupted, and have ``gang_grace_s`` to come back.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from hpc_ray.client import context
from hpc_ray.client.client import Waiter
from hpc_ray.client.objects import ERROR
from hpc_ray.client.records import now_ns
from hpc_ray.client.refs import ObjectRef
from hpc_ray.client.tasks import Function, Task, Template
from hpc_ray.exceptions import GangError, MPIError, RayError, TaskCancelledError
from hpc_ray.ids import TaskID
from hpc_ray.launcher.steps import Rank, Step
from hpc_ray.protocol import CancelTask, PushTask, TaskReply, UseLease
from hpc_ray.serialize import loads

if TYPE_CHECKING:
    from hpc_ray.worker.executor import Executor

_COMMAND = [sys.executable, "-P", "-m", "hpc_ray.worker.rank"]
_LEAVE_S = 5.0  # for MPI to be finalized
_MOST_CALLS = 500  # of one step: each has used a communicator, of which MPICH has 2000


class GangFailed(Exception):
    """Carries the error that the caller shall see."""

    def __init__(self, failure: RayError):
        super().__init__(failure)
        self.failure = failure


class Seat:
    """A rank, as the process that a task was sent to."""

    def __init__(self, rank: Rank):
        self.worker = rank.address
        self.worker_id = rank.worker_id
        self.pid = rank.pid


class Call:
    """What the ranks of a gang do now. The ``submitter`` of their tasks; under the client's lock."""

    def __init__(self, gangs: Gangs, task: PushTask, step: Step):
        self.client = gangs.client
        self.packer = gangs.client.packer
        self.step = step
        self.name = task.name
        self.waiter = Waiter(step.size)  # done when all have answered, or one has failed
        self.settled = Waiter(step.size)  # done when all have answered
        self.failure: RayError | None = None
        self.hearsay: RayError | None = None  # a rank's word that another one has failed
        self.tasks: list[Task] = []
        self.references: list[ObjectRef] = []

    def on_reply(self, task: Task, message: TaskReply) -> None:
        result = message.results[0]
        self.finish(task, loads(result.payload) if result.kind == ERROR else None)
        self.packer.finish(task, message.results)

    def finish(self, task: Task, error: BaseException | None) -> None:
        """A rank's part is over."""
        del self.client.tasks.tasks[task.id]
        if error is not None and self.failure is None and not task.cancelled:
            failure = error if isinstance(error, RayError) else RayError(str(error))
            cause = getattr(error, "cause", None)
            if isinstance(cause, MPIError) and cause.peer_failed:
                self.hearsay = self.hearsay or failure
            else:
                self.failure = failure
                self.waiter.finish()
        self.waiter.one()
        self.settled.one()

    def on_death(self, is_dead: Any) -> None:
        """Called with the deaths of processes."""
        for number, task in enumerate(self.tasks):
            if task.id in self.client.tasks.tasks and is_dead(task.seat.worker):
                reason = "the process was killed or exited"
                code = self.step.process.poll()
                if code is not None:
                    reason += f"; its mpirun ended with {code}"
                hostname = self.client.config.hostname
                error = GangError(self.name, number, self.step.size, task.seat.pid, hostname, reason)
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


class Gangs:
    """The gangs that this worker leads, one at a time."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.client = executor.client
        self.step: Step | None = None  # idle, with ``timer`` on it
        self.timer: threading.Timer | None = None
        self.mutex = threading.Lock()  # of these two

    def run(self, task: PushTask, wish: dict[str, Any]) -> Any:
        """Run a task on ``wish["ranks"]`` ranks; a list of what each returned, or, if it is ``single``, what its one rank did. Blocks.

        Raises:
            GangFailed: a rank did not return.
            LaunchError: the ranks did not come up.
            KeyboardInterrupt: the task was cancelled.
        """
        size, gpus = wish["ranks"], wish["gpus"]
        step = self._take(size)
        try:
            step.calls += 1
            call = Call(self, task, step)
            try:
                self._send(call, task, gpus)
                self._wait(call)
            finally:
                call.close()
            failure = call.failure or call.hearsay
            if failure is not None:
                raise GangFailed(failure)
            values = self.client.get_many(call.references, None)
        except BaseException:
            step.end()
            raise
        self._keep(step)
        return values[0] if wish["single"] else values

    # -- the step

    def _take(self, size: int) -> Step:
        with self.mutex:
            step, self.step = self.step, None
            if self.timer is not None:
                self.timer.cancel()
        if step is not None:
            dead = not step.is_up() or any(rank.address in self.client.dead for rank in step.ranks)
            if not dead and step.calls < _MOST_CALLS:
                return step
            step.leave(0.0 if dead else _LEAVE_S)
        note = {"path": sys.path, "runtime_env": context.runtime_env}
        variables = {}
        if self.executor.visible_gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = self.executor.visible_gpus
        return Step(size, _COMMAND, self.client.config, note, variables)

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

    def _send(self, call: Call, task: PushTask, gpus: float) -> None:
        client, executor, size = self.client, self.executor, call.step.size
        function = Function(task.function_id, executor.blobs[task.function_id], task.name)
        mine = executor.leases.get(task.lease_id)
        resources = {name: amount // size for name, amount in executor.shape.resources.items()}
        shape = msgspec.structs.replace(executor.shape, resources=resources, runtime_env=context.runtime_env)
        with client.lock:
            client.mourners.append(call.on_death)
            for number, rank in enumerate(call.step.ranks):
                template = Template(function, f"{task.name}[rank {number} of {size}]", executor.shape, max_retries=0)
                part = Task(call, template, client.minter.task_id())
                part.lane = part.seat = Seat(rank)
                part.sent = now_ns()
                call.references.append(client.packer.make_returns(part))
                call.tasks.append(part)
                client.tasks.tasks[part.id] = part
            for number, part in enumerate(call.tasks):
                address = part.seat.worker
                instances = dict(mine.instances) if mine is not None else {}
                if instances.get("GPU"):
                    instances["GPU"] = share(instances["GPU"], number, gpus)
                client.send(address, UseLease(task.lease_id, shape, context.namespace, instances, context.logging))
                client.export(address, function)
                client.send(
                    address,
                    PushTask(
                        part.id,
                        part.attempt,
                        function.id,
                        part.template.name,
                        task.arguments,
                        task.dependencies,
                        1,
                        b"",
                        b"",
                        task.lease_id,
                    ),
                )
            call.on_death(lambda address: address in client.dead)

    def _wait(self, call: Call) -> None:
        """Until all have answered or one has failed; then the others have a moment more."""
        client = self.client
        try:
            client.block(call.waiter, gives_way=False)
            if call.failure is not None:
                with client.lock:
                    call.interrupt()
                client.block(call.settled, client.settings.gang_grace_s, gives_way=False)
        except KeyboardInterrupt:  # the gang is cancelled: user code in the ranks may clean up
            with client.lock:
                call.interrupt()
            with contextlib.suppress(KeyboardInterrupt):
                client.block(call.settled, client.settings.gang_grace_s, gives_way=False)
            raise


def share(gpus: list[list[int]], rank: int, each: float) -> list[list[int]]:
    """Of the GPUs of a gang, those that a rank uses; two ranks may use one, each a part of it."""
    first = int(rank * each + 1e-9)
    last = max(first + 1, int((rank + 1) * each + 1 - 1e-9))
    return gpus[first:last] if each else []

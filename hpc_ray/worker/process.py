"""A worker process from its fork to its end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback

from setproctitle import setproctitle

from hpc_ray._core import Segment
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.config import RUNTIME_ENV_VARIABLE, NodeConfig
from hpc_ray.protocol import LogLines, ProcessKind, Shutdown
from hpc_ray.slurm import signals
from hpc_ray.worker.environment import Environment, without_ranks
from hpc_ray.worker.executor import Executor
from hpc_ray.worker.output import name_streams

LAST_WORDS_S = 60.0  # so long the answers of a worker that leaves in order wait for who lives, and does not read


def main(segment: Segment, config: NodeConfig, token: int, *, entered: bool = False) -> None:
    """Run a worker in this freshly forked process; does not return. ``entered``: it has become a new interpreter for its
    runtime environment, and is in it but for the hook.

    Leaves by ``os._exit``: the handlers that user code registered with ``atexit`` run when the end is orderly, and not when the
    process was told to die."""
    status = 1
    try:
        status = _live(segment, config, token, entered)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _live(segment: Segment, config: NodeConfig, token: int, entered: bool) -> int:
    if signals.in_job():
        signals.put_off()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    setproctitle("hpc_ray::idle")
    name_streams()
    lane = segment.open_lane()
    worker_id = os.urandom(28)
    client = Client(segment, lane, config, ProcessKind.WORKER, worker_id, os.getpid(), token)
    context.set_client(client)
    context.is_worker = True
    environment = os.environ.pop(RUNTIME_ENV_VARIABLE, "")
    if environment and not _enter(Environment(environment, client), entered):
        return 1
    context.runtime_env = without_ranks(environment)
    executor = Executor(client)
    signal.signal(signal.SIGINT, client.interrupts.on_signal)  # cancel uses it
    client.interrupts.watch()
    client.on_shutdown = lambda message: _on_shutdown(executor, message)
    client.on_log = _warn
    client.connect(config.settings.start_timeout_s)
    executor.run()
    executor.stay_while_used()
    executor.host.shut_down()
    executor.leave()
    atexit._run_exitfuncs()
    _flush()
    client.close()
    client.lane.close(LAST_WORDS_S)
    return executor.status


def _enter(environment: Environment, entered: bool) -> bool:
    """False: it cannot be, and the raylet knows."""
    try:
        with environment.time_limit():
            if not entered:
                environment.enter()
            environment.call_hook()
    except BaseException as error:
        environment.failed(error)
        return False
    return True


def _on_shutdown(executor: Executor, message: Shutdown) -> None:
    """The process shall end: an idle worker leaves in order, a busy one at once."""
    reason = message.reason
    executor.keep_history = message.keep_history
    if message.unless_used:
        executor.on_push_task(executor.client.raylet, message)
        return
    if executor.running or (executor.host.creating is not None and executor.host.loop is not None):
        executor.leave()
        executor.client.lane.flush()
        _flush()
        os._exit(0)
    executor.leaving = reason or "the session ended"
    executor.client.fail(RuntimeError(reason or "the session ended"))
    if executor.host.loop is not None:
        executor.host.stop()
    arrival = executor.arrival
    if arrival is not None:
        arrival.finish()


def _warn(message: LogLines) -> None:
    """What the runtime has to say about the calls of this process: it goes where its output goes, to the driver."""
    print(*message.lines, sep="\n", file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass

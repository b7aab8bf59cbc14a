"""What Slurm's signals mean to the processes of a job.

Slurm signals every process of a step at once: SIGUSR1 where ``--signal`` asked for a warning, SIGTERM at scancel, preemption
and the time limit, and SIGKILL when KillWait is over. Only the driver shall end of the first two; the cluster lives
until it has, so that it can still fetch and save what it has.

SIGNAL-1 (one decides): in a job, node processes and roles ignore both, workers put them off, links pass them to the driver.
SIGNAL-2 (from the start): what we start has them blocked until it does so, as they would end it before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any

DRAINING = (signal.SIGTERM, signal.SIGUSR1)


def in_job() -> bool:
    """Whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def hold_back() -> set[int]:
    """SIGNAL-2: in a job, this thread and what it starts, also by exec, get neither before ``let_come``. What was held back before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, DRAINING if in_job() else ())


def let_come(before: Iterable[int] | None = None) -> None:
    """The opposite of ``hold_back``, in its process or in one that it has started. ``before``: what that gave."""
    if before is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAINING)
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """In processes without user code: whoever holds them ends them."""
    for number in DRAINING:
        signal.signal(number, signal.SIG_IGN)
    let_come()


def put_off() -> None:
    """In workers. What they start meets the signals as ever, by exec or by fork."""
    own = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != own:  # a fork of user code, such as a process of multiprocessing
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in DRAINING:
        signal.signal(number, on_signal)

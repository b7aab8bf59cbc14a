"""Entry of a node process: ``python -P -m hpc_ray.launcher.node FD [ROLES]``.

FD is one end of ``channel.pair()``; whoever holds the other end sends ``{"config", "detached", "outlives", "cpus"}``
with the descriptor of the folder's lock, gets ``{"ready"}`` or ``{"error"}``, and keeps the end open for as long as the node shall live.
ROLES (JSON, for tests) names other entry points than the real ones, as "module:function".
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hpc_ray import _core
from hpc_ray.config import decode_config
from hpc_ray.launcher import channel, session
from hpc_ray.launcher.fork_server import ForkServer

ROLES = {
    "gcs": "hpc_ray.gcs.server:main",
    "raylet": "hpc_ray.raylet.server:main",
    "worker": "hpc_ray.worker:main",
}


def load(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def main(arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    roles = dict(ROLES, **(json.loads(arguments[1]) if len(arguments) > 1 else {}))
    note, descriptors = channel.receive_note(control)
    if note is None:  # the starter changed its mind, or is gone
        return 0
    lock = descriptors[0]
    config = decode_config(note["config"])
    try:
        session.note_leader(lock, os.getpid(), folder=config.spill_dir)
        os.environ[session.SESSION_VARIABLE] = config.session
        os.environ[session.NODE_VARIABLE] = str(config.node)
        os.environ.update(config.environment)
        if note.get("cpus"):  # launchers bind their ranks, and so would have bound all our workers
            os.sched_setaffinity(0, note["cpus"])
        server = ForkServer(
            config, control, lock, load, roles, detached=bool(note.get("detached")), outlives=bool(note.get("outlives"))
        )
        server.start()
        importlib.import_module(roles["worker"].partition(":")[0])
        gc.collect()
        gc.freeze()  # what is loaded now is shared with the workers for good
        channel.send_note(control, {"ready": True, "pid": os.getpid()})
    except BaseException as error:
        traceback.print_exc()
        session.remove_dir(config.session_dir)
        try:
            channel.send_note(control, {"error": f"{type(error).__name__}: {error}"})
        except OSError:
            pass
        return 1
    return server.serve()


if __name__ == "__main__":
    _core.set_child_subreaper()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

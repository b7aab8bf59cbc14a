"""Reading the logs of the cluster's nodes: each node's raylet answers for its own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from hpc_ray.observation import Activity, Asking
from hpc_ray.util.state.common import DEFAULT_TIMEOUT_S
from hpc_ray.util.state.exception import RayStateApiException

_LOOK_AGAIN_S = 0.5
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_GROUPS = (("worker", ".out", "worker_out"), ("worker", ".err", "worker_err"), ("raylet", "", "raylet"), ("gcs", "", "gcs_server"))


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: int = DEFAULT_TIMEOUT_S,
) -> dict[str, list[str]]:
    """The log files of a node, by what wrote them (worker_out, worker_err, raylet, gcs_server, internal). Blocks.

    Raises:
        AssertionError: neither ``node_id`` nor ``node_ip`` is given.
        RayStateApiException: no such node lives.
    """
    assert node_ip is not None or node_id is not None, "At least one of node ip and node id is required"
    asking = Asking(address, timeout)
    found: dict[str, list[str]] = {}
    for name in _ask(asking, _raylet(asking, node_id, node_ip), "list_logs", pattern=glob_filter or "*"):
        group = next((group for start, end, group in _GROUPS if name.startswith(start) and name.endswith(end)), "internal")
        found.setdefault(group, []).append(name)
    return found


def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: int = DEFAULT_TIMEOUT_S,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str | None = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
    _interval: float | None = None,
    filter_ansi_code: bool = False,
) -> Iterator[Any]:
    """A log file in pieces: texts, or bytes with ``encoding=None``.

    Args:
        filename, pid: of a file, or of a worker, of the node that ``node_id`` or ``node_ip`` names.
        actor_id, task_id: what the process of the actor, or the process that ran this attempt of the task, has printed.
        follow: go on with what is written later, until the session ends or you stop; looks every ``_interval`` seconds.
        tail: begin with the last so many lines; -1: with the first.
        timeout: seconds for each question.
        suffix: "out" or "err", of a worker.

    Raises:
        ValueError: too little to find a log by, or too much.
        RayStateApiException: there is no such log.
    """
    if submission_id is not None:
        raise RayStateApiException("programs are not submitted to the cluster here; a program's output is where it was started")
    if suffix not in ("out", "err"):
        raise ValueError(f"Invalid suffix: {suffix}. Must be one of 'out' or 'err'.")
    if not (node_id or node_ip or actor_id or task_id):
        raise ValueError("node_id or node_ip must be given where there is no actor_id or task_id")
    if node_id and node_ip:
        raise ValueError(f"Both node_id and node_ip are given: {node_id}, {node_ip}. Only one of them can be.")
    if not (filename or actor_id or task_id or pid):
        raise ValueError("None of actor_id, task_id, pid or filename is given; a log is found by one of them.")
    asking = Asking(address, timeout)
    if filename:
        raylet = _raylet(asking, node_id, node_ip)
        _check_exists(asking, raylet, filename)
    else:
        if actor_id:
            node_id, pid = _place_of_actor(asking, actor_id)
        elif task_id:
            node_id, pid = _place_of_task(asking, task_id, attempt_number)
        raylet = _raylet(asking, node_id, node_ip)
        known = [row["pid"] for question in ("workers", "dead_workers") for row in _ask(asking, raylet, question)]
        if pid is None or int(pid) not in known:
            raise RayStateApiException(f"Could not find a log file: the node {node_id or node_ip} has had no process {pid}.")
        filename = f"worker-{pid}.{suffix}"
    for piece in _pieces(asking, raylet, filename, tail, follow, _interval or _LOOK_AGAIN_S):
        data = _COLOURS.sub(b"", piece) if filter_ansi_code else piece
        yield data if encoding is None else data.decode(encoding, errors or "strict")


def _pieces(asking: Asking, raylet: int, filename: str, tail: int, follow: bool, pause: float) -> Iterator[bytes]:
    """Whole lines, but for the end of the file."""
    offset, rest = 0, b""
    while True:
        data = b""
        if filename in _ask(asking, raylet, "list_logs", pattern=filename):  # a worker that has printed nothing has none
            data, offset = _ask(asking, raylet, "read_log", filename=filename, offset=offset, tail=tail)
            tail = -1
        if data:
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if whole or newline:
                yield whole + newline
        elif follow:
            time.sleep(pause)
        else:
            break
    if rest:
        yield rest


def _ask(asking: Asking, raylet: int, name: str, **arguments: Any) -> Any:
    try:
        return asking.client.query(raylet, name, asking.timeout_s, **arguments)
    except ValueError as error:
        raise RayStateApiException(str(error)) from None


def _check_exists(asking: Asking, raylet: int, filename: str) -> None:
    if filename not in _ask(asking, raylet, "list_logs"):
        raise RayStateApiException(f"A file is not found: the node has no log {filename!r}; see list_logs")


def _raylet(asking: Asking, node_id: str | None, node_ip: str | None) -> int:
    for node in asking.nodes:
        if node["alive"] and (bytes(node["node_id"]).hex() == node_id or (node_id is None and node["ip"] == node_ip)):
            return node["raylet"]
    raise RayStateApiException(f"no node {node_id or node_ip} lives in this cluster")


def _place_of_actor(asking: Asking, actor_id: str) -> tuple[str, int]:
    for row in asking.gcs("list_actors"):
        if bytes(row["actor_id"]).hex() == actor_id and row["pid"]:
            return bytes(row["node_id"]).hex(), row["pid"]
    raise RayStateApiException(f"Could not find a log file: there is no actor {actor_id}, or it was never started")


def _place_of_task(asking: Asking, task_id: str, number: int) -> tuple[str, int]:
    for attempt in Activity(asking).attempts:
        if attempt.task_id.hex() == task_id and attempt.number == number and attempt.where is not None:
            return attempt.where.node_id, attempt.where.pid
    raise RayStateApiException(f"Could not find a log file: attempt {number} of task {task_id} has run nowhere that is known")

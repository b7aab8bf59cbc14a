"""Asking the cluster what it does: the GCS, the raylets, and all processes about their tasks. Nothing is kept here.

Relied on by ``util.state``, the dashboard and the command line. What there is about a task lies in two places: who made the call
knows what became of it, who ran it knows when (``client.records``). Here the two are put together.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import msgspec

from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import CallRow, History, Resources, RunRow, SpanRow, short_name
from hpc_ray.session import ensure_connected, init

MOST_ROWS = 100_000  # of all processes together
ENDED = ("FINISHED", "FAILED")


class Process(msgspec.Struct, frozen=True):
    """A worker or driver, also one that is gone."""

    address: int
    worker_id: str
    pid: int
    is_driver: bool
    node_id: str
    ip: str


class Asking:
    """One look at the cluster. Every method blocks, for ``timeout_s`` at most.

    Raises:
        ConnectionError: there is no session (``address`` says which to join; default: a running one).
    """

    def __init__(self, address: str | None = None, timeout_s: float = 30.0):
        if context.client is None:
            init(address or "auto")
        client = context.client
        assert client is not None
        self.client: Client = client
        self.timeout_s = timeout_s
        self.missing = 0  # processes and nodes that did not answer
        self._nodes: list[dict[str, Any]] | None = None

    def gcs(self, name: str, **arguments: Any) -> Any:
        """The GCS's answer; GetTimeoutError if there is none in time."""
        return self.client.query(GCS_ADDRESS, name, self.timeout_s, **arguments)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        if self._nodes is None:
            self._nodes = self.gcs("nodes")
        return self._nodes

    def raylets(self, name: str) -> Iterable[tuple[dict[str, Any], Any]]:
        """(node, answer) of the nodes that live; one that does not answer in time is counted in ``missing``."""
        nodes = {node["raylet"]: node for node in self.nodes if node["alive"]}
        answers, late = self.client.query_all(nodes, name, self.timeout_s)
        self.missing += late
        return [(nodes[raylet], value) for raylet, value in answers.items()]

    def processes(self) -> list[Process]:
        """Workers and drivers that live."""
        return [
            _process(node, row)
            for node, rows in self.raylets("workers")
            for row in rows
            if row["kind"] in ("WORKER", "DRIVER", "RANK") and row["worker_id"]
        ]

    def each(self, processes: Iterable[Process], name: str, **arguments: Any) -> dict[int, Any]:
        """What each process answers, by its address; those that do not in time are counted in ``missing``."""
        client = self.client
        others = [process.address for process in processes if process.address != client.address]
        found, late = client.query_all(others, name, self.timeout_s, **arguments)
        self.missing += late
        with client.lock:
            own = client.records.question(name)
            if own is not None:
                found[client.address] = own(**arguments)
        return found


def _process(node: dict[str, Any], row: dict[str, Any]) -> Process:
    worker_id, node_id = bytes(row["worker_id"]).hex(), bytes(node["node_id"]).hex()
    return Process(row["address"], worker_id, row["pid"], row["kind"] == "DRIVER", node_id, node["ip"])


class Attempt(msgspec.Struct):
    """One attempt of a task, from all who know of it. Times are ns of the epoch, 0: not known, or not yet."""

    task_id: bytes
    number: int
    kind: str
    name: str
    function: str
    state: str
    parent: bytes = b""
    actor_id: bytes = b""
    where: Process | None = None
    created: int = 0
    sent: int = 0
    started: int = 0
    called: int = 0
    returned: int = 0
    ended: int = 0
    error_type: str = ""
    error_text: str = ""
    resources: Resources = {}
    group_id: bytes = b""
    runtime_env: str = ""

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """What a timeline shows within an attempt that was started: name, start, end."""
        yield "task:deserialize_arguments", self.started, self.called or self.ended
        if self.called:
            yield "task:execute", self.called, self.returned or self.ended
        if self.returned:
            yield "task:store_outputs", self.returned, self.ended


class Activity:
    """What runs in the cluster and has run lately.

    Attributes:
        attempts: of all tasks and calls that somebody remembers, each task's in order.
        spans: of user code, each with the process it was in.
    """

    def __init__(self, asking: Asking):
        processes = asking.processes()
        self.places = {process.address: process for process in processes}
        share = max(100, MOST_ROWS // max(1, len(processes)))
        answers = asking.each(processes, "history", limit=share)
        known = {address: msgspec.convert(answer, History) for address, answer in answers.items()}
        for node, rows in asking.raylets("dead_workers"):  # after those that live, as they may end meanwhile
            for row in rows:
                self.places[row["address"]] = _process(node, row)
        for _, left in asking.raylets("left_histories"):
            known.update((history.address, history) for history in (msgspec.msgpack.decode(data, type=History) for data in left))
        histories = list(known.values())
        self._runs = {(run.task_id, run.attempt): (run, history.address) for history in histories for run in history.runs}
        self.spans: list[tuple[SpanRow, Process | None]] = [
            (span, self.places.get(history.address)) for history in histories for span in history.spans
        ]
        found = [self._called(call) for history in histories for call in history.calls]
        found += [self._made(row) for row in asking.gcs("list_actors") if row["recorded"]]
        found += [self._ran(run, address) for run, address in self._runs.values()]  # whoever made the call is gone
        found.sort(key=lambda attempt: (attempt.task_id, attempt.number))
        for before, after in pairwise(found):  # sending again elsewhere is no attempt of its own
            after.number = before.number + 1 if after.task_id == before.task_id else 0
        if found:
            found[0].number = 0
        self.attempts: list[Attempt] = found

    def _called(self, call: CallRow) -> Attempt:
        made = Attempt(
            call.task_id,
            call.attempt,
            call.kind,
            call.name,
            call.function,
            call.state,
            call.parent,
            call.actor_id,
            self.places.get(call.worker),
            call.created,
            call.sent,
            ended=call.ended,
            error_type=call.error_type,
            error_text=call.error_text,
            resources=call.resources,
            group_id=call.group_id,
            runtime_env=call.runtime_env,
        )
        self._add_run(made)
        return made

    def _add_run(self, attempt: Attempt) -> None:
        run, address = self._runs.pop((attempt.task_id, attempt.number), (None, 0))
        if run is not None:
            attempt.where = self.places.get(address)
            attempt.started, attempt.called, attempt.returned = run.started, run.called, run.returned
            attempt.ended = run.ended or attempt.ended
            if attempt.state not in ENDED:
                attempt.state = run.state

    def _ran(self, run: RunRow, address: int) -> Attempt:
        return Attempt(
            run.task_id,
            run.attempt,
            run.kind,
            run.name,
            run.function,
            run.state,
            actor_id=run.actor_id,
            where=self.places.get(address),
            started=run.started,
            called=run.called,
            returned=run.returned,
            ended=run.ended,
            error_type="TASK_EXECUTION_EXCEPTION" if run.state == "FAILED" else "",
        )

    def _made(self, row: dict[str, Any]) -> Attempt:
        """The making of an actor."""
        function = f"{short_name(row['class_name'])}.__init__"
        made = Attempt(
            bytes(row["creation_task_id"]),
            row["attempt"],
            "ACTOR_CREATION_TASK",
            f"{row['name']}:{function}" if row["name"] else function,
            function,
            _CREATION_STATES.get(row["state"], "PENDING_NODE_ASSIGNMENT"),
            actor_id=bytes(row["actor_id"]),
            where=self.places.get(row["address"]),
            created=int(row["created_at"] * 1e9),
            ended=int(row["ready_at"] * 1e9),
            resources=row["resources"],
            group_id=bytes(row["group_id"]),
            runtime_env=row["runtime_env"],
        )
        if row["state"] == "DEAD" and (row["death_kind"] == "INIT_FAILED" or not row["ready_at"]):
            made.state = "FAILED"
            made.error_type = _CREATION_ERRORS.get(row["death_kind"], "ACTOR_DIED")
            made.error_text = row["death_text"]
        self._add_run(made)
        return made


_CREATION_STATES = {"DEPENDENCIES_UNREADY": "PENDING_ARGS_AVAIL", "ALIVE": "FINISHED", "DEAD": "FINISHED"}
_CREATION_ERRORS = {
    "INIT_FAILED": "TASK_EXECUTION_EXCEPTION",
    "UNSCHEDULABLE": "ACTOR_UNSCHEDULABLE_ERROR",
    "GROUP_REMOVED": "ACTOR_PLACEMENT_GROUP_REMOVED",
    "RUNTIME_ENV": "RUNTIME_ENV_SETUP_FAILED",
    "NODE_DIED": "NODE_DIED",
    "OOM": "OUT_OF_MEMORY",
}


# ------------------------------------------------------------------ the timeline


_PATIENCE_S = 10.0


def timeline(filename: str | os.PathLike[str] | None = None) -> list[dict[str, Any]] | None:
    """What ran when, as events of Chrome's trace format: for each task and call one event, and within it the loading of its
    arguments, its code, and the storing of its results; and the spans that ``util.profiling.profile`` named. A row of the picture
    is a process. Blocks while the processes are asked; each remembers its latest 10,000 tasks (setting ``task_history``).

    Args:
        filename: write them there as JSON, for chrome://tracing or ui.perfetto.dev, and return None.

    Raises:
        OSError: the file cannot be written.
    """
    events = trace_events()
    if filename is None:
        return events
    with open(filename, "w", encoding="utf-8") as file:
        json.dump(events, file)
    return None


def trace_events() -> list[dict[str, Any]]:
    """What ``timeline`` gives. Blocks."""
    ensure_connected()
    asking = Asking(timeout_s=_PATIENCE_S)
    activity = Activity(asking)
    if asking.missing:
        warnings.warn(f"{asking.missing} processes are too busy to answer; what they ran is missing", stacklevel=3)
    events = [event for attempt in activity.attempts if attempt.started and attempt.ended for event in _events(attempt)]
    for span, process in activity.spans:
        extra = {**span.extra, "task_id": span.task_id.hex()} if span.task_id else dict(span.extra)
        name, color = str(extra.pop("name", span.name)), str(extra.pop("cname", "generic_work"))
        events.append(_event(span.name, name, process, span.started, span.ended, color, extra))
    events.sort(key=lambda event: event["ts"])
    return events


_COLORS = {
    "task:deserialize_arguments": "rail_load",
    "task:execute": "rail_animation",
    "task:store_outputs": "rail_idle",
}


def _events(attempt: Attempt) -> Iterable[dict[str, Any]]:
    arguments = {
        "name": attempt.name,
        "task_id": attempt.task_id.hex(),
        "job_id": attempt.task_id[-4:].hex(),
        "attempt_number": attempt.number,
        "func_or_class_name": attempt.function,
        "actor_id": attempt.actor_id.hex() or None,
    }
    if attempt.state == "FAILED":
        arguments["error_type"] = attempt.error_type
    yield _event(f"task::{attempt.name}", attempt.function, attempt.where, attempt.started, attempt.ended, "generic_work", arguments)
    for name, start, end in attempt.parts():
        yield _event(name, "", attempt.where, start, end, _COLORS[name], {})


def _event(
    kind: str, name: str, process: Process | None, started: int, ended: int, color: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    role = "driver" if process is not None and process.is_driver else "worker"
    return {
        "cat": kind,
        "name": name or kind,
        "pid": process.ip if process is not None else "",
        "tid": f"{role}:{process.worker_id}" if process is not None else role,
        "ts": started / 1000,
        "dur": (ended - started) / 1000,
        "ph": "X",
        "cname": color,
        "args": arguments,
    }

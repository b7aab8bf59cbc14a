"""The metrics of a session as text for Prometheus: those of ``util.metrics`` in all processes, and the cluster's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from hpc_ray.observation import Activity, Asking
from hpc_ray.protocol import UNIT

PREFIX = "ray_"  # as Ray's are called, so that its graphs fit


def render(asking: Asking) -> str:
    """All metrics now. Blocks; raises GetTimeoutError."""
    families: dict[str, tuple[str, str, list[str]]] = {}  # name → kind, description, lines

    def add(name: str, kind: str, description: str, lines: Iterable[str]) -> None:
        families.setdefault(name, (kind, description, []))[2].extend(lines)

    for node in asking.nodes:
        if node["alive"]:
            for name, total in node["total"].items():
                free = node["available"].get(name, 0)
                for state, amount in (("USED", total - free), ("AVAILABLE", free)):
                    labels = {"Name": name, "State": state, "NodeAddress": node["ip"]}
                    add(PREFIX + "resources", "gauge", "Resources of the nodes", [_line(PREFIX + "resources", labels, amount / UNIT)])
    tasks = Counter((attempt.name, attempt.state) for attempt in Activity(asking).attempts)
    actors = Counter((row["class_name"], row["state"]) for row in asking.gcs("list_actors"))
    for what, counts in (("tasks", tasks), ("actors", actors)):
        lines = [_line(PREFIX + what, {"Name": name, "State": state}, count) for (name, state), count in counts.items()]
        add(PREFIX + what, "gauge", f"The {what} that are remembered, by name and state", lines)
    processes = {process.address: process for process in asking.processes()}
    for address, series in asking.each(processes.values(), "metrics").items():
        process = processes.get(address)
        if process is not None:
            for one in series:
                labels = {**one["tags"], "NodeAddress": process.ip, "Pid": str(process.pid)}
                name = PREFIX + one["name"]
                add(name, one["kind"], one["description"], _series(name, labels, one["value"]))
    text = []
    for name, (kind, description, lines) in families.items():
        if lines:
            text += [f"# HELP {name} {_escaped(description)}", f"# TYPE {name} {kind}", *lines]
    return "\n".join(text) + "\n"


def _series(name: str, labels: dict[str, str], value: Any) -> Iterable[str]:
    if not isinstance(value, dict):
        yield _line(name, labels, value)
        return
    below = 0
    for boundary, count in zip([*value["boundaries"], "+Inf"], value["counts"], strict=True):
        below += count
        yield _line(f"{name}_bucket", {**labels, "le": str(boundary)}, below)
    yield _line(f"{name}_sum", labels, value["sum"])
    yield _line(f"{name}_count", labels, value["count"])


def _line(name: str, labels: dict[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{pairs}}} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

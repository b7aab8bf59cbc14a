"""timeline and profile."""

from __future__ import annotations

import json

import pytest

from hpc_ray.util.profiling import profile


def test_tasks_calls_and_spans(ray, tmp_path):
    @ray.remote
    def works():
        with profile("within", {"answer": 42}):
            pass
        return 1

    @ray.remote
    class Actor:
        async def method(self):
            return 2

    actor = Actor.options(name="shown").remote()
    with profile("of the driver", {"name": "driving"}):
        task = works.options(name="shown task").remote()
        assert ray.get([task, actor.method.remote()]) == [1, 2]
    events = ray.timeline()
    by_kind = {event["cat"]: event for event in events}
    assert {"task::shown task", "task::shown:Actor.__init__", "task::Actor.method", "within", "of the driver"} <= set(by_kind)
    whole = by_kind["task::shown task"]
    assert whole["ph"] == "X" and whole["args"]["task_id"] == task.task_id().hex() and whole["name"] == "works"
    start, end = whole["ts"] - 1, whole["ts"] + whole["dur"] + 1  # µs since 1970 are rounded to quarters
    parts = [
        event
        for event in events
        if event["tid"] == whole["tid"] and start <= event["ts"] and event["ts"] + event["dur"] <= end
    ]
    assert [part["cat"] for part in parts if part["dur"] < whole["dur"]] == [
        "task:deserialize_arguments",
        "task:execute",
        "within",
        "task:store_outputs",
    ]
    span = by_kind["within"]
    assert span["args"] == {"answer": 42, "task_id": task.task_id().hex()}
    driving = by_kind["of the driver"]
    assert driving["name"] == "driving" and driving["tid"].startswith("driver:")
    assert driving["ts"] <= whole["ts"] and whole["ts"] + whole["dur"] <= driving["ts"] + driving["dur"]
    assert whole["pid"] == ray.nodes()[0]["NodeManagerAddress"]
    file = tmp_path / "timeline.json"
    assert ray.timeline(str(file)) is None
    assert {event["cat"] for event in json.loads(file.read_text())} >= set(by_kind)


def test_a_file_that_cannot_be_written(ray, tmp_path):
    with pytest.raises(OSError, match="no folder"):
        ray.timeline(str(tmp_path / "no folder" / "file.json"))

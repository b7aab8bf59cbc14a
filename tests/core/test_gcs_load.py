"""GCS-1 in a real session: tasks and actor calls are none of the GCS's business."""

from __future__ import annotations

import time

from hpc_ray.api import ensure_connected
from hpc_ray.config import Settings
from hpc_ray.ids import GCS_ADDRESS

OF_TIME = {"ReportResources", "TimerFired", "Query"}  # come at most so often in a time, whatever runs


def messages(work):
    """What the GCS gets while it is done: events by class; and for how long."""
    ask = ensure_connected().query
    before, begin = ask(GCS_ADDRESS, "statistics")["events"], time.monotonic()
    work()
    seconds = time.monotonic() - begin
    after = ask(GCS_ADDRESS, "statistics")["events"]
    grown = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    return grown, seconds


def test_the_gcs_hears_nothing_of_tasks_and_calls(ray):
    @ray.remote
    def task(value):
        return value

    @ray.remote
    class Actor:
        def method(self, value):
            return value

    actor = Actor.remote()
    ray.get([task.remote(1), actor.method.remote(1)])  # their code is known then, and where the actor is
    for count in (10, 3000):
        grown, seconds = messages(lambda count=count: ray.get([task.remote(i) for i in range(count)]))
        assert set(grown) <= OF_TIME
        assert sum(grown.values()) <= 10 + 3 * seconds / Settings().report_interval_s
        grown, seconds = messages(lambda count=count: ray.get([actor.method.remote(i) for i in range(count)]))
        assert set(grown) <= OF_TIME
        assert sum(grown.values()) <= 10 + 3 * seconds / Settings().report_interval_s

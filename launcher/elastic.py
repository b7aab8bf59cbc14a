"""How many nodes a cluster should have, and which of them can go: the decisions of ``hpc-ray autoscale``.

Pure but for its memory: what is seen and the time go in, what is to be done comes out. ``autoscaling`` looks and does.

ELASTIC-1 (bounds): at any time no more than ``most`` of our jobs wait or run, and never fewer than ``least`` are left by us.
ELASTIC-2 (no flutter): nodes are asked for when what waits has waited for ``wait_s``, and given back after ``idle_s`` without work.
ELASTIC-3 (no storm): jobs that end before their node is up make the next ones rarer, and after ``MOST_FAILURES`` in a row it is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hpc_ray.protocol import NodeInfo, Resources
from hpc_ray.scheduling import NodeView, place_bundles, readable

MOST_FAILURES = 5
_BACK_OFF_S = 5.0  # after a first failure; doubles with each more


@dataclass(frozen=True)
class Limits:
    least: int
    most: int
    wait_s: float = 3.0
    idle_s: float = 60.0


@dataclass
class Demand:
    """What waits for room."""

    tasks: list[tuple[Resources, int]] = field(default_factory=list)  # of tasks and actors: what one needs, how many
    groups: list[dict[str, Any]] = field(default_factory=list)  # placement groups: "bundles" without a place, "strategy", "labels"


@dataclass(frozen=True)
class Node:
    """A living node that a job of ours has brought."""

    index: int
    job: str
    needed_for: str  # "": for nothing
    granted: int  # leases, ever


@dataclass
class Seen:
    demand: Demand
    nodes: list[Node]
    jobs: dict[str, str]  # those of ours that Slurm has: id → state
    shape: Resources  # what a node of such a job has
    others: list[NodeInfo] = field(default_factory=list)  # all nodes that live, for placement groups


@dataclass
class Steps:
    """What is to be done."""

    submit: int = 0  # so many jobs
    cancel: list[str] = field(default_factory=list)  # these, which still wait
    drain: list[Node] = field(default_factory=list)
    say: list[str] = field(default_factory=list)
    over: str = ""  # why there is no use in going on


def nodes_wanted(demand: Demand, shape: Resources, most: int, others: Iterable[NodeInfo] = ()) -> tuple[int, list[Resources]]:
    """How many empty nodes of this shape would hold what waits, at most ``most``; and what does not fit on one of them."""
    too_large: list[Resources] = []
    free: list[Resources] = []  # of the nodes that are wanted so far
    for need, count in sorted(demand.tasks, key=lambda one: -sum(one[0].values())):
        left = count
        if _holds(shape, need) < 1:
            too_large.append(need)
            continue
        for room in free:
            left -= _fill(room, need, left)
        while left > 0 and len(free) < most:
            free.append(dict(shape))
            left -= _fill(free[-1], need, left)
    wanted = len(free)
    for group in demand.groups:
        found = _nodes_for_group(group, shape, most, list(others))
        if found is None:
            too_large += group["bundles"]
        else:
            wanted += found
    return min(wanted, most), too_large


def _holds(room: Resources, need: Resources) -> int:
    """How many of these fit; many, if they need nothing."""
    counts = [room.get(name, 0) // amount for name, amount in need.items() if amount]
    return min(counts) if counts else 1 << 30


def _fill(room: Resources, need: Resources, count: int) -> int:
    count = min(count, _holds(room, need))
    for name, amount in need.items():
        room[name] = room.get(name, 0) - amount * count
    return count


def _nodes_for_group(group: dict[str, Any], shape: Resources, most: int, others: list[NodeInfo]) -> int | None:
    """The fewest that let it be placed beside the nodes that there are; None if even ``most`` do not."""
    bundles = dict(enumerate(group["bundles"]))
    views = [NodeView(info) for info in others]
    for count in range(most + 1):
        new = [NodeView(NodeInfo(b"", 1_000_000 + i, "", "", 0, dict(shape), dict(shape), {})) for i in range(count)]
        labels = dict(enumerate(group["labels"]))
        if place_bundles([*views, *new], bundles, group["strategy"], labels=labels, occupied=frozenset(group["occupied"])) is not None:
            return count
    return None


class Autoscaler:
    """See the module's text. ``decide`` is called every second or two."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._unmet_since: float | None = None
        self._surplus_since: float | None = None
        self._idle_since: dict[int, tuple[int, float]] = {}  # node → leases until then, since when
        self._jobs: dict[str, bool] = {}  # ours: id → whether its node was up
        self._failures = 0
        self._not_before = 0.0
        self._told: list[Resources] = []

    def decide(self, now: float, seen: Seen) -> Steps:
        steps = Steps()
        self._follow_jobs(now, seen, steps)
        up = {node.job for node in seen.nodes}
        coming = [job for job in seen.jobs if not self._jobs[job]]  # others were up, and are at their end
        have = len(up) + len(coming)
        limits = self.limits
        wanted, too_large = nodes_wanted(seen.demand, seen.shape, limits.most, seen.others)
        for need in too_large:
            if need not in self._told:
                self._told.append(need)
                steps.say.append(f"no node of such a job can hold what asks for {readable(need)}; it has {readable(seen.shape)}")
        missing = wanted - len(coming)
        self._unmet_since = None if missing <= 0 else now if self._unmet_since is None else self._unmet_since
        steps.submit = max(0, limits.least - have)
        if self._unmet_since is not None and now - self._unmet_since >= limits.wait_s:
            steps.submit = max(steps.submit, min(missing, limits.most - have))
            self._unmet_since = None
        if now < self._not_before:
            steps.submit = 0
        self._give_back(now, seen, steps, coming, have, -missing)
        return steps

    def submitted(self, job: str) -> None:
        self._jobs[job] = False

    def _follow_jobs(self, now: float, seen: Seen, steps: Steps) -> None:
        up = {node.job for node in seen.nodes}
        for job in seen.jobs:  # those of an earlier run of this command, too
            self._jobs.setdefault(job, False)
        for job in up & self._jobs.keys():
            if not self._jobs[job]:
                self._jobs[job] = True
                self._failures = 0
                self._told.clear()
        for job in [job for job in self._jobs if job not in seen.jobs and job not in up]:
            if not self._jobs.pop(job):
                self._failures += 1
                self._not_before = now + _BACK_OFF_S * 2 ** (self._failures - 1)
                steps.say.append(f"job {job} has ended before its node was up; its output says why")
        if self._failures >= MOST_FAILURES:
            steps.over = f"{self._failures} jobs in a row have ended before their nodes were up"

    def _give_back(self, now: float, seen: Seen, steps: Steps, coming: list[str], have: int, surplus: int) -> None:
        """Jobs that wait and are not needed any more, then nodes without work."""
        limits = self.limits
        spare = min(surplus, have - limits.least)
        waiting = [job for job in coming if seen.jobs[job] == "PENDING"]
        if spare > 0 and waiting:
            self._surplus_since = now if self._surplus_since is None else self._surplus_since
            if now - self._surplus_since >= limits.idle_s:
                steps.cancel = waiting[len(waiting) - min(spare, len(waiting)) :]
                have -= len(steps.cancel)
                for job in steps.cancel:
                    self._jobs.pop(job, None)
        else:
            self._surplus_since = None
        for index in self._idle_since.keys() - {node.index for node in seen.nodes}:
            del self._idle_since[index]
        for node in seen.nodes:
            granted, since = self._idle_since.get(node.index, (-1, now))
            if node.needed_for or node.granted != granted:
                self._idle_since[node.index] = (-1 if node.needed_for else node.granted, now)
            elif now - since >= limits.idle_s and have > limits.least:
                steps.drain.append(node)
                self._idle_since[node.index] = (granted, now)  # if it stays, it may be asked again then
                have -= 1

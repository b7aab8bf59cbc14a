"""Placement groups: bundles of resources set aside on nodes, in two phases. The part of ``GcsState`` that places them.

GROUP-1 (table): a group goes through GROUP_STEPS only; REMOVED is final.
GROUP-2 (two phases): bundles are committed only when all bundles of the attempt were prepared; otherwise all of the
attempt are released. One attempt at a time.
GROUP-3 (all or nothing): while a group is CREATED every bundle has a node that lives.
GROUP-4 (answered): whoever waits for a group is answered when it is CREATED or REMOVED.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import msgspec

from hpc_ray.gcs.part import DEFERRED, Deferred, Part
from hpc_ray.ids import raylet_address
from hpc_ray.machine import Table, handles
from hpc_ray.protocol import (
    Answer,
    BundlesPrepared,
    CommitBundles,
    GroupRemoved,
    PrepareBundles,
    ReleaseBundles,
    Resources,
)
from hpc_ray.scheduling import INFEASIBLE_S, infeasible, place_bundles, readable

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
MAX_REMOVED_GROUPS = 10_000
PREPARE_RETRY_S = 0.05  # after a raylet could not prepare


class GroupState(enum.IntEnum):
    PENDING = 0  # no bundle has a node
    PREPARING = 1  # an attempt is under way
    CREATED = 2
    RESCHEDULING = 3  # bundles were lost with their node, and wait for a new one
    REMOVED = 4


GROUP_STEPS = Table(
    "placement group",
    {
        GroupState.PENDING: {GroupState.PREPARING, GroupState.REMOVED},
        GroupState.PREPARING: {
            GroupState.PENDING,
            GroupState.CREATED,
            GroupState.RESCHEDULING,
            GroupState.REMOVED,
        },
        GroupState.CREATED: {GroupState.RESCHEDULING, GroupState.REMOVED},
        GroupState.RESCHEDULING: {GroupState.PREPARING, GroupState.REMOVED},
        GroupState.REMOVED: (),
    },
)


class Group(msgspec.Struct):
    """As journalled."""

    group_id: bytes
    bundles: list[Resources]
    strategy: str
    name: str
    namespace: str
    detached: bool
    job_id: bytes
    labels: list[dict[str, Any]]
    creator: int
    state: GroupState = GroupState.PENDING
    attempt: int = 0
    nodes: dict[int, int] = {}  # bundle → node, once committed
    created_before: bool = False  # what it falls back to: RESCHEDULING rather than PENDING
    owned: bool = False  # it goes with its creator


class Attempt:
    """A first phase under way; not journalled, a restarted GCS begins anew."""

    def __init__(self, placed: dict[int, int]):
        self.placed = placed
        self.waiting = set(placed.values())  # nodes that have not answered
        self.failed = False


class Groups(Part):
    """See the module's text."""

    def init_groups(self) -> None:
        self.groups: dict[bytes, Group] = {}
        self.group_names: dict[tuple[str, str], bytes] = {}
        self.waiting_groups: dict[bytes, None] = {}
        self.owned_groups: dict[bytes, None] = {}
        self._warned_groups: set[bytes] = set()  # waiting ones whose maker knows that they can never fit
        self.removed_group_ids: dict[bytes, None] = {}
        self._attempts: dict[bytes, Attempt] = {}
        self._waiters: dict[bytes, dict[tuple[int, int], None]] = {}
        self._group_retry_at: dict[bytes, float] = {}

    def group_is_gone(self, group_id: bytes) -> bool:
        group = self.groups.get(group_id)
        return group is None or group.state is GroupState.REMOVED

    # -- questions that change something

    def query_create_placement_group(
        self,
        group_id: bytes,
        bundles: list[Resources],
        strategy: str = "PACK",
        name: str = "",
        namespace: str = "",
        detached: bool = False,
        job_id: bytes = b"",
        labels: list[dict[str, Any]] | None = None,
        owned: bool = False,
    ) -> None:
        """Amounts in 1/UNIT; ``labels``: one selector for each bundle, or none. An ``owned`` group goes with the process that asks, and
        may have bundles of nothing: places on nodes."""
        if strategy not in STRATEGIES:
            raise ValueError(f"no placement strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
        if not bundles or (not owned and any(not any(bundle.values()) for bundle in bundles)):
            raise ValueError(f"a placement group needs bundles that are not empty, not {bundles}")
        if group_id in self.groups:
            return
        if name:
            if (namespace, name) in self.group_names:
                raise ValueError(f"the placement group name {name!r} is taken in namespace {namespace!r}")
            self.group_names[namespace, name] = group_id
        creator = self.asker[0]
        group = Group(group_id, bundles, strategy, name, namespace, detached, job_id, labels or [], creator, owned=owned)
        self.groups[group_id] = group
        self.waiting_groups[group_id] = None
        if owned:
            self.owned_groups[group_id] = None
        self._save_group(group, f"asked for: {strategy}, {len(bundles)} bundles")
        if not self.stopping:
            self._try(group)  # for the others nothing has changed

    def query_remove_placement_group(self, group_id: bytes) -> None:
        group = self.groups.get(group_id)
        if group is not None:
            self.remove_group(group)

    def waiting_for_groups(self) -> list[dict[str, Any]]:
        """Placement groups that wait: their bundles without a place."""
        found = []
        for group_id in self.waiting_groups:
            group = self.groups[group_id]
            missing = [i for i in range(len(group.bundles)) if i not in group.nodes]
            found.append(
                {
                    "bundles": [group.bundles[i] for i in missing],
                    "labels": [group.labels[i] if i < len(group.labels) else {} for i in missing],
                    "strategy": group.strategy,
                    "occupied": sorted(set(group.nodes.values())),
                }
            )
        return found

    def query_wait_placement_group(self, group_id: bytes) -> str | Deferred:
        """Answered with the state's name once that is CREATED or REMOVED (GROUP-4)."""
        group = self.groups.get(group_id)
        if group is None:
            return "REMOVED"
        if group.state in (GroupState.CREATED, GroupState.REMOVED):
            return group.state.name
        self._waiters.setdefault(group_id, {})[self.asker] = None
        return DEFERRED

    def query_get_placement_group(self, name: str, namespace: str = "") -> dict[str, Any] | None:
        group_id = self.group_names.get((namespace, name))
        return None if group_id is None else self._group_row(self.groups[group_id])

    def query_placement_group_table(self, group_id: bytes = b"") -> Any:
        """One row, or None; all of them without an id."""
        if group_id:
            group = self.groups.get(group_id)
            return None if group is None else self._group_row(group)
        return [self._group_row(group) for group in self.groups.values()]

    def _group_row(self, group: Group) -> dict[str, Any]:
        preparing = GroupState.RESCHEDULING if group.created_before else GroupState.PENDING
        state = preparing if group.state is GroupState.PREPARING else group.state
        nodes = [self.views[group.nodes[i]].node_id if i in group.nodes else b"" for i in range(len(group.bundles))]
        return {
            "group_id": group.group_id,
            "name": group.name,
            "namespace": group.namespace,
            "bundles": group.bundles,
            "strategy": group.strategy,
            "state": state.name,
            "nodes": nodes,
            "detached": group.detached,
            "job_id": group.job_id,
            "attempts": group.attempt,
            "labels": group.labels,
        }

    # -- placing (GROUP-2)

    def place_groups(self) -> None:
        for group_id in list(self.waiting_groups):
            if self._group_retry_at.get(group_id, 0.0) <= self.now:
                self._try(self.groups[group_id])

    def _try(self, group: Group) -> None:
        missing = {i: bundle for i, bundle in enumerate(group.bundles) if i not in group.nodes}
        placed = place_bundles(
            self.views.values(),
            missing,
            group.strategy,
            labels=dict(enumerate(group.labels)),
            occupied=frozenset(group.nodes.values()),
            prefer=group.creator >> 48,
        )
        if placed is None:
            if group.group_id not in self._warned_groups:
                self.set_timer("infeasible_groups", self.now + INFEASIBLE_S)
            return
        self._warned_groups.discard(group.group_id)
        del self.waiting_groups[group.group_id]
        self._group_retry_at.pop(group.group_id, None)
        group.attempt += 1
        self._attempts[group.group_id] = Attempt(placed)
        self._step_group(group, GroupState.PREPARING, "room found")
        self._save_group(group, f"attempt {group.attempt}: {placed}")
        for node in sorted(set(placed.values())):
            mine = {i: group.bundles[i] for i, where in placed.items() if where == node}
            for bundle in mine.values():
                self.take(node, bundle)
            self.send(raylet_address(node), PrepareBundles(group.group_id, group.attempt, mine))

    def timer_infeasible_groups(self) -> None:
        """Tell whoever made a group, once, that it would not fit even if all nodes were empty."""
        self._warned_groups &= self.waiting_groups.keys()
        empty = [view.emptied() for view in self.views.values()]
        for group_id in self.waiting_groups:
            group = self.groups[group_id]
            if group_id in self._warned_groups:
                continue
            if place_bundles(empty, dict(enumerate(group.bundles)), group.strategy, labels=dict(enumerate(group.labels))) is None:
                self._warned_groups.add(group_id)
                bundles = ", ".join(readable(bundle) for bundle in group.bundles[:8]) + (", …" if len(group.bundles) > 8 else "")
                asks = f"a placement group asks for {bundles} (strategy {group.strategy})"
                self.send(group.creator, infeasible(self.views.values(), asks, group.job_id))

    @handles(BundlesPrepared)
    def on_bundles_prepared(self, event: BundlesPrepared, source: int) -> None:
        group = self.groups.get(event.group_id)
        attempt = self._attempts.get(event.group_id)
        if group is None or attempt is None or group.attempt != event.attempt:
            return  # given up meanwhile, and released then
        attempt.waiting.discard(event.node)
        attempt.failed |= not event.ok
        if not attempt.waiting:
            self._conclude(group, attempt)

    def _conclude(self, group: Group, attempt: Attempt) -> None:
        del self._attempts[group.group_id]
        if attempt.failed:
            self._release(group, attempt)
            self._back(group, "could not be prepared")
            self._group_retry_at[group.group_id] = self.now + PREPARE_RETRY_S
            self.set_timer("groups", self.now + PREPARE_RETRY_S)
            return
        group.nodes = {**group.nodes, **attempt.placed}
        group.created_before = True
        lost = [i for i, node in group.nodes.items() if not self.views[node].alive]
        for node in sorted(set(attempt.placed.values())):
            self.send(raylet_address(node), CommitBundles(group.group_id, group.attempt))
        if lost:  # a node of an earlier attempt died meanwhile
            for index in lost:
                del group.nodes[index]
            self._back(group, "lost bundles meanwhile")
            return
        self._step_group(group, GroupState.CREATED, "all prepared")
        self._save_group(group, "created")
        self._answer_waiters(group)
        self.view_changed = True

    def timer_groups(self) -> None:
        self.view_changed = True
        later = [at for at in self._group_retry_at.values() if at > self.now]
        if later:
            self.set_timer("groups", min(later))

    def _release(self, group: Group, attempt: Attempt) -> None:
        for node in sorted(set(attempt.placed.values())):
            if self.views[node].alive:
                self.send(raylet_address(node), ReleaseBundles(group.group_id, group.attempt, False))

    def _back(self, group: Group, text: str) -> None:
        self._step_group(group, GroupState.RESCHEDULING if group.created_before else GroupState.PENDING, text)
        self._save_group(group, text)
        self.waiting_groups[group.group_id] = None
        self.view_changed = True

    # -- ends

    def groups_lose_node(self, node: int) -> None:
        """Bundles there are gone; they get a new place (GROUP-3)."""
        for group in list(self.groups.values()):
            attempt = self._attempts.get(group.group_id)
            if attempt is not None and node in attempt.placed.values():
                attempt.failed = True
                attempt.waiting.discard(node)
                if not attempt.waiting:
                    self._conclude(group, attempt)
            lost = [i for i, where in group.nodes.items() if where == node]
            if not lost or group.state is GroupState.REMOVED:
                continue
            for index in lost:
                del group.nodes[index]
            if group.state is GroupState.CREATED:
                self._back(group, f"node {node} died with bundles {lost}")
            else:
                self._save_group(group, f"node {node} died with bundles {lost}")

    def remove_group(self, group: Group) -> None:
        if group.state is GroupState.REMOVED:
            return
        nodes = set(group.nodes.values())
        attempt = self._attempts.pop(group.group_id, None)
        if attempt is not None:
            nodes |= set(attempt.placed.values())
        self._step_group(group, GroupState.REMOVED, "removed")
        self._save_group(group, "removed")
        self.waiting_groups.pop(group.group_id, None)
        self._group_retry_at.pop(group.group_id, None)
        if self.group_names.get((group.namespace, group.name)) == group.group_id:
            del self.group_names[group.namespace, group.name]
        for node in sorted(nodes):
            if self.views[node].alive:
                self.send(raylet_address(node), ReleaseBundles(group.group_id, -1))
        self.tell_raylets(GroupRemoved(group.group_id))
        self.end_actors_of_group(group.group_id)
        self._answer_waiters(group)
        if group.owned:  # nobody asks for it any more
            del self.owned_groups[group.group_id], self.groups[group.group_id]
            self.journal("group", group.group_id, None)
            return
        self.removed_group_ids[group.group_id] = None
        if len(self.removed_group_ids) > MAX_REMOVED_GROUPS:
            oldest = next(iter(self.removed_group_ids))
            del self.removed_group_ids[oldest], self.groups[oldest]
            self.journal("group", oldest, None)

    def remove_groups_of_job(self, job_id: bytes) -> None:
        for group in list(self.groups.values()):
            if group.job_id == job_id and not group.detached:
                self.remove_group(group)

    def remove_groups_of_owner(self, gone: Callable[[int], bool]) -> None:
        for group_id in list(self.owned_groups):
            if gone(self.groups[group_id].creator):
                self.remove_group(self.groups[group_id])

    def _answer_waiters(self, group: Group) -> None:
        for source, request_id in self._waiters.pop(group.group_id, {}):
            self.send(source, Answer(request_id, group.state.name))

    def drop_group_waiter(self, gone: Any) -> None:
        for group_id, waiters in list(self._waiters.items()):
            for key in [key for key in waiters if gone(key[0])]:
                del waiters[key]
            if not waiters:
                del self._waiters[group_id]

    # -- common

    def _save_group(self, group: Group, text: str) -> None:
        self.history.add(group.group_id.hex(), self.now, text)
        self.journal("group", group.group_id, group)

    def _step_group(self, group: Group, end: GroupState, event: str) -> None:
        GROUP_STEPS.check(group.group_id.hex(), group.state, end, event, self.history)
        group.state = end

    def restore_group(self, group: Group) -> None:
        self.groups[group.group_id] = group
        if group.state is GroupState.REMOVED:
            self.removed_group_ids[group.group_id] = None
            return
        if group.name:
            self.group_names[group.namespace, group.name] = group.group_id
        if group.owned:
            self.owned_groups[group.group_id] = None
        if group.state in (GroupState.PENDING, GroupState.RESCHEDULING):
            self.waiting_groups[group.group_id] = None

    def resume_groups(self) -> None:
        """No node of the former session lives: detached groups are placed anew, the others are removed."""
        for group in list(self.groups.values()):
            if group.state is GroupState.REMOVED:
                continue
            group.nodes = {}
            if not group.detached:
                self.remove_group(group)
            elif group.state in (GroupState.CREATED, GroupState.PREPARING):
                self._back(group, "resumed from the journal")
            else:
                self._save_group(group, "resumed from the journal")

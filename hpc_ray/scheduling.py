"""Which node: the rules that the raylets (spillback) and the GCS (actors, placement groups) share. Pure functions.

Relies on ``protocol``; called by ``raylet.state`` and ``gcs.state``, which never import one another.

SCHED-1 (hard means hard): no choice ever breaks a hard label, a hard node affinity or a node's total.
SCHED-2 (same answer): equal arguments give equal choices; ties go to the preferred node, then to the one that follows
it by index, and so on round: so the raylets of a large session do not all spill to the same node.
"""

from __future__ import annotations

import bisect
import copy
import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hpc_ray.protocol import UNIT, LogLines, NodeInfo, Resources, Strategy

INFEASIBLE_S = 3.0  # before an owner is told that no node can ever meet its request
PACK_UNTIL = 0.5  # Ray's hybrid policy: stay local up to this utilisation, then the least used node
ANYWHERE = ("DEFAULT", "SPREAD")  # kinds of strategies that take any node
FANOUT = 16  # of what is passed on from node to node
_MOST_NODES = 1 << 16
_MARK = "bundle_group_"  # how the names of the marks of bundles, and of their groups, begin
_CRITICAL = ("CPU", "memory", "object_store_memory")  # what utilisation is measured by (Ray's choice, too)


class Search:
    """Where ``choose`` goes on for one demand. As long as ``version`` stays, the nodes only fill up: those that had no room have
    none, and need not be looked at again for each of a thousand units."""

    __slots__ = ("full", "gains", "start", "version")

    def __init__(self) -> None:
        self.version = self.gains = -1
        self.start = 0  # among the nodes in their order from the preferred one: so many are not below PACK_UNTIL any more
        self.full = False  # no node has room

    def at(self, version: int, gains: int = 0) -> Search:
        """``gains``: how often the caller's own node, which it looks at itself before, has got room."""
        if version != self.version:
            self.start = 0
        if version != self.version or gains != self.gains:
            self.full = False
        self.version, self.gains = version, gains
        return self


def branches(nodes: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Whom to tell what all shall hear, and whom each of those shall tell in turn."""
    size = -(-len(nodes) // FANOUT) or 1
    for start in range(0, len(nodes), size):
        yield nodes[start], nodes[start + 1 : start + size]


class Verdict(enum.Enum):
    AVAILABLE = 0  # the node has room now
    FEASIBLE = 1  # no node has room now; this one can have
    NOWHERE = 2  # no node of today can; another one might join
    IMPOSSIBLE = 3  # hard affinity to a node that is dead


class Choice(NamedTuple):
    verdict: Verdict
    node: int = -1


class NodeView:
    """A node as seen from elsewhere. ``available`` is a private copy: its holder subtracts what it sent there."""

    __slots__ = ("alive", "available", "bundles", "index", "labels", "node_id", "number", "pending", "reported", "total")

    def __init__(self, info: NodeInfo):
        self.index = info.index
        self.node_id = info.node_id
        self.alive = info.alive
        self.available: Resources = {}
        self.total: Resources = {}
        self.bundles: GroupBundles | None = None  # once somebody has asked for any of a group
        self.number = 0  # of the ClusterView that said so last
        self.update(info)

    def update(self, info: NodeInfo) -> bool:
        """Its latest word; whether it may have room now that it had not."""
        before = self.available
        if self.bundles is not None and info.total.keys() != self.total.keys():
            self.bundles = None
        self.total = info.total
        self.available = dict(info.available)
        self.reported = info.available  # without what ``take`` has taken since
        self.labels = info.labels
        self.pending = info.pending
        return any(amount > before.get(name, 0) for name, amount in self.available.items())

    def fits(self, demand: Resources) -> bool:
        return self._cover(self.available, demand)

    def feasible(self, demand: Resources) -> bool:
        return self._cover(self.total, demand)

    def _cover(self, amounts: Resources, demand: Resources) -> bool:
        grouped = False
        for name, amount in demand.items():
            if amount:
                if amount > amounts.get(name, 0):
                    return False
                grouped = grouped or "_group_" in name
        if not grouped:
            return True
        if self.bundles is None:
            self.bundles = GroupBundles(self.total)
        choices = self.bundles.choices(amounts, demand)
        return choices is None or next(choices, None) is not None

    def take(self, demand: Resources) -> None:
        for name, amount in demand.items():
            self.available[name] = self.available.get(name, 0) - amount

    def forget_takes(self) -> None:
        """Back to what the node said last: what was taken in expectation has come and gone, or was never used."""
        self.available = dict(self.reported)

    def give(self, demand: Resources) -> None:
        for name, amount in demand.items():
            self.available[name] = min(self.total.get(name, 0), self.available.get(name, 0) + amount)

    def emptied(self) -> NodeView:
        """A copy on which nothing runs."""
        found = copy.copy(self)
        found.available = dict(self.total)
        return found

    def utilisation(self) -> float:
        return utilisation(self.total, self.available)


class GroupBundles:
    """The bundles of placement groups on a node. Those that had no room when they were looked at are last, until something of theirs
    comes back: the first one that has room is found at once, however many there are."""

    __slots__ = ("_groups",)

    def __init__(self, names: Iterable[str] = ()):
        """``names``: the node's resources."""
        self._groups: dict[str, OrderedDict[str, None]] = {}  # group → its bundles, as 3_<group>
        for name in names:
            self.add(name)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, name: str) -> None:
        """The node has this resource: a bundle if it is a bundle's mark."""
        bundle, group = _bundle_of(name)
        if group:
            self._groups.setdefault(group, OrderedDict())[bundle] = None

    def remove(self, name: str) -> None:
        bundle, group = _bundle_of(name)
        if group in self._groups:
            del self._groups[group][bundle]
            if not self._groups[group]:
                del self._groups[group]

    def freed(self, names: Iterable[str]) -> None:
        """Something of these resources has come back."""
        for name in names:
            bundle, group = _bundle_of(name)
            if group in self._groups:
                self._groups[group].move_to_end(bundle, last=False)

    def choices(self, amounts: Resources, demand: Resources) -> Iterator[Resources] | None:
        """What a demand that may go to any bundle of a group comes to in each bundle that has enough in these ``amounts`` of the node:
        it takes from the group and from that bundle (RES-5). None for every other demand."""
        group = ""
        for name in demand:
            found = name.partition("_group_")[2] if "_group_" in name else ""
            if found in self._groups:
                group = found
            elif found and _MARK + found in amounts:  # not a resource that is only called like that
                return None  # its bundle is given
        return self._choices(amounts, demand, group) if group else None

    def _choices(self, amounts: Resources, demand: Resources, group: str) -> Iterator[Resources]:
        any_bundle, bundles = f"_group_{group}", self._groups[group]
        asked = [(name.removesuffix(group), amount) for name, amount in demand.items() if amount and name.endswith(any_bundle)]
        for _ in range(len(bundles)):
            bundle = next(iter(bundles))
            if all(amounts.get(start + bundle, 0) >= amount for start, amount in asked):
                yield {**demand, **{start + bundle: amount for start, amount in asked}}
            bundles.move_to_end(bundle)


def _bundle_of(name: str) -> tuple[str, str]:
    """The bundle and the group of a bundle's mark: bundle_group_3_ab → 3_ab, ab. Nothing of other resources."""
    if not name.startswith(_MARK):
        return "", ""
    bundle = name.removeprefix(_MARK)
    return bundle, bundle.partition("_")[2]


def utilisation(total: Resources, available: Resources) -> float:
    """The share in use of the critical resource used most, 0 … 1."""
    most = 0.0
    for name in _CRITICAL:
        amount = total.get(name, 0)
        if amount:
            most = max(most, 1.0 - available.get(name, 0) / amount)
    return most


# ------------------------------------------------------------------ what is told


def readable(amounts: Resources) -> str:
    return "{" + ", ".join(f"{name}: {amount / UNIT:g}" for name, amount in sorted(amounts.items())) + "}"


def infeasible(nodes: Iterable[NodeView], asks: str, job_id: bytes) -> LogLines:
    """The warning for whoever ``asks`` ("an actor asks for …") what no node of today can ever meet."""
    most: Resources = {}
    for node in nodes:
        if node.alive:
            for name, amount in node.total.items():
                if "_group_" not in name and not name.startswith("node:"):
                    most[name] = max(most.get(name, 0), amount)
    text = f"Warning: {asks}, which no node of this session can ever meet; the most that a node has: {readable(most)}. "
    return LogLines(0, "raylet", "", job_id, True, [text + "It waits for a node that can."])


# ------------------------------------------------------------------ labels


def _condition(wanted: Any) -> tuple[str, list[str]]:
    """From any form in use: ``["in", [...]]``, ``"v"``, ``"!v"``, ``"in(a,b)"``, ``"!in(a,b)"``."""
    if isinstance(wanted, str):
        negated = wanted.startswith("!")
        text = wanted[1:] if negated else wanted
        if text.startswith("in(") and text.endswith(")"):
            values = [part.strip() for part in text[3:-1].split(",")]
        else:
            values = [text]
        return ("notin" if negated else "in"), values
    if isinstance(wanted, Mapping):
        [(operator, values)] = wanted.items()
    elif len(wanted) == 1:
        operator, values = wanted[0], []
    else:
        operator, values = wanted[0], wanted[1]
    return operator.lower().replace("_", "").replace(" ", ""), [values] if isinstance(values, str) else list(values)


def matches(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """Does a node with these labels satisfy every condition?"""
    for key, wanted in selector.items():
        operator, values = _condition(wanted)
        present = key in labels
        if operator == "in":
            good = present and labels[key] in values
        elif operator == "notin":
            good = not present or labels[key] not in values
        elif operator == "exists":
            good = present
        elif operator == "doesnotexist":
            good = not present
        else:
            raise ValueError(f"unknown label operator {operator!r}; there are In, NotIn, Exists, DoesNotExist")
        if not good:
            return False
    return True


# ------------------------------------------------------------------ one demand


def choose(
    nodes: Iterable[NodeView],
    demand: Resources,
    strategy: Strategy,
    *,
    prefer: int = -1,
    turn: int = 0,
    search: Search | None = None,
) -> Choice:
    """Where a task or actor should go.

    Args:
        nodes: all that are known, dead ones included; with ``search`` a list of those that live, by index.
        demand: what it needs to be placed.
        prefer: index of the node that wins ties: the caller's own, or the owner's.
        turn: for SPREAD, a counter of the caller.
        search: of the caller's earlier choices for the same arguments but ``turn``. It makes no difference to the choice.
    """
    if search is None or not isinstance(nodes, list):
        candidates = [node for node in nodes if node.alive]
    else:
        candidates = nodes
        if strategy.kind == "SPREAD":
            return _spread(candidates, demand, turn, search)
        if strategy.kind == "DEFAULT" and (found := _first_below(candidates, demand, prefer, search)) is not None:
            return found
    if strategy.kind == "NODE":
        target = next((node for node in candidates if node.node_id == strategy.node_id), None)
        if target is not None and target.feasible(demand):
            return Choice(Verdict.AVAILABLE if target.fits(demand) else Verdict.FEASIBLE, target.index)
        if not strategy.soft:
            return Choice(Verdict.IMPOSSIBLE if target is None else Verdict.NOWHERE)
    elif strategy.kind == "LABELS":
        return _labelled(candidates, demand, strategy, prefer)
    elif strategy.kind == "SPREAD":
        return _spread(sorted(candidates, key=_index), demand, turn)
    return _pick(candidates, demand, prefer)


def _labelled(nodes: list[NodeView], demand: Resources, strategy: Strategy, prefer: int) -> Choice:
    """The first conditions that are met somewhere now, or else somewhere once there is room."""
    later = Choice(Verdict.NOWHERE)
    for conditions in (strategy.hard_labels, *strategy.fallbacks):
        candidates = [node for node in nodes if matches(node.labels, conditions)]
        liked = [node for node in candidates if matches(node.labels, strategy.soft_labels)]
        for group in (liked, candidates) if strategy.soft_labels else (candidates,):
            choice = _pick(group, demand, prefer)
            if choice.verdict is Verdict.AVAILABLE:
                return choice
            if later.verdict is Verdict.NOWHERE and group is candidates:
                later = choice
    return later


def _pick(candidates: list[NodeView], demand: Resources, prefer: int) -> Choice:
    """Ray's hybrid policy: below PACK_UNTIL all nodes are alike and the preferred one wins; above, the least used."""
    best: tuple[float, int, int] | None = None
    fallback: tuple[int, float, int, int] | None = None
    for node in candidates:
        if node.fits(demand):
            used = node.utilisation()
            key = (used if used >= PACK_UNTIL else 0.0, (node.index - prefer) % _MOST_NODES, node.index)
            if best is None or key < best:
                best = key
        elif best is None and node.feasible(demand):
            rank = (len(node.pending), node.utilisation(), (node.index - prefer) % _MOST_NODES, node.index)
            if fallback is None or rank < fallback:
                fallback = rank
    if best is not None:
        return Choice(Verdict.AVAILABLE, best[-1])
    if fallback is not None:
        return Choice(Verdict.FEASIBLE, fallback[-1])
    return Choice(Verdict.NOWHERE)


def _first_below(nodes: list[NodeView], demand: Resources, prefer: int, search: Search) -> Choice | None:
    """What ``_pick`` would choose if a node is below PACK_UNTIL: the first of those in the order from the preferred one."""
    count = len(nodes)
    first = bisect.bisect_left(nodes, prefer, key=_index) if prefer >= 0 else 0
    while search.start < count:
        node = nodes[(first + search.start) % count]
        if node.fits(demand) and node.utilisation() < PACK_UNTIL:
            return Choice(Verdict.AVAILABLE, node.index)
        search.start += 1
    return None


def _index(node: NodeView) -> int:
    return node.index


def _spread(nodes: list[NodeView], demand: Resources, turn: int, search: Search | None = None) -> Choice:
    """Round the nodes, in the order of their indices."""
    full = search is not None and search.full
    for verdict, good in ((Verdict.AVAILABLE, NodeView.fits), (Verdict.FEASIBLE, NodeView.feasible)):
        if full and verdict is Verdict.AVAILABLE:
            continue
        for step in range(len(nodes)):
            node = nodes[(turn + step) % len(nodes)]
            if good(node, demand):
                return Choice(verdict, node.index)
        if search is not None:
            search.full = True
    return Choice(Verdict.NOWHERE)


# ------------------------------------------------------------------ placement groups


class _Room:
    """What is still free while bundles are being laid out; works on copies."""

    def __init__(
        self,
        views: list[NodeView],
        bundles: Mapping[int, Resources],
        labels: Mapping[int, Mapping[str, Any]],
    ):
        self.nodes = {view.index: view for view in views}
        self._free = {view.index: dict(view.available) for view in views}
        self._bundles = bundles
        self._labels = labels

    def fits(self, node: int, number: int) -> bool:
        free = self._free[node]
        wanted = self._labels.get(number)
        if wanted and not matches(self.nodes[node].labels, wanted):
            return False
        return all(free.get(name, 0) >= amount for name, amount in self._bundles[number].items() if amount)

    def take(self, node: int, number: int) -> None:
        free = self._free[node]
        for name, amount in self._bundles[number].items():
            free[name] = free.get(name, 0) - amount

    def together(self, node: int, numbers: list[int]) -> list[int]:
        """Which of the bundles fit on the node at once; takes nothing."""
        saved = dict(self._free[node])
        taken = []
        for number in numbers:
            if self.fits(node, number):
                self.take(node, number)
                taken.append(number)
        self._free[node] = saved
        return taken


def place_bundles(
    nodes: Iterable[NodeView],
    bundles: Mapping[int, Resources],
    strategy: str,
    *,
    labels: Mapping[int, Mapping[str, Any]] | None = None,
    occupied: frozenset[int] = frozenset(),
    prefer: int = -1,
) -> dict[int, int] | None:
    """Bundle index → node index, or None while there is no room. Largest bundles are placed first.

    Args:
        occupied: nodes that hold other bundles of the group already (when lost ones are placed anew).
    """
    views = sorted((node for node in nodes if node.alive), key=lambda node: (node.index != prefer, node.index))
    room = _Room(views, bundles, labels or {})
    order = sorted(bundles, key=lambda number: (-sum(bundles[number].values()), number))
    if strategy == "STRICT_PACK":
        targets = [index for index in room.nodes if not occupied or index in occupied]
        for index in targets:
            if len(room.together(index, order)) == len(order):
                return dict.fromkeys(order, index)
        return None
    if strategy == "PACK":
        return _pack(room, order, occupied)
    return _spread_bundles(room, order, occupied, strict=strategy == "STRICT_SPREAD")


def _pack(room: _Room, order: list[int], occupied: frozenset[int]) -> dict[int, int] | None:
    """Few nodes: fill the one that holds most of what is left, nodes of the group first, then the next."""
    placed: dict[int, int] = {}
    targets = sorted(room.nodes, key=lambda index: index not in occupied)  # stable: preferred first among equals
    left = order
    while left:
        best: list[int] = []
        where = -1
        for index in targets:
            here = room.together(index, left)
            if len(here) > len(best):
                best, where = here, index
                if len(best) == len(left):
                    break
        if not best:
            return None
        for number in best:
            room.take(where, number)
            placed[number] = where
        targets.remove(where)
        left = [number for number in left if number not in placed]
    return placed


def _spread_bundles(room: _Room, order: list[int], occupied: frozenset[int], *, strict: bool) -> dict[int, int] | None:
    """A node each as long as there are nodes; with ``strict`` never two on one."""
    load = dict.fromkeys(occupied, 1)
    used = {index: view.utilisation() for index, view in room.nodes.items()}
    placed: dict[int, int] = {}
    for number in order:
        options = [index for index in room.nodes if not (strict and load.get(index, 0)) and room.fits(index, number)]
        if not options:
            return None
        chosen = min(options, key=lambda index: (load.get(index, 0), used[index], index))
        room.take(chosen, number)
        load[chosen] = load.get(chosen, 0) + 1
        placed[number] = chosen
    return placed

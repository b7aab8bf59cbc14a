"""The resources of one node: amounts, and for accelerators also which of them. Pure; called by ``raylet.state`` only.

RES-1 (conservation): for each resource, available + granted = total; available may be negative only by ``retake``.
RES-2 (per instance): the same for each accelerator, and its sum over the instances is the resource's amount.
RES-3 (whole or part): a demand of one accelerator or more gets whole ones; a smaller one lies within a single one.
RES-4 (groups): names of a placement group appear with its bundles and vanish once nobody uses them any more.
RES-5 (one room, two names): a group's ``CPU_group_<group>`` is the sum of its bundles' ``CPU_group_<i>_<group>``, also of what is
available and per instance: each grant in the group takes both names, and lies in one bundle.
"""

from __future__ import annotations

from collections.abc import Callable

from hpc_ray.protocol import UNIT, Resources
from hpc_ray.scheduling import GroupBundles

ACCELERATORS = frozenset({"GPU", "TPU", "NPU", "HPU", "FPGA", "neuron_cores", "RBLN", "FURIOSA"})
BUNDLE_UNITS = 1000 * UNIT  # of the marker ``bundle_group_…``, as in Ray

Instances = dict[str, list[list[int]]]  # name → [[index, amount], …]


def base_name(name: str) -> str:
    """``GPU_group_0_ab…`` → ``GPU``."""
    return name.split("_group_", 1)[0]


def bundle_names(bundle: Resources, group_id: bytes, index: int) -> Resources:
    """The resources that a committed bundle adds to its node."""
    group = group_id.hex()
    names: Resources = {}
    for name, amount in {**bundle, "bundle": BUNDLE_UNITS}.items():
        names[f"{name}_group_{index}_{group}"] = amount
        names[f"{name}_group_{group}"] = amount
    return names


class Grant:
    """What one holder has. ``parked`` is the part given back for a while (a blocked worker's CPUs)."""

    __slots__ = ("amounts", "instances", "parked")

    def __init__(self, amounts: Resources, instances: Instances):
        self.amounts = amounts
        self.instances = instances
        self.parked: Resources = {}

    def visible_instances(self) -> Instances:
        """Under plain names, as the worker wants them."""
        seen: Instances = {}
        for name, picked in self.instances.items():
            seen.setdefault(base_name(name), picked)
        return seen


class ResourcePool:
    """Grants and takes back. Every amount is an integer in 1/UNIT."""

    def __init__(self, total: Resources):
        self.total: Resources = {}
        self.available: Resources = {}
        self.gains = 0  # how often something may have become free
        self._capacity: dict[str, dict[int, int]] = {}
        self._free: dict[str, dict[int, int]] = {}
        self._bundles = GroupBundles()  # without any, demands are taken as they are
        self.add(total)

    # -- the node's total

    def add(self, names: Resources, instances: Instances | None = None) -> None:
        """More of these. ``instances`` says which accelerators; without it, they are 0, 1, … each of one UNIT."""
        self.gains += 1
        for name, amount in names.items():
            self.total[name] = self.total.get(name, 0) + amount
            self.available[name] = self.available.get(name, 0) + amount
            self._bundles.add(name)
            if base_name(name) in ACCELERATORS:
                capacity = self._capacity.setdefault(name, {})
                free = self._free.setdefault(name, {})
                for index, part in (instances or {}).get(base_name(name)) or _whole(amount):
                    capacity[index] = capacity.get(index, 0) + part
                    free[index] = free.get(index, 0) + part

    def remove(self, names: Resources, instances: Instances | None = None) -> None:
        """Less of these; they must not be granted (RES-4)."""
        for name, amount in names.items():
            self.total[name] -= amount
            self.available[name] -= amount
            if name in self._capacity:
                for index, part in (instances or {}).get(base_name(name)) or _whole(amount):
                    for table in (self._capacity[name], self._free[name]):
                        table[index] -= part
                        if not table[index]:
                            del table[index]
            if not self.total[name]:
                del self.total[name], self.available[name]
                self._capacity.pop(name, None)
                self._free.pop(name, None)
                self._bundles.remove(name)

    def change_total(self, target: Resources) -> None:
        """Have these totals from now on, apart from those of placement groups. What is granted stays so: where less is left
        than that, nothing is free until enough has come back. Accelerators that are granted do not go."""
        for name in {*self.total, *target}:
            if name != base_name(name) or name.startswith("bundle"):
                continue
            wanted, now = target.get(name, 0), self.total.get(name, 0)
            if self._free.get(name) != self._capacity.get(name):
                continue
            if self.available.get(name, 0) == now:
                self.remove({name: now} if now else {})
                self.add({name: wanted} if wanted else {})
            else:  # part of it is granted
                self.total[name] = wanted
                self.available[name] += wanted - now
                self.gains += 1

    # -- questions

    def feasible(self, demand: Resources) -> bool:
        """Could it be granted if nothing else were?"""
        for name, amount in demand.items():
            if amount > self.total.get(name, 0):
                return False
            if amount and name in self._capacity and not _pick(self._capacity[name], self._capacity[name], amount):
                return False
        return not self._bundles or self._as_taken(demand, self.total, self.feasible) is not None

    def fits(self, demand: Resources) -> bool:
        """Can it be granted now?"""
        for name, amount in demand.items():
            if amount and amount > self.available.get(name, 0):
                return False
            if amount and name in self._free and not _pick(self._free[name], self._capacity[name], amount):
                return False
        return not self._bundles or self._as_taken(demand, self.available, self.fits) is not None

    def _as_taken(self, demand: Resources, amounts: Resources, has_room: Callable[[Resources], bool]) -> Resources | None:
        """What a grant takes: the demand, and that of the first bundle with room if any will do (RES-5); None if none has room."""
        choices = self._bundles.choices(amounts, demand)
        return demand if choices is None else next(filter(has_room, choices), None)

    # -- grants

    def grant(self, demand: Resources) -> Grant | None:
        """Take it, all or nothing."""
        taken = self._as_taken(demand, self.available, self.fits) if self._bundles else demand
        if taken is None or not self.fits(taken):
            return None
        picked = self._pick_instances(taken)
        if picked is None:
            return None
        amounts = {name: amount for name, amount in taken.items() if amount}
        for name, amount in amounts.items():
            self.available[name] -= amount
        for name, parts in picked.items():
            for index, part in parts:
                self._free[name][index] -= part
        return Grant(amounts, picked)

    def give_back(self, grant: Grant) -> None:
        """End a grant; the object is void afterwards."""
        self.gains += 1
        for name, amount in grant.amounts.items():
            self.available[name] += amount - grant.parked.get(name, 0)
        for name, parts in grant.instances.items():
            for index, part in parts:
                self._free[name][index] += part
        if self._bundles:
            self._bundles.freed(grant.amounts)
        grant.amounts, grant.instances, grant.parked = {}, {}, {}

    def park_cpus(self, grant: Grant) -> bool:
        """Lend out the CPUs of a holder that waits; False if there was nothing to lend."""
        if grant.parked:
            return False
        self.gains += 1
        grant.parked = {name: n for name, n in grant.amounts.items() if base_name(name) == "CPU"}
        for name, amount in grant.parked.items():
            self.available[name] += amount
        if self._bundles:
            self._bundles.freed(grant.amounts)
        return bool(grant.parked)

    def retake(self, grant: Grant) -> None:
        """Undo ``park_cpus``, even below zero: the holder runs on now (RES-1)."""
        for name, amount in grant.parked.items():
            self.available[name] -= amount
        grant.parked = {}

    def _pick_instances(self, demand: Resources) -> Instances | None:
        """Which accelerators. A group's two names for one thing get the same ones: the one with the index decides."""
        picked: Instances = {}
        by_base: Instances = {}
        for name in sorted((n for n in demand if n in self._free and demand[n]), key=len, reverse=True):
            wanted = by_base.get(base_name(name))
            free = self._free[name]
            if (
                wanted is not None
                and sum(part for _, part in wanted) == demand[name]
                and all(free.get(index, 0) >= part for index, part in wanted)
            ):
                picked[name] = wanted
                continue
            parts = _pick(free, self._capacity[name], demand[name])
            if not parts:
                return None
            picked[name] = by_base[base_name(name)] = parts
        return picked

    # -- checks

    def validate(self, grants: list[Grant]) -> None:
        """RES-1, RES-2 and RES-5, given every live grant."""
        for name, total in self.total.items():
            held = sum(g.amounts.get(name, 0) - g.parked.get(name, 0) for g in grants)
            assert self.available[name] + held == total, (name, self.available[name], held, total)
        for name, capacity in self._capacity.items():
            assert sum(capacity.values()) == self.total[name], (name, capacity, self.total[name])
            for index, whole in capacity.items():
                used = sum(part for g in grants for i, part in g.instances.get(name, ()) if i == index)
                assert self._free[name][index] + used == whole, (name, index)
                assert 0 <= self._free[name][index] <= whole, (name, index)
        for group in [name.removeprefix("bundle_group_") for name in self.total if name.startswith("bundle_group_")]:
            self._validate_group(group)

    def _validate_group(self, group: str) -> None:
        """RES-5; nothing to see where ``group`` is one of its bundles."""
        for name in [name for name in self.total if name.endswith(f"_group_{group}")]:
            bundles = [n for n in self.total if n.startswith(f"{base_name(name)}_group_") and n.endswith(f"_{group}") and n != name]
            if bundles:
                assert self.available[name] == sum(self.available[n] for n in bundles), (name, self.available)
                for index, free in self._free.get(name, {}).items():
                    assert free == sum(self._free[n].get(index, 0) for n in bundles), (name, index)


def _whole(amount: int) -> list[list[int]]:
    parts = [[index, UNIT] for index in range(amount // UNIT)]
    if amount % UNIT:
        parts.append([len(parts), amount % UNIT])
    return parts


def _pick(free: dict[int, int], capacity: dict[int, int], amount: int) -> list[list[int]]:
    """The instances for a demand (RES-3); empty if it cannot be met."""
    if amount >= UNIT:
        if amount % UNIT:
            return []
        whole = [index for index in sorted(free) if free[index] == capacity[index] == UNIT]
        count = amount // UNIT
        return [[index, UNIT] for index in whole[:count]] if len(whole) >= count else []
    best = min((index for index in free if free[index] >= amount), key=lambda i: (free[i], i), default=None)
    return [] if best is None else [[best, amount]]

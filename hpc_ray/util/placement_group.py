"""Placement groups: bundles of resources set aside together, for tasks and actors that belong together.

Relied on by programs and libraries that place work. The group itself lives at the GCS (``gcs/groups.py``); this is the handle.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hpc_ray.api import put
from hpc_ray.client import context
from hpc_ray.client.refs import ObjectRef
from hpc_ray.exceptions import GetTimeoutError, RaySystemError
from hpc_ray.ids import GCS_ADDRESS, PlacementGroupID
from hpc_ray.options import check_selector, conditions, units
from hpc_ray.protocol import UNIT
from hpc_ray.remote_function import RemoteFunction
from hpc_ray.runtime_context import get_runtime_context
from hpc_ray.session import ensure_connected
from hpc_ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_BUNDLES_EXAMPLE = 'for example [{"CPU": 1.0}, {"GPU": 1.0}]'


def _itself(group: PlacementGroup) -> PlacementGroup:
    return group


_ready = RemoteFunction(_itself, {"num_cpus": 0, "name": "placement_group_ready", "enable_task_events": False})


class PlacementGroup:
    """A handle on a placement group. Can be passed on; equal handles name the same group."""

    def __init__(self, id: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None):
        self._id = id
        self._accepted: Callable[[], Any] | None = None  # until somebody asks for the id of a new group
        self.bundle_cache = bundle_cache

    @property
    def id(self) -> PlacementGroupID:
        """The group's id. The first time it waits until the GCS has the group, so whoever is given the id finds it."""
        accepted, self._accepted = self._accepted, None
        if accepted is not None:
            accepted()
        return self._id

    def __reduce__(self) -> Any:
        return PlacementGroup, (self.id, self.bundle_cache)

    @staticmethod
    def empty() -> PlacementGroup:
        """Stands for no group: what is placed in it is placed anywhere."""
        return PlacementGroup(PlacementGroupID(b"\xff" * PlacementGroupID.SIZE), [])

    @property
    def is_empty(self) -> bool:
        """Whether it stands for no group."""
        return self.id.is_nil()

    def ready(self) -> ObjectRef:
        """A reference that is there once all bundles are set aside; its value is the group. Does not wait.

        ``get`` of it raises TaskPlacementGroupRemoved if the group is removed before that.
        """
        if self.is_empty:
            return put(self)
        strategy = PlacementGroupSchedulingStrategy(self)
        return _ready.options(scheduling_strategy=strategy).remote(self)

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all bundles are set aside; False after ``timeout_seconds``. Blocks.

        Raises:
            Exception: the group does not exist (any more).
        """
        if isinstance(timeout_seconds, bool) or not isinstance(timeout_seconds, (int, float)):
            raise TypeError(f"timeout_seconds must be a number, not {type(timeout_seconds).__name__}")
        if self.is_empty:
            return True
        client = ensure_connected()
        group_id = self.id.binary()
        try:
            state = client.query(GCS_ADDRESS, "wait_placement_group", max(0.0, timeout_seconds), group_id=group_id)
        except GetTimeoutError:
            row = client.query(GCS_ADDRESS, "placement_group_table", group_id=group_id)
            state = "REMOVED" if row is None else row["state"]
        if state == "REMOVED":
            raise Exception(f"Placement group {self.id} does not exist: it was removed, or it is of another session.")
        return state == "CREATED"

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """The resources of each bundle. May ask the GCS, once.

        Raises:
            ValueError: the group does not exist.
        """
        if self.bundle_cache is None:
            row = ensure_connected().query(GCS_ADDRESS, "placement_group_table", group_id=self.id.binary())
            if row is None:
                raise ValueError(f"Placement group {self.id} does not exist.")
            self.bundle_cache = _specs(row["bundles"])
        return self.bundle_cache

    @property
    def bundle_count(self) -> int:
        return len(self.bundle_specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str | None = None,
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
    topology_strategy: dict[str, str] | None = None,
) -> PlacementGroup:
    """Ask for a placement group. Its bundles are set aside meanwhile; one with a name is returned when the cluster has accepted it.

    Args:
        bundles: the resources of each.
        strategy: "PACK" (on few nodes; the default), "SPREAD" (on many), "STRICT_PACK" (on one), "STRICT_SPREAD" (each on
            a node of its own).
        name: to find it by, with ``get_placement_group``.
        lifetime: "detached": it stays after the program that made it.
        bundle_label_selector: for each bundle the labels its node has to have.

    Raises:
        ValueError: bundles, strategy or lifetime that cannot be.
        TypeError: a name that is no str.
        RaySystemError: the name is taken, or a resource is called "bundle".
    """
    checked = _check_bundles(bundles)
    if strategy is None:
        strategy = "PACK"
    if strategy not in STRATEGIES:
        raise ValueError(f"Invalid placement group strategy {strategy}; there are {', '.join(STRATEGIES)}")
    if lifetime not in (None, "detached"):
        raise ValueError(f"Placement group `lifetime` argument must be either `None` or 'detached'. Got {lifetime}.")
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if _soft_target_node_id is not None or topology_strategy:
        raise ValueError("_soft_target_node_id and topology_strategy are not offered; use bundle_label_selector")
    labels = _check_selectors(bundle_label_selector, len(bundles))
    client = ensure_connected()
    group_id = os.urandom(PlacementGroupID.SIZE - 4) + client.job_id
    accepted = client.ask(
        GCS_ADDRESS,
        "create_placement_group",
        group_id=group_id,
        bundles=[units(bundle) for bundle in checked],
        strategy=strategy,
        name=name,
        namespace=context.namespace,
        detached=lifetime == "detached",
        job_id=client.job_id,
        labels=labels,
    )
    group = PlacementGroup(PlacementGroupID(group_id), checked)
    if not name and not labels:
        group._accepted = accepted  # it has been checked, and cannot be refused
        return group
    try:
        accepted()
    except ValueError as error:
        raise RaySystemError(str(error)) from None
    return group


def _check_bundles(bundles: Any) -> list[dict[str, float]]:
    if not isinstance(bundles, list):
        raise ValueError(f"Placement group bundles must be a list, got {type(bundles)}.")
    if not bundles:
        raise ValueError(f"Bundles must be a non-empty list of resource dictionaries, {_BUNDLES_EXAMPLE}.")
    for bundle in bundles:
        if not isinstance(bundle, dict) or not all(
            isinstance(key, str) and isinstance(amount, (int, float)) for key, amount in bundle.items()
        ):
            raise ValueError(f"Bundles must be a list of resource dictionaries, {_BUNDLES_EXAMPLE}; one is {bundle!r}.")
        if not any(bundle.values()):
            raise ValueError(f"Bundles cannot be an empty dictionary or resources with only 0 values. Bundles: {bundles}")
        if any(amount < 0 or (amount and amount * UNIT <= 0.5) for amount in bundle.values()):
            raise ValueError(f"Amounts must not be negative, nor below {1 / UNIT}; one bundle is {bundle!r}.")
        if "bundle" in bundle:
            raise RaySystemError("bundle is a system reserved resource, which is not allowed to be used in placement group.")
    return [{key: float(amount) for key, amount in bundle.items()} for bundle in bundles]


def _check_selectors(selectors: Any, count: int) -> list[dict[str, Any]]:
    if not selectors:
        return []
    if not isinstance(selectors, list):
        raise ValueError(f"bundle_label_selector must be a list, not {type(selectors).__name__}")
    if len(selectors) != count:
        raise ValueError(f"Invalid bundle label selector {selectors}: there are {count} bundles, and it needs one for each.")
    for selector in selectors:
        if not isinstance(selector, dict) or not all(
            isinstance(key, str) and isinstance(text, str) for key, text in selector.items()
        ):
            raise ValueError(f"A bundle's label selector is a dictionary of strings, not {selector!r}.")
        check_selector("bundle_label_selector", selector)
    return [conditions(selector) for selector in selectors]


def _specs(bundles: list[dict[str, int]]) -> list[dict[str, float]]:
    return [{key: amount / UNIT for key, amount in bundle.items()} for bundle in bundles]


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Give back the bundles; tasks and actors in them are ended. Harmless if it was removed before.
    Blocks until the GCS knows; the bundles follow.

    Raises:
        AssertionError: None.
    """
    assert placement_group is not None, "remove_placement_group() needs a placement group"
    ensure_connected().query(GCS_ADDRESS, "remove_placement_group", group_id=placement_group.id.binary())


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group with this name in the caller's namespace.

    Raises:
        ValueError: there is none, or the name is empty.
    """
    if not placement_group_name:
        raise ValueError("Please supply a non-empty value to get_placement_group")
    row = ensure_connected().query(GCS_ADDRESS, "get_placement_group", name=placement_group_name, namespace=context.namespace)
    if row is None:
        raise ValueError(f"Failed to look up placement group with name: {placement_group_name}")
    return PlacementGroup(PlacementGroupID(bytes(row["group_id"])), _specs(row["bundles"]))


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the calling task or actor runs in; None outside of groups and in drivers."""
    if context.client is None:
        return None
    group_id = get_runtime_context().get_placement_group_id()
    return None if group_id is None else PlacementGroup(PlacementGroupID.from_hex(group_id))


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """What the GCS knows about a group ({} if nothing); without one: about all, by their hexadecimal ids. Blocks for
    one question to the GCS."""
    client = ensure_connected()
    if placement_group is not None:
        row = client.query(GCS_ADDRESS, "placement_group_table", group_id=placement_group.id.binary())
        return {} if row is None else _described(row)
    rows = client.query(GCS_ADDRESS, "placement_group_table")
    return {bytes(row["group_id"]).hex(): _described(row) for row in rows}


def _described(row: dict[str, Any]) -> dict[str, Any]:
    done = {"CREATED": "FINISHED", "REMOVED": "REMOVED"}
    return {
        "placement_group_id": bytes(row["group_id"]).hex(),
        "name": row["name"],
        "bundles": dict(enumerate(_specs(row["bundles"]))),
        "bundles_to_node_id": {i: bytes(node).hex() for i, node in enumerate(row["nodes"])},
        "strategy": row["strategy"],
        "state": row["state"],
        "stats": {
            "scheduling_attempt": row["attempts"],
            "scheduling_state": done.get(row["state"], "QUEUED"),
        },
    }


def check_placement_group_index(placement_group: PlacementGroup, bundle_index: int) -> None:
    """Raises ValueError unless the group has a bundle of this number; -1 stands for any."""
    if placement_group.is_empty:
        if bundle_index != -1:
            raise ValueError("If placement group is not set, the value of bundle index must be -1.")
    elif not -1 <= bundle_index < placement_group.bundle_count:
        raise ValueError(
            f"placement group bundle index {bundle_index} is invalid. Valid placement group indexes: "
            f"0-{placement_group.bundle_count - 1}, or -1 for any"
        )

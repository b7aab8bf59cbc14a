"""Where a task or actor shall run, for the option ``scheduling_strategy``."""

from __future__ import annotations

from typing import Any


class PlacementGroupSchedulingStrategy:
    """In a placement group: ``placement_group_bundle_index`` -1 for any bundle; with
    ``placement_group_capture_child_tasks`` what it starts runs there too."""

    def __init__(
        self,
        placement_group: Any,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ):
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks


class NodeAffinitySchedulingStrategy:
    """On one node, by its hexadecimal id; with ``soft`` elsewhere if that node is gone or cannot."""

    def __init__(self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False):
        self.node_id = node_id if isinstance(node_id, str) else node_id.hex()
        if len(self.node_id) != 56:
            raise ValueError(f"node_id must be the 56 hexadecimal digits of a node's id, not {self.node_id!r}")
        self.soft = soft
        self._spill_on_unavailable = _spill_on_unavailable
        self._fail_on_unavailable = _fail_on_unavailable


class _Operator:
    name = ""

    def __init__(self, *values: str):
        if self.name in ("in", "not_in") and not values:
            raise ValueError(f"{type(self).__name__}() needs at least one value")
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"label values must be str, not {type(value).__name__}")
        self.values = list(values)


class In(_Operator):
    """The label is one of these."""

    name = "in"


class NotIn(_Operator):
    """The label is none of these."""

    name = "not_in"


class Exists(_Operator):
    """The node has the label."""

    name = "exists"


class DoesNotExist(_Operator):
    """The node does not have the label."""

    name = "does_not_exist"


class NodeLabelSchedulingStrategy:
    """On a node whose labels match all of ``hard`` and, if there is one, all of ``soft``."""

    def __init__(self, hard: dict[str, _Operator], *, soft: dict[str, _Operator] | None = None):
        if not hard and not soft:
            raise ValueError("give at least one label, in hard or in soft")
        for labels in (hard, soft or {}):
            if not isinstance(labels, dict):
                raise TypeError(f"labels must be a dict of names and operators, not {type(labels).__name__}")
            for key, operator in labels.items():
                if not isinstance(key, str) or not isinstance(operator, _Operator):
                    raise ValueError(f"{key!r}: a label is a str with In, NotIn, Exists or DoesNotExist")
        self.hard = hard
        self.soft = soft or {}

    @staticmethod
    def describe(labels: dict[str, _Operator]) -> dict[str, list[Any]]:
        return {key: [operator.name, operator.values] for key, operator in labels.items()}

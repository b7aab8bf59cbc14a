"""The options of remote functions and actors: which there are, what is right, and what they mean for a lease.

One table per kind; ``check`` refuses what is unknown or wrong before anything is sent. Names and defaults are Ray's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import NoneType
from typing import Any

import msgspec

from hpc_ray import packing
from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.protocol import UNIT, Gang, Resources, Shape, Strategy
from hpc_ray.scheduling import matches
from hpc_ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

Check = Callable[[str, Any], None]
MOST = 1 << 60  # of a resource, in 1/UNIT: more than any node has, and it fits a message
BUNDLE_MARK = UNIT // 1000  # what each task or actor takes of the marker ``bundle_group_…``, as in Ray


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if value != value or value == float("inf"):
        raise ValueError(f"{name} must be finite, it is {value}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, it is {value}")
    if 0 < value * UNIT <= 0.5:
        raise ValueError(f"{name}={value} is finer than the smallest amount, {1 / UNIT}")


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _typed(kind: type | tuple, what: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {what}, not {type(value).__name__}")

    return check


def _integer(least: int, also: tuple = ()) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
        if value < least and value not in also:
            extra = "".join(f" or {item}" for item in also)
            raise ValueError(f"{name} must be at least {least}{extra}, it is {value}")

    return check


def _resources(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict of names and amounts, not {type(value).__name__}")
    for key, amount in value.items():
        if key in ("CPU", "GPU", "memory", "object_store_memory"):
            word = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(key, key)
            raise ValueError(f"use {word}=... instead of {name}={{{key!r}: ...}}")
        _number(f"{name}[{key!r}]", amount)


def _returns(name: str, value: Any) -> None:
    if isinstance(value, str):
        if value not in ("dynamic", "streaming", "per_rank"):
            raise TypeError(f'{name} must be an integer, "dynamic" or "streaming", not {value!r}')
    else:
        _integer(0)(name, value)


def _retry_exceptions(name: str, value: Any) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a bool or a list of exception classes, not {type(value).__name__}")
    for item in value:
        if not (isinstance(item, type) and issubclass(item, Exception)):
            raise ValueError(f"{name} must hold exception classes; {item!r} is none")


def _strategy(name: str, value: Any) -> None:
    kinds = (PlacementGroupSchedulingStrategy, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy)
    if isinstance(value, str):
        if value not in ("DEFAULT", "SPREAD"):
            raise ValueError(f'{name} must be "DEFAULT", "SPREAD" or a strategy object, not {value!r}')
    elif isinstance(value, PlacementGroupSchedulingStrategy):
        group = value.placement_group
        assert group in (None, "default") or hasattr(type(group), "bundle_specs"), (
            f"{name} must hold a placement group, not a {type(group).__name__}"
        )
    elif value is not None and not isinstance(value, kinds):
        raise TypeError(f'{name} must be "DEFAULT", "SPREAD" or a strategy object, not {type(value).__name__}')


def _group(name: str, value: Any) -> None:
    if value not in (None, "default") and not hasattr(type(value), "bundle_specs"):
        error = AssertionError if isinstance(value, str) else TypeError  # as Ray's
        raise error(f"{name} must be a placement group, not a {type(value).__name__}")


def _lifetime(name: str, value: Any) -> None:
    if value not in (None, "detached", "non_detached"):
        raise ValueError(f'{name} must be None, "detached" or "non_detached", not {value!r}')


def _name(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if value == "":
        raise ValueError(f"{name} must not be empty")


def _groups(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict of names and thread counts, not {type(value).__name__}")
    for key, count in value.items():
        _integer(1)(f"{name}[{key!r}]", count)


_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"([a-zA-Z0-9]([a-zA-Z0-9._-]{{0,251}}[a-zA-Z0-9])?/)?{_LABEL}")
_SELECTOR = re.compile(rf"|!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


def check_selector(name: str, selector: dict[str, str]) -> None:
    """Raises ValueError for a label selector that Ray would not take."""
    for key, wanted in selector.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{name} has the key {key!r}, which is no label's: [prefix/]name, of at most [253/]63 of a-z, A-Z, 0-9, . _ -")
        if not _SELECTOR.fullmatch(wanted):
            raise ValueError(
                f'{name}[{key!r}] must be "value", "!value", "in(a, b)" or "!in(a, b)", and a value has at most 63 of a-z, A-Z, 0-9, '
                f". _ -; it is {wanted!r}"
            )


def _labels(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict of labels and what they shall be, not {type(value).__name__}")
    for key, wanted in value.items():
        if not isinstance(key, str) or not isinstance(wanted, str):
            raise TypeError(f'{name} must hold str: "value", "!value", "in(a, b)" or "!in(a, b)"; it has {key!r}: {wanted!r}')
    check_selector(name, value)


def _fallbacks(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of dicts with a label_selector each, not {type(value).__name__}")
    for item in value:
        if not isinstance(item, dict) or set(item) != {"label_selector"}:
            raise ValueError(f"{name} must hold dicts with the one key label_selector; it has {item!r}")
        selector = item["label_selector"]
        if not isinstance(selector, (dict, NoneType)):
            raise ValueError(f"the label_selector in {name} must be a dict, not {type(selector).__name__}")
        _labels(f"the label_selector in {name}", selector or {})


def _environment(name: str, value: Any) -> None:
    packing.check(value)


_COMMON: dict[str, Check] = {
    "num_cpus": _optional(_number),
    "num_gpus": _optional(_number),
    "memory": _optional(_number),
    "object_store_memory": _optional(_number),
    "resources": _optional(_resources),
    "accelerator_type": _optional(_typed(str, "a str")),
    "runtime_env": _optional(_environment),
    "scheduling_strategy": _strategy,
    "placement_group": _group,  # this and the next two: as they were written before there were strategies
    "placement_group_bundle_index": _integer(-1),
    "placement_group_capture_child_tasks": _optional(_typed(bool, "a bool")),
    "label_selector": _optional(_labels),
    "fallback_strategy": _optional(_fallbacks),
    "name": _optional(_name),
    "mpi_ranks": _optional(_integer(1)),
    "mpi_ranks_per_node": _optional(_integer(1)),
    "_metadata": _optional(_typed(dict, "a dict")),
    "enable_task_events": _typed(bool, "a bool"),
}
_TASK: dict[str, Check] = {
    **_COMMON,
    "name": _optional(_typed(str, "a str")),  # "": as if there were none
    "num_returns": _optional(_returns),
    "max_retries": _optional(_integer(0, (-1,))),
    "retry_exceptions": _retry_exceptions,
    "max_calls": _optional(_integer(0)),
    "_generator_backpressure_num_objects": _optional(_integer(1, (-1,))),
}
_ACTOR: dict[str, Check] = {
    **_COMMON,
    "namespace": _optional(_name),
    "lifetime": _lifetime,
    "get_if_exists": _typed(bool, "a bool"),
    "max_restarts": _optional(_integer(0, (-1,))),
    "max_task_retries": _optional(_integer(0, (-1,))),
    "max_concurrency": _optional(_integer(0)),  # 0: as if it were not given, also of the next one
    "max_pending_calls": _optional(_integer(0, (-1,))),
    "concurrency_groups": _optional(_groups),
    "allow_out_of_order_execution": _optional(_typed(bool, "a bool")),
}
METHOD_OPTIONS: dict[str, Check] = {
    "num_returns": _optional(_returns),
    "concurrency_group": _optional(_typed(str, "a str")),
    "max_task_retries": _optional(_integer(0, (-1,))),
    "retry_exceptions": _optional(_retry_exceptions),
    "name": _optional(_typed(str, "a str")),  # "": as if there were none
    "enable_task_events": _typed(bool, "a bool"),
    "_generator_backpressure_num_objects": _optional(_integer(1, (-1,))),
}


def _check(kind: str, table: dict[str, Check], options: dict[str, Any], unknown: type[Exception] = ValueError) -> None:
    for name, value in options.items():
        check = table.get(name)
        if check is None:
            raise unknown(f"Invalid option keyword {name} for {kind}. Valid ones are {sorted(n for n in table if n[0] != '_')}.")
        check(name, value)


def check_task(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for options that a remote function cannot have."""
    _check("remote functions", _TASK, options)
    _check_gang(options)
    _check_group(options)
    _check_gpus(options)


def check_actor(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for options that an actor cannot have."""
    _check("actors", _ACTOR, options)
    _check_gang(options)
    if options.get("mpi_ranks"):
        for name in ("max_concurrency", "concurrency_groups", "allow_out_of_order_execution"):
            if options.get(name) not in (None, 0, 1, False, {}):
                raise ValueError(f"{name} is not for gangs: each of their calls runs on all ranks, one after the other")
    _check_group(options)
    _check_gpus(options)
    if options.get("get_if_exists") and not options.get("name"):
        raise ValueError("get_if_exists needs a name to look for: give the actor a name")


def check_method(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for options that an actor's method cannot have."""
    _check("actor methods", METHOD_OPTIONS, options, TypeError)


def _check_group(options: dict[str, Any]) -> None:
    if options.get("placement_group") in (None, "default"):
        if options.get("placement_group_bundle_index", -1) != -1:
            raise ValueError("If placement group is not set, the value of bundle index must be -1.")
    elif options.get("scheduling_strategy") is not None:
        raise ValueError("give the placement group with the scheduling_strategy, not besides it in the option placement_group")


def check_returns(ranks: int | None, returns: Any) -> None:
    """Raises ValueError for a ``num_returns`` that a gang, or what is none, cannot have."""
    if ranks is None:
        if returns == "per_rank":
            raise ValueError('num_returns="per_rank" is for gangs: give mpi_ranks as well')
    elif returns not in (None, 0, 1, ranks, "per_rank"):
        raise ValueError(
            f'num_returns of a gang must be 1 (a list of what its ranks return), mpi_ranks={ranks} or "per_rank" (a reference for '
            f"each), or 0; it is {returns!r}"
        )


def _check_gang(options: dict[str, Any]) -> None:
    ranks, per_node = options.get("mpi_ranks"), options.get("mpi_ranks_per_node")
    check_returns(ranks, options.get("num_returns"))
    if ranks is None:
        if per_node is not None:
            raise ValueError("mpi_ranks_per_node says how the ranks of a gang lie: give mpi_ranks as well")
        return
    each = options.get("num_gpus") or 0
    counts = {ranks} if per_node is None else {min(ranks, per_node), ranks % per_node}
    for count in counts:
        if each * count != int(each * count):
            where = "" if per_node is None else " of a node"
            raise ValueError(f"num_gpus={each} for each of {count} ranks{where} makes {each * count:g} GPUs; it must be a whole number")


def _check_gpus(options: dict[str, Any]) -> None:
    gpus = options.get("num_gpus")
    if gpus and gpus > 1 and gpus != int(gpus):
        raise ValueError(f"num_gpus above 1 must be whole, it is {gpus}")


def amounts(options: dict[str, Any], default_cpus: float) -> Resources:
    """What the options ask for, in fixed-point units."""
    cpus = options.get("num_cpus")
    wanted = {"CPU": default_cpus if cpus is None else cpus, "GPU": options.get("num_gpus") or 0}
    for name in ("memory", "object_store_memory"):
        if options.get(name):
            wanted[name] = options[name]
    wanted.update(options.get("resources") or {})
    if options.get("accelerator_type"):
        wanted[f"accelerator_type:{options['accelerator_type']}"] = 0.001
    return units(wanted)


def units(wanted: dict[str, float]) -> Resources:
    """Amounts as they travel."""
    return {name: round(min(amount * UNIT, MOST)) for name, amount in wanted.items() if amount}


def led_by_one(shape: Shape, ranks: int) -> Shape:
    """The lease of a gang: its worker leads so many ranks and no others, since it keeps them for the next one."""
    fields = json.loads(shape.runtime_env or "{}")
    return msgspec.structs.replace(shape, runtime_env=json.dumps({**fields, "_mpi_ranks": ranks}, sort_keys=True))


def gang_of(name: str, options: dict[str, Any], client: Client, default_cpus: float = 1) -> tuple[Gang, Shape]:
    """How the ranks of a gang lie, and the lease that its leader needs: that of all ranks, or none where they are on several nodes
    and have a placement group. Asks the GCS.

    Raises:
        ValueError: the nodes are too small, or the options fit only what lies on one node.
    """
    ranks, per_node = options["mpi_ranks"], options.get("mpi_ranks_per_node") or 0
    each = amounts(options, default_cpus)
    single = options.get("num_returns") == "per_rank" and ranks == 1
    gang = Gang(ranks, each, options.get("num_gpus") or 0, per_node, single)
    shape = shape_of({key: amount * ranks for key, amount in each.items()}, options, client)
    strategy = shape.strategy
    if shape.group_id or strategy.kind == "NODE":
        if per_node and per_node < ranks:
            raise ValueError(
                f"{name} shall have {per_node} of its {ranks} MPI ranks on each node, so it takes a placement group of its own; it "
                "cannot be in another one, or have a NodeAffinitySchedulingStrategy"
            )
        return gang, shape
    nodes = [node for node in client.query(GCS_ADDRESS, "nodes") if node["alive"] and matches(node["labels"], strategy.hard_labels)]
    rooms = sorted((room_for(each, node["total"], ranks) for node in nodes), reverse=True)
    if not lies_on_several(name, ranks, per_node, each, rooms):
        return gang, shape
    if strategy.soft_labels:
        raise ValueError(f"{name} needs several nodes for its {ranks} MPI ranks, and these can have hard labels only")
    spread = msgspec.structs.replace(gang, spread=True, even=strategy.kind == "SPREAD", labels=strategy.hard_labels)
    return spread, msgspec.structs.replace(shape, resources={}, strategy=Strategy())


def room_for(each: Resources, total: Resources, ranks: int) -> int:
    """How many of the ranks a node can hold."""
    return min((total.get(key, 0) // amount for key, amount in each.items()), default=ranks)


def lies_on_several(name: str, ranks: int, per_node: int, each: Resources, rooms: list[int]) -> bool:
    """Whether a gang needs more than one node. ``rooms``: how many ranks each node can hold, the largest first.

    Raises:
        ValueError: the nodes are too few or too small.
    """
    largest = rooms[0] if rooms else 0
    if largest >= ranks and (not per_node or per_node >= ranks):
        return False
    if per_node:
        counts = [min(per_node, ranks - first) for first in range(0, ranks, per_node)]
        if len(counts) <= len(rooms) and all(room >= count for room, count in zip(rooms, counts, strict=False)):
            return True
    elif sum(rooms) >= ranks:
        return True
    what = ", ".join(f"{amount / UNIT:g} {key}" for key, amount in each.items()) or "nothing"
    layout = f", {per_node} on each node" if per_node else ""
    found = ", ".join(map(str, rooms[:8])) + (", …" if len(rooms) > 8 else "")
    raise ValueError(
        f"{name} shall have {ranks} MPI ranks with {what} each{layout}, and there is room for {sum(rooms)}: {found or 'none'} on "
        f"{len(rooms)} node{'s' * (len(rooms) != 1)}. Start larger nodes, as with init(num_cpus={ranks}) or hpc-ray run --num-cpus "
        f"{ranks}, or more of them, or let ranks share CPUs: num_cpus is what each takes, and may be 0.5 or 0"
    )


def strategy_of(options: dict[str, Any]) -> tuple[Strategy, PlacementGroupSchedulingStrategy | None]:
    value = options.get("scheduling_strategy")
    older = options.get("placement_group")
    if older not in (None, "default"):
        capture = options.get("placement_group_capture_child_tasks")
        value = PlacementGroupSchedulingStrategy(older, options.get("placement_group_bundle_index", -1), capture)
    if isinstance(value, PlacementGroupSchedulingStrategy):
        return Strategy(), value
    if isinstance(value, NodeAffinitySchedulingStrategy):
        return Strategy("NODE", bytes.fromhex(value.node_id), value.soft), None
    if isinstance(value, NodeLabelSchedulingStrategy):
        return Strategy("LABELS", hard_labels=value.describe(value.hard), soft_labels=value.describe(value.soft)), None
    selector = options.get("label_selector")
    if selector:
        fallbacks = [conditions(one["label_selector"] or {}) for one in options.get("fallback_strategy") or []]
        return Strategy("LABELS", hard_labels=conditions(selector), fallbacks=fallbacks), None
    return Strategy(value or "DEFAULT"), None


def conditions(selector: dict[str, str]) -> dict[str, Any]:
    return {key: _selector(text) for key, text in selector.items()}


def _selector(text: str) -> list[Any]:
    """Ray's label selector: ``value``, ``!value``, ``in(a, b)``, ``!in(a, b)`` → [operator, values]."""
    negated = text.startswith("!")
    body = text[1:] if negated else text
    if body.startswith("in(") and body.endswith(")"):
        values = [item.strip() for item in body[3:-1].split(",")]
    else:
        values = [body]
    return ["not_in" if negated else "in", values]


def in_bundle(resources: Resources, group_id: bytes, bundle: int) -> Resources:
    """The names under which a placement group's resources are known to raylets. What goes to one bundle takes from the group,
    too; for what may go to any (-1), the raylet chooses the bundle (RES-5)."""
    group = f"group_{group_id.hex()}"
    asked = {**resources, "bundle": BUNDLE_MARK}  # whoever asks for nothing else still needs the bundle
    named = {f"{name}_{group}": amount for name, amount in asked.items()}
    if bundle >= 0:
        named |= {f"{name}_group_{bundle}_{group_id.hex()}": amount for name, amount in asked.items()}
    return named


def shape_of(resources: Resources, options: dict[str, Any], client: Client) -> Shape:
    """The lease that a task or actor with these options needs. Blocks where files of its runtime environment are to be sent."""
    job_id = client.job_id
    strategy, group = strategy_of(options)
    environment = options.get("runtime_env")
    text = packing.packed(environment, client, context.runtime_env)
    if options.get("scheduling_strategy") is None and group is None and options.get("placement_group") != "default":
        parent = _captured()
        if parent is not None:  # its children stay in its placement group
            return Shape(in_bundle(resources, parent.group_id, -1), job_id, strategy, text, parent.group_id, -1, True)
    if group is None or group.placement_group in (None, "default") or group.placement_group.is_empty:
        return Shape(resources, job_id, strategy, text)
    placed = group.placement_group
    bundle = group.placement_group_bundle_index
    if not -1 <= bundle < placed.bundle_count:
        raise ValueError(
            f"placement group bundle index {bundle} is invalid. Valid placement group indexes: 0-{placed.bundle_count - 1}, or -1 for any"
        )
    bundles = placed.bundle_specs if bundle < 0 else [placed.bundle_specs[bundle]]
    if not any(all(one.get(name, 0) * UNIT >= amount for name, amount in resources.items()) for one in bundles):
        wanted = {name: amount / UNIT for name, amount in resources.items()}
        raise ValueError(f"{wanted} does not fit into any bundle that it may use: {bundles}")
    group_id = placed.id.binary()
    capture = bool(group.placement_group_capture_child_tasks)
    return Shape(in_bundle(resources, group_id, bundle), job_id, strategy, text, group_id, bundle, capture)


def _captured() -> Shape | None:
    """The shape of the calling task or actor, if what it starts shall stay in its placement group."""
    task = context.task.get()
    shape = context.actor.spec.shape if context.actor is not None else task.shape if task is not None else None
    return shape if shape is not None and shape.group_id and shape.capture_children else None

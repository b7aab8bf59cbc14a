"""Where objects are."""

from __future__ import annotations

from typing import Any

from hpc_ray.api import wait
from hpc_ray.client.client import Client
from hpc_ray.client.refs import ObjectRef
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.session import ensure_connected


def get_object_locations(obj_refs: list[ObjectRef], timeout_ms: int = -1) -> dict[ObjectRef, dict[str, Any]]:
    """For each object ``node_ids`` (hexadecimal; none for a small value, which its owner keeps), ``object_size`` in bytes and
    ``did_spill`` (this node's copy is on the disk). Objects that are being made are waited for, ``timeout_ms`` at most (-1: as long
    as it takes). Blocks.
    """
    if obj_refs:
        timeout = None if timeout_ms < 0 else timeout_ms / 1000
        wait(obj_refs, num_returns=len(obj_refs), timeout=timeout, fetch_local=False)
    return get_local_object_locations(obj_refs)


def get_local_object_locations(obj_refs: list[ObjectRef]) -> dict[ObjectRef, dict[str, Any]]:
    """The same with what this process knows already; objects that it does not know the place of are left out."""
    client = ensure_connected()
    nodes = {row["index"]: bytes(row["node_id"]).hex() for row in client.query(GCS_ADDRESS, "nodes")}
    found = {reference: _location(client, reference, nodes) for reference in obj_refs}
    return {reference: place for reference, place in found.items() if place is not None}


def _location(client: Client, reference: ObjectRef, nodes: dict[int, str]) -> dict[str, Any] | None:
    with client.lock:
        result, places = reference._entry.result, list(reference._entry.places or ())
    if result is None:
        return None
    node_ids = [nodes[node] for node, _ in places if node in nodes]
    spilled = any(client.files.on_disk(handle) for node, handle in places if node == client.node)
    return {"node_ids": node_ids, "object_size": result.size or len(result.payload), "did_spill": spilled}

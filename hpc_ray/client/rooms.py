"""Room for the ranks of a gang: on which nodes they are, and which accelerators each has.

A gang that lies on one node has the lease of its leader. One that lies on several has a placement group of its own, which is all or
nothing too; the group belongs to the leader, so it goes with it, however that ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_ray.ids import GCS_ADDRESS, JobID, PlacementGroupID, raylet_address
from hpc_ray.protocol import UNIT, Gang

if TYPE_CHECKING:
    from hpc_ray.client.client import Client

Instances = dict[str, list[list[int]]]


class Room:
    """What a gang has.

    Attributes:
        nodes: index of the node of each rank; the ranks of one node are neighbours.
        hosts: name of the host of each rank.
        instances: accelerators of each rank, GPU → [[index, amount], …].
        sharing: its ranks share CPUs, as each has booked less than one.
    """

    def __init__(self, gang: Gang, nodes: list[int], hosts: list[str], instances: list[Instances]):
        self.nodes = nodes
        self.hosts = hosts
        self.instances = instances
        self.sharing = gang.each.get("CPU", 0) < UNIT
        self.client: Client | None = None  # that has ``group_id``
        self.group_id = b""

    @classmethod
    def here(cls, client: Client, gang: Gang, instances: Instances) -> Room:
        """On this node, with what a lease has."""
        size = gang.ranks
        return cls(gang, [client.node] * size, [client.config.hostname] * size, shared(instances, size, gang.gpus))

    @classmethod
    def take(cls, client: Client, gang: Gang) -> Room:
        """On several nodes. Blocks until there is room.

        Raises:
            RuntimeError: the group was removed meanwhile.
        """
        group_id = PlacementGroupID.of(JobID(client.job_id)).binary()
        counts = counts_of(gang)
        bundles = [{name: amount * count for name, amount in gang.each.items()} for count in counts]
        strategy = "STRICT_SPREAD" if gang.per_node else "SPREAD" if gang.even else "PACK"
        labels = [gang.labels] * len(bundles) if gang.labels else None
        wish: dict[str, Any] = {"bundles": bundles, "strategy": strategy, "job_id": client.job_id, "labels": labels, "owned": True}
        room = cls(gang, [], [], [])
        room.client, room.group_id = client, group_id
        try:
            client.query(GCS_ADDRESS, "create_placement_group", group_id=group_id, **wish)
            if client.query(GCS_ADDRESS, "wait_placement_group", group_id=group_id) != "CREATED":
                raise RuntimeError("the placement group of a gang was removed while it waited for room")
            row = client.query(GCS_ADDRESS, "placement_group_table", group_id=group_id)
            known = {bytes(node["node_id"]): node for node in client.query(GCS_ADDRESS, "nodes")}
            places = [known[bytes(node_id)] for node_id in row["nodes"]]
            given: dict[str, Instances] = {}
            if gang.gpus:
                for index in {place["index"] for place in places}:
                    given |= client.query(raylet_address(index), "bundle_instances", group_id=group_id)
            for number in sorted(range(len(places)), key=lambda number: (places[number]["index"], number)):
                place, count = places[number], counts[number]
                room.nodes += [place["index"]] * count
                room.hosts += [place["hostname"]] * count
                room.instances += shared(given.get(str(number), {}), count, gang.gpus)
        except BaseException:
            room.give_back()
            raise
        return room

    def give_back(self) -> None:
        """May be called twice; that of ``here`` goes with its lease."""
        if self.client is not None:
            client, self.client = self.client, None
            client.query(GCS_ADDRESS, "remove_placement_group", group_id=self.group_id)


def counts_of(gang: Gang) -> list[int]:
    """How many ranks each bundle is for."""
    ranks, most = gang.ranks, gang.per_node or 1
    return [min(most, ranks - first) for first in range(0, ranks, most)]


def shared(instances: Instances, ranks: int, gpus: float) -> list[Instances]:
    """Who of so many ranks gets what."""
    if not instances.get("GPU"):
        return [dict(instances) for _ in range(ranks)]
    return [{**instances, "GPU": share(instances["GPU"], rank, gpus)} for rank in range(ranks)]


def share(gpus: list[list[int]], rank: int, each: float) -> list[list[int]]:
    """Of the GPUs of a gang, those that a rank uses; two ranks may use one, each a part of it."""
    first = int(rank * each + 1e-9)
    last = max(first + 1, int((rank + 1) * each + 1 - 1e-9))
    return gpus[first:last] if each else []

"""Bundles of placement groups on one node. The part of ``RayletState`` that sets them aside.

BUNDLE-1 (two phases): a bundle is PREPARED (its room is taken, nobody can use it), then COMMITTED (its names exist),
then RELEASING (nobody new gets in), then gone; a PREPARED one may go at once.
BUNDLE-2 (all or nothing): the bundles of one PrepareBundles are all set aside or none is.
BUNDLE-3 (last one out): the room of a RELEASING bundle comes back when no lease of the group is left on the node.
"""

from __future__ import annotations

import enum

from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.machine import Table, handles
from hpc_ray.protocol import (
    BundlesPrepared,
    CommitBundles,
    GroupRemoved,
    PrepareBundles,
    ReleaseBundles,
    Resources,
)
from hpc_ray.raylet.leases import Leases
from hpc_ray.raylet.resources import Grant, Instances, bundle_names


class BundleState(enum.Enum):
    PREPARED = 0
    COMMITTED = 1
    RELEASING = 2
    GONE = 3


BUNDLE_STEPS = Table(
    "bundle",
    {
        BundleState.PREPARED: {BundleState.COMMITTED, BundleState.GONE},
        BundleState.COMMITTED: {BundleState.RELEASING},
        BundleState.RELEASING: {BundleState.GONE},
        BundleState.GONE: (),
    },
)


class Bundle:
    def __init__(self, group_id: bytes, index: int, attempt: int, amounts: Resources, grant: Grant):
        self.group_id = group_id
        self.index = index
        self.attempt = attempt
        self.state = BundleState.PREPARED
        self.grant = grant
        self.names = bundle_names(amounts, group_id, index)
        self.instances: Instances = grant.visible_instances()


class Bundles(Leases):
    """See the module's text."""

    def init_bundles(self) -> None:
        self.bundles: dict[tuple[bytes, int], Bundle] = {}
        self.releasing: set[bytes] = set()  # groups with RELEASING bundles

    @handles(PrepareBundles)
    def on_prepare_bundles(self, event: PrepareBundles, source: int) -> None:
        taken: dict[int, Grant] = {}
        ok = not self.stopping
        for index, amounts in event.bundles.items():
            grant = None
            if ok and (event.group_id, index) not in self.bundles:
                grant = self.pool.grant(amounts)
            if grant is None:
                ok = False
                break
            taken[index] = grant
        for index, grant in taken.items():
            if ok:
                bundle = Bundle(event.group_id, index, event.attempt, event.bundles[index], grant)
                self.bundles[event.group_id, index] = bundle
                self._note(bundle, f"prepared, attempt {event.attempt}")
            else:
                self.pool.give_back(grant)
        self.send(GCS_ADDRESS, BundlesPrepared(event.group_id, event.attempt, self.node, ok))

    @handles(CommitBundles)
    def on_commit_bundles(self, event: CommitBundles, source: int) -> None:
        for bundle in self._of(event.group_id):
            if bundle.attempt == event.attempt and bundle.state is BundleState.PREPARED:
                self._step(bundle, BundleState.COMMITTED, "CommitBundles")
                self.pool.add(bundle.names, bundle.instances)
                self.dirty = True

    @handles(ReleaseBundles)
    def on_release_bundles(self, event: ReleaseBundles, source: int) -> None:
        for bundle in self._of(event.group_id):
            if event.attempt not in (-1, bundle.attempt):
                continue
            if bundle.state is BundleState.PREPARED:
                self._step(bundle, BundleState.GONE, "ReleaseBundles")
                self._forget(bundle)
            elif bundle.state is BundleState.COMMITTED:
                self._step(bundle, BundleState.RELEASING, "ReleaseBundles")
                self.releasing.add(event.group_id)
        if event.attempt == -1:
            self.drop_group(event.group_id)
        if event.kill:
            self.kill_group(event.group_id)
        self.finish_releases(event.group_id)

    @handles(GroupRemoved)
    def on_group_removed(self, event: GroupRemoved, source: int) -> None:
        self.drop_group(event.group_id)

    def query_bundle_instances(self, group_id: bytes) -> dict[str, Instances]:
        """Bundle → its accelerators, of a group that is created; keys as text, for the way."""
        return {str(bundle.index): bundle.instances for bundle in self._of(group_id)}

    def finish_releases(self, group_id: bytes) -> None:
        """Give room back once nobody uses the group here any more (BUNDLE-3)."""
        if group_id not in self.releasing or any(lease.shape.group_id == group_id for lease in self.leases.values()):
            return
        self.releasing.remove(group_id)
        for bundle in self._of(group_id):
            if bundle.state is BundleState.RELEASING:
                self._step(bundle, BundleState.GONE, "last lease closed")
                self.pool.remove(bundle.names, bundle.instances)
                self._forget(bundle)

    def _forget(self, bundle: Bundle) -> None:
        self.pool.give_back(bundle.grant)
        del self.bundles[bundle.group_id, bundle.index]
        self.dirty = True
        self.report_soon()

    def _of(self, group_id: bytes) -> list[Bundle]:
        return [bundle for key, bundle in self.bundles.items() if key[0] == group_id]

    def _step(self, bundle: Bundle, end: BundleState, event: str) -> None:
        identity = f"{bundle.group_id.hex()}[{bundle.index}]"
        BUNDLE_STEPS.check(identity, bundle.state, end, event, self.history)
        bundle.state = end
        self._note(bundle, end.name)

    def _note(self, bundle: Bundle, text: str) -> None:
        self.history.add(f"{bundle.group_id.hex()}[{bundle.index}]", self.now, text)

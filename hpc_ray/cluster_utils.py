"""A cluster of several nodes on this machine, whose nodes come and go; for tests.

The nodes are virtual: processes and shared memory of their own, and MPI between them, as on several hosts. The ranks that carry the
messages are started at once; a node that is added takes the next of them.
"""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

from hpc_ray import api, session
from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError
from hpc_ray.launcher import world
from hpc_ray.version import __version__

_AMOUNTS = ("num_cpus", "num_gpus", "resources", "memory", "object_store_memory", "labels")
# What Ray's nodes have besides: ports, and the dashboard, which is ``init``'s here.
_MEANINGLESS = {"include_dashboard", "dashboard_host", "dashboard_port", "port", "redis_port", "node_manager_port"}
_MEANINGLESS |= {"object_manager_port", "min_worker_port", "max_worker_port"}
_STORE_BYTES = 150 << 20


class Node:
    """A node of a ``Cluster``."""

    def __init__(self, index: int, node_id: str, options: dict[str, Any]):
        self.index = index
        self.node_id = node_id
        self.unique_id = node_id
        self.options = options

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.node_id})"


class Cluster:
    """Virtual nodes on this machine.

    Args:
        initialize_head: start the head node now.
        connect: and ``init`` this process there.
        head_node_args: amounts of the head, as for ``add_node``.
        shutdown_at_exit: end the cluster with this process.
        max_nodes: how many nodes there can be over the cluster's whole life (removed ones count); by default
            ``HPC_RAY_CLUSTER_NODES`` or 5. Over TCP (``HPC_RAY_TRANSPORT=tcp``) there is no need of a limit, and none.

    Raises:
        LaunchError: MPI is missing, or the nodes did not come up.
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
        max_nodes: int | None = None,
    ):
        self.head_node: Node | None = None
        self.worker_nodes: list[Node] = []
        self._world: world.World | None = None
        self._most = int(os.environ.get("HPC_RAY_CLUSTER_NODES", "5")) if max_nodes is None else max_nodes
        if connect and not initialize_head:
            raise RuntimeError("Cannot connect to uninitialized cluster: pass initialize_head=True.")
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()

    @property
    def address(self) -> str:
        """For ``init(address=...)``.

        Raises:
            RuntimeError: there is no head yet.
        """
        if self._world is None:
            raise RuntimeError("the cluster has no nodes yet: add_node() first")
        return self._world.session

    @property
    def gcs_address(self) -> str:
        """The same: the GCS has no port of its own."""
        return self.address

    def list_all_nodes(self) -> list[Node]:
        """The head and the others, as far as they have not been removed."""
        return [*([self.head_node] if self.head_node is not None else []), *self.worker_nodes]

    def connect(self, namespace: str | None = None) -> Any:
        """``init`` this process in the cluster."""
        return session.init(address=self.address, namespace=namespace)

    def add_node(self, wait: bool = True, **node_args: Any) -> Node:
        """Start a node; the first one is the head. Blocks until it is up, and, with ``wait``, until the cluster counts it.

        Args:
            num_cpus (default 1), num_gpus, resources, memory, object_store_memory (bytes; default 150 MiB), labels. Of what Ray
                knows besides, ports and the dashboard's options mean nothing here.

        Raises:
            ConfigurationError: an argument that nodes do not have.
            LaunchError: it did not come up, or all of ``max_nodes`` are used up.
        """
        system = node_args.pop("_system_config", None)
        node_args = {name: value for name, value in node_args.items() if name not in _MEANINGLESS}
        unknown = sorted(set(node_args) - set(_AMOUNTS))
        if unknown:
            raise ConfigurationError(f"a node has no {', '.join(unknown)}; it has {', '.join(_AMOUNTS)}")
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": _STORE_BYTES, **node_args}
        settings = Settings.from_environment(system)
        if self._world is None:
            self._world = world.start_virtual(1, options, settings=settings, build=__version__, standby=self._most - 1)
            node = self.head_node = Node(0, "", options)
            return node
        answer = self._world.request(settings.start_timeout_s, start=options)
        node = Node(answer["node"], answer["node_id"], options)
        self.worker_nodes.append(node)
        if wait and session.is_initialized():
            self._wait_until(lambda: node.node_id in _alive(), settings.start_timeout_s)
        return node

    def remove_node(self, node: Node, allow_graceful: bool = True) -> None:
        """End a node: in order, or with ``allow_graceful=False`` as if it had crashed. Blocks until it is gone.

        Raises:
            ValueError: it is the head, or no node of this cluster.
            LaunchError: the cluster does not answer.
        """
        if node is self.head_node:
            raise ValueError("the head cannot be removed: the cluster ends with it; use shutdown()")
        if node not in self.worker_nodes or self._world is None:
            raise ValueError(f"{node} is not in this cluster")
        self.worker_nodes.remove(node)
        self._world.request(60.0, node=node.index, end="order" if allow_graceful else "kill")
        if session.is_initialized():
            self._wait_until(lambda: node.node_id not in _alive(), 30.0)

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Block until the cluster counts all nodes.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
        """
        expected = len(self.list_all_nodes())
        self._wait_until(lambda: len(_alive()) == expected, timeout)

    def _wait_until(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster's nodes were not as expected within {timeout_s:g} s: {api.nodes()}")
            time.sleep(0.005)

    def shutdown(self) -> None:
        """End all nodes. Blocks until they are gone. Harmless a second time."""
        atexit.unregister(self.shutdown)
        held, self._world = self._world, None
        if held is not None:
            held.close()
        self.head_node = None
        self.worker_nodes = []


def _alive() -> set[str]:
    return {node["NodeID"] for node in api.nodes() if node["Alive"]}

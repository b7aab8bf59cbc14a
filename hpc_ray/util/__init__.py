"""Helpers for programs, at the places where Ray has them."""

from __future__ import annotations

import importlib
import socket
from typing import Any, NoReturn

from hpc_ray.client import context
from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.serialize import deregister_serializer, register_serializer
from hpc_ray.session import ensure_connected
from hpc_ray.util import accelerators
from hpc_ray.util.actor_pool import ActorPool
from hpc_ray.util.check_serialize import inspect_serializability
from hpc_ray.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
from hpc_ray.util.iteration import as_completed, map_unordered
from hpc_ray.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """The names of the actors that live in the caller's namespace; of all: dicts of ``name`` and ``namespace``."""
    found = ensure_connected().query(GCS_ADDRESS, "list_named_actors", namespace=context.namespace, all_namespaces=all_namespaces)
    return found if all_namespaces else [row["name"] for row in found]


def get_node_ip_address(address: str | None = None) -> str:
    """The address of this node, as in the list of nodes; ``address`` is for compatibility."""
    client = context.client
    if client is not None and client.welcome is not None:
        return client.welcome.ip
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def get_node_instance_id() -> str:
    """The host's name: what stands for an instance here."""
    return socket.gethostname()


def connect(
    conn_str: str,
    secure: bool = False,
    metadata: Any = None,
    connection_retries: int = 3,
    job_config: Any = None,
    namespace: str | None = None,
    *,
    ignore_version: bool = False,
    _credentials: Any = None,
    ray_init_kwargs: dict[str, Any] | None = None,
) -> NoReturn:
    """There is no Ray Client here.

    Raises:
        ConnectionError: always; the text says what to do instead.
    """
    raise ConnectionError(
        f"connect({conn_str!r}): hpc_ray has no Ray Client, since nothing here listens on a port. Run the program on a node of "
        'the cluster and call init(address="auto") in it, or start it with mpirun, srun or `hpc-ray run`.'
    )


def disconnect() -> None:
    """Without effect, since nothing is ever connected that way; ``shutdown`` ends a session."""


_LEFT_OUT = {
    "iter": "Ray's parallel iterators are deprecated; use ActorPool, multiprocessing.Pool, or tasks with num_returns=\"streaming\"",
    "pdb": "a worker has no terminal and no port; call the function without remote() to debug it, or print",
    "ray_debugpy": "a worker has no port for a debugger; call the function without remote() to debug it",
}


def __getattr__(name: str) -> Any:
    """``collective``, which is imported when it is used; for what Ray has and hpc_ray has not, the reason."""
    if name == "collective":
        return importlib.import_module("hpc_ray.util.collective")
    why = f": {_LEFT_OUT[name]}" if name in _LEFT_OUT else ""
    raise AttributeError(f"module 'hpc_ray.util' has no attribute {name!r}{why}")


__all__ = [
    "ActorPool",
    "accelerators",
    "as_completed",
    "connect",
    "deregister_serializer",
    "disable_log_once_globally",
    "disconnect",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_instance_id",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
]

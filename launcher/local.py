"""How ``init()`` gets a cluster: start one, find one, end one. ``client`` calls ``start_cluster`` and ``attach``.

LOCAL-1 (lives for us): a cluster that this process started ends with it, however it ends, unless started detached.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.launcher import channel, session, world
from hpc_ray.launcher.attachment import Attachment, connect
from hpc_ray.launcher.node_process import NodeProcess, node_config


def attach(address: str | None = "auto", *, build: str = "") -> Attachment:
    """Attaches to a running cluster of this user on this host.

    ``address`` is a session's name or "auto": the one that HPC_RAY_ADDRESS names, else the newest (in a Slurm job the job's newest).

    Raises:
        LaunchError: none runs, or the node did not let us in.
    """
    wanted = address or "auto"
    if wanted in ("auto", "local"):
        wanted = os.environ.get(session.ADDRESS_VARIABLE) or "auto"
    found = session.running()
    if wanted == "auto":
        ours = session.of_our_job(name for name, _ in found)
        if not ours:
            others = f" (others of this user do: {', '.join(sorted(dict(found)))})" if found else ""
            whose = f"Slurm job {os.environ['SLURM_JOB_ID']}" if found else "user"
            raise LaunchError(
                f"no hpc_ray cluster of this {whose} runs on this host{others}; start one with `hpc-ray start`, or call init() "
                "without an address"
            )
        wanted = ours[-1]
    nodes = [node for name, node in found if name == wanted]
    if not nodes:
        known = ", ".join(sorted({name for name, _ in found})) or "none"
        raise LaunchError(f"session {wanted!r} does not run on this host. Running: {known}")
    return connect(wanted, min(nodes), build=build)


def is_launched() -> bool:
    """Whether this program's launcher makes a cluster for it, which it has not joined yet, and HPC_RAY_ADDRESS names no other."""
    return world.is_driver() and not os.environ.get(session.ADDRESS_VARIABLE)


OPTIONS_VARIABLE = "HPC_RAY_NODE_OPTIONS"  # JSON of amounts that ``hpc-ray run`` was given; ``init``'s own win


def start_cluster(
    *,
    num_nodes: int | None = None,
    settings: Settings | None = None,
    environment: dict[str, str] | None = None,
    journal: str = "",
    build: str = "",
    roles: dict[str, str] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Attachment:
    """What ``init()`` without an address means here: the world of ``hpc-ray run`` or mpirun that this process belongs to, virtual
    nodes, or one node on this host. In ranks other than 0 it does not return.

    ``options``: num_cpus, num_gpus, resources, memory, object_store_memory, labels; amounts are for each node, except in a world
    that was launched without ``num_nodes``: there they are the driver's node's, who sets them once it has attached.

    Raises:
        LaunchError: it did not come up.
        ConfigurationError: impossible amounts.
    """
    outer = json.loads(os.environ.get(OPTIONS_VARIABLE, "{}"))
    options = {**outer, **{name: value for name, value in options.items() if value is not None}}
    if world.is_driver():
        return world.join_from_link(build)
    rank = world.discover()
    if rank is not None and rank.size > 1:
        if num_nodes is None:
            options = {**outer, "object_store_memory": options.get("object_store_memory")}
        return world.start_in_rank(
            rank,
            options,
            nodes=num_nodes,
            settings=settings,
            environment=environment,
            journal=journal,
            build=build,
            roles=roles,
            quiet=quiet,
        )
    if world.in_world():
        return world.join_from_link(build)
    return start_local(
        num_nodes=num_nodes or 1,
        settings=settings,
        environment=environment,
        journal=journal,
        build=build,
        roles=roles,
        **options,
    )


def start_local(
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: dict[str, float] | None = None,
    memory: int | None = None,
    object_store_memory: int | None = None,
    labels: dict[str, str] | None = None,
    settings: Settings | None = None,
    num_nodes: int = 1,
    environment: dict[str, str] | None = None,
    journal: str = "",
    detached: bool = False,
    build: str = "",
    roles: dict[str, str] | None = None,
) -> Attachment:
    """Starts a cluster on this host that lives for this process (or, ``detached``, until ``hpc-ray stop``), and attaches.

    With ``num_nodes`` > 1 these are virtual nodes that share nothing but MPI. Amounts are for each node. ``roles`` replaces
    entry points (tests).

    Raises:
        LaunchError: it did not come up; the text has what the node printed.
        ConfigurationError: impossible amounts.
    """
    if num_nodes < 1:
        raise ConfigurationError(f"num_nodes must be at least 1, it is {num_nodes}")
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "resources": resources,
        "memory": memory,
        "object_store_memory": object_store_memory,
        "labels": labels,
    }
    if num_nodes > 1:
        virtual = world.start_virtual(
            num_nodes, options, settings=settings, environment=environment, journal=journal, build=build, roles=roles
        )
        try:
            return connect(virtual.session, 0, owned=virtual, build=build)
        except BaseException:
            virtual.close()
            raise
    node = NodeProcess(roles=roles)
    try:
        session.sweep()
        name = session.new_name()
        config = node_config(
            session_name=name,
            settings=settings,
            environment=environment,
            journal=journal,
            **options,
        )
        node.configure(config, detached=detached)
        node.wait_ready()
        attachment = connect(name, owned=None if detached else node, build=build)
    except BaseException as error:
        printed = node.stderr() if node._errors >= 0 else ""
        node.kill()
        if isinstance(error, LaunchError) and printed and printed not in str(error):
            raise LaunchError(f"{error}{printed}") from None
        raise
    if detached:
        node.release()
    return attachment


def is_detached(name: str) -> bool:
    """Whether a running session was started to outlive its drivers."""
    nodes = [node for session_name, node in session.running() if session_name == name]
    for node in nodes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                connection.connect(f"\0hpc_ray/{os.getuid()}/{name}/{node}")
                connection.settimeout(5)
                note, descriptors = channel.receive_note(connection)
            except OSError:
                continue
            for descriptor in descriptors:
                os.close(descriptor)
            return bool(note and note.get("detached"))
    return False


def stop_session(name: str, timeout_s: float = 15.0) -> bool:
    """Ends a session's nodes on this host and waits; False when it does not run.

    Raises:
        LaunchError: it has not ended in time.
    """
    nodes = [node for session_name, node in session.running() if session_name == name]
    for node in sorted(nodes, reverse=True):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                connection.connect(f"\0hpc_ray/{os.getuid()}/{name}/{node}")
                connection.settimeout(timeout_s)
                note, descriptors = channel.receive_note(connection)
                for descriptor in descriptors:
                    os.close(descriptor)
                if note is None:
                    continue
                channel.send_note(connection, {"stop": "hpc-ray stop"})
                while channel.receive_note(connection)[0] is not None:
                    pass
            except TimeoutError:
                raise LaunchError(f"node {node} of session {name} has not ended within {timeout_s:g} s") from None
            except OSError:
                continue
    return bool(nodes)

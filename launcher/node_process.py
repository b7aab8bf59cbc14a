"""A node of this host, from the side of whoever starts it: its description, its process, its end.

Used by ``local`` (drivers), ``link`` (ranks).

NODE-1 (no orphan): a node lives as long as we hold its control channel, so it ends with us, however we end; a fork of this
process holds nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import msgspec

from hpc_ray.config import NodeConfig, Settings, encode_config
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import channel, host, mpi_files, session
from hpc_ray.slurm import signals

_MIN_STORE_BYTES = 64 << 20
_STORE_FRACTION = 0.3  # of the available memory, as Ray


def node_config(
    *,
    session_name: str,
    node: int = 0,
    nodes: int = 1,
    share: int = 1,
    share_index: int = 0,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: dict[str, float] | None = None,
    memory: int | None = None,
    object_store_memory: int | None = None,
    labels: dict[str, str] | None = None,
    settings: Settings | None = None,
    has_link: bool = False,
    environment: dict[str, str] | None = None,
    python_path: list[str] | None = None,
    working_dir: str = "",
    journal: str = "",
) -> NodeConfig:
    """The description of a node on this host, which has no folder yet; what is not given is discovered, and divided by ``share`` (virtual
    nodes).

    Raises:
        ConfigurationError: amounts that cannot be, or more memory than the machine or cgroup has.
    """
    ip = host.ip_address()
    node_id = os.urandom(28).hex()
    total, available = host.memory_bytes()
    for name, amount in {**(resources or {}), "num_cpus": num_cpus, "num_gpus": num_gpus}.items():
        if amount is not None and not 0 <= amount < float("inf"):
            raise ConfigurationError(f"{name} must be a number that is not negative, it is {amount}")
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ConfigurationError(f"use the argument for {name!r}, not the resources dictionary")
    cpus = float(max(1, host.cpu_count() // share)) if num_cpus is None else float(num_cpus)
    environment = dict(environment or {})
    gpus: float
    if num_gpus is None:
        ids = host.gpu_ids()
        mine = ids[len(ids) * share_index // share : len(ids) * (share_index + 1) // share]
        gpus = float(len(mine))
        if ids and (share > 1 or host.VISIBLE_GPUS in os.environ):  # the node's process may have been started seeing fewer
            environment.setdefault(host.VISIBLE_GPUS, ",".join(mine))
    else:
        gpus = float(num_gpus)
    store = int(object_store_memory) if object_store_memory else int(available * _STORE_FRACTION) // share
    store = max(store, _MIN_STORE_BYTES) if not object_store_memory else store
    if store < 1 << 20:
        raise ConfigurationError(f"object_store_memory is {store} bytes; at least 1 MiB (1048576) is needed")
    work = int(memory) if memory is not None else max(0, available // share - store)
    for name, amount in (("object_store_memory", store), ("memory", work if memory is not None else 0)):
        if amount * share > total:
            raise ConfigurationError(
                f"{name} of {amount / 2**30:.2f} GiB{f' on each of {share} nodes of this host' if share > 1 else ''} was "
                f"asked for, but the machine (or this cgroup or Slurm job) has {total / 2**30:.2f} GiB; ask for less"
            )
    amounts = {"CPU": cpus, "GPU": gpus, "memory": float(work), "object_store_memory": float(store)}
    amounts[f"node:{ip}"] = 1.0
    if node == 0:
        amounts["node:__internal_head__"] = 1.0
    all_labels = {"ray.io/node-id": node_id}
    model = host.gpu_model() if gpus else ""
    if model:
        kind = model.replace("NVIDIA", "").replace("Tesla", "").split()[0].split("-")[0]
        amounts.setdefault(f"accelerator_type:{kind}", 1.0)
        all_labels["ray.io/accelerator-type"] = kind
    amounts.update({name: float(amount) for name, amount in (resources or {}).items()})
    all_labels.update(labels or {})
    return NodeConfig(
        session=session_name,
        session_dir="",
        node=node,
        node_id=node_id,
        hostname=socket.gethostname(),
        ip=ip,
        resources={name: amount for name, amount in amounts.items() if amount},
        labels=all_labels,
        arena_bytes=store,
        nodes=nodes,
        has_link=has_link,
        settings=settings or Settings.from_environment(),
        environment=environment,
        python_path=list(sys.path) if python_path is None else python_path,
        working_dir=working_dir or os.getcwd(),
        journal=journal,
    )


# ------------------------------------------------------------------ the node process


class NodeProcess:
    """A node process that this process started, by the end of its control channel that we hold."""

    def __init__(self, *, roles: dict[str, str] | None = None):
        """Starts it; it loads its modules and waits for ``configure``."""
        self.session = ""
        self.node = 0
        self._began = time.time()
        self.folder = ""
        self.control, theirs = channel.pair()
        channel.let_go_in_forks(self.control)
        self._errors = os.memfd_create("hpc_ray-node-stderr")
        command = python_command("-m", "hpc_ray.launcher.node", str(theirs.fileno()))
        if roles:
            command.append(json.dumps(roles))
        environment = session.scrubbed_environment()
        environment["SPT_NOENV"] = "1"  # setproctitle would wipe what /proc/PID/environ shows, our marks too (SESSION-1)
        held = signals.hold_back()
        with open(os.devnull, "rb") as null:
            self.process = subprocess.Popen(
                command,
                stdin=null,
                stdout=self._errors,
                stderr=self._errors,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        signals.let_come(held)
        theirs.close()

    def configure(
        self, config: NodeConfig, *, detached: bool = False, outlives: bool = False, cpus: set[int] | None = None
    ) -> None:
        """Makes its folder, and says what the node is and which CPUs it may use (None: those it has). ``wait_ready`` comes next.
        ``detached``: it does not end with us; ``outlives``: it does, but we are not a driver's. Raises LaunchError."""
        self.session, self.node = config.session, config.node
        self.folder, lock = session.make_dir(config.session, config.node)
        config = msgspec.structs.replace(config, session_dir=self.folder)
        self._timeout_s = config.settings.start_timeout_s
        note = {"config": encode_config(config), "detached": detached, "outlives": outlives or detached, "cpus": sorted(cpus or ())}
        try:
            channel.send_note(self.control, note, (lock,))
        except OSError:
            pass  # dead already; wait_ready has the words for it
        finally:
            os.close(lock)

    def wait_ready(self) -> None:
        """Until the roles have been forked.

        Raises:
            LaunchError: it failed or took longer than ``start_timeout_s``; with what the node printed.
        """
        self.control.settimeout(self._timeout_s)
        try:
            note, _ = channel.receive_note(self.control)
            self.control.settimeout(None)
        except TimeoutError:
            text = f"the node was not up after {self._timeout_s:g} s (HPC_RAY_START_TIMEOUT_S)" + self.stderr()
            self.kill()
            raise LaunchError(text) from None
        if note is not None and "ready" in note:
            return
        reason = (note or {}).get("error") or (note or {}).get("died")
        words = (f": {reason}" + self.stderr()) if reason else self.last_words()
        self.kill()
        raise LaunchError(f"the node did not start{words}")

    def last_words(self) -> str:
        """How it has ended, where it has within a while, and what it printed; to go on with a sentence."""
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        return f": the node process ended with {self.process.poll()}{self.stderr()}"

    def stderr(self) -> str:
        """What it printed lately, as a paragraph for an error."""
        size = os.fstat(self._errors).st_size
        text = os.pread(self._errors, 4000, max(0, size - 4000)).decode("utf-8", "replace").strip()
        return f"\nIt printed:\n{text}" if text else ""

    def death(self) -> str:
        """How it was killed, where it was."""
        return session.death_text("the node process", self.process)

    def end(self, reason: str) -> None:
        """Begins its end in order; its drivers hear the reason."""
        try:
            channel.send_note(self.control, {"stop": reason})
        except OSError:
            pass
        self.control.close()

    def close(self, timeout_s: float = 10.0) -> int | None:
        """Ends the node in order and waits for it; its exit code."""
        self.end("whoever started this node has closed it")
        try:
            code: int | None = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        return code

    def kill(self) -> None:
        """Makes sure that nothing of it is left; harmless when it ended in order."""
        was_running = self.process.poll() is None
        if was_running:
            self.process.kill()
            self.process.wait()
        if was_running or self.process.returncode < 0:
            session.kill_leftovers(self.session, str(self.node), self.process.pid)
            mpi_files.Leftovers(self._began).remove()
            if self.folder:
                session.remove_node(self.folder, self._began)
        elif self.folder:
            session.remove_dir(self.folder)  # gone already where it ended in order
        self.control.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def release(self) -> None:
        """Forgets a detached node: it goes on without us."""
        self.control.close()
        os.close(self._errors)
        self._errors = -1
        self.process.returncode = 0  # Popen would warn of a child that still runs

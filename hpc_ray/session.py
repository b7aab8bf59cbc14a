"""One session of this process: ``init``, ``shutdown``, and the connection in between."""

from __future__ import annotations

import atexit
import copy
import json
import logging
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from hpc_ray import as_ray
from hpc_ray.client import context, refs
from hpc_ray.client.client import Client
from hpc_ray.client.logging_config import LoggingConfig, use_logging
from hpc_ray.client.waiting import Waiter
from hpc_ray.config import Settings
from hpc_ray.exceptions import LaunchError, LocalRayletDiedError, RayError
from hpc_ray.ids import GCS_ADDRESS, raylet_address
from hpc_ray.job_config import JobConfig
from hpc_ray.packing import check, packed
from hpc_ray.protocol import (
    UNIT,
    FinishJob,
    FollowLogs,
    InstallEnvironment,
    LogLines,
    ProcessKind,
    ProcessLeaving,
    RegisterJob,
)
from hpc_ray.version import __commit__, __version__

_lock = threading.RLock()
_attachment: Any = None
_dashboard: Any = None


class Context(Mapping):
    """What ``init`` connected to. Also a context manager that ends the session."""

    def __init__(self, address_info: dict[str, Any]):
        self.address_info = address_info
        self.python_version = ".".join(map(str, sys.version_info[:3]))
        self.ray_version = __version__
        self.ray_commit = __commit__
        self.dashboard_url = address_info["webui_url"]

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Any:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """End the session."""
        shutdown()

    def __repr__(self) -> str:
        return f"Context(session={self.address_info.get('session')!r}, node_id={self.address_info.get('node_id')!r})"


def is_initialized() -> bool:
    """Whether this process is connected to a cluster. Does not block."""
    return context.client is not None


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    object_store_memory: int | None = None,
    local_mode: bool = False,
    ignore_reinit_error: bool = False,
    include_dashboard: bool | None = None,
    dashboard_host: str = "127.0.0.1",
    dashboard_port: int | None = None,
    job_config: Any = None,
    configure_logging: bool = True,
    logging_level: int | str = "info",
    logging_format: str | None = None,
    logging_config: Any = None,
    log_to_driver: bool | None = None,
    namespace: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    enable_resource_isolation: bool = False,
    system_reserved_cpu: float | None = None,
    system_reserved_memory: int | None = None,
    cgroup_path: str | None = None,
    proxy_server_url: str | None = None,
    **kwargs: Any,
) -> Context:
    """Connect to a cluster, or start one on this machine and connect to that. Blocks until the first node is up.

    Args:
        address: None starts a cluster, or joins the one that the launcher (``mpirun``, ``srun``, ``hpc-ray run``) made for
            this program; "auto" joins a running one of this user (the launcher's, in a program of Ray's under ``hpc-ray run
            --as-ray``); otherwise the name of a session.
        num_cpus, num_gpus, resources, labels, object_store_memory (bytes): of the node; what is not given is discovered. In a
            launched world they are of this process's node, and the other nodes have none of the resources that are given
            here: leave them out, or give them to the launcher, to use all nodes. The store's size is
            each node's, and at most what the launcher gave it.
        ignore_reinit_error: a second ``init`` keeps the session instead of raising.
        configure_logging, logging_level, logging_format: of the logger "hpc_ray" in this process.
        logging_config: a LoggingConfig (or its fields as a dict): the root loggers of this process and of all tasks and actors.
        log_to_driver: show what workers print (default: yes).
        include_dashboard: serve a page on the session, its lists as JSON and its metrics from this process; the context's
            ``dashboard_url`` says where. Default: if another host or a port is given. Needs the extra ``dashboard``; without that there
            is a warning and no page.
        dashboard_host, dashboard_port: where; default: 127.0.0.1 and the first free port from 8265 on.
        namespace: of named actors; default: that of job_config, or one of its own.
        runtime_env: of all tasks and actors that do not say another (see ``RuntimeEnv``). Local folders are sent to the nodes.
        job_config: a ``JobConfig``; ``runtime_env`` and ``namespace`` go before its own.
        num_nodes (keyword): this many virtual nodes, which share nothing but MPI, or TCP (``HPC_RAY_TRANSPORT=tcp``); the amounts are
            each node's.
        object_spilling_directory (keyword): a folder on a disk of each node, for objects that the store has no room for; default:
            the session's folder, below ``SLURM_TMPDIR``, ``TMPDIR`` or /tmp.
        _system_config (keyword): settings by name, see ``config.Settings``.
        _memory (keyword): bytes that tasks and actors may ask for with their option ``memory``.
        The rest is Ray's and stands for what hpc_ray does not have; any other value than the default is refused.

    Raises:
        RuntimeError: called twice, or an option that is unknown or not offered here.
        ValueError, TypeError, AssertionError: amounts, names or a runtime environment that cannot be.
        ConnectionError: there is no cluster at this address.
        LaunchError: the cluster did not come up.
        OSError: the dashboard's port is taken.
    """
    global _attachment
    if sys.is_finalizing():  # a finaliser calls: threads cannot be started any more, and waiting for one would never end
        raise RuntimeError("The interpreter is about to end: no session can be started any more")
    from hpc_ray.launcher import local, world  # what starts clusters is imported where one is started

    with _lock:
        _leave_to_parent()
        if context.client is not None:
            if ignore_reinit_error:
                logging.getLogger("hpc_ray").info("init() was called again; the session goes on as it is")
                return Context(_address_info(context.client))
            raise RuntimeError(
                "Maybe you called hpc_ray.init twice by accident? This error can be suppressed by passing in "
                "'ignore_reinit_error=True' or by calling 'hpc_ray.shutdown()' prior to 'hpc_ray.init()'."
            )
        num_nodes = kwargs.pop("num_nodes", None)
        system = dict(kwargs.pop("_system_config", None) or {})
        folder = kwargs.pop("object_spilling_directory", None)
        if folder is not None:
            system["object_spilling_directory"] = folder
        memory = kwargs.pop("_memory", None)
        kwargs.pop("_redis_password", None)  # libraries pass it on; there is no Redis that it could protect
        if kwargs:
            raise RuntimeError(f"Unknown keyword argument(s): {', '.join(sorted(kwargs))}; see help(hpc_ray.init)")
        _refuse_what_is_not_offered(
            local_mode=local_mode,
            enable_resource_isolation=enable_resource_isolation,
            system_reserved_cpu=system_reserved_cpu,
            system_reserved_memory=system_reserved_memory,
            cgroup_path=cgroup_path,
            proxy_server_url=proxy_server_url,
        )
        job = _job_config(job_config, runtime_env)
        if namespace is None:
            namespace = job.ray_namespace
        if namespace is not None and not isinstance(namespace, str):
            raise TypeError(f"namespace must be None or a string, not {type(namespace).__name__}")
        if namespace == "":
            raise ValueError('"" is not a namespace; leave it out for one of its own')
        _check_amounts(num_cpus, num_gpus, resources, object_store_memory)
        if num_nodes is not None and (not isinstance(num_nodes, int) or num_nodes < 1):
            raise ValueError(f"num_nodes must be a whole number from 1 on, it is {num_nodes!r}")
        if configure_logging:
            _configure_logging(logging_level, logging_format)
        logs = _logging_text(logging_config)
        settings = Settings.from_environment(system)
        given: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "memory": memory,
            "resources": resources,
            "labels": labels,
            "object_store_memory": object_store_memory,
        }
        if address == "auto" and local.is_launched():
            if as_ray.VARIABLE not in os.environ:
                raise ConnectionError(
                    'this program was launched with a cluster of its own: call init() without an address. address="auto" joins one that '
                    "somebody else has started, which HPC_RAY_ADDRESS may name here"
                )
            address = None  # a program of Ray's, as it is: it means the cluster that it was launched with
        _fill_standard_descriptors()
        if address is None or address == "local":
            attachment = local.start_cluster(num_nodes=num_nodes, settings=settings, build=__version__, **given)
        else:
            refused = [name for name, value in {**given, "num_nodes": num_nodes}.items() if value is not None]
            if refused:
                raise ValueError(f"When connecting to an existing cluster, {', '.join(refused)} must not be provided: it has its own.")
            attachment = _attach(address)
        try:
            client = _connect(attachment, namespace, job, settings.log_to_driver if log_to_driver is None else log_to_driver)
            if world.in_world() and num_nodes is None:
                _set_resources(client, num_cpus, num_gpus, resources, labels, object_store_memory)
        except BaseException:
            if context.client is not None:
                context.client.close()
                context.set_client(None)
            attachment.close()
            raise
        use_logging(logs)
        _attachment = attachment
        atexit.register(shutdown)
        if include_dashboard or (include_dashboard is None and (dashboard_host != "127.0.0.1" or dashboard_port is not None)):
            serve_dashboard(dashboard_host, dashboard_port)
        return Context(_address_info(client))


def serve_dashboard(host: str | None, port: int | None) -> str | None:
    """Serve a page on this process's session, until it ends; host and port. None where what that needs is not installed; then a
    warning says so.

    Raises:
        OSError: the port is taken; the session has ended then.
    """
    global _dashboard
    try:
        from hpc_ray.dashboard.server import Dashboard
    except ImportError as error:
        warnings.warn(
            f"there is no dashboard, since {error.name} is not installed; the session goes on without. "
            "Install it with pip install 'hpc-ray[dashboard]'",
            stacklevel=3,
        )
        return None
    try:
        _dashboard = Dashboard(host, port)
    except OSError:
        shutdown()
        raise
    return _dashboard.address


_INSTEAD = {
    "local_mode": "it was removed from Ray; run the function without remote() to debug it",
    "enable_resource_isolation": "the launcher (Slurm, systemd) owns the cgroups",
    "system_reserved_cpu": "say num_cpus instead",
    "system_reserved_memory": "say object_store_memory instead",
    "cgroup_path": "the launcher (Slurm, systemd) owns the cgroups",
    "proxy_server_url": "nothing is reached through a proxy: there are no ports",
}


def _job_config(given: Any, runtime_env: dict[str, Any] | None) -> JobConfig:
    """As given, with ``runtime_env`` instead of its own if there is one; checked.

    Raises:
        TypeError, ValueError: it cannot be.
    """
    if isinstance(given, dict):
        given = JobConfig.from_json(given)
    if not isinstance(given, (JobConfig, type(None))):
        raise TypeError(f"job_config must be a JobConfig, not {type(given).__name__}")
    job = copy.copy(given) if given is not None else JobConfig()
    if job.jvm_options:
        raise ValueError("job_config has jvm_options: there is no Java here")
    if job.code_search_path:
        raise ValueError("job_config has a code_search_path: use runtime_env={'py_modules': [...]}, or PYTHONPATH")
    if runtime_env:
        job.set_runtime_env(runtime_env)
    if job.runtime_env:
        check(job.runtime_env)
    return job


def _refuse_what_is_not_offered(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise RuntimeError(f"init({name}={value!r}) is not offered by hpc_ray: {_INSTEAD[name]}")


def _check_amounts(
    num_cpus: float | None, num_gpus: float | None, resources: dict[str, float] | None, object_store_memory: int | None
) -> None:
    for name, value in {"num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_memory": object_store_memory}.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, not {type(value).__name__}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number and not negative, it is {value}")
    if resources is not None and not isinstance(resources, dict):
        raise TypeError(f"resources must be a dict of names and amounts, not {type(resources).__name__}")
    for name, value in (resources or {}).items():
        assert name not in ("CPU", "GPU", "memory", "object_store_memory"), (
            f"use {_ARGUMENT[name]}=... instead of resources={{{name!r}: ...}}"
        )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"the amount of the resource {name!r} must be a number, not {type(value).__name__}")
        if not 0 <= value < float("inf") or value != int(value):
            raise ValueError(f"a node's resources are whole numbers and not negative; {name!r} is {value}")


_ARGUMENT = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory", "object_store_memory": "object_store_memory"}


def _configure_logging(level: int | str, form: str | None) -> None:
    logger = logging.getLogger("hpc_ray")
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if form is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(form))
        logger.handlers[:] = [handler]


def _set_resources(
    client: Client,
    num_cpus: float | None,
    num_gpus: float | None,
    resources: dict[str, float] | None,
    labels: dict[str, str] | None,
    object_store_memory: int | None,
) -> None:
    """In a launched world: this node has what ``init`` was given, and what it was given is nowhere else."""
    if object_store_memory is not None and object_store_memory > client.config.arena_bytes:
        raise ValueError(
            f"object_store_memory is {object_store_memory} bytes, but the nodes of this world were launched with "
            f"{client.config.arena_bytes}; give it to the launcher: hpc-ray run --object-store-memory {object_store_memory}"
        )
    amounts = {**(resources or {}), "CPU": num_cpus, "GPU": num_gpus}
    units = {name: round(amount * UNIT) for name, amount in amounts.items() if amount is not None}
    client.query(GCS_ADDRESS, "set_resources", resources=units, labels=labels or {}, object_store_memory=object_store_memory or 0)


def _attach(address: str) -> Any:
    from hpc_ray.launcher import local

    try:
        return local.attach(address, build=__version__)
    except LaunchError as error:
        raise ConnectionError(str(error)) from None


def observe(address: str | None) -> None:
    """Join a running session without being a program of it: for commands that only look.

    Raises:
        ConnectionError: there is no session at this address (default: the newest).
    """
    global _attachment
    with _lock:
        attachment = _attach(address or "auto")
        client = Client(attachment.segment, attachment.lane, attachment.config, ProcessKind.DRIVER, attachment.worker_id, os.getpid())
        client.adopt(attachment.welcome, attachment.early)
        attachment.on_node_death = lambda text: client.fail(LocalRayletDiedError(f"the session is over: {text}"))
        context.set_client(client)
        _attachment = attachment
        atexit.register(shutdown)


def _connect(attachment: Any, namespace: str | None, job: JobConfig, log_to_driver: bool) -> Client:
    config = attachment.config
    client = Client(attachment.segment, attachment.lane, config, ProcessKind.DRIVER, attachment.worker_id, os.getpid())
    client.adopt(attachment.welcome, attachment.early)
    attachment.on_node_death = lambda text: client.fail(LocalRayletDiedError(f"the session is over: {text}"))
    client.on_shutdown = lambda message: client.fail(
        LocalRayletDiedError(f"the session was shut down: {attachment.explain(message.reason)}")
    )
    name = namespace or str(uuid.uuid4())
    try:
        environment = _register_job(client, name, job)
    except BaseException:
        client.close()
        raise
    context.namespace = name
    context.runtime_env = environment
    context.detached = job._default_actor_lifetime == "detached"
    context.set_client(client)
    if environment and json.loads(environment).get("config", {}).get("eager_install", True):
        for node in range(config.nodes):
            client.send(raylet_address(node), InstallEnvironment(environment))
    client.interrupts.install()
    if log_to_driver:
        client.on_log = _print_log
        client.send(client.raylet, FollowLogs(client.address, client.job_id, True))
    return client


def _register_job(client: Client, name: str, job: JobConfig) -> str:
    """Tell the cluster about this program; its runtime environment as it travels."""
    config = client.config
    environment = packed(job.runtime_env, client)
    settings = {
        "python_path": sys.path,
        "working_dir": os.getcwd(),
        "runtime_env": json.loads(environment or "{}"),
        "metadata": job.metadata,
        "default_actor_lifetime": job._default_actor_lifetime,
    }
    answer = client.request(
        GCS_ADDRESS,
        lambda request_id: RegisterJob(request_id, client.address, os.getpid(), " ".join([sys.executable, *sys.argv]), name, settings),
        config.settings.start_timeout_s,
    )
    client.use_job(answer.job_id)
    if config.nodes > 1:
        client.query(GCS_ADDRESS, "wait_nodes", config.settings.start_timeout_s, count=config.nodes)
    return environment


def _logging_text(logging_config: Any) -> str:
    """As it travels. Raises TypeError for what is no LoggingConfig and no dict."""
    if logging_config is None:
        return ""
    if isinstance(logging_config, dict):
        logging_config = LoggingConfig.from_dict(logging_config)
    if not isinstance(logging_config, LoggingConfig):
        raise TypeError(f"logging_config must be a LoggingConfig or a dict of its fields, not {type(logging_config).__name__}")
    return json.dumps(logging_config.to_dict())


def _print_log(message: LogLines) -> None:
    stream = sys.stderr if message.is_error else sys.stdout
    client = context.client
    where = "" if client is None or client.welcome is None or message.ip == client.welcome.ip else f", ip={message.ip}"
    who = f"{message.name} pid={message.pid}{where}" if message.pid else message.name  # the raylet speaks for itself
    for line in message.lines:
        print(f"({who}) {line}", file=stream)


def _address_info(client: Client) -> dict[str, Any]:
    welcome = client.welcome
    assert welcome is not None
    return {
        "node_ip_address": welcome.ip,
        "node_id": welcome.node_id.hex(),
        "session": welcome.session,
        "session_dir": welcome.session_dir,
        "address": welcome.session,
        "gcs_address": welcome.session,
        "webui_url": _dashboard.address if _dashboard is not None else "",
        # Of what there is not:
        "redis_address": None,
        "object_store_address": "",
        "raylet_socket_name": "",
        "metrics_export_port": -1,
        "dashboard_agent_listen_port": -1,
    }


def install_as_ray() -> None:
    """From now on ``import ray`` gives hpc_ray, in this process and in the workers of the sessions that it starts.

    Call it before ``init()`` and before anything imports ``ray``; a second call does nothing. ``hpc-ray run --as-ray`` does it for
    a program that cannot be changed.

    Raises:
        RuntimeError: Ray itself has been imported, or a session runs, whose workers would not know of it.
    """
    if as_ray.VARIABLE in os.environ and (context.is_worker or "ray" in sys.modules):
        return
    if "ray" in sys.modules:
        raise RuntimeError("Ray itself has been imported in this process; call hpc_ray.install_as_ray() before `import ray`")
    if context.client is not None:
        raise RuntimeError("call hpc_ray.install_as_ray() before init(): the workers of this session have started without it")
    as_ray.install()


def shutdown(*, wait_for_processes: bool = False, _exiting_interpreter: bool = False) -> None:
    """End this process's session; a cluster that ``init`` started ends with it. Always blocks until it has. Harmless without one."""
    global _attachment, _dashboard
    with _lock:
        _leave_to_parent()
        client, attachment = context.client, _attachment
        if client is None:
            return
        atexit.unregister(shutdown)
        if _dashboard is not None:
            _dashboard.close()
            _dashboard = None
        use_logging("")
        context.set_client(None)
        context.runtime_env, context.detached = "", None
        _attachment = None
        if attachment is None:
            return  # a worker: its process ends by itself
        attachment.on_node_death = client.on_shutdown = None
        client.interrupts.remove()
        if client.broken is None:
            _show_last_lines(client)
            if attachment.detached:
                _leave_history(client)
            client.send(GCS_ADDRESS, FinishJob(client.job_id))
            client.send(client.raylet, ProcessLeaving("shutdown"))
            client.lane.flush()
        client.close()
        attachment.close()
        client.let_go()


def _leave_to_parent() -> None:
    """In a fork of a program or worker: the session is its parent's, so it is not connected, and ends nothing."""
    global _attachment, _dashboard
    client = context.client
    if client is not None and client.pid != os.getpid():
        context.set_client(None)
        refs.install()
        _attachment = _dashboard = None


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, as daemons do, nothing of ours may come: what is printed would go there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest that is free


def _leave_history(client: Client) -> None:
    """The cluster goes on, and others may ask what ran here: this program's records go to the raylet, and its idle workers are
    given back, so that they leave theirs too. The raylet's answer makes sure that it has heard of this before the GCS's word that the
    job is over."""
    client.records.leave()
    with client.lock:
        client.tasks.give_back_idle()
    try:
        client.query(client.raylet, "statistics", _LAST_LINES_S)
    except (KeyboardInterrupt, RayError):
        pass  # in a hurry, or the node is gone


def _show_last_lines(client: Client) -> None:
    """What workers printed before the results that the program has seen is shown before it ends."""
    if client.on_log is None:
        return
    with client.lock:
        client.log_ended = Waiter(max(1, client.config.nodes - len(client.dead_nodes)))
    client.send(client.raylet, FollowLogs(client.address, client.job_id, False))
    try:
        shown = -1
        while not client.log_ended.done and shown != client.lines_shown:  # as long as lines come
            shown = client.lines_shown
            client.block(client.log_ended, _LAST_LINES_S)
        client.show_log_lines()
    except (KeyboardInterrupt, LocalRayletDiedError):
        pass  # in a hurry, or the node is gone


_LAST_LINES_S = 10.0


def ensure_connected() -> Client:
    """The client; starts a session if there is none."""
    client = context.client
    if client is None:
        init()
        client = context.client
        assert client is not None
    return client



"""Which hosts a cluster over TCP has, and how a node is started on another one. All but ``is_here`` is pure.

Relied on by ``cli``, which asks, and ``member``, whose head starts the others: through Slurm where there is an allocation, else by an
agent such as ssh, which gets ``HOST COMMAND`` as mpirun's agents do.
"""

from __future__ import annotations

import re
import shlex
import socket
from typing import Any, NamedTuple

from hpc_ray.exceptions import ConfigurationError
from hpc_ray.launcher.world import MEMBER_COMMAND
from hpc_ray.transport import tcp

DEFAULT_AGENT = "ssh -x -o BatchMode=yes"
# What nodes started by an agent get of our environment; all else is the other host's own.
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS")


class Launch(NamedTuple):
    """How some of the nodes are started."""

    argv: list[str]
    hosts: list[str]  # one node on each
    by_stdin: bool  # what they need to know goes there, and not into the environment


def read_hostfile(text: str) -> list[str]:
    """Hosts in the way of mpirun's files: one on a line, ``slots=4`` or ``:4`` after it, ``#`` before remarks; each once."""
    hosts = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words:
            hosts.append(_without_slots(words[0]))
    return list(dict.fromkeys(hosts))


def read_hosts(text: str) -> list[str]:
    """``node1,node2`` as after --hosts; each once."""
    return list(dict.fromkeys(_without_slots(word.strip()) for word in text.split(",") if word.strip()))


def _without_slots(word: str) -> str:
    host, colon, slots = word.rpartition(":")
    return host if colon and slots.isdigit() and ":" not in host else word


def expand_nodelist(text: str) -> list[str]:
    """Slurm's way to write hosts, ``node[1-3,07],login``, in full.

    Raises:
        ConfigurationError: it cannot be read.
    """
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for fixed, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            endings = [fixed] if fixed else _numbers(ranges, text)
            names = [name + ending for name in names for ending in endings]
        hosts += names
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    found = []
    for one in ranges.split(","):
        low, dash, high = one.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ConfigurationError(f"the list of hosts {text!r} cannot be read")
        found += [f"{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
    return found


def agent_launch(host: str, agent: str, folder: str) -> Launch:
    """A node on one host, by ``agent HOST COMMAND``. What it must know, the secret too, goes by stdin: command lines can be seen."""
    command = f"cd {shlex.quote(folder)} 2>/dev/null; exec {shlex.join([*MEMBER_COMMAND, '-'])}"
    return Launch([*shlex.split(agent), host, command], [host], by_stdin=True)


def srun_launch(hosts: list[str], cpus: int | None) -> Launch:
    """A step of the Slurm job with a node on each of these hosts, which outlives those that are lost. ``cpus``: of each host; None:
    what Slurm gives."""
    argv = ["srun", "--mpi=none", "--no-kill", "--kill-on-bad-exit=0", "--overlap", "--input=none", "--cpu-bind=none"]
    argv += ["--nodes", str(len(hosts)), "--ntasks", str(len(hosts)), "--ntasks-per-node=1", "--nodelist", ",".join(hosts)]
    if cpus is not None:
        argv += ["--cpus-per-task", str(cpus)]
    return Launch([*argv, *MEMBER_COMMAND], hosts, by_stdin=False)


def cpus_per_node(environment: dict[str, str]) -> int | None:
    """CPUs that the job has on every one of its nodes, as Slurm writes it: ``4(x2),2``; None where it does not say."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return min(map(int, counts)) if counts else None


def passed_variables(environment: dict[str, str]) -> dict[str, str]:
    """Of our environment, for nodes that an agent starts."""
    return {name: text for name, text in environment.items() if name in _PASSED or _is_setting(name)}


def _is_setting(name: str) -> bool:
    return name.startswith("HPC_RAY_") and not name.startswith("HPC_RAY_LAUNCH_")


def is_here(host: str) -> bool:
    """Whether a host's name or address is this host's. Asks the resolver."""
    mine = socket.gethostname()
    if host in (mine, mine.partition(".")[0], "localhost"):
        return True
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return any(tcp.source_towards(str(address[0])) == address[0] for *_, address in found)


def split(hosts: list[str]) -> tuple[bool, list[str]]:
    """Whether this host is among them, and the others."""
    others = [host for host in hosts if not is_here(host)]
    return len(others) < len(hosts), others


def plan_launches(others: list[str], agent: str | None, folder: str, environment: dict[str, str]) -> list[Launch]:
    """How nodes on these other hosts are started: as a step of the Slurm job that this is, unless an agent was named."""
    if not others:
        return []
    if agent is None and "SLURM_JOB_ID" in environment:
        return [srun_launch(others, cpus_per_node(environment))]
    return [agent_launch(host, agent or DEFAULT_AGENT, folder) for host in others]


def as_json(launches: list[Launch]) -> list[dict[str, Any]]:
    return [launch._asdict() for launch in launches]

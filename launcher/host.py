"""What this host lets us use: CPUs, memory, GPUs, address. Read from affinity, cgroups, Slurm and /proc, by files only.

Relied on by ``local`` and ``link``. Starts no program and opens no connection.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import socket
import struct

from hpc_ray.exceptions import ConfigurationError

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

_CGROUP = "/sys/fs/cgroup"


def read(path: str) -> str:
    """A small file of the kernel's, "" if it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _cgroup_folders(controller: str) -> list[str]:
    """Folders of our cgroup and its parents, for version 2 and for this controller of version 1."""
    folders = []
    for line in read("/proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            roots = [_CGROUP, f"{_CGROUP}/unified"]
        elif controller in names.split(","):
            roots = [f"{_CGROUP}/{names}", f"{_CGROUP}/{controller}"]
        else:
            continue
        for root in roots:
            here = path.rstrip("/")
            while True:
                folders.append(root + here)
                if not here:
                    break
                here = here.rpartition("/")[0]
    return folders


def cpu_count() -> int:
    """CPUs for us: affinity, cgroup quota, Slurm; at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup_folders("cpu"):
        words = read(f"{folder}/cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            count = min(count, int(words[0]) / int(words[1]))
        quota, period = read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) > 0:
            count = min(count, int(quota) / int(period))
    granted = granted_cpus()
    if granted is not None:
        count = min(count, granted)
    return max(1, math.ceil(count))


def granted_cpus(environment: dict[str, str] | None = None) -> int | None:
    """How many CPUs of this host Slurm gave to the job or step; None outside of Slurm."""
    number = (os.environ if environment is None else environment).get("SLURM_CPUS_ON_NODE", "")
    return int(number) if number.isdigit() and int(number) else None


def cpuset() -> set[int]:
    """CPUs that our cgroup lets us use; every CPU of the machine where it does not say."""
    for folder in _cgroup_folders("cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            found = cpu_list(read(f"{folder}/{name}"))
            if found:
                return found
    return set(range(os.sysconf("SC_NPROCESSORS_CONF")))


def cpu_list(text: str) -> set[int]:
    """The kernel's way to write CPUs, like "0-3,8"; empty if it is not that."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def widened(bound: set[int], allowed: set[int], granted: int | None) -> set[int]:
    """CPUs for a node whose ranks were bound to ``bound``: all that this job was given here, and none of another job's.

    ``allowed`` is the cgroup's cpuset. Outside of Slurm (``granted`` None) it is ours. In Slurm it is, where it has no more CPUs than
    were granted; a larger one is shared with other jobs, and then the binding is all that says which CPUs are ours.
    """
    if granted is None or len(allowed) <= granted:
        return allowed
    return bound


def _memory_limits() -> list[tuple[int, int]]:
    limits = []
    for folder in _cgroup_folders("memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = read(f"{folder}/{limit_name}")
            if limit.isdigit() and int(limit) < 1 << 60:
                inactive = re.search(r"^(?:total_)?inactive_file (\d+)", read(f"{folder}/memory.stat"), re.MULTILINE)
                usage = int(read(f"{folder}/{usage_name}") or 0) - (int(inactive.group(1)) if inactive else 0)
                limits.append((int(limit), max(0, usage)))
    return limits


def memory_bytes() -> tuple[int, int]:
    """(total, available): the machine's, or the cgroup's or Slurm's where that is less."""
    info: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE))
    total = int(info.get("MemTotal", "0")) << 10
    available = int(info["MemAvailable"]) << 10 if "MemAvailable" in info else total
    for limit, usage in _memory_limits():
        total = min(total, limit)
        available = min(available, max(0, limit - usage))
    granted = granted_memory()
    if granted:
        total = min(total, granted)
        available = min(available, total)
    return total, available


def granted_memory(environment: dict[str, str] | None = None) -> int:
    """Bytes of this host's memory that Slurm gave to the job; 0 where it does not say (or gave all)."""
    source = os.environ if environment is None else environment

    def number(name: str) -> int:
        text = source.get(name, "")
        return int(text) if text.isdigit() else 0

    megabytes = number("SLURM_MEM_PER_NODE")
    if not megabytes:
        megabytes = number("SLURM_MEM_PER_CPU") * number("SLURM_CPUS_ON_NODE")
    if not megabytes:
        megabytes = number("SLURM_MEM_PER_GPU") * number("SLURM_GPUS_ON_NODE")
    return megabytes << 20


def gpu_ids() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the GPUs of /proc/driver/nvidia."""
    visible = os.environ.get(VISIBLE_GPUS)
    if visible is not None:
        ids = []
        for word in visible.split(","):
            if not word.strip() or word.strip() in ("-1", "NoDevFiles"):
                break
            ids.append(word.strip())
        return ids
    try:
        count = len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        try:
            count = sum(1 for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name))
        except OSError:
            count = 0
    return [str(i) for i in range(count)]


def joined(visible: list[str]) -> str:
    """What several ranks of a host see of its GPUs, each once, in the order of the ranks."""
    return ",".join(dict.fromkeys(word for text in visible for word in text.split(",") if word.strip()))


def gpu_model() -> str:
    """Name of the first GPU for labels, "" where there is none."""
    try:
        for name in sorted(os.listdir("/proc/driver/nvidia/gpus")):
            found = re.search(r"^Model:\s*(.+)$", read(f"/proc/driver/nvidia/gpus/{name}/information"), re.MULTILINE)
            if found:
                return found.group(1).strip()
    except OSError:
        pass
    return ""


def is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
            return True
        except OSError:
            pass
    return False


def interface_address(name: str) -> str:
    """The address of a network interface of this host, IPv4 where it has one; an address is its own.

    Raises:
        ConfigurationError: there is no such interface, or it has no address.
    """
    if is_address(name):
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntop(socket.AF_INET, answer[20:24])
        except OSError:
            pass
    for line in read("/proc/net/if_inet6").splitlines():
        number, _, _, scope, _, interface = line.split()
        if interface == name and scope == "00":  # global
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number))
    known = ", ".join(interface for _, interface in socket.if_nameindex())
    raise ConfigurationError(f"network_interface is {name!r}, which this host does not have, or without an address; it has {known}")


def first_address() -> str:
    """Of the first interface that has one, other than the loopback; "" where there is none."""
    for _, name in socket.if_nameindex():
        try:
            if name != "lo":
                return interface_address(name)
        except ConfigurationError:
            pass
    return ""


_SIOCGIFADDR = 0x8915


def ip_address() -> str:
    """Our address on the way out; a UDP socket is asked, nothing is sent. Where no way leads out, the first one that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return next(iter(local_addresses(read("/proc/net/fib_trie"))), "127.0.0.1")


def local_addresses(trie: str) -> list[str]:
    """This host's IPv4 addresses but for loopback, from the kernel's /proc/net/fib_trie, each once, in its order."""
    found = re.findall(r"\|-- (\d+\.\d+\.\d+\.\d+)\s+/32 host LOCAL", trie)
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]

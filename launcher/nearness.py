"""Which CPUs are next to which GPUs, by what the NVIDIA driver and the kernel say in files.

NEAR-1 (never wrong): where it is not certain which device a name means, nothing is said, and nobody is bound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hpc_ray.launcher import host

_GPUS = "/proc/driver/nvidia/gpus"
_DEVICES = "/sys/bus/pci/devices"


def host_wide(names: list[str], visible: list[str], variables: Mapping[str, str]) -> list[str]:
    """What these GPUs of CUDA_VISIBLE_DEVICES are called on the whole host; empty if that is not known. A pure function.

    Slurm counts anew in a job whose devices it confines, and says in another variable which of the host's they are.
    """
    if not all(name.isdigit() for name in names):
        return names  # UUIDs are the same everywhere
    granted = variables.get("SLURM_STEP_GPUS") or variables.get("SLURM_JOB_GPUS") or ""
    if not granted:
        return names if "SLURM_JOB_ID" not in variables else []
    numbers = granted.split(",")
    if len(numbers) != len(visible) or not all(number.isdigit() for number in numbers):
        return []
    place = dict(zip(visible, numbers, strict=True))
    return [place[name] for name in names] if all(name in place for name in names) else []


def cpus_near(names: list[str], gpus: str = _GPUS, devices: str = _DEVICES) -> set[int]:
    """CPUs next to all of these GPUs together, which are numbers of the host or UUIDs; empty where that is not known."""
    try:
        addresses = sorted(os.listdir(gpus))
    except OSError:
        return set()
    near: set[int] = set()
    for name in names:
        if name.isdigit():
            found = addresses[int(name) : int(name) + 1]
        else:
            found = [address for address in addresses if _uuid(f"{gpus}/{address}/information").startswith(name)]
        if len(found) != 1:
            return set()  # of a MIG slice, or of another host
        cpus = host.cpu_list(host.read(f"{devices}/{found[0].lower()}/local_cpulist"))
        if not cpus:
            return set()
        near |= cpus
    return near


def _uuid(path: str) -> str:
    found = re.search(r"^GPU UUID:\s*(\S+)", host.read(path), re.MULTILINE)
    return found.group(1) if found else ""


def cpus_for(near: set[int], own: set[int], needed: float) -> set[int]:
    """CPUs for who has GPUs with ``near`` CPUs and was promised ``needed`` of the node's ``own``: those near, if they are enough."""
    both = near & own
    return both if both and len(both) >= needed else own

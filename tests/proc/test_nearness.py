"""Workers with GPUs run next to them: on this machine with files in front of the kernel's, as if it had two GPUs."""

from __future__ import annotations

import os
import subprocess

import pytest

from hpc_ray.interpreter import python_command

CPUS = sorted(os.sched_getaffinity(0))

PROGRAM = """
import os, sys
import hpc_ray as ray
ray.init(num_cpus=4, num_gpus=2, object_store_memory=100 << 20)
@ray.remote
def where():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), sorted(os.sched_getaffinity(0))
@ray.remote(num_gpus=1, num_cpus=1)
class Model:
    def where(self): return os.environ["CUDA_VISIBLE_DEVICES"], sorted(os.sched_getaffinity(0))
models = [Model.remote() for _ in range(2)]
print(sorted(ray.get([model.where.remote() for model in models])))
for model in models: ray.kill(model)
both = where.options(num_gpus=2)
print(ray.get(both.remote()))
print([ray.get(where.options(num_gpus=1, num_cpus=count).remote())[1] for count in (1, 4)])
print(ray.get(where.remote())[1])
"""


@pytest.mark.skipif(len(CPUS) < 2, reason="it needs two CPUs")
@pytest.mark.skipif(os.geteuid() != 0, reason="it needs root, to put files in front of the kernel's")
@pytest.mark.parametrize("bind", ["1", "0"])
def test_workers_with_gpus(tmp_path, bind):
    addresses = ["0000:18:00.0", "0000:af:00.0"]
    for address, cpu in zip(addresses, CPUS[:2], strict=True):
        (tmp_path / "driver" / "nvidia" / "gpus" / address).mkdir(parents=True)
        (tmp_path / "devices" / address).mkdir(parents=True)
        (tmp_path / "devices" / address / "local_cpulist").write_text(f"{cpu}\n")
    mount = 'mount --bind "$0/driver" /proc/driver && mount --bind "$0/devices" /sys/bus/pci/devices && exec "$@"'
    line = ["unshare", "--mount", "sh", "-c", mount, str(tmp_path), *python_command("-c", PROGRAM)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_"))}
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, env=environment | {"HPC_RAY_BIND_TO_GPUS": bind})
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"this machine does not allow it: {done.stderr.strip()}")
    first, second = ([[CPUS[0]], [CPUS[1]]]) if bind == "1" else [CPUS, CPUS]
    wanted = [
        [("0", first), ("1", second)],
        ("0,1", CPUS[:2] if bind == "1" else CPUS),
        [first, CPUS],  # four CPUs were asked for, one is near
        CPUS,
    ]
    assert done.stdout.splitlines() == [str(line) for line in wanted], done.stderr

"""Jobs on a real Slurm: submitted, followed, ended by signals. The hosts must see this Python and this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_ray.slurm import scheduler

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

HPC_RAY = str(Path(sys.executable).with_name("hpc-ray"))

TWO_HOSTS = """
import socket, sys
import hpc_ray as ray
ray.init()
@ray.remote
class Host:
    def name(self): return socket.gethostname()
hosts = [Host.options(num_cpus=1, scheduling_strategy="SPREAD").remote() for _ in range(2)]
print("hosts", len(set(ray.get([host.name.remote() for host in hosts]))), flush=True)
sys.exit(3)
"""

DRAINS = """
import hpc_ray as ray, time
ray.init()
@ray.remote
class Model:
    def save(self): return "saved"
model = Model.remote()
ray.get(model.save.remote())
try:
    print("ready", flush=True)
    time.sleep(1000)
finally:
    print(ray.get(model.save.remote()), flush=True)
"""


def submit(folder: Path, name: str, program: str, *options: str) -> subprocess.Popen:
    script = folder / f"{name}.py"
    script.write_text(program)
    line = [HPC_RAY, "submit", "-N", "2", "-o", str(folder / f"{name}-%j.out"), *options, str(script)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def test_two_hosts_and_the_exit_code(shared):
    child = submit(shared, "two_hosts", TWO_HOSTS)
    out, err = child.communicate(timeout=120)
    assert "hosts 2\n" in out, err
    assert child.returncode == 3
    assert "FAILED" in err and "exit code 3" in err


@pytest.mark.parametrize(("signal", "code"), [("", 143), ("USR1", 138)])
def test_the_driver_drains(shared, signal, code):
    child = submit(shared, f"drains{signal}", DRAINS)
    number = child.stderr.readline().split()[-1]
    while "ready" not in (line := child.stdout.readline()):
        assert line, child.stderr.read()
    scheduler.run(["scancel", *([f"--signal={signal}"] if signal else []), number])
    out, err = child.communicate(timeout=120)
    assert "saved\n" in out, err
    assert f"task 0: Exited with exit code {code}" in out
    assert child.returncode != 0
    (state,) = scheduler.states(number)
    assert state.state == ("FAILED" if signal else "CANCELLED")


def test_what_slurm_refuses_comes_with_what_there_is(shared):
    child = submit(shared, "refused", "pass", "--partition", "no-such-partition")
    out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ("", 1)
    assert "invalid partition" in err.lower() and "These partitions are there" in err

"""The signals of Slurm, which every process of a step gets at once, without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from hpc_ray.interpreter import python_command

pytestmark = pytest.mark.usefixtures("no_leaks")

PROGRAM = """
import atexit, os, signal, subprocess, sys, time
import hpc_ray as ray
ray.init(num_cpus=2, include_dashboard=False)

@ray.remote
class Model:
    def save(self): return "saved"
    def fork(self):
        up, tell = os.pipe()
        child = os.fork()
        if not child:
            os.write(tell, b"1")
            while True: time.sleep(100)
        os.read(up, 1)  # Python forgets signals that come before its work after a fork is done
        os.kill(child, signal.SIGTERM)
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    def start(self):
        child = subprocess.Popen(["sleep", "100"])
        child.terminate()
        return -child.wait()

model = Model.remote()
print("children end:", ray.get([model.fork.remote(), model.start.remote()]))
atexit.register(print, "at exit")
sleeper = ray.remote(lambda: time.sleep(1000)).remote()
try:
    print("ready", flush=True)
    WAIT
finally:
    print("finally", sys.exc_info()[1].code, ray.get(model.save.remote()))
"""


def processes_of(pid: int) -> list[int]:
    """It and all below it."""
    found = [pid]
    for process in found:
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as file:
                found.extend(map(int, file.read().split()))
    return found


@pytest.mark.parametrize("wait", ["ray.get(sleeper)", "time.sleep(1000)"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_driver_ends_in_order_with_its_cluster_alive(number, wait):
    """SIGNAL-1"""
    child = subprocess.Popen(
        python_command("-c", PROGRAM.replace("WAIT", wait)),
        env=dict(os.environ, SLURM_JOB_ID="77"),
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == f"children end: [{signal.SIGTERM:d}, {signal.SIGTERM:d}]\n"
        assert child.stdout.readline() == "ready\n"
        for pid in processes_of(child.pid):
            os.kill(pid, number)
        rest, _ = child.communicate(timeout=60)
    assert rest == f"finally {128 + number} saved\nat exit\n"
    assert child.returncode == 128 + number


def test_a_handler_of_the_user_is_left_alone():
    program = (
        "import os, signal, hpc_ray as ray\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('mine', flush=True))\n"
        "ray.init(num_cpus=1)\nos.kill(os.getpid(), signal.SIGUSR1)\nray.shutdown()\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    ended = subprocess.run(
        python_command("-c", program),
        env=dict(os.environ, SLURM_JOB_ID="77"),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.stdout, ended.returncode) == ("mine\nTrue\n", 0)

"""Start and stop, in order and out of it: each time nothing is left and the exit code is the script's (FORK-1, LOCAL-1)."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import workloads

from hpc_ray.interpreter import python_command
from hpc_ray.launcher import session

SCRIPT = """
import os, sys, time
import hpc_ray as ray
ray.init(num_cpus=2)
@ray.remote
def double(x): return 2 * x
@ray.remote
def hang(): time.sleep(1000)
@ray.remote
def child_process():
    import subprocess
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
@ray.remote(num_cpus=0)
class Actor:
    def pid(self): return os.getpid()
    def hang(self): time.sleep(1000)
actor = Actor.remote()
ray.get([actor.pid.remote(), child_process.remote()])
held = ray.put(bytes(10_000_000))
assert ray.get([double.remote(i) for i in range(10)]) == [2 * i for i in range(10)]
hanging = [hang.remote(), actor.hang.remote()]
print("ready", flush=True)
"""
ENDS = {
    "plain": ("", 0),
    "shutdown": ("ray.shutdown()", 0),
    "exit 3": ("sys.exit(3)", 3),
    "os._exit": ("os._exit(5)", 5),
    "exception": ("raise ValueError('mine')", 1),
    "error of a task": ("ray.get(ray.remote(lambda: 1 / 0).remote())", 1),
    "kill -9": ("time.sleep(1000)", -signal.SIGKILL),
    "kill -9 in get": ("ray.get(hanging)", -signal.SIGKILL),
    "Ctrl-C": ("time.sleep(1000)", -signal.SIGINT),
    "Ctrl-C in get": ("ray.get(hanging)", -signal.SIGINT),
    "SIGTERM": ("ray.get(hanging)", -signal.SIGTERM),
}


def run(end: str) -> tuple[int, str]:
    """Exit code and errors of a script that ends in this way."""
    last, _ = ENDS[end]
    process = subprocess.Popen(
        python_command("-c", SCRIPT + last), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/tmp"
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line == "ready\n":
        for name, number in (("kill", signal.SIGKILL), ("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM)):
            if end.startswith(name):
                assert len(workloads.Traces.now().processes) > 4, "the marks of our processes cannot be seen"
                os.kill(process.pid, number)
    _, errors = process.communicate(timeout=workloads.PATIENCE_S)
    assert line == "ready\n", errors
    return process.returncode, errors


@pytest.mark.stress
@pytest.mark.parametrize("end", ENDS)
def test_ends(end):
    for _ in workloads.rounds(4):
        before = workloads.Traces.now()
        code, errors = run(end)
        assert code == ENDS[end][1], errors
        workloads.eventually(lambda before=before: workloads.Traces.now().beyond(before), [], timeout_s=20)


@pytest.mark.stress
def test_killed_while_starting():
    """kill -9 of the driver at any moment of ``init`` leaves nothing."""
    for i in workloads.rounds(20):
        before = workloads.Traces.now()
        process = subprocess.Popen(python_command("-c", SCRIPT), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(0.02 + 0.02 * (i % 20))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        workloads.eventually(lambda before=before: workloads.Traces.now().beyond(before), [], timeout_s=20)


@pytest.mark.links
@pytest.mark.stress
@pytest.mark.parametrize("victim", ["driver", "mpirun"])
def test_killed_with_three_nodes(victim):
    """kill -9 of the driver of virtual nodes, or of the mpirun below it: all nodes end."""
    for _ in workloads.rounds(5):
        before = workloads.Traces.now()
        script = SCRIPT.replace("num_cpus=2", "num_cpus=2, num_nodes=3") + "ray.get(hanging)"
        process = subprocess.Popen(python_command("-c", script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pids = [process.pid] if victim == "driver" else [p for p in session.children(process.pid) if _is_mpirun(p)]
        assert pids
        os.kill(pids[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=workloads.PATIENCE_S)
        if victim == "mpirun":
            assert process.returncode == 1
            # Its workers may be seen to die before the node is.
            assert "LocalRayletDiedError" in errors or "whoever started this node has closed it" in errors, errors
        workloads.eventually(lambda: workloads.Traces.now().beyond(before), [], timeout_s=20)  # noqa: B023


def _is_mpirun(pid: int) -> bool:
    with open(f"/proc/{pid}/cmdline") as file:
        return os.path.basename(file.read().split("\0")[0]) in ("mpirun", "prterun", "mpiexec", "mpiexec.hydra")

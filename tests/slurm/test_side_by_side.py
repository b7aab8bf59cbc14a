"""Several clusters on one host at once, of one user and of two: none sees, disturbs or ends another."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from slurm_programs import CYCLES
from slurm_site import HPC_RAY, await_line

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

ON_ONE_HOST = ["-N1", "-n1", "-c1", "--nodelist=node1"]
CYCLE_COUNT = 20
OTHER_USER = "games"  # is on every Debian

# A shell that starts a cluster, uses it, waits until it may go on, and ends it.
STARTED = """
hpc-ray start --num-cpus 1 --object-store-memory 100000000 || exit 2
python -c "$1" || exit 3
echo up
while [ ! -e "$2" ]; do sleep 0.05; done
hpc-ray stop
python -c "$1"
echo "end $?"
"""
WHICH = """
import hpc_ray as ray
ray.init(address="auto", log_to_driver=False)
print("attached", ray.get_runtime_context().gcs_address)
"""


@pytest.fixture(scope="module")
def other_user(slurm):
    """Words before a command that make it another user's."""
    if slurm.box is None or shutil.which("setpriv") is None:
        pytest.skip("another user's jobs can be tested in a box only")
    slurm.box.open_to_all_users()
    words = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--init-groups", "env", "HOME=/tmp"]
    tried = slurm.run(*words, "python", "-c", "import hpc_ray")
    if tried.returncode:
        pytest.skip(f"the user {OTHER_USER} cannot run this Python: {tried.stderr.strip()[-200:]}")
    return words


def test_cycles_of_two_users_and_two_jobs(slurm, box, other_user):
    program = slurm.program("cycles", CYCLES)
    names = {"one": [], "two": [], "other": other_user}
    jobs = {}
    for name, before in names.items():
        jobs[name] = slurm.start(*before, "srun", *ON_ONE_HOST, "python", program, name, str(CYCLE_COUNT))
    for name, job in jobs.items():
        with job:
            out, err = job.communicate(timeout=120)
        assert out == f"{name} did {CYCLE_COUNT}\n" and job.returncode == 0, err
    slurm.await_nothing_left()


def test_each_job_has_its_own_auto_and_its_own_stop(slurm, box):
    with contextlib.ExitStack() as stack:
        jobs, sessions = {}, {}
        for name in ("one", "two"):
            words = ["sh", "-c", STARTED, "job", WHICH, str(slurm.folder / f"{name}.go")]
            jobs[name] = stack.enter_context(slurm.start("srun", *ON_ONE_HOST, *words))
        for name, job in jobs.items():
            sessions[name] = await_line(job, "attached").split()[-1]
            await_line(job, "up")
        assert sessions["one"] != sessions["two"]
        for name, other in (("one", "two"), ("two", "one")):
            (slurm.folder / f"{name}.go").touch()
            out, err = jobs[name].communicate(timeout=60)
            assert f"session {sessions[name]} has ended" in out and sessions[other] not in out, out + err
            assert "end 1" in out and "no hpc_ray cluster of this " in err, out + err
            if name == "one":
                assert box.left(1)  # the other one's
    slurm.await_nothing_left()


def test_start_and_stop_in_salloc(slurm, box):
    """As in a terminal: a cluster that outlives programs, in an allocation."""
    script = f"""
    {HPC_RAY} start --num-cpus 2 --object-store-memory 100000000
    python -c 'import hpc_ray as ray; ray.init(address="auto"); ray.put(1); print("first", ray.cluster_resources()["CPU"])'
    python -c 'import hpc_ray as ray; ray.init(address="auto"); print("second", ray.cluster_resources()["CPU"])'
    {HPC_RAY} stop
    """
    ended = slurm.run("salloc", "-N1", "-c2", "srun", "-c2", "sh", "-c", script)
    assert "first 2.0\n" in ended.stdout and "second 2.0\n" in ended.stdout, ended.stdout + ended.stderr
    assert "has ended" in ended.stdout and ended.returncode == 0
    slurm.await_nothing_left()

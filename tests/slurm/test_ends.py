"""However a job ends: within 15 s nothing of ours is left on any host, no process, no shared memory, no session folder."""

from __future__ import annotations

import os
import signal

import pytest
from slurm_programs import BUSY
from slurm_site import HPC_RAY, await_line

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

WITHIN_S = 15.0


def start(slurm, *words):
    """A job on two hosts that has actors, objects and children on both; its id."""
    job = slurm.submit(slurm.program("busy", BUSY), "-N", "2", *words[1:], arguments=words[:1])
    number = slurm.job_of(job)
    await_line(job, "ready")
    assert sum("busy" in process or "sleep 1000" in process for process in slurm.left()) >= 3, slurm.left()
    return job, number


def test_cancelled(slurm, box):
    job, number = start(slurm, "polite")
    with job:
        assert slurm.run(HPC_RAY, "cancel", number).returncode == 0
        slurm.await_nothing_left(WITHIN_S)
        _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and "CANCELLED" in err, err


def test_killed(slurm, box):
    """A driver that does not end of the signal: after KillWait Slurm kills all processes at once. Folders stay, as nobody is there to
    remove them; the next cluster on those hosts does."""
    job, number = start(slurm, "stubborn")
    with job:
        assert slurm.run(HPC_RAY, "cancel", number).returncode == 0
        slurm.await_nothing_left(2 * WITHIN_S, but="/tmp/")  # Slurm takes its time, beyond KillWait too
        _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and "CANCELLED" in err, err
    ended = slurm.run("srun", f"--mpi={slurm.mpi}", "-N3", HPC_RAY, "run", slurm.program("next", "import hpc_ray as ray; ray.init()"))
    assert ended.returncode == 0, ended.stderr
    slurm.await_nothing_left(WITHIN_S)


def test_timed_out(slurm, box):
    """The time is over at once, by an administrator's word: a minute is the least that a job can ask for."""
    job, number = start(slurm, "polite", "--signal-s", "0")
    with job:
        assert slurm.run("scontrol", "update", f"JobId={number}", "EndTime=now").returncode == 0
        _, err = job.communicate(timeout=100)  # Slurm looks at times every 30 s
        slurm.await_nothing_left(WITHIN_S)
    assert job.returncode != 0 and "TIMEOUT" in err, err


@pytest.mark.parametrize("launch", ["srun", "mpirun", pytest.param("hpc-ray", marks=pytest.mark.thorough)])
def test_a_host_dies(slurm, box, launch):
    """The world ends with it, on the other hosts too."""
    program = slurm.program("busy", BUSY)
    run = [HPC_RAY, "run"]
    starter = {"srun": ["srun", f"--mpi={slurm.mpi}", *run], "mpirun": ["mpirun", *run], "hpc-ray": [*run, "-n", "2"]}[launch]
    with slurm.start("salloc", "-N2", "--nodelist=node1,node2", "--ntasks-per-node=1", *starter, program) as job:
        await_line(job, "ready")
        box.net("kill-node", "2")
        try:
            slurm.await_nothing_left(WITHIN_S)
            out, err = job.communicate(timeout=60)
        finally:
            box.do("start-node", "2")
    if launch != "mpirun":  # Open MPI's says 0
        assert job.returncode != 0, out + err
    if launch == "hpc-ray":
        assert "a host or rank 0 was lost" in err or job.returncode > 1, err


@pytest.mark.parametrize("victim", ["hpc_ray.launcher.rank", "hpc_ray.launcher.node"])
def test_a_process_of_ours_is_killed(slurm, box, victim):
    """The link or the node process of the host that is not the head: whatever that ends, nothing stays of it."""
    job, number = start(slurm, "polite")
    with job:
        last = max(host for host in range(1, box.count + 1) if box.processes(host))
        (pid, *_) = [process.split()[0] for process in box.processes(last) if victim in process]
        os.kill(int(pid), signal.SIGKILL)
        slurm.run("scancel", number)
        slurm.await_nothing_left(WITHIN_S)
        job.communicate(timeout=60)

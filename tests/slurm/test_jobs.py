"""Jobs by `hpc-ray submit`: followed, ended by signals, in arrays, after one another, and once more from where they were."""

from __future__ import annotations

import importlib.util
import time

import pytest
from boxes import ROOT
from slurm_programs import DRAINS, HOSTS, RESUMES, STANDS_STILL
from slurm_site import HPC_RAY, await_line

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def queued_again(slurm):
    """Slurm looks at times every 30 s only: this job takes them beside the other tests."""
    script = slurm.program("resumes", RESUMES)
    options = ["-t", "1", "--signal-s", "60", "--requeue", "-N", "2"]
    with slurm.submit(script, *options, arguments=(str(slurm.folder / "checkpoint"),)) as child:
        yield child
        child.terminate()


def test_two_hosts_and_the_exit_code(slurm):
    with slurm.submit(slurm.program("two_hosts", HOSTS), "-N", "2") as child:
        out, err = child.communicate(timeout=120)
    assert "hosts 2 " in out, err
    assert child.returncode == 3
    assert "FAILED" in err and "exit code 3" in err


@pytest.mark.parametrize(("signal", "code"), [("", 143), pytest.param("USR1", 138, marks=pytest.mark.thorough)])
def test_the_driver_drains(slurm, signal, code):
    with slurm.submit(slurm.program(f"drains{signal}", DRAINS), "-N", "2") as child:
        number = slurm.job_of(child)
        await_line(child, "ready")
        slurm.run("scancel", *([f"--signal={signal}"] if signal else []), number)
        out, err = child.communicate(timeout=120)
    assert "saved\n" in out, err
    assert f"task 0: Exited with exit code {code}" in out
    assert child.returncode != 0
    (state,) = slurm.states(number)
    assert state.state == ("FAILED" if signal else "CANCELLED")


@pytest.mark.parametrize("more", [pytest.param([], id="MPI"), pytest.param(["--survive-nodes"], id="TCP", marks=pytest.mark.thorough)])
def test_a_suspended_job_goes_on(slurm, more, monkeypatch):
    """Nobody is taken for dead who stood still together with all others."""
    monkeypatch.setitem(slurm.environment, "HPC_RAY_HEARTBEAT_S", "0.2")
    monkeypatch.setitem(slurm.environment, "HPC_RAY_HEARTBEAT_TIMEOUT_S", "1")
    with slurm.submit(slurm.program("stands_still", STANDS_STILL), "-N", "2", *more, arguments=("3",)) as child:
        number = slurm.job_of(child)
        assert await_line(child, "ready").split()[-1] == "2"
        assert slurm.run("scontrol", "suspend", number).returncode == 0
        time.sleep(5)  # time in which nobody hears of anybody
        assert [job.state for job in slurm.states(number)] == ["SUSPENDED"]
        assert slurm.run("scontrol", "resume", number).returncode == 0
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "went on" in out, out + err


def test_what_slurm_refuses_comes_with_what_there_is(slurm):
    with slurm.submit(slurm.program("refused", "pass"), "--partition", "no-such-partition") as child:
        out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ("", 1)
    assert "invalid partition" in err.lower() and "These partitions are there" in err


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed (extra train)")
def test_training_on_two_hosts(slurm):
    """As a user would."""
    script = str(ROOT / "examples" / "train_digits.py")
    with slurm.submit(script, "-N", "2", "-c", "2", arguments=("--epochs", "1", "--workers", "2")) as child:
        out, err = child.communicate(timeout=150)
    assert child.returncode == 0, out + err
    assert "2 workers" in out and "COMPLETED" in err, out + err


@pytest.mark.parametrize(
    ("launch", "where"),
    [
        pytest.param("srun", [], id="srun-one host"),
        pytest.param("srun", ["--ranks-per-node", "2"], id="srun-both hosts", marks=pytest.mark.thorough),
        pytest.param("mpirun", [], id="mpirun-one host", marks=pytest.mark.thorough),
        pytest.param("mpirun", ["--ranks-per-node", "2"], id="mpirun-both hosts"),
    ],
)
def test_a_gang_in_a_job(slurm, launch, where):
    """Its ranks are a step of their own, whatever started the job's; the answer is checked against a serial solver."""
    script = str(ROOT / "examples" / "parallel_solver.py")
    started = ["srun", f"--mpi={slurm.mpi}"] if launch == "srun" else ["mpirun"]
    ended = slurm.run("salloc", "-N2", "-c2", "--ntasks-per-node=1", *started, HPC_RAY, "run", script, *where, timeout_s=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nodes, 2 ranks" in ended.stderr and ended.stdout.count("the same as in one piece: True") == 2


def test_an_array_and_what_waits_for_it(slurm):
    """Three clusters of one host each, and a job that starts when they have ended well."""
    script = slurm.program("setting", "import os, hpc_ray as ray\nray.init()\nprint('setting', os.environ['SLURM_ARRAY_TASK_ID'])")
    with slurm.submit(script, "--array", "1-3") as child:
        number = slurm.job_of(child)
        after = slurm.run(HPC_RAY, "submit", "--no-follow", "--dependency", f"afterok:{number}", slurm.program("after", "print('after')"))
        out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert sorted(line for line in out.splitlines() if "setting" in line) == [f"({number}_{task}) setting {task}" for task in (1, 2, 3)]
    late = slurm.run(HPC_RAY, "logs", "-f", after.stdout.strip())
    assert (late.stdout, late.returncode) == ("after\n", 0), late.stderr


def test_a_dependency_that_fails_says_so(slurm):
    first = slurm.run(HPC_RAY, "submit", "--no-follow", slurm.program("fails", "raise SystemExit(5)")).stdout.strip()
    last = slurm.run(HPC_RAY, "submit", "--no-follow", "--dependency", f"afterok:{first}", slurm.program("never", "")).stdout.strip()
    slurm.run(HPC_RAY, "logs", "-f", first)
    told = slurm.run(HPC_RAY, "status", last).stdout
    assert "DependencyNeverSatisfied: what it waits for has failed" in told or "(Dependency)" in told, told
    assert slurm.run(HPC_RAY, "cancel", last).stdout == f"hpc-ray: cancelled job {last}\n"


def test_the_end_of_the_time_and_the_same_job_again(slurm, queued_again):
    """SIGUSR1 before the limit: the script saves; the job is queued again and goes on from there."""
    out, err = queued_again.communicate(timeout=170)
    assert queued_again.returncode == 0, out + err
    words = [line for line in out.splitlines() if line.startswith(("begins", "resumes", "done"))]
    assert words == ["begins at 1", "resumes at 3", "done"], out + err

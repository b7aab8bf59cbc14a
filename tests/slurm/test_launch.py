"""A world inside of Slurm: by srun and by mpirun, with the MPI of this Python, which is Open MPI or MPICH."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_programs import HOSTS, INNER
from slurm_site import HPC_RAY

from hpc_ray.launcher import pairing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(100)]


@pytest.fixture
def hosts(slurm):
    return slurm.program("hosts", HOSTS)


def right(ended, hosts=2, code=3):
    assert f"hosts {hosts} " in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == code, ended.stderr


@pytest.mark.each_mpi
@pytest.mark.parametrize("options", [["--ntasks-per-node=1"], ["--ntasks-per-node=2", "--cpus-per-task=2"]])
def test_srun(slurm, hosts, options):
    ended = slurm.run("srun", f"--mpi={slurm.mpi}", "-N2", *options, HPC_RAY, "run", hosts)
    right(ended)
    assert f"2 nodes, {2 * int(options[0][-1])} ranks" in ended.stderr


def test_a_rank_that_is_late_in_mpi_init(slurm, hosts):
    """The others have left MPI_Init's barrier, and send, while it is still in it."""
    if pairing.open_mpi_major(slurm.library) < 5:
        pytest.skip("only Open MPI 5 looks for messages there before it has MPI_COMM_WORLD")
    if (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")) is None:
        pytest.skip("there is no C compiler")
    library = slurm.folder / "late_barrier.so"
    source = Path(__file__).with_name("late_barrier.c")
    subprocess.run([compiler, "-xc", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    right(slurm.run("srun", f"--export=ALL,LD_PRELOAD={library}", "--mpi=pmix", "-N2", HPC_RAY, "run", hosts))


def test_programs_that_a_script_starts_are_no_ranks(slurm):
    """They see the job's variables, but not those of a task of the step."""
    ended = slurm.run("srun", f"--mpi={slurm.mpi}", "-N2", HPC_RAY, "run", slurm.program("inner", INNER))
    assert ended.stdout == "inner 1 1 outer 2\n", ended.stdout + ended.stderr


def test_srun_of_one_task_needs_no_mpi(slurm, hosts):
    right(slurm.run("srun", "-N1", "-n1", HPC_RAY, "run", hosts), hosts=1)


@pytest.mark.parametrize("wrong", ["other", "none"])
def test_srun_with_the_wrong_pmi_is_refused(slurm, hosts, wrong):
    """Each task would be rank 0 of 1, or MPI would abort with words of its own."""
    given = {"pmix": "pmi2", "pmi2": "pmix"}[slurm.mpi] if wrong == "other" else "none"
    ended = slurm.run("srun", f"--mpi={given}", "-N2", HPC_RAY, "run", hosts)
    assert ended.returncode == 1 and ended.stdout == "", ended.stdout
    if wrong == "other" and "OMPI was not built with SLURM's PMI support" in ended.stderr:
        return  # Open MPI 4 may know PMI-2, so it was let try
    assert ended.stderr.count("do not belong together") == 1, ended.stderr
    assert f"srun --mpi={slurm.mpi}" in ended.stderr
    if slurm.box is not None:
        slurm.await_nothing_left()


def test_mpirun_in_salloc(slurm, hosts):
    ended = slurm.run("salloc", "-N2", "--ntasks-per-node=1", "mpirun", HPC_RAY, "run", hosts)
    assert "hosts 2 " in ended.stdout and ended.returncode != 0, ended.stdout + ended.stderr


def test_hpc_ray_starts_mpirun_in_salloc(slurm, hosts):
    right(slurm.run("salloc", "-N2", "--ntasks-per-node=1", HPC_RAY, "run", "-n", "2", hosts))


def test_the_exit_code_comes_from_another_host(slurm):
    """mpirun runs here, rank 0 elsewhere."""
    program = "import sys, hpc_ray as ray\nray.init(object_store_memory=100 << 20)\nprint('fine', end='', file=sys.stderr)"
    script = slurm.program("fine", program)
    ended = slurm.run("salloc", "-N2", "--ntasks-per-node=1", HPC_RAY, "run", "-q", "-n", "2", script)
    assert ended.returncode == 0, ended.stderr
    assert "fine" in ended.stderr and "exit" not in ended.stderr


def test_mpirun_in_sbatch(slurm, hosts):
    script = slurm.folder / "mpirun.sbatch"
    script.write_text(f"#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=1 -o {slurm.folder}/mpirun.out\nexec mpirun {HPC_RAY} run {hosts}\n")
    ended = slurm.run("sbatch", "--wait", str(script))
    assert "hosts 2 " in (slurm.folder / "mpirun.out").read_text()
    assert ended.returncode != 0


@pytest.mark.parametrize("launch", ["srun", pytest.param("mpirun", marks=pytest.mark.thorough)])
def test_a_gang_on_all_hosts_of_a_job(slurm, launch):
    """Its ranks are a step of their own there, by the means of the allocation."""
    script = str(Path(__file__).parents[1] / "hosts" / "programs" / "gang.py")
    started = ["srun", f"--mpi={slurm.mpi}"] if launch == "srun" else ["mpirun"]
    ended = slurm.run("salloc", "-N2", "-c2", "--ntasks-per-node=1", *started, HPC_RAY, "run", script, timeout_s=90)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("RIGHT "), ended.stdout + ended.stderr
    if slurm.box is not None:
        slurm.await_nothing_left()

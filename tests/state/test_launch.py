"""What is decided before MPI: command lines of mpirun, a rank's place by its environment, whether launcher and library fit."""

from __future__ import annotations

import os

import pytest

from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import pairing, rank, session, world
from hpc_ray.launcher.relay import Relay, last_words
from hpc_ray.launcher.world import HYDRA, MPIRun, Rank

PROGRAM = ["python", "program.py"]


@pytest.mark.parametrize(
    ("mpirun", "words"),
    [
        (
            MPIRun("/m/mpirun", "openmpi", (5, 0, 11)),
            "/m/mpirun -n 3 --with-ft ulfm --map-by slot:OVERSUBSCRIBE --bind-to none -x HPC_RAY_LAUNCH_PLAN python program.py",
        ),
        (
            MPIRun("/m/mpirun", "openmpi", (4, 1, 4)),
            "/m/mpirun -n 3 --oversubscribe --bind-to none -x HPC_RAY_LAUNCH_PLAN python program.py",
        ),
        (MPIRun("/m/mpiexec", "mpich", (5, 0, 2)), "/m/mpiexec -n 3 python program.py"),
        (MPIRun("/m/mpiexec", "unknown", ()), "/m/mpiexec -n 3 python program.py"),
    ],
)
def test_command_lines_of_mpirun(mpirun, words):
    assert world.mpirun_command(mpirun, 3, PROGRAM) == words.split()


def test_a_users_options_come_last_and_win():
    line = world.mpirun_command(MPIRun("mpirun", "openmpi", (5,)), 2, PROGRAM, ["--host", "a,b"], passed=())
    assert " ".join(line) == "mpirun -n 2 --with-ft ulfm --map-by slot:OVERSUBSCRIBE --bind-to none --host a,b python program.py"


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Rank(2, 4, 1, "Open MPI's mpirun")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, Rank(2, 4, 0, HYDRA)),
        (STEP, Rank(5, 8, 1, "srun")),
        (STEP | {"PMI_RANK": "5", "PMI_SIZE": "8"}, Rank(5, 8, 1, "srun")),  # srun --mpi=pmi2
        # mpirun in an allocation starts its daemons by srun, whose variables the ranks inherit
        (STEP | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Rank(0, 2, 0, "Open MPI's mpirun")),
        (STEP | {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Rank(1, 2, 0, HYDRA)),
        ({"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # the batch script itself
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, None),  # … of older ones
    ],
)
def test_a_ranks_place(variables, place):
    assert world.discover(variables) == place


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_STEP_NUM_NODES": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False),
        (STEP | {"SLURM_STEP_NUM_NODES": "1"}, True),
        (STEP | {"SLURM_STEP_NUM_NODES": "2"}, False),
    ],
)
def test_ranks_on_one_host(variables, wanted):
    assert world.on_one_host(variables) == wanted


def test_ranks_on_one_host_need_no_network():
    assert world.one_host_settings(5, alone=True) == {"OMPI_MCA_btl": "self,sm"}
    assert world.one_host_settings(4, alone=False) == {"OMPI_MCA_btl": "self,vader,tcp"}
    assert [pairing.open_mpi_major(text) for text in (OPEN_MPI, OPEN_MPI_4, MPICH)] == [5, 4, 0]


OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11\0"
OPEN_MPI_4 = "Open MPI v4.1.4, package: Debian OpenMPI"
MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\n"
MPICH_OF_PMIX = "MPICH Version:      4.3.0\nMPICH configure:    --with-pm=no --with-pmi=pmix\n"
PMIX = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0", "SLURM_MPI_TYPE": "pmix"}
PMI2 = {"PMI_RANK": "0", "PMI_FD": "11", "SLURM_MPI_TYPE": "pmi2"}
NONE = {"SLURM_MPI_TYPE": "none"}


@pytest.mark.parametrize(
    ("launcher", "library", "variables"),
    [
        ("srun", OPEN_MPI, PMIX),
        ("srun", OPEN_MPI_4, PMI2),  # where it was built so; else the size of the world tells
        ("srun", MPICH, PMI2),
        ("srun", MPICH, NONE),  # where it was linked with Slurm's own PMI; else …
        ("srun", MPICH_OF_PMIX, PMIX),
        ("Open MPI's mpirun", OPEN_MPI, {}),
        (HYDRA, MPICH, {}),
        (HYDRA, "Intel(R) MPI Library 2021.13 for Linux* OS", {}),
    ],
)
def test_launchers_and_libraries_that_may_fit(launcher, library, variables):
    assert pairing.problem(launcher, library, variables) == ""


@pytest.mark.parametrize(
    ("launcher", "library", "variables", "words"),
    [
        ("srun", OPEN_MPI, PMI2, "started by srun --mpi=pmi2, but mpi4py uses Open MPI v5.0.11, package"),
        ("srun", OPEN_MPI, PMI2, "use `srun --mpi=pmix`"),
        ("srun", OPEN_MPI, NONE, "started by srun --mpi=none, but"),
        ("srun", OPEN_MPI, {"PMIX_MCA_gds": "hash"}, "started by srun, but"),  # a user's setting is no launcher
        ("srun", OPEN_MPI_4, NONE, "use `srun --mpi=pmix`"),
        ("srun", MPICH, PMIX, "started by srun --mpi=pmix, but mpi4py uses MPICH Version: 5.0.2: they do not"),
        ("srun", MPICH, PMIX, "use `srun --mpi=pmi2`"),
        ("Open MPI's mpirun", MPICH, {}, "Use the mpirun of the MPI that mpi4py loads"),
        (HYDRA, OPEN_MPI, {}, "Use the mpirun of the MPI that mpi4py loads"),
    ],
)
def test_those_that_cannot_are_refused(launcher, library, variables, words):
    assert words in pairing.problem(launcher, library, variables)


@pytest.mark.parametrize(
    ("hosts", "nodes", "ranks"),
    [
        (["a", "b"], None, [0, 1]),
        (["a", "a", "b", "b"], None, [0, 2]),
        (["a", "b", "a", "b"], None, [0, 1]),
        (["a", "a", "a", "a"], None, [0]),
        (["a", "a", "a", "a"], 3, [0, 1, 2]),
        (["a", "a", "b", "b"], 3, [0, 2, 1]),
    ],
)
def test_who_leads_a_node(hosts, nodes, ranks):
    assert rank.leaders(hosts, nodes) == ranks


@pytest.mark.parametrize(("nodes", "words"), [(4, "there are 3 ranks"), (1, "the ranks are on 2 hosts")])
def test_numbers_of_nodes_that_cannot_be(nodes, words):
    with pytest.raises(LaunchError, match=words):
        rank.leaders(["a", "a", "b"], nodes)


def test_a_job_means_its_own_sessions():
    names = ["session_1_job7.0_ab", "session_2_job77.0_cd", "session_3_ef", "session_4_job7.2_01", "session_4_job7.2_01"]
    assert session.of_our_job(names, {"SLURM_JOB_ID": "7"}) == ["session_1_job7.0_ab", "session_4_job7.2_01"]
    assert session.of_our_job(names, {"SLURM_JOB_ID": "8"}) == []
    assert session.of_our_job(names, {}) == names[:4]


def test_hosts_of_mpirun():
    found = world.host_options(world.MPIRun("m", "openmpi", (5, 0, 11)), ["a", "b"], 3, "/agent")
    assert " ".join(found[0]) == (
        "--host a:2,b:2 --prtemca oob_tcp_keepalive_time 5 --prtemca oob_tcp_keepalive_intvl 1 --prtemca oob_tcp_keepalive_probes 3"
    )
    assert found[1] == {"PRTE_MCA_plm_ssh_agent": "/agent"}
    found = world.host_options(world.MPIRun("m", "openmpi", (4, 1)), ["a", "b"], 2, "/agent")
    assert found == (["--host", "a:1,b:1"], {"OMPI_MCA_plm_rsh_agent": "/agent"})
    found = world.host_options(world.MPIRun("m", "mpich", (5,)), ["a", "b"], 2, "/agent")
    assert found == (["-hosts", "a:1,b:1"], {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": "/agent"})
    assert world.host_options(world.MPIRun("m", "mpich", (5,)), ["a"], 1, None)[1] == {}


@pytest.fixture
def relay():
    with open(os.devnull, "wb") as nobody:
        source, target = os.pipe()
        os.close(target)
        made = Relay(source, nobody.fileno(), "ab12")
        yield made
        made.close()


@pytest.mark.parametrize("cut", range(1, 40))
def test_last_words_are_heard_and_not_shown(relay, cut):
    """However the pipe cuts them, and whatever the script has printed before them without an end of its line."""
    whole = b"50 %\r100 %" + last_words("ab12", 7, "host b") + b"bye\n"
    assert relay.sift(whole[:cut]) + relay.sift(whole[cut:]) == b"50 %\r100 %bye\n"
    assert relay.note == {"exit": 7, "lost": "host b"}


def test_other_lines_are_passed_on_at_once(relay):
    assert relay.sift(b"Epoch 1: 50 %") == b"Epoch 1: 50 %"
    assert relay.sift(b"a \x1e b\n") == b"a \x1e b\n"
    assert relay.sift(last_words("another", 3, "")) == last_words("another", 3, "")  # a world inside of this one
    assert relay.note is None

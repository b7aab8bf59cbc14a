"""Worlds of MPI on several hosts: mpirun by hand and from ``hpc-ray run``, and the loss of a host, with which they end."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from hpc_ray.exceptions import LaunchError
from hpc_ray.launcher import world

try:
    MPIRUN = world.find_mpirun()
except LaunchError:
    pytest.skip("no mpirun is installed", allow_module_level=True)

PROGRAMS = Path(__file__).with_name("programs")
WORK = PROGRAMS / "work.py"
NAMES = ["node1", "node2", "node3"]
# May wait for its mpirun for minutes on a host that is cut off; the last one is the shell that starts it.
OPEN_MPI_DAEMON = ("prte", "orted", "/tmp/ompi.", "dyld_library_path")


def over_mpi(hosts, *command: object) -> subprocess.Popen:
    return hosts.start(1, "hpc-ray", "run", "--hosts", ",".join(NAMES), "--agent", hosts.tool("agent"), *command)


def await_ready(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line.startswith("READY"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.thorough
def test_training_by_mpirun(hosts):
    """As a user of MPI starts it, one rank on each host."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    example = Path(__file__).parents[2] / "examples" / "train_digits.py"
    options, variables = world.host_options(MPIRUN, NAMES, 3, hosts.tool("agent"))
    line = world.mpirun_command(MPIRUN, 3, [], options, passed=())
    program = ["hpc-ray", "run", "--num-cpus", 1, example, "--workers", 3, "--epochs", 1, "--quiet", "--no-plot"]
    done = hosts.run(1, *line, *program, **world.under_root(variables))
    assert done.returncode == 0 and "3 workers on 3 nodes" in done.stdout, done
    hosts.await_nothing_left()


@pytest.mark.each_mpi
def test_work_on_three_hosts(hosts):
    process = over_mpi(hosts, WORK)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0 and out.splitlines()[-1] == "right node1 node2 node3 alive node1 node2 node3", (out, err)
    hosts.await_nothing_left()


@pytest.mark.parametrize("fault", ["kill-node", pytest.param("power-off", marks=pytest.mark.thorough), "partition"])
def test_a_host_is_lost(fault, hosts):
    """The session ends with a message, not with a hang and not as if all were well, and leaves nothing anywhere."""
    process = over_mpi(hosts, WORK, "watch")
    await_ready(process)
    hosts.tool(fault, 3)
    out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and "right" not in out, (out, err)
    assert err.count("hpc-ray: node 2 on node3 is lost") + err.count("the session is over before the script is") == 1, err
    if fault == "partition":
        hosts.await_nothing_left(but=OPEN_MPI_DAEMON)
        return
    hosts.tool("start-node", 3)
    hosts.await_nothing_left()


def test_two_worlds_do_not_see_each_other(hosts):
    processes = [over_mpi(hosts, WORK) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0 and out.splitlines()[-1] == "right node1 node2 node3 alive node1 node2 node3", (out, err)
    hosts.await_nothing_left()


@pytest.mark.parametrize("how", ["--hosts", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("--survive-nodes", "mpirun"))])
def test_gangs_over_hosts(how, hosts):
    """Their ranks are a job step on three hosts, which is started as the session was: by its agent."""
    agent = hosts.tool("agent")
    program = PROGRAMS / "gang.py"
    if how == "mpirun":
        options, variables = world.host_options(MPIRUN, NAMES, 3, agent)
        line = world.mpirun_command(MPIRUN, 3, [], options, passed=())
        done = hosts.run(1, *line, "hpc-ray", "run", program, **world.under_root(variables))
    else:
        more = ["--survive-nodes"] if how == "--survive-nodes" else []
        done = hosts.run(1, "hpc-ray", "run", *more, "--hosts", ",".join(NAMES), "--agent", agent, program)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "RIGHT node1 node2 node3", (done.stdout, done.stderr)
    hosts.await_nothing_left()


def test_killed_gangs_leave_no_shared_memory_to_the_session(hosts):
    where = ["--hosts", ",".join(NAMES), "--agent", hosts.tool("agent")]
    done = hosts.run(1, "hpc-ray", "run", "--survive-nodes", *where, PROGRAMS / "killed.py")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ended", "had", "left"))]  # mpirun may say more
    assert lines == 3 * ["ended ActorDiedError"] + ["had node1 node2 node3", "left"], (done.stdout, done.stderr)
    hosts.await_nothing_left()


@pytest.mark.parametrize("what", ["gang", "program"])
@pytest.mark.parametrize("more", [[], ["--survive-nodes"]], ids=["MPI", "TCP"])
def test_a_session_ends_while_ranks_are_busy(more, what, hosts):
    """They hear of it when their host has no node any more, and what MPI keeps in shared memory goes with them."""
    done = hosts.run(1, "hpc-ray", "run", *more, "--hosts", ",".join(NAMES), "--agent", hosts.tool("agent"), PROGRAMS / "busy.py", what)
    assert (done.returncode, done.stdout) == (0, "READY\n"), (done.stdout, done.stderr)
    hosts.await_nothing_left()


@pytest.mark.parametrize("more", [pytest.param([], id="MPI"), pytest.param(["--survive-nodes"], id="TCP", marks=pytest.mark.thorough)])
def test_the_solver_on_three_hosts(more, hosts):
    """The example, whose answer is checked against a serial solver."""
    solver = Path(__file__).parents[2] / "examples" / "parallel_solver.py"
    where = ["--hosts", ",".join(NAMES), "--agent", hosts.tool("agent")]
    done = hosts.run(1, "hpc-ray", "run", *more, *where, solver, "--ranks", 6, "--ranks-per-node", 2)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.count("on 6 ranks") == done.stdout.count("the same as in one piece: True") == 2, done.stdout
    hosts.await_nothing_left()


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.thorough) for fault in ("kill-node", "partition")] + ["power-off"])
def test_a_lost_session_goes_on_with_the_hosts_left(fault, hosts):
    process = over_mpi(hosts, "--relaunch", 1, PROGRAMS / "resume.py")
    await_ready(process)
    hosts.tool(fault, 3)
    out, err = process.communicate(timeout=90)
    said = re.sub(r"^-{40,}\n.*?^-{40,}\n", "", out, flags=re.DOTALL | re.MULTILINE)  # without what mpirun may complain of, in its frame
    assert process.returncode == 0 and said.splitlines() == ["resumed on node1 node2"], (out, err)
    assert "not to be reached any more: node3" in err and "relaunch 1 of 1 on node1, node2" in err, err
    if fault == "partition":
        hosts.await_nothing_left(but=OPEN_MPI_DAEMON)
        return
    hosts.tool("start-node", 3)
    hosts.await_nothing_left()

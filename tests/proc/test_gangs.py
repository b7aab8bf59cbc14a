"""Gangs: tasks on several MPI ranks, MPI programs as tasks, and what becomes of them when something fails. The same file runs under
Open MPI and under MPICH."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

import numpy as np

import hpc_ray as ray
from hpc_ray.exceptions import (
    ActorDiedError,
    ConfigurationError,
    GangError,
    LaunchError,
    MPIError,
    RayTaskError,
    TaskCancelledError,
)
from hpc_ray.launcher import world

try:
    MPIRUN = world.find_mpirun()
except LaunchError:
    pytest.skip("no mpirun is installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(120)
OPEN_MPI = MPIRUN.family == "openmpi"


@pytest.fixture(scope="module")
def session(no_leaks_in_module):
    """One for the tests that break nothing but their own gang."""
    ray.init(num_cpus=6, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_actor_of_another_test():
    """A handle in the traceback of an awaited error, which refers to itself, is an actor's until it is collected."""
    yield
    gc.collect()


@ray.remote(mpi_ranks=3)
def added(array, factor=1):
    comm = ray.mpi_comm()
    return comm.rank, comm.size, float(comm.allreduce(array.sum() * factor))


@ray.remote(mpi_ranks=2)
def pids():
    return os.getpid()


# ------------------------------------------------------------------ what a gang does


@pytest.mark.each_mpi
def test_every_rank_gets_the_arguments_and_a_communicator(session):
    array = np.ones(200_000)  # more than fits into a message
    wanted = [(rank, 3, 1_200_000.0) for rank in range(3)]
    assert ray.get(added.remote(array, factor=2)) == wanted
    assert ray.get(added.remote(ray.put(array), factor=ray.put(2))) == wanted


def test_results_by_rank(session):
    a, b = pids.options(num_returns="per_rank").remote()
    assert ray.get(a) != ray.get(b)
    assert len(ray.get(pids.options(num_returns=2).remote())) == 2
    assert isinstance(ray.get(pids.options(mpi_ranks=1).remote()), list)
    (only,) = pids.options(mpi_ranks=1, num_returns="per_rank").remote()
    assert isinstance(ray.get(only), int)
    assert pids.options(num_returns=0).remote() is None


def test_large_results_and_references_in_results_arrive(session):
    @ray.remote(mpi_ranks=2)
    def made():
        rank = ray.mpi_comm().rank
        return np.full(100_000, rank), ray.put(rank)

    for rank, (array, reference) in enumerate(ray.get(made.remote())):
        assert (array == rank).all()
        assert ray.get(reference) == rank


def test_a_rank_is_a_worker_like_others(session):
    @ray.remote
    def square(x):
        return x * x

    @ray.remote(mpi_ranks=2, num_cpus=2, runtime_env={"env_vars": {"OF_THE_GANG": "yes"}})
    def asks():
        context = ray.get_runtime_context()
        comm = ray.mpi_comm()
        child = ray.get(square.options(num_cpus=0).remote(context.get_mpi_rank()))
        cpus = context.get_assigned_resources()["CPU"]
        return context.get_mpi_rank() == comm.rank, context.get_mpi_size(), child, cpus, os.environ["OF_THE_GANG"]

    assert ray.get(asks.remote()) == [(True, 2, 0, 2.0, "yes"), (True, 2, 1, 2.0, "yes")]
    assert ray.get_runtime_context().get_mpi_rank() is None
    with pytest.raises(RuntimeError, match="mpi_ranks"):
        ray.mpi_comm()


def test_ranks_serve_again_with_another_communicator(session):
    @ray.remote(mpi_ranks=2)
    def leaves_a_message():
        comm = ray.mpi_comm()
        if comm.rank == 0:
            comm.isend("old", dest=1, tag=5)
        return os.getpid()

    @ray.remote(mpi_ranks=2)
    def receives():
        comm = ray.mpi_comm()
        if comm.rank == 0:
            comm.send("new", dest=1, tag=5)
        return os.getpid(), comm.recv(source=0, tag=5) if comm.rank == 1 else None

    first = ray.get(leaves_a_message.remote())
    (a, _), (b, message) = ray.get(receives.remote())
    assert [a, b] == first  # the same processes
    assert message == "new"


def test_gangs_side_by_side_and_one_after_the_other(session, gate):
    @ray.remote(mpi_ranks=3)
    def stays(name):
        if ray.mpi_comm().rank == 0:
            gate.wait(name)
        ray.mpi_comm().barrier()
        return os.getpid()

    a, b = stays.remote("a"), stays.remote("b")  # six CPUs are enough for both …
    gate.await_arrivals(1, "a")
    gate.await_arrivals(1, "b")
    c = stays.remote("c")  # … but not for a third, which is given all of its ranks or none
    gate.open("c")
    assert ray.wait([c], timeout=0.3)[0] == []
    assert gate.arrived("c") == 0
    gate.open("a")
    ray.get(c)
    gate.open("b")
    assert not set(ray.get(a)) & set(ray.get(b))


def test_who_lists_tasks_sees_the_ranks(session):
    from hpc_ray.util.state import list_tasks, list_workers

    @ray.remote(mpi_ranks=2)
    def seen():
        return os.getpid()

    ranks = ray.get(seen.remote())
    rows = {row.name: row for row in list_tasks(detail=True)}
    assert rows["seen"].state == "FINISHED"
    assert [rows[f"seen[rank {rank} of 2]"].worker_pid for rank in range(2)] == ranks
    assert set(ranks) < {row.pid for row in list_workers() if row.worker_type == "WORKER"}


def test_in_a_graph(session):
    assert ray.get(added.bind(np.ones(2), factor=3).execute())[2] == (2, 3, 18.0)


def test_what_cannot_be(session):
    def f():
        pass

    def g():
        yield 1

    with pytest.raises(ValueError, match="num_returns of a gang"):
        ray.remote(mpi_ranks=4, num_returns=3)(f)
    with pytest.raises(ValueError, match="per_rank"):
        ray.remote(num_returns="per_rank")(f)
    with pytest.raises(ValueError, match="cannot yield"):
        ray.remote(mpi_ranks=2)(g)
    with pytest.raises(ValueError, match="whole number"):
        ray.remote(mpi_ranks=3, num_gpus=0.5)(f)
    for ranks in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            ray.remote(mpi_ranks=ranks)(f)
    with pytest.raises(TypeError):
        ray.remote(mpi_ranks="4")(f)
    with pytest.raises(ValueError, match=r"room for 6.*init\(num_cpus=7\)"):
        added.options(mpi_ranks=7).remote(1)
    with pytest.raises(ValueError, match="room for 3"):
        added.options(mpi_ranks=4, num_cpus=2).remote(1)
    assert len(ray.get(added.options(mpi_ranks=7, num_cpus=0.5).remote(np.ones(1)))) == 7


# ------------------------------------------------------------------ failures


@ray.remote(mpi_ranks=3)
def fails(how, gate):
    comm = ray.mpi_comm()
    gate.arrive("rank")
    if comm.rank == 1:
        comm.recv(source=2)
        if how == "raise":
            raise KeyError("of rank 1")
        if how == "exit":
            sys.exit(0)
        if how == "leave":
            os._exit(7)
        os.kill(os.getpid(), how)
    if comm.rank == 2:
        comm.send(None, dest=1)
    comm.barrier()  # never complete


def test_a_rank_that_raises_ends_its_gang_only(session, gate):
    with pytest.raises(KeyError, match="of rank 1") as caught:
        ray.get(fails.remote("raise", gate))
    assert isinstance(caught.value, RayTaskError)
    assert "fails[rank 1 of 3]" in str(caught.value)
    assert 'raise KeyError("of rank 1")' in str(caught.value)
    assert len(ray.get(added.remote(np.ones(1)))) == 3


@pytest.mark.each_mpi
@pytest.mark.parametrize(
    ("how", "text"),
    [
        (signal.SIGKILL, "killed by SIGKILL"),
        (signal.SIGSEGV, "killed by SIGSEGV"),
        (signal.SIGTERM, "killed by SIGTERM"),
        ("leave", "exit code 7"),
        ("exit", r"sys.exit\(0\)"),
    ],
)
def test_a_rank_that_ends_takes_its_gang_along_only(session, gate, how, text):
    """And the gang's error says which rank that was, and how it ended, whatever mpirun does with the others."""
    with pytest.raises(GangError, match=rf"rank 1 of 3 of fails\(\) .*: {text}") as caught:
        ray.get(fails.remote(how, gate))
    assert isinstance(caught.value, GangError) and (caught.value.rank, caught.value.size) == (1, 3)
    assert caught.value.pid in gate.pids("rank")
    assert len(ray.get(added.remote(np.ones(1)))) == 3


@pytest.mark.each_mpi
def test_ranks_that_mpirun_ends_say_so(session, gate):
    @ray.remote(mpi_ranks=2)
    def without_mpirun():
        comm = ray.mpi_comm()
        comm.barrier()
        if comm.rank == 0:
            keeper = os.getppid()
            starter = Path(f"/proc/{keeper}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(starter), signal.SIGKILL)
        gate.wait()

    how = "; mpirun was killed by SIGKILL" if OPEN_MPI else ""  # of MPICH's that was a process below it
    with pytest.raises(GangError, match=rf"rank \d of 2 .*: its mpirun has ended it{how}"):
        ray.get(without_mpirun.remote())
    assert len(ray.get(added.remote(np.ones(1)))) == 3


def test_a_rank_that_has_heard_of_an_end_does_not_answer_for_it(session, gate):
    """MPI may tell a rank of another's end before anyone else hears of it. The gang's error names the one that ended."""

    @ray.remote(mpi_ranks=2)
    def told_first():
        if ray.mpi_comm().rank == 0:
            gate.arrive("told")
            raise MPIError("MPI_ERR_PROC_FAILED: Process Failure", 75, True)
        gate.await_arrivals(1, "told")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(GangError, match=r"rank 1 of 2"):
        ray.get(told_first.remote())

    @ray.remote(mpi_ranks=2)
    def only_told():
        if ray.mpi_comm().rank == 0:
            raise MPIError("MPI_ERR_PROC_FAILED: Process Failure", 75, True)

    with pytest.raises(MPIError, match="Process Failure"):
        ray.get(only_told.remote())


def test_an_error_of_mpi_travels_without_mpi(session):
    @ray.remote(mpi_ranks=2)
    def sends_nowhere():
        ray.mpi_comm().send(None, dest=99)

    with pytest.raises(MPIError, match="rank") as caught:
        ray.get(sends_nowhere.remote())
    assert isinstance(caught.value, RayTaskError) and "sends_nowhere[rank" in str(caught.value)
    assert caught.value.error_class and not caught.value.peer_failed
    assert "dest=99" in str(caught.value), "the traceback ends in the user's code"


def test_a_gang_can_be_repeated(session, gate):
    @ray.remote(mpi_ranks=2, retry_exceptions=[GangError, KeyError], max_retries=3)
    def third_time():
        comm = ray.mpi_comm()
        if comm.rank == 0:
            gate.arrive("attempt")
            if gate.arrived("attempt") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if gate.arrived("attempt") == 2:
                raise KeyError
        comm.barrier()
        return comm.rank

    assert ray.get(third_time.remote()) == [0, 1]
    assert gate.arrived("attempt") == 3


def gone(pid):
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("force", [False, True])
def test_cancel(session, gate, eventually, force):
    @ray.remote(mpi_ranks=2)
    def waits():
        comm = ray.mpi_comm()
        gate.arrive("cancel")
        comm.recv(source=1 - comm.rank)  # of C code, which no interrupt reaches

    reference = waits.remote()
    gate.await_arrivals(2, "cancel")
    ray.cancel(reference, force=force)
    with pytest.raises(TaskCancelledError):
        ray.get(reference)
    for pid in gate.pids("cancel"):
        eventually(lambda pid=pid: gone(pid), "a rank of a cancelled gang ends")


def test_ranks_are_interrupted_before_they_are_ended(session, gate):
    @ray.remote(mpi_ranks=2)
    def cleans_up():
        if ray.mpi_comm().rank == 0:
            raise ValueError("first")
        try:
            gate.wait("never")
        except KeyboardInterrupt:
            gate.arrive("cleaned")
            raise

    with pytest.raises(ValueError, match="first"):
        ray.get(cleans_up.remote())
    assert gate.arrived("cleaned") == gate.arrived("never")


def test_a_leader_that_is_killed_takes_its_ranks_along(session, gate, eventually):
    @ray.remote(mpi_ranks=2, max_retries=0)
    def waits():
        gate.arrive("leader" if ray.mpi_comm().rank == 0 else "other")
        gate.wait("never")

    reference = waits.remote()
    gate.await_arrivals(1, "leader")
    gate.await_arrivals(1, "other")
    ranks = gate.pids("leader") + gate.pids("other")
    (leader,) = {int(Path(f"/proc/{pid}/environ").read_bytes().partition(b"HPC_RAY_WORKER=")[2].split(b"\0")[0]) for pid in ranks}
    os.kill(leader, signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(reference)
    for pid in ranks:
        eventually(lambda pid=pid: gone(pid), "a rank ends with its leader")


def test_a_gang_that_cannot_start_says_why(session):
    with pytest.raises(LaunchError, match="MPI cannot be used from Python"):
        ray.get(pids.options(runtime_env={"env_vars": {"MPI4PY_LIBMPI": "/not/there.so"}}).remote())


def test_ranks_that_do_not_come_up_are_counted(session, tmp_path):
    """The error names the host, with how far its ranks have come."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'HPC_RAY_RANK' in os.environ: os._exit(3)")
    host = os.uname().nodename
    with pytest.raises(LaunchError, match=rf"mpirun ended with \d+ before its 2 ranks were up\n{host}: 2 not begun\nload of {host}"):
        ray.get(pids.options(runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}}).remote())


def test_a_step_is_a_session_of_its_own(session):
    """STEP-3: two in one session can starve those whom they wait for."""
    kernel_session = ray.remote(lambda: os.getsid(0))
    workers = ray.get(kernel_session.remote())
    assert workers not in ray.get(kernel_session.options(mpi_ranks=2).remote())
    program = ray.mpi_run([sys.executable, "-c", "import os; print(os.getsid(0))"], ranks=1)
    assert int(program.stdout) != workers


# ------------------------------------------------------------------ actors


@ray.remote(mpi_ranks=3)
class Solver:
    """Holds a part of a vector on each rank."""

    def __init__(self, vector, fails=-1):
        self.comm = ray.mpi_comm()
        if self.comm.rank == fails:
            raise KeyError("of the constructor")
        self.part = np.array_split(vector, self.comm.size)[self.comm.rank]
        self.calls = []

    def norm(self):
        return float(self.comm.allreduce((self.part**2).sum()))

    def scale(self, factor=1):
        self.part = self.part * factor
        self.calls.append(factor)
        return self.calls

    def part_of_it(self):
        return self.part

    def same(self):
        return self.comm is ray.mpi_comm(), ray.get_runtime_context().get_mpi_rank(), ray.get_runtime_context().get_actor_id()

    def raise_on(self, rank, *, after=None):
        if self.comm.rank == rank:
            raise KeyError("of rank 1")
        if after is not None:
            after.arrive("waits")
            self.comm.barrier()
        return "fine"

    def end_on(self, rank, number):
        if self.comm.rank == rank:
            os.kill(os.getpid(), number)
        self.comm.barrier()

    def pid(self):
        return os.getpid()

    def leave(self):
        ray.actor.exit_actor()


def test_an_actor_has_an_instance_on_each_rank(session):
    vector = np.ones(300_000)
    solver = Solver.remote(ray.put(vector))
    assert ray.get(solver.norm.remote()) == [300_000.0] * 3
    solver.scale.remote(ray.put(2))
    assert ray.get(solver.norm.remote()) == [1_200_000.0] * 3
    parts = solver.part_of_it.options(num_returns="per_rank").remote()
    assert [len(ray.get(part)) for part in parts] == [100_000] * 3
    assert len(solver.part_of_it.options(num_returns=3).remote()) == 3
    assert ray.get(solver.same.remote()) == [(True, rank, solver._actor_id.hex()) for rank in range(3)]


def test_calls_of_an_actor_run_in_order_on_all_ranks(session):
    solver = Solver.remote(np.ones(3))
    calls = [solver.scale.remote(number) for number in range(20)]

    @ray.remote
    def calls_too(handle):
        return ray.get(handle.scale.remote(factor=-1))

    assert ray.get(calls)[-1] == [list(range(20))] * 3
    assert ray.get(calls_too.remote(solver)) == [[*range(20), -1]] * 3


def test_one_rank(session):
    solver = Solver.options(mpi_ranks=1).remote(np.ones(3))
    assert ray.get(solver.norm.remote()) == [3.0]
    (only,) = solver.norm.options(num_returns="per_rank").remote()
    assert ray.get(only) == 3.0


@pytest.mark.each_mpi
def test_a_named_actor_and_its_end(session, eventually):
    solver = Solver.options(name="of the gang").remote(np.ones(3))
    other = ray.get_actor("of the gang")
    pids = ray.get(other.pid.remote())
    del solver, other
    for pid in pids:
        eventually(lambda pid=pid: gone(pid), "a rank ends with its actor")
    solver = Solver.remote(np.ones(3))
    pids = ray.get(solver.pid.remote())
    ray.kill(solver)
    with pytest.raises(ActorDiedError, match=r"ray\.kill"):
        ray.get(solver.norm.remote())
    for pid in pids:
        eventually(lambda pid=pid: gone(pid), "a rank ends with its actor")
    solver = Solver.remote(np.ones(3))
    solver.leave.remote()
    with pytest.raises(ActorDiedError, match="exit_actor"):
        ray.get(solver.norm.remote())


def test_an_actor_outlives_an_error_from_which_all_ranks_come_back(session):
    solver = Solver.remote(np.ones(3))
    with pytest.raises(KeyError, match="of rank 1") as caught:
        ray.get(solver.raise_on.remote(1))
    assert "Solver.raise_on[rank 1 of 3]" in str(caught.value)
    assert ray.get(solver.norm.remote()) == [3.0] * 3


def test_an_actor_whose_ranks_do_not_come_back_has_crashed(session, gate):
    solver = Solver.remote(np.ones(3))
    with pytest.raises(ActorDiedError) as caught:
        ray.get(solver.raise_on.remote(1, after=gate))
    assert "Solver.raise_on[rank 1 of 3]" in str(caught.value)
    assert 'raise KeyError("of rank 1")' in str(caught.value)
    assert "did not come back from raise_on()" in str(caught.value)
    assert gate.arrived("waits") == 2
    with pytest.raises(ActorDiedError, match="of rank 1"):
        ray.get(solver.norm.remote())


def test_a_rank_that_dies_is_the_death_of_its_actor(session, eventually):
    solver = Solver.remote(np.ones(3))
    pids = ray.get(solver.pid.remote())
    with pytest.raises(ActorDiedError, match=r"rank 1 of 3 of Solver(\.end_on)?\(\) .*: killed by SIGSEGV") as caught:
        ray.get(solver.end_on.remote(1, signal.SIGSEGV))
    assert str(pids[1]) in str(caught.value)
    for pid in pids:
        eventually(lambda pid=pid: gone(pid), "a rank ends with its actor")


def test_a_rank_that_dies_between_calls(session):
    solver = Solver.remote(np.ones(3))
    os.kill(ray.get(solver.pid.remote())[2], signal.SIGKILL)
    with pytest.raises(ActorDiedError, match=r"rank 2 of 3 of Solver.*: killed by SIGKILL"):
        while True:  # calls that reach it before the news does
            ray.get(solver.norm.remote())


def test_an_actor_is_restarted(session, gate):
    @ray.remote(mpi_ranks=2, max_restarts=1, max_task_retries=1)
    class Counter:
        def __init__(self):
            gate.arrive("made")
            self.calls = 0

        def count(self):
            self.calls += 1
            return self.calls

        def die_once(self):
            rank = ray.mpi_comm().rank
            if rank == 1:
                gate.arrive("attempt")
                if gate.arrived("attempt") == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return ray.mpi_comm().allgather(self.calls)

    counter = Counter.remote()
    assert ray.get(counter.count.remote()) == [1, 1]
    assert ray.get(counter.die_once.remote()) == [[0, 0]] * 2  # again, by the new ranks
    assert gate.arrived("made") == 4
    assert ray.get(counter.count.remote()) == [1, 1]


def test_a_constructor_that_fails_on_a_rank(session):
    solver = Solver.remote(np.ones(3), fails=2)
    with pytest.raises(ActorDiedError, match=r"__init__\[rank 2 of 3\]") as caught:
        ray.get(solver.norm.remote())
    assert "of the constructor" in str(caught.value)
    broken = Solver.options(runtime_env={"env_vars": {"MPI4PY_LIBMPI": "/not/there.so"}}).remote(np.ones(3))
    with pytest.raises(ActorDiedError, match="MPI cannot be used from Python"):
        ray.get(broken.norm.remote())


def test_cancelled_calls_of_an_actor(session, gate):
    @ray.remote(mpi_ranks=2)
    class Patient:
        def wait(self):
            gate.arrive("patient")
            while not ray.get_runtime_context().is_canceled():
                gate.arrived("patient")
            gate.arrive("heard")

        def fine(self):
            return True

    patient = Patient.remote()
    reference = patient.wait.remote()
    gate.await_arrivals(2, "patient")
    ray.cancel(reference)
    with pytest.raises(TaskCancelledError):
        ray.get(reference)
    assert ray.get(patient.fine.remote()) == [True, True]
    assert gate.arrived("heard") == 2


def test_what_an_actor_cannot_be(session):
    class Streams:
        def items(self):
            yield 1

    class Waits:
        async def wait(self):
            pass

    class Plain:
        def f(self):
            pass

    with pytest.raises(ValueError, match="items yields"):
        ray.remote(mpi_ranks=2)(Streams).remote()
    with pytest.raises(ValueError, match="wait is asynchronous"):
        ray.remote(mpi_ranks=2)(Waits).remote()
    with pytest.raises(ValueError, match="max_concurrency is not for gangs"):
        ray.remote(mpi_ranks=2, max_concurrency=2)(Plain)
    with pytest.raises(ValueError, match="room for 6"):
        ray.remote(mpi_ranks=7)(Plain).remote()
    plain = ray.remote(Plain).remote()
    with pytest.raises(ValueError, match="give mpi_ranks as well"):
        plain.f.options(num_returns="per_rank")
    gang = ray.remote(mpi_ranks=2)(Plain).remote()
    with pytest.raises(ValueError, match="num_returns of a gang"):
        gang.f.options(num_returns=3)


# ------------------------------------------------------------------ programs


PROGRAM = """
import os
from mpi4py import MPI
comm = MPI.COMM_WORLD
os.write(1, f"rank {comm.rank} sum {comm.allreduce(1)}\\n".encode())  # in one piece
"""


@pytest.mark.each_mpi
def test_an_mpi_program_is_a_task(session):
    found = ray.mpi_run([sys.executable, "-c", PROGRAM], ranks=2)
    assert found.returncode == 0, found.stderr
    assert sorted(found.stdout.splitlines()) == ["rank 0 sum 2", "rank 1 sum 2"]
    failed = ray.mpi_run(["sh", "-c", "echo oh >&2; exit 3"], ranks=1)
    assert failed.returncode == 3
    assert "oh" in failed.stderr


KILLED = ["sh", "-c", "kill -9 $$"]
# One rank ends so, after the others have begun to wait for it.
LOST = """
from mpi4py import MPI
import os, time
MPI.COMM_WORLD.barrier()
if MPI.COMM_WORLD.rank == 1:
    {end}
{others}
"""


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (KILLED, 1),
        ([sys.executable, "-c", LOST.format(end="os.kill(os.getpid(), 9)", others="time.sleep(1000)")], 3),
        ([sys.executable, "-c", LOST.format(end="os._exit(5)", others="MPI.COMM_WORLD.recv(source=1)")], 3),
    ],
    ids=["killed", "one killed", "one left"],
)
def test_a_program_fails_with_its_first_rank(session, command, ranks):
    """As mpirun has it: the others end too, and it says so."""
    assert ray.mpi_run(command, ranks=ranks).returncode != 0


def test_its_surroundings(session, tmp_path):
    found = ray.mpi_run(["sh", "-c", "pwd; echo $OF_MINE"], ranks=1, cwd=tmp_path, env={"OF_MINE": "yes"})
    assert found.stdout.splitlines() == [str(tmp_path), "yes"]
    with pytest.raises(TypeError, match="list of words"):
        ray.mpi_run("ls -l", ranks=1)
    with pytest.raises(ValueError, match="room for 6"):
        ray.mpi_run(["ls"], ranks=7)
    with pytest.raises(ConfigurationError, match="too many"):
        ray.mpi_run(["ls"], ranks=100_000, num_cpus=0)
    with pytest.raises(LaunchError, match=f"there is no folder {tmp_path}/none on "):
        ray.mpi_run(["ls"], ranks=1, cwd=tmp_path / "none")
    with pytest.raises(TypeError, match="'FOO': 1"):
        ray.mpi_run(["ls"], ranks=1, env={"FOO": 1})


@pytest.mark.parametrize("force", [False, True])
def test_a_cancelled_program_ends(session, tmp_path, eventually, force):
    script = f"echo $$ > {tmp_path}/pid.tmp; mv {tmp_path}/pid.tmp {tmp_path}/pid; exec sleep 1000"
    reference = ray.mpi_run.remote(["sh", "-c", script], ranks=1)
    pid = int(eventually((tmp_path / "pid").exists, "the program runs") and (tmp_path / "pid").read_text())
    ray.cancel(reference, force=force)
    with pytest.raises(TaskCancelledError):
        ray.get(reference)
    eventually(lambda: gone(pid), "the program ends with its task")

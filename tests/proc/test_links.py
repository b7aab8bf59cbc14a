"""Between nodes with the MPI of this environment: the transport alone, links under way, ways to start, deaths.

Every program is started from here with a time limit; the same file runs under Open MPI and under MPICH.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from hpc_ray.cluster_utils import Cluster
from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import host, local, session, world

try:
    MPIRUN = world.find_mpirun()
except LaunchError:
    pytest.skip("no mpirun is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_leaks")
OPEN_MPI = MPIRUN.family == "openmpi"
ULFM = OPEN_MPI and MPIRUN.version >= (5,)
HPC_RAY = python_command("-m", "hpc_ray.launcher.cli")
STORE = 128 << 20


def environment(**more: str) -> dict[str, str]:
    return world.under_root({**os.environ, **more})


def mpirun(ranks: int, *command: str) -> list[str]:
    line = world.mpirun_command(MPIRUN, ranks, list(command))
    return [word for word in line if word not in ("-x", world.PLAN_VARIABLE)]


def finished(command: list[str], *, timeout_s: float = 60, **options) -> subprocess.CompletedProcess:
    options.setdefault("env", environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)


# ------------------------------------------------------------------ the transport alone


@pytest.mark.each_mpi
def test_messages_and_objects_arrive_whole():
    done = finished(mpirun(3, sys.executable, str(Path(__file__).with_name("link_program.py"))), timeout_s=110)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    print(reports[0])
    for report in reports:
        assert report["bad"] == 0 and report["errors"] == {} and report["closed"]
        assert "not there" in report["refused"]


# ------------------------------------------------------------------ virtual nodes


@pytest.fixture(params=["mpi", "tcp"], ids=["over-mpi", "over-tcp"])  # "mpi" alone is a mark of pytest-mpi
def transport(request, monkeypatch):
    monkeypatch.setenv("HPC_RAY_TRANSPORT", request.param)
    return request.param


DRIVER = """
import os, sys, time
import numpy as np
import hpc_ray as ray
ray.init(num_nodes=3, num_cpus=1, object_store_memory=128 << 20)
while len([n for n in ray.nodes() if n["Alive"]]) < 3:
    time.sleep(0.01)
@ray.remote(num_cpus=1)
class Holder:
    def where(self):
        return ray.get_runtime_context().get_node_id()
    def make(self, n):
        return np.arange(n, dtype=np.int64)
    def total(self, array):
        return int(array.sum())
holders = [Holder.remote() for _ in range(3)]
assert len(set(ray.get([h.where.remote() for h in holders]))) == 3
from hpc_ray import session
world = session._attachment._owned
{then}
"""


def driver(then: str) -> subprocess.Popen:
    return subprocess.Popen(
        python_command("-c", DRIVER.replace("{then}", then)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def links_of(pid: int) -> list[int]:
    """Pids of link processes that descend from a process; over TCP the head's is the first."""
    found = []
    for child in session.children(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[:8]
        if b"hpc_ray.launcher.rank" in words or b"hpc_ray.launcher.member" in words:
            try:
                if os.readlink(f"/proc/{child}/exe") == os.path.realpath(sys.executable):
                    found.append(child)
            except OSError:
                pass
        found += links_of(child)
    return found


def shared_files(pids: list[int]) -> set[str]:
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


@pytest.mark.each_mpi
def test_actors_and_objects_on_three_nodes(transport):
    text = """
n = 2_000_000
arrays = [h.make.remote(n) for h in holders]
for h in holders:
    assert ray.get([h.total.remote(a) for a in arrays]) == [n * (n - 1) // 2] * 3
print('all right', flush=True)
"""
    with driver(text) as process:
        out, err = process.communicate(timeout=90)
    assert "all right" in out and process.returncode == 0, err


def test_collectives_over_three_nodes(transport):
    text = """
from hpc_ray.util import collective
def call(self, rank, n):
    if not collective.is_group_initialized('g'):
        collective.init_collective_group(3, rank, 'mpi', 'g')
    array = np.arange(n, dtype=np.float64) * (rank + 1)
    collective.allreduce(array, 'g')
    return bool((array == np.arange(n) * 6).all())
for n in (1, 1000, 1_000_000, 10):
    assert all(ray.get([h.__ray_call__.remote(call, rank, n) for rank, h in enumerate(holders)], timeout=60))
waiting = [h.__ray_call__.remote(call, rank, 5) for rank, h in enumerate(holders[:2])]
ray.kill(holders[2])
try:
    ray.get(waiting, timeout=20)
except ray.exceptions.ActorDiedError as error:
    assert 'rank 2' in str(error) and holders[2]._actor_id.hex() in str(error)
    print('all right', flush=True)
"""
    with driver(text) as process:
        out, err = process.communicate(timeout=90)
    assert "all right" in out and process.returncode == 0, err


def test_a_compiled_graph_over_three_nodes(transport):
    """Small values go as messages, large ones are fetched from the node where they lie; the end of a node ends the graph."""
    text = """
from hpc_ray.dag import InputNode, MultiOutputNode
a, b, c = holders
with InputNode() as n:
    made = a.make.bind(n)
    graph = MultiOutputNode([b.total.bind(made), c.total.bind(made), made]).experimental_compile(_max_inflight_executions=3)
for n in [10, 1_000_000, 20, 2_000_000, 1_000_001] * 2:
    one, two, array = ray.get(graph.execute(n), timeout=60)
    assert one == two == n * (n - 1) // 2 == array.sum() and len(array) == n
ray.kill(c)  # it may still take some steps
try:
    while True:
        ray.get(graph.execute(1), timeout=60)
except ray.exceptions.ActorDiedError as error:
    assert c._actor_id.hex() in str(error)
    print('all right', flush=True)
graph.teardown()
"""
    with driver(text) as process:
        out, err = process.communicate(timeout=90)
    assert "all right" in out and process.returncode == 0, err


def test_links_sleep_when_nothing_happens(transport):
    with driver("print('up', flush=True); sys.stdin.read(); time.sleep(1000)") as process:
        assert process.stdout.readline()
        links = links_of(process.pid)
        assert len(links) == 3
        if transport == "tcp":  # one that has ended does not keep the others awake
            os.kill(links.pop(), signal.SIGKILL)
        shares = idle_shares(links)
        process.kill()
    assert max(shares) < 0.03


def idle_shares(links: list[int]) -> list[float]:
    """How much of a core each uses while nothing happens."""

    def used() -> list[float]:
        ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in links]
        return [sum(map(int, pair)) / os.sysconf("SC_CLK_TCK") for pair in ticks]

    time.sleep(1.5)  # links lengthen their intervals after a second of silence
    before, started = used(), time.monotonic()
    time.sleep(4)
    passed = time.monotonic() - started
    shares = [(b - a) / passed for a, b in zip(before, used(), strict=True)]
    print("idle share of a core:", [f"{share:.2%}" for share in shares])
    return shares


def test_threads_may_change_a_cluster_at_once():
    cluster = Cluster(max_nodes=7)
    cluster.add_node()
    errors = []

    def work() -> None:
        try:
            for graceful in (False, True):
                cluster.remove_node(cluster.add_node(), allow_graceful=graceful)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.shutdown()
    assert not errors


def test_links_sleep_when_their_nodes_have_gone():
    text = """
import sys, time
from hpc_ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, connect=True, max_nodes=3)
nodes = [cluster.add_node(), cluster.add_node()]
cluster.remove_node(nodes[0], allow_graceful=False)
cluster.remove_node(nodes[1])
print("removed", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen(python_command("-c", text), stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout.readline()
        links = links_of(process.pid)
        assert len(links) == 3
        shares = idle_shares(links)
        process.kill()
    assert max(shares) < 0.03


@pytest.mark.each_mpi
@pytest.mark.parametrize("victim", ["driver", "mpirun", "head link"])
def test_a_death_ends_all(victim, transport, eventually):
    if transport == "tcp" and victim == "mpirun":
        pytest.skip("there is no mpirun over TCP")

    def folders():
        return set(Path(os.environ["TMPDIR"]).glob("ompi*"))

    before = folders()
    text = """
print(world.child.pid, flush=True)
try:
    while True: ray.get(holders[1].where.remote(), timeout=60); time.sleep(0.01)
except ray.exceptions.RayError as error:
    print(type(error).__name__, flush=True)  # of the other node, or of ours
while True:
    try:
        ray.nodes()
    except ray.exceptions.LocalRayletDiedError as error:
        print(error, flush=True)
        break
    except ray.exceptions.RayError:
        pass  # the GCS went first
    time.sleep(0.01)
"""
    with driver(text) as process:
        launcher = int(process.stdout.readline())
        links = links_of(process.pid)
        assert len(links) == 3
        files = shared_files(links)
        link = _link_of(0, links, transport)
        os.kill({"driver": process.pid, "mpirun": launcher, "head link": link}[victim], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    if victim == "mpirun":
        assert f"mpirun was killed by SIGKILL (pid {launcher})" in out, (out, err)
    elif victim == "head link" and transport == "tcp":
        assert f"the head's link was killed by SIGKILL (pid {link})" in out, (out, err)
    elif victim == "head link":
        assert f"the link of node 0 has died (pid {link} on" in out, (out, err)
    eventually(lambda: folders() <= before, "mpirun's folder is gone")
    eventually(lambda: not [path for path in files if os.path.exists(path)], "MPI's shared memory is gone")


def _link_of(node: int, links: list[int], transport: str) -> int:
    return links[node] if transport == "tcp" else next(pid for pid in links if _rank_of(pid) == node)


def _rank_of(pid: int) -> int:
    variables = {k.decode(): v.decode() for k, v in session.environment_of(pid).items()}
    rank = world.discover(variables)
    assert rank is not None
    return rank.rank


def test_death_of_another_link(transport):
    """With ULFM and over TCP the node is lost and the others go on; without, the job ends with an error and nothing stays."""
    text = """
print(world.child.pid, flush=True)
sys.stdin.readline()
try:
    deadline = time.monotonic() + 30
    while sum(n['Alive'] for n in ray.nodes()) == 3 and time.monotonic() < deadline: time.sleep(0.01)
    print('alive', sum(n['Alive'] for n in ray.nodes()), flush=True)
    fine = 0
    for h in holders:
        try: ray.get(h.where.remote(), timeout=20); fine += 1
        except ray.exceptions.RayActorError: pass
    print('fine', fine, flush=True)
except ray.exceptions.RayError as error:
    print(type(error).__name__, flush=True)
"""
    process = subprocess.Popen(
        python_command("-c", DRIVER.replace("{then}", text)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        process.stdout.readline()
        os.kill(_link_of(2, links_of(process.pid), transport), signal.SIGKILL)
        out, err = process.communicate("\n", timeout=90)
    if ULFM or transport == "tcp":
        assert "alive 2" in out and "fine 2" in out, (out, err)
    else:
        assert out.strip() and "fine 3" not in out, (out, err)


# ------------------------------------------------------------------ ways to start

SCRIPT = """
import os, sys
print("args", sys.argv[1:], flush=True)
import hpc_ray as ray
ray.init(object_store_memory=128 << 20)
print("stdin", sys.stdin.readline().strip(), flush=True)
launcher = [k for k in os.environ if k.startswith(("PMI", "OMPI_COMM", "HPC_RAY_LAUNCH"))]
@ray.remote
def inside():
    return [k for k in os.environ if k.startswith(("PMI", "OMPI_COMM", "HPC_RAY_LAUNCH"))]
print("launcher variables", ray.get(inside.remote()), flush=True)
print("nodes", ray.cluster_resources(), flush=True)
{then}
"""


@pytest.fixture
def script(tmp_path):
    def write(then: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.replace("{then}", then))
        return str(path)

    return write


WAYS = {
    "plain": lambda path: [sys.executable, path],
    "run": lambda path: [*HPC_RAY, "run", path],
    "run -n": lambda path: [*HPC_RAY, "run", "-n", "3", "--nodes", "2", path],
    "mpirun run": lambda path: mpirun(3, *HPC_RAY, "run", "--nodes", "2", path),
    "mpirun python": lambda path: mpirun(3, sys.executable, path),
}


@pytest.mark.each_mpi
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_start(way, script):
    done = finished([*WAYS[way](script("sys.exit(7)")), "a", "-b"], input="hello\n")
    assert "args ['a', '-b']" in done.stdout and "stdin hello" in done.stdout, done.stderr
    assert "launcher variables []" in done.stdout
    assert done.stdout.count("nodes {") == 1  # one driver
    assert done.returncode == 7, done.stderr
    assert ("MPI worker" in done.stderr) == ("run -n" in way or "mpirun" in way)


def test_what_init_is_given_in_a_launched_world(tmp_path):
    """It is of the driver's node; without it, each node has what the launcher found or was told."""
    path = tmp_path / "resources.py"
    path.write_text("""
import hpc_ray as ray
for given in ({"num_cpus": 4, "resources": {"slot": 2}, "labels": {"zone": "a"}}, {}):
    ray.init(**given)
    print([(n["Resources"].get("CPU"), n["Resources"].get("slot"), n["Labels"].get("zone")) for n in ray.nodes()])
    assert ray.get(ray.remote(num_cpus=3)(lambda: 1).remote(), timeout=30) == 1
    ray.shutdown()
ray.init(object_store_memory=64 << 20)
kept = [ray.put(bytes(20 << 20)) for _ in range(8)]  # more than that; it spills
print(ray.cluster_resources()["object_store_memory"] / 2**20, [len(ray.get(ref)) >> 20 for ref in kept])
ray.shutdown()
try:
    ray.init(object_store_memory=1 << 40)
except ValueError as error:
    print("hpc-ray run --object-store-memory" in str(error), ray.is_initialized())
""")
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", "--nodes", "2", "--num-cpus", "3", str(path)])
    assert done.stdout.splitlines() == [
        "[(4.0, 2.0, 'a'), (None, None, None)]",
        "[(3.0, None, None), (3.0, None, None)]",
        f"128.0 {[20] * 8}",
        "True False",
    ], done


def test_a_program_started_by_the_driver_has_a_cluster_of_its_own(tmp_path):
    inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
    inner.write_text("import hpc_ray as ray; ray.init(num_cpus=3); print(len(ray.nodes()), ray.cluster_resources()['CPU'])")
    outer.write_text(f"""
import subprocess, sys
import hpc_ray as ray
first = subprocess.check_output([sys.executable, {str(inner)!r}], text=True)
ray.init()
second = subprocess.check_output([sys.executable, {str(inner)!r}], text=True)
print([first, second], len(ray.nodes()))
""")
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", "--nodes", "2", str(outer)])
    assert done.stdout.strip() == "['1 3.0\\n', '1 3.0\\n'] 2", done


def test_auto_is_the_launched_cluster_for_programs_of_ray_alone(tmp_path):
    """Always, and not only when that is up before the program asks. Others may say init() without an address."""
    ours, theirs = tmp_path / "ours.py", tmp_path / "theirs.py"
    ours.write_text("""
import hpc_ray
try:
    hpc_ray.init(address="auto")
except ConnectionError as error:
    print("without an address" in str(error), hpc_ray.is_initialized())
hpc_ray.init()
print(len(hpc_ray.nodes()))
""")
    theirs.write_text("import ray; ray.init(address='auto'); print(len(ray.nodes()))")
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", "--nodes", "2", str(ours)])
    assert done.stdout.splitlines() == ["True False", "2"], done
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", "--nodes", "2", "--as-ray", str(theirs)])
    assert done.stdout.splitlines() == ["2"], done


def test_the_script_ends_well(script):
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", script("")], input="\n")
    assert done.returncode == 0 and "session_" not in done.stderr, done.stderr


def test_a_script_that_never_connects(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import sys; print('no cluster'); sys.exit(3)")
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", str(path)])
    assert done.returncode == 3 and "no cluster" in done.stdout, done.stderr


@pytest.mark.parametrize(("then", "code"), [("os.kill(os.getpid(), 9)", 137), ("raise RuntimeError('mine')", 1)])
def test_a_script_that_ends_badly(then, code, script):
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", script(then)], input="\n")
    assert done.returncode == code, done.stderr
    assert code != 1 or "RuntimeError: mine" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_supervisor_is_told_to_end(number, script):
    command = [*HPC_RAY, "run", "-q", "-n", "2", script("print('up', flush=True); import time; time.sleep(1000)")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    with process:
        process.stdin.write("\n")
        process.stdin.flush()
        while process.stdout.readline().strip() != "up":
            pass
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)


# ------------------------------------------------------------------ errors, once


def test_errors_are_said_once(tmp_path):
    done = finished(mpirun(3, *HPC_RAY, "run", str(tmp_path / "nothing.py")))
    assert done.returncode != 0 and done.stderr.count("does not exist") == 1, done.stderr
    done = finished([*HPC_RAY, "run", "-n", "100000", __file__])
    assert done.returncode == 1 and "too many for this host" in done.stderr
    done = finished([*HPC_RAY, "run", "--no-such-option", __file__])
    assert done.returncode == 2 and "No such option" in done.stderr


@pytest.mark.each_mpi
@pytest.mark.skipif(shutil.which("taskset") is None, reason="there is no taskset")
def test_binding_of_ranks_is_undone(script):
    """A launcher has bound each rank to a core: driver and workers have all that this host lets us use all the same."""
    core = min(os.sched_getaffinity(0))
    program = script("""
import os
def mine(): return sorted(os.sched_getaffinity(0))
print("CPUs", mine(), ray.get(ray.remote(mine).remote()), ray.cluster_resources()["CPU"])
""")
    done = finished(mpirun(2, "taskset", "--cpu-list", str(core), *HPC_RAY, "run", program), input="\n")
    cpus = sorted(host.cpuset())
    assert f"CPUs {cpus} {cpus} {float(len(cpus))}" in done.stdout, done.stdout + done.stderr


def test_more_nodes_than_ranks(script):
    done = finished(mpirun(2, *HPC_RAY, "run", "--nodes", "3", script("")))
    assert done.returncode != 0 and done.stderr.count("3 nodes were asked for") == 1, done.stderr


def test_a_launcher_of_another_mpi():
    """What the ranks of a wrong mpirun see: its variables, and an MPI library that does not know them."""
    foreign = "PMI_{}" if OPEN_MPI else "OMPI_COMM_WORLD_{}"
    plan = world.make_plan({"num_cpus": 1, "object_store_memory": STORE}, world=2, nodes=2)
    told = []
    for rank in range(2):
        variables = environment(**{foreign.format("RANK"): str(rank), foreign.format("SIZE"): "2"})
        done = finished(world.RANK_COMMAND, env={**variables, world.PLAN_VARIABLE: json.dumps(plan)})
        assert done.returncode == 1
        told.append(done.stderr)
    assert "they do not belong together" in told[0] and told[1] == ""


def test_singletons_are_refused():
    """A launcher that MPI does not see at all: each rank would be rank 0 of 1."""
    plan = world.make_plan({"num_cpus": 1, "object_store_memory": STORE}, world=2, nodes=2)
    variables = environment(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    done = finished(world.RANK_COMMAND, env={**variables, world.PLAN_VARIABLE: json.dumps(plan)})
    assert done.returncode == 1 and "do not belong together" in done.stderr, done.stderr


def test_too_much_memory_for_virtual_nodes():
    with pytest.raises(LaunchError, match="was asked for, but the machine"):
        local.start_cluster(num_nodes=2, object_store_memory=1 << 50, settings=Settings())
    with pytest.raises(ConfigurationError, match="too many for this host"):
        local.start_cluster(num_nodes=100_000)


# ------------------------------------------------------------------ relaunch

RESUMED = """
import os, signal
import hpc_ray as ray
from hpc_ray.experimental import internal_kv
ray.init(namespace="kept", object_store_memory=128 << 20)
before = int(os.environ["HPC_RAY_RELAUNCHED"])
@ray.remote(num_cpus=0)
class Keeper:
    def where(self):
        return os.getpid()
if before == 0:
    keeper = Keeper.options(name="keeper", lifetime="detached").remote()
    group = ray.util.placement_group([{"CPU": 1}], name="group", lifetime="detached")
    ray.get([keeper.where.remote(), group.ready()])
    internal_kv._internal_kv_put(b"key", b"value")
    print("first", flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
keeper = ray.get_actor("keeper")
assert ray.get(keeper.where.remote(), timeout=60)
assert ray.get(ray.util.get_placement_group("group").ready(), timeout=60)
assert internal_kv._internal_kv_get(b"key") == b"value"
print("second", before, len(ray.nodes()), flush=True)
"""


def test_a_lost_session_resumes(transport, tmp_path):
    path = tmp_path / "resumed.py"
    path.write_text(RESUMED)
    done = finished([*HPC_RAY, "run", "-q", "-n", "2", "--nodes", "2", "--num-cpus", "2", "--relaunch", "2", str(path)], timeout_s=100)
    said = [line for line in done.stdout.splitlines() if line.startswith(("first", "second"))]  # MPICH's mpirun has its say there too
    assert done.returncode == 0 and said == ["first", "second 1 2"], done
    assert "relaunch 1 of 2 on this host" in done.stderr and "without a word" in done.stderr, done.stderr
    assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("hpc_ray-journal")]

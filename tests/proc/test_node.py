"""A node's processes: up, down, killed one by one. The real roles; what is left behind is looked for after each test."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import local, session
from hpc_ray.launcher.session import children

pytestmark = pytest.mark.usefixtures("no_leaks")
STORE = 128 << 20


def start(**options):
    settings = options.pop("settings", None) or Settings(prestart_workers=1, kill_on_exit_s=1.0)
    return local.start_cluster(num_cpus=1, object_store_memory=STORE, settings=settings, **options)


def pids(attachment) -> dict[str, int]:
    """Pids by role, from titles below the node process."""
    node = attachment._owned.process.pid
    found = {"node": node}
    for pid in children(node):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        found.setdefault(title.removeprefix("hpc_ray::"), pid)
    return found


def test_start_and_close():
    attachment = start()
    assert attachment.welcome is not None and attachment.welcome.session == attachment.config.session
    assert attachment.config.session in [name for name, *_ in session.running()]
    folder = Path(attachment.config.session_dir)
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent.stat().st_mode & 0o777 == 0o700
    attachment.close()
    attachment.close()
    assert not folder.parent.exists()


@pytest.mark.parametrize("role", ["gcs", "raylet", "node"])
def test_a_killed_role_ends_the_node_and_is_named(role, eventually):
    attachment = start()
    found = eventually(lambda: (p := pids(attachment)) and {"gcs", "raylet"} <= p.keys() and p, "the roles have titles")
    told = threading.Event()
    texts: list[str] = []
    attachment.on_node_death = lambda text: (texts.append(text), told.set())
    os.kill(found[role], signal.SIGKILL)
    assert told.wait(10)
    assert role in texts[0]
    if role != "node":
        assert "SIGKILL" in texts[0]
    attachment.close()


def test_what_a_role_printed_is_in_the_error(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import stand_ins
    finally:
        sys.path.pop(0)
    with pytest.raises(LaunchError, match="no journal, says the stand-in"):
        attachment = start(roles=stand_ins.ROLES, environment={"STAND_IN_GCS": "crash"})
        told = threading.Event()
        texts: list[str] = []
        attachment.on_node_death = lambda text: (texts.append(text), told.set())
        assert told.wait(10)
        attachment.close()
        raise LaunchError(texts[0])


def test_a_missing_role_is_an_error_with_its_text():
    with pytest.raises(LaunchError, match="no_such_module"):
        start(roles={"worker": "no_such_module:main"})


DRIVER = """
import subprocess, sys, time
import hpc_ray as ray
ray.init(num_cpus=2, object_store_memory=128 << 20)
@ray.remote
def family():
    # a child of its own session and a grandchild that is orphaned at once
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.run(["sh", "-c", "sleep 1001 & :"])
    import os
    return os.getpid(), child.pid
@ray.remote
class Holder:
    def family(self):
        child = subprocess.Popen(["sleep", "1002"], start_new_session=True)
        import os
        return os.getpid(), child.pid
holder = Holder.remote()
print(*ray.get(family.remote()), *ray.get(holder.family.remote()), flush=True)
{then}
"""


def driver(then: str) -> subprocess.Popen:
    return subprocess.Popen(python_command("-c", DRIVER.replace("{then}", then)), stdout=subprocess.PIPE, text=True)


def test_a_killed_driver_leaves_nothing():
    with driver("time.sleep(1000)") as process:
        assert len(process.stdout.readline().split()) == 4
        process.kill()


def test_a_driver_that_raises_leaves_nothing():
    with driver("raise SystemExit(7)") as process:
        process.communicate(timeout=60)
    assert process.returncode == 7


def test_a_killed_node_leaves_nothing_and_the_driver_hears_of_it():
    text = """
import os, signal
from hpc_ray import session
os.kill(session._attachment._owned.process.pid, signal.SIGKILL)
try:
    while True:  # the actor may be quick enough to answer once more
        ray.get(holder.family.remote(), timeout=20)
except ray.exceptions.RayError as error:
    print(type(error).__name__, flush=True)
"""
    with driver(text) as process:
        out, _ = process.communicate(timeout=60)
    assert "LocalRayletDiedError" in out


def test_children_of_a_dead_worker_are_killed(eventually):
    text = "ray.kill(holder); sys.stdin.readline()"
    process = subprocess.Popen(
        python_command("-c", DRIVER.replace("{then}", text)),
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    with process:
        _, child, _, of_actor = map(int, process.stdout.readline().split())
        eventually(lambda: not session.process_start(of_actor), "the actor's child is gone")
        assert session.process_start(child), "but not that of a worker that lives"
        process.communicate("\n", timeout=60)


def test_interrupt_ends_driver_and_all():
    with driver("time.sleep(1000)") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGINT, 130)


def test_a_fork_of_the_driver_does_not_keep_the_node(eventually):
    text = """
import os
from hpc_ray import session
name = session._attachment.config.session
fork = os.fork()
if fork == 0:
    time.sleep(1000)
    os._exit(0)
print(name, fork, flush=True)
os.kill(os.getpid(), 9)
"""
    with driver(text) as process:
        process.stdout.readline()
        name, fork = process.stdout.readline().split()
        try:
            process.wait(60)
            eventually(lambda: name not in dict(session.running()), "the node has ended")
            assert session.process_start(int(fork)), "while the driver's fork lives on"
        finally:
            os.kill(int(fork), signal.SIGKILL)


def test_attach_auto_and_by_name(monkeypatch):
    attachment = start()
    name = attachment.config.session
    monkeypatch.setenv("HPC_RAY_ADDRESS", name)
    other = local.attach("auto")
    assert other.config.session == name and other.welcome is not None
    other.close()
    assert name in dict(session.running())  # a visitor's leave does not end it
    attachment.close()
    with pytest.raises(LaunchError, match="does not run on this host"):
        local.attach(name)


def test_detached_by_command_line(tmp_path):
    hpc_ray = python_command("-m", "hpc_ray.launcher.cli")
    run = {"capture_output": True, "text": True, "timeout": 60}
    refused = subprocess.run([*hpc_ray, "start", "--labels", "zone"], check=False, **run)
    assert refused.returncode == 2 and "labels are name=value" in refused.stderr
    options = ["--num-cpus", "3", "--object-store-memory", str(STORE), "--labels", "zone=a,disk=fast"]
    out = subprocess.run([*hpc_ray, "start", *options], check=True, **run).stdout
    name = next(word for word in out.split() if word.startswith("session_"))
    try:
        out = subprocess.run([*hpc_ray, "status", name], check=True, **run).stdout
        assert name in out and "CPU 3/3" in out
        script = tmp_path / "script.py"
        script.write_text(
            "import hpc_ray as ray, sys\nray.init(address=sys.argv[1])\nprint(ray.get(ray.remote(lambda: 41 + 1).remote()))\n"
            "labels = ray.nodes()[0]['Labels']\nassert (labels['zone'], labels['disk']) == ('a', 'fast'), labels\n"
        )
        for _ in range(2):
            out = subprocess.run([sys.executable, str(script), name], check=True, **run).stdout
            assert "42" in out
    finally:
        out = subprocess.run([*hpc_ray, "stop", name], check=True, **run).stdout
    assert "has ended" in out
    assert subprocess.run([*hpc_ray, "stop", name], capture_output=True, timeout=60, check=False).returncode == 1


def test_stale_folders_are_swept_and_live_ones_are_not(tmp_path):
    base = Path(session.base_dir())
    dead = base / "session_2000_dead" / "node-0"
    dead.mkdir(parents=True)
    (dead / "lock").write_text('{"pid": 0}')
    live = base / "session_2000_live" / "node-0"
    live.mkdir(parents=True)
    (live / "lock").write_text('{"pid": 0}')
    with open(live / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        session.sweep()
        assert not dead.parent.exists() and live.exists()
    session.sweep()
    assert not live.parent.exists()


def test_a_sweep_does_not_take_another_process_for_a_dead_leader():
    """Its number has come again, for a process that leads a kernel's session of its own."""
    other = subprocess.Popen(["sleep", "100"], start_new_session=True)
    try:
        dead = Path(session.base_dir()) / "session_2000_dead" / "node-0"
        dead.mkdir(parents=True)
        (dead / "lock").write_text(json.dumps({"pid": other.pid, "start": session.process_start(other.pid) - 1}))
        session.sweep()
        assert not dead.exists() and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_folder_can_be_made_while_others_are_swept():
    """Each rank of a launch sweeps, and makes its node's folder, while others do."""
    over = threading.Event()

    def sweep():
        while not over.is_set():
            session.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(500):
            path, lock = session.make_dir(session.new_name(), 0)
            session.remove_dir(path)
            os.close(lock)
            path = session.base_dir()
            assert path.startswith(os.environ["TMPDIR"]), "and not another one, because it was away for an instant"
    finally:
        over.set()
        sweeper.join()


def test_more_memory_than_there_is():
    with pytest.raises(ConfigurationError, match="was asked for, but the machine"):
        local.start_cluster(object_store_memory=1 << 50)


def test_workers_carry_no_launcher_variables(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_pml", "ob1")
    monkeypatch.setenv("PMI_FD", "99")
    source = session.scrubbed_environment()
    assert "OMPI_MCA_pml" not in source and "PMI_FD" not in source

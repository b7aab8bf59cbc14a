"""Three hosts on this machine, each with its network, process ids, /tmp and /dev/shm; ``netns-cluster`` makes them of namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
TOOL = HERE.parent / "testbed" / "netns-cluster"
SHARED = [str(HERE.parents[1]), sys.prefix, sys.base_prefix]  # also where they are below /tmp, which each host has for itself
HOSTS = 3
GONE_S = 15.0

# Everything but init and the asker itself; files of /tmp and /dev/shm.
_TRACES = """
import os, sys
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        command = open(f"/proc/{pid}/cmdline", "rb").read().replace(b"\\0", b" ").decode(errors="replace")[:150]
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        continue
    if int(pid) not in (1, os.getpid()) and state != "Z" and " start-node " not in command and " up " not in command:
        print("process", pid, command)
for top in ("/tmp", "/dev/shm"):
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in sys.argv[1:]]
        for name in folders + files:
            if any(path.startswith(os.path.join(folder, name) + "/") for path in sys.argv[1:]):
                continue  # on the way to what the hosts share
            if "torchinductor" not in folder + name:  # torch's
                print("file", os.path.join(folder, name))
"""


class Hosts:
    """node1 to node3, of this test run alone: its state is in a folder of its own, and so are its networks."""

    def __init__(self):
        # Not below /tmp, which each host has for itself; this folder they share.
        self.folder = Path(tempfile.mkdtemp(prefix="hpc_ray-hosts-", dir="/run"))
        self.environment = {**os.environ, "NETNS_CLUSTER_DIR": str(self.folder / "net"), "HPC_RAY_HEARTBEAT_TIMEOUT_S": "4"}
        for name in ("TMPDIR", "NETNS_CLUSTER_NET"):
            self.environment.pop(name, None)
        self.environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + self.environment["PATH"]
        self.running: list[subprocess.Popen] = []

    def tool(self, *words: object) -> str:
        done = subprocess.run(
            [str(TOOL), *map(str, words)], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, host: int, *command: object, **variables: str) -> subprocess.Popen:
        """A command on a host."""
        process = subprocess.Popen(
            [str(TOOL), "exec", str(host), *map(str, command)],
            env={**self.environment, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def run(self, host: int, *command: object, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(host, *command, **variables)
        out, err = process.communicate(timeout=90)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def traces(self, host: int) -> list[str]:
        done = self.run(host, sys.executable, "-S", "-c", _TRACES, *SHARED)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def await_nothing_left(self, hosts: range | list[int] = range(1, HOSTS + 1), but: tuple[str, ...] = ()) -> None:
        """No process and no file of anybody on these hosts, which were empty. ``but``: texts in what is not ours to end."""
        deadline = time.monotonic() + GONE_S
        for host in hosts:
            while left := [trace for trace in self.traces(host) if not any(text in trace.lower() for text in but)]:
                assert time.monotonic() < deadline, f"left on node{host}:\n  " + "\n  ".join(left)
                time.sleep(0.1)


@pytest.fixture(scope="session")
def machines() -> Iterator[Hosts]:
    if os.geteuid():
        pytest.skip("hosts of network namespaces need root")
    missing = [name for name in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"hosts of network namespaces need {', '.join(missing)} (iproute2, util-linux)")
    hosts = Hosts()
    try:
        line = [str(TOOL), "up", str(HOSTS), "--visible", *SHARED]
        up = subprocess.run(line, env=hosts.environment, capture_output=True, text=True, timeout=60, check=False)
        if up.returncode:
            pytest.skip(f"this machine allows no hosts of network namespaces: {up.stderr.strip()}")
        yield hosts
    finally:
        subprocess.run([str(TOOL), "down"], env=hosts.environment, capture_output=True, timeout=60, check=False)
        shutil.rmtree(hosts.folder, ignore_errors=True)


@pytest.fixture
def hosts(machines: Hosts) -> Iterator[Hosts]:
    """All of them on, connected and empty; afterwards too, whatever the test did to them."""
    yield machines
    for process in machines.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    machines.running.clear()
    machines.tool("heal")
    for host in range(1, HOSTS + 1):
        try:
            left = machines.traces(host)
        except AssertionError:
            left = ["it is off"]
        if left:
            subprocess.run([str(TOOL), "kill-node", str(host)], env=machines.environment, capture_output=True, timeout=60, check=False)
            machines.tool("start-node", host)

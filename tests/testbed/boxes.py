"""Hosts and Slurm in a box, from the side of tests: ``Hosts`` and ``SlurmBox`` are the two programs in this folder.

BOX-1 (many at once): each box has a folder of its own below /run and a network that is joined to no other, so that test runs on one machine
do not meet; addresses and names of hosts may be the same in all.
BOX-2 (nothing left): a box goes with its run. What a killed run has left is taken down by the next one, which knows it by a lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = Path("/run")
PREFIX = "hr-box-"  # not our name: daemons of the box have it in their command lines


def missing(*programs: str) -> str:
    """Why there can be no box on this machine, as a sentence; "" where there can be one."""
    if os.geteuid():
        return "hosts in a box need root"
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in ("ip", "nsenter", "setpriv", *programs) if shutil.which(name, path=search) is None]
    if absent:
        return f"a box needs {', '.join(absent)} (apt-get install iproute2 slurm-wlm munge)"
    try:
        probe = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        tried = subprocess.run(probe, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"namespaces cannot be tried: {error}"
    return f"this machine does not allow namespaces: {tried.stderr.strip()}" if tried.returncode else ""


# Puts a folder of the same content, which everybody may walk through, in front of a closed one.
_OPEN = """
set -e; from=$1; to=$(mktemp -d)
mount -t tmpfs -o mode=755 tmpfs "$to"
for entry in "$from"/* "$from"/.[!.]*; do
    if [ -d "$entry" ] && [ ! -h "$entry" ]; then mkdir "$to/${entry##*/}"; mount --rbind "$entry" "$to/${entry##*/}"; fi
done
mount --move "$to" "$from"; rmdir "$to"
"""


class Hosts:
    """``head`` and ``node1`` … ``nodeN``, hosts with their own processes, network, /dev/shm and /tmp. The other files are shared;
    of those below /tmp the source tree and this Python."""

    program = "netns-cluster"

    def __init__(self, count: int):
        self.count = count
        self._take_down_others()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=RUN))
        self.folder.chmod(0o755)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.environment = self._environment(self.folder)
        visible = [str(ROOT), sys.prefix, sys.base_prefix]
        try:
            self.do("up", str(count), "--visible", *visible)
        except BaseException:
            self.down()
            raise

    @staticmethod
    def _environment(folder: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SLURMD_")) and name != "TMPDIR"}
        kept["PATH"] = os.pathsep.join([kept.get("PATH", ""), "/usr/sbin", "/sbin"])
        return kept | {
            "NETNS_CLUSTER_DIR": str(folder / "state" / "net"),
            "SLURM_BOX_DIR": str(folder / "state"),
            "SLURM_CONF": str(folder / "state" / "slurm.conf"),
        }

    @classmethod
    def _take_down_others(cls) -> None:
        for folder in RUN.glob(f"{PREFIX}*"):
            try:
                with open(folder / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    subprocess.run([HERE / "netns-cluster", "down"], env=cls._environment(folder), capture_output=True, timeout=30)
                    shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue  # its run lives, or has just begun

    def do(self, *words: str, timeout_s: float = 60.0) -> str:
        """The box's program; what it printed."""
        ended = subprocess.run(
            [str(HERE / self.program), *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert ended.returncode == 0, f"{self.program} {' '.join(words)}: {ended.stderr}{ended.stdout}"
        return ended.stdout

    def net(self, *words: str) -> str:
        """A command of netns-cluster for these hosts."""
        return self.do(*words)

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs ``command`` on a host (0: head), for ``subprocess`` with ``environment``."""
        return [str(HERE / "netns-cluster"), "exec", str(host), *command]

    def open_to_all_users(self) -> None:
        """Lets other users than root run this Python on the hosts, also where its folder is closed to them on the machine."""
        wanted = [path for place in (ROOT, sys.prefix, sys.base_prefix) for path in Path(place).resolve().parents]
        closed = {path for path in wanted if not path.stat().st_mode & 0o001}
        for path in sorted(closed):
            for host in range(self.count + 1):
                subprocess.run(self.on(host, "sh", "-c", _OPEN, "open", str(path)), env=self.environment, check=True, timeout=30)

    def down(self) -> None:
        try:
            self.do("down")
        finally:
            os.close(self._lock)
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- what is on a host, seen from outside

    def pid(self, host: int) -> int:
        """Of the host's first process."""
        return int((self.folder / "state" / "net" / f"{host}.pid").read_text().split()[0])

    def processes(self, host: int, mark: str = "HPC_RAY_SESSION=") -> list[str]:
        """Living processes of a host that have the mark in their environment, and those of our launcher."""
        space = os.readlink(f"/proc/{self.pid(host)}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if os.readlink(entry / "ns/pid") != space:
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                marked = f"\0{mark}".encode() in b"\0" + (entry / "environ").read_bytes()
            except OSError:
                continue
            if state != "Z" and (marked or "hpc_ray" in command or "hpc-ray" in command):
                found.append(f"{entry.name} {command}")
        return found

    def is_up(self, host: int) -> bool:
        return os.path.exists(f"/proc/{self.pid(host)}/root/dev/shm")

    def left(self, host: int) -> list[str]:
        """What sessions have left on a host, in words: processes, shared memory, folders. Of a dead host nothing is left."""
        if not self.is_up(host):
            return []
        root = Path(f"/proc/{self.pid(host)}/root")
        found = [f"process {process}" for process in self.processes(host)]
        found += [f"/dev/shm/{path.name}" for path in (root / "dev/shm").iterdir()]
        found += [f"/tmp/{path.relative_to(root / 'tmp')}" for path in (root / "tmp").glob("hpc_ray-*/*")]
        return [f"host {host}: {what}" for what in found]


class SlurmBox(Hosts):
    """Slurm on such hosts: ``head`` has slurmctld, each node four CPUs."""

    program = "slurm-box"

    def net(self, *words: str) -> str:
        return self.do("net", *words)

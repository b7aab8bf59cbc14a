"""What MPIs keep in /dev/shm and /tmp, and leave there when their processes are killed, some also when they end well.

A file is left behind when no process has it mapped or open. In shared memory Open MPI has one for each rank, MPICH one for the ranks of a
host, which has its name for as long as they live; in /tmp its launcher has one with the host's topology. (Processes of another container
with the same folders are not seen. Theirs may lose its name, which an MPI needs only while it starts; test_mpi_files.py.)
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator

SHARED_MEMORY = "/dev/shm/"
# How their names begin, by folder.
_KINDS = {
    SHARED_MEMORY: ("sm_segment.", "vader_segment.", "open_mpi.", "mpich_shm_", "ucx_shm_"),
    "/tmp/": ("hydra_hwloc_xmlfile_",),
}


def remove(paths: Iterable[str]) -> None:
    """Of these, those in shared memory; others are not touched."""
    for path in paths:
        if path.startswith(SHARED_MEMORY) and ".." not in path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def of_rank(rank: int, *, everything: bool) -> list[str]:
    """Files that MPI has mapped here: those of our rank (Open MPI ends their names with it), or ``everything``, for a rank without which
    there is no world."""
    return sorted(path for path in _mapped_by("self") if everything or path.endswith(f".{rank}"))


class Leftovers:
    """Of ranks that were killed, among them ranks that never told us of their files: of this user, made since then (``time.time()``)."""

    def __init__(self, since: float):
        self.since = since
        self._users: dict[str, int] = {}  # who has it, by path: asked first the next time

    def remove(self) -> list[str]:
        """Removes what is left behind by now; the paths. Reads ``/proc`` of all processes if a file's user is not known or gone."""
        paths = set(self._paths())
        has = {pid: _mapped_by(pid) | _opened_by(pid) for pid in set(self._users.values())} if paths else {}
        self._users = {path: pid for path, pid in self._users.items() if path in paths and path in has[pid]}
        # Whoever makes one in shared memory has it open until it is mapped. One that is open now may be mapped and closed before we ask
        # for maps, so these are asked for once more, after that.
        for look in (_mapped_by, _opened_by, _mapped_by):
            self._users |= _users(paths - self._users.keys(), look)
        left = sorted(paths - self._users.keys())
        for path in left:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return left

    def _paths(self) -> Iterator[str]:
        for folder, kinds in _KINDS.items():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(kinds) and self._is_of_ours(entry):
                        yield entry.path

    def _is_of_ours(self, entry: os.DirEntry) -> bool:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return False  # it is gone
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_ctime >= self.since


def _users(paths: set[str], look: Callable[[int], set[str]]) -> dict[str, int]:
    """Of these files, those that a process has as ``look`` tells of it, and such a process."""
    users: dict[str, int] = {}
    for name in os.listdir("/proc") if paths else ():
        if name.isdigit():
            users |= dict.fromkeys(look(int(name)) & paths, int(name))
            if len(users) == len(paths):
                break
    return users


def _mapped_by(pid: int | str) -> set[str]:
    """Files in /dev/shm that a process of ours has mapped."""
    try:
        with open(f"/proc/{pid}/maps") as file:
            text = file.read()
    except OSError:
        return set()
    lines = [line.partition(SHARED_MEMORY)[2] for line in text.splitlines()] if SHARED_MEMORY in text else []
    return {SHARED_MEMORY + name for name in lines if name and "(deleted)" not in name}


def _opened_by(pid: int) -> set[str]:
    """Files that a process of ours has open."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found

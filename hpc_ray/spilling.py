"""Objects whose bytes are in a file instead of the arena: one node's folder of them, and how both kinds are read alike.

Used by every process that reads or makes objects (client, worker, link), and by the raylet, which decides what is moved. A file is
named by its object's handle, so nobody need ask where it is. Readers map it: what is wanted comes back through the page cache, which
all processes of the node share, and needs no room in the arena.

SPILL-1 (complete): the slot says SPILLED only when the whole file is written; who sees it so, and no file, has met a deletion.
SPILL-2 (no file without an object): whoever frees a spilled object removes its file; what the dead left, the raylet sweeps.
SPILL-3 (no copies): bytes go from the arena's memory, or from the value's own buffers, straight to the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from hpc_ray._core import MappedFile, Store
from hpc_ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

_LOOKS = 100  # at an object that moves; a spill that is taken back takes microseconds
_STEP = 1 << 30  # bytes per system call; Linux does at most 2 GiB


class ObjectFiles:
    """The objects of one node, in the arena and in files below ``folder``. Thread-safe as ``Store`` is."""

    def __init__(self, store: Store, folder: str):
        self.store = store
        self.folder = folder

    def path(self, handle: int) -> str:
        return f"{self.folder}/{handle:016x}"

    # -------------------------------------------------------------- reading

    def read(self, handle: int) -> Any:
        """A read-only buffer that stays good while it is referred to; None when the object is gone."""
        store = self.store
        for _ in range(_LOOKS):
            pin = store.get(handle)
            if pin is not None:
                return pin
            found = store.info(handle)
            if found is None or not found[3]:
                return None
            try:
                return MappedFile(self.path(handle))
            except FileNotFoundError:  # deleted, or its spill was taken back: look again
                continue
        return None

    def on_disk(self, handle: int) -> bool:
        found = self.store.info(handle)
        return found is not None and found[4]

    # -------------------------------------------------------------- writing

    def write(self, handle: int, size: int, pieces: Iterable[tuple[int, Any]]) -> None:
        """Write the file of an object from (offset, bytes) pieces. Blocks; releases the GIL.

        Raises:
            OutOfDiskError, ObjectStoreFullError: see ``explain``; the file is gone then.
        """
        path = self.path(handle)
        try:
            file = self._create(path)
            try:
                os.ftruncate(file, size)
                for offset, piece in pieces:
                    view = memoryview(piece).cast("B")
                    while view:
                        done = os.pwrite(file, view[:_STEP], offset)
                        view, offset = view[done:], offset + done
            finally:
                os.close(file)
        except BaseException as error:
            self.remove(handle)
            if isinstance(error, OSError):
                raise self.explain(error) from None
            raise

    def reserve(self, handle: int, size: int) -> None:
        """Make the file of an object that is going to come through ``write_buffer``. Raises as ``write``."""
        path = self.path(handle)
        try:
            file = self._create(path)
            try:
                os.posix_fallocate(file, 0, size)  # now rather than by SIGBUS
            finally:
                os.close(file)
        except OSError as error:
            self.remove(handle)
            raise self.explain(error) from None

    def _create(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:  # the first one
            os.makedirs(self.folder, 0o700, exist_ok=True)
            return os.open(path, flags, 0o600)

    def write_buffer(self, handle: int) -> memoryview:
        """The memory of an object that is being created, as ``Store.write_buffer``, or its file's."""
        if self.on_disk(handle):
            return memoryview(MappedFile(self.path(handle), writable=True))
        return self.store.write_buffer(handle)

    def prepare(self, handle: int, offset: int, size: int) -> None:
        """So many bytes of a ``write_buffer`` are about to be written; what is in a file needs nothing."""
        self.store.prepare(handle, offset, size)

    def spill(self, handle: int) -> int:
        """Move an object from the arena to a file; the bytes freed, 0 if it is in use or gone. Blocks. Raises as ``write``."""
        pin = self.store.get(handle)
        if pin is None:
            return 0
        size = len(pin)
        self.write(handle, size, [(0, pin)])
        del pin  # ours does not count
        if self.store.spill(handle):
            return size
        self.remove(handle)
        return 0

    # -------------------------------------------------------------- the end of an object

    def delete(self, handle: int) -> None:
        """No new readers; the room is free when the last one is gone."""
        if self.store.delete(handle) != 1:
            self.remove(handle)

    def remove(self, handle: int) -> None:
        try:
            os.unlink(self.path(handle))
        except OSError:
            pass

    def sweep(self) -> None:
        """Remove the files of objects that went with the process that was to remove them (SPILL-2)."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return
        for name in names:
            handle = int(name, 16)
            if self.store.info(handle) is None:
                self.remove(handle)

    def explain(self, error: OSError) -> RayError:
        """What the caller shall see of a file that cannot be written."""
        where = f"{self.folder} ({os.strerror(error.errno or 0)})"
        hint = "drop references that are not needed, or set object_spilling_directory to a folder on a larger disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OutOfDiskError(f"The object store is full, and so is the disk that objects are spilled to: {where}; {hint}.")
        return ObjectStoreFullError(f"The object store is full, and objects cannot be spilled to {where}; {hint}.")

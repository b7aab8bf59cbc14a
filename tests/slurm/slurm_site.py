"""The Slurm of these tests, in a box or the site's, and what tests do with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import boxes

from hpc_ray.launcher import submission
from hpc_ray.slurm import commands
from hpc_ray.slurm.commands import JobState

BIN = Path(sys.executable).parent
HPC_RAY = str(BIN / "hpc-ray")


class Slurm:
    """Runs programs where Slurm's are: on the box's head, or here."""

    def __init__(self, folder: Path, box: boxes.SlurmBox | None):
        self.folder = folder
        self.box = box
        self.library = submission.mpi_library()
        self.environment = dict(box.environment if box is not None else os.environ, PYTHONUNBUFFERED="1")
        self.environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.environment["PATH"] = os.pathsep.join([str(BIN), self.environment.get("PATH", "")])

    def command(self, *words: str) -> list[str]:
        return self.box.on(0, *words) if self.box is not None else list(words)

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*words), stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=self.folder)

    def run(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """To its end, or that of the time."""
        with self.start(*words) as child:
            try:
                out, err = child.communicate(timeout=timeout_s)
            except BaseException:
                child.terminate()
                raise
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    def program(self, name: str, text: str) -> str:
        path = self.folder / f"{name}.py"
        path.write_text(text)
        return str(path)

    def submit(self, script: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """``hpc-ray submit``, followed."""
        output = "%j_%a" if "--array" in options else "%j"
        return self.start(HPC_RAY, "submit", "--output", f"{self.folder}/{Path(script).stem}-{output}.out", *options, script, *arguments)

    def states(self, job: str) -> list[JobState]:
        return commands.read_scontrol(self.run(*commands.scontrol_command(job)).stdout)

    def job_of(self, submitted: subprocess.Popen[str]) -> str:
        """The id, from the first line that submit prints."""
        assert submitted.stderr is not None
        line = submitted.stderr.readline()
        found = re.search(r"submitted job (\d+)", line)
        assert found, line + submitted.stderr.read()
        return found.group(1)

    @property
    def mpi(self) -> str:
        """srun's --mpi that fits the MPI of this Python."""
        return "pmix" if "Open MPI" in self.library else "pmi2"

    def left(self) -> list[str]:
        """What is still on the hosts of the box."""
        assert self.box is not None
        return [what for host in range(self.box.count + 1) for what in self.box.left(host)]

    def await_nothing_left(self, timeout_s: float = 15.0, *, but: str = "\n") -> None:
        """``but``: a text in what may stay."""
        deadline = time.monotonic() + timeout_s
        while left := [what for what in self.left() if but not in what]:
            assert time.monotonic() < deadline, f"still there after {timeout_s:g} s:\n  " + "\n  ".join(left)
            time.sleep(0.1)


def await_line(child: subprocess.Popen[str], text: str) -> str:
    """The first line of its output with the text; fails with its words when it ends before."""
    assert child.stdout is not None and child.stderr is not None
    seen = ""
    while text not in (line := child.stdout.readline()):
        assert line, seen + child.stderr.read()
        seen += line
    return line

"""Jobs that go on when a host is lost: the head is the batch script's process, the others are a step that outlives them."""

from __future__ import annotations

import pytest
from slurm_programs import DRAINS, SURVIVES
from slurm_site import await_line

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]


def test_a_host_dies(slurm, box):
    enough = slurm.folder / "enough"
    script = slurm.program("survives", SURVIVES)
    with slurm.submit(script, "-N", "3", "-c", "2", "--survive-nodes", arguments=(str(enough),)) as job:
        slurm.job_of(job)
        assert await_line(job, "begins on").split()[2:] == ["node1", "node2", "node3"]
        box.net("kill-node", "3")
        try:
            await_line(job, "node3 is gone")
            enough.touch()
            out, err = job.communicate(timeout=100)
        finally:
            box.do("start-node", "3")
    assert "ends on node1 node2\n" in out, out + err
    assert job.returncode == 0, err
    slurm.await_nothing_left()


@pytest.mark.parametrize(("signal", "code"), [([], 143), pytest.param(["--batch", "--signal=USR1"], 138, marks=pytest.mark.thorough)])
def test_the_driver_drains(slurm, signal, code):
    with slurm.submit(slurm.program("drains", DRAINS), "-N", "2", "--survive-nodes") as job:
        number = slurm.job_of(job)
        await_line(job, "ready")
        assert slurm.run("scancel", *signal, number).returncode == 0
        out, err = job.communicate(timeout=100)
    assert "saved\n" in out and job.returncode == code, out + err

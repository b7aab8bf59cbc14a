"""When ``hpc-ray run`` launches again, and on what; with stand-ins for launches."""

from hpc_ray.launcher import supervisor
from hpc_ray.launcher.supervisor import Outcome


def going(outcomes, names, times, gone=()):
    """(exit code, [(hosts, launches before)])"""
    made = []

    def launch(names, before):
        made.append((names, before))
        return outcomes[before]

    return supervisor.keep_going(launch, names, times, lambda names: [name for name in names if name not in gone]), made


def test_a_script_that_ends_is_not_launched_again(capfd):
    for code in (0, 3):
        assert going([Outcome(code)], ["a", "b"], 5) == (code, [(["a", "b"], 0)])
    assert capfd.readouterr().err == ""


def test_a_lost_session_goes_on_with_what_is_left(capfd):
    lost = Outcome(1, "node 1 on b is lost")
    assert going([lost, Outcome(0)], ["a", "b", "c"], 2, gone=["b"]) == (0, [(["a", "b", "c"], 0), (["a", "c"], 1)])
    said = capfd.readouterr().err
    assert "not to be reached any more: b" in said and "relaunch 1 of 2 on a, c" in said
    assert going([lost, Outcome(0)], None, 1) == (0, [(None, 0), (None, 1)])


def test_no_more_often_than_that(capfd):
    lost = Outcome(137, "rank 0 has ended")
    assert going([lost, lost, lost], ["a"], 2) == (137, [(["a"], 0), (["a"], 1), (["a"], 2)])
    assert going([lost], ["a"], 0) == (137, [(["a"], 0)])
    assert going([lost], ["a"], 3, gone=["a"]) == (137, [(["a"], 0)])
    assert "relaunch 3" not in capfd.readouterr().err


def test_probes():
    assert supervisor.probe_command("n1", None, {}) == ["ssh", "-x", "-o", "BatchMode=yes", "n1", "true"]
    assert supervisor.probe_command("n1", "/agent -v", {"SLURM_JOB_ID": "3"}) == ["/agent", "-v", "n1", "true"]
    assert supervisor.probe_command("n1", None, {"SLURM_JOB_ID": "3"}) == [
        *("srun", "--mpi=none", "--overlap", "--input=none", "--nodes", "1", "--ntasks", "1", "--nodelist", "n1", "true")
    ]
    assert supervisor.reachable(["localhost"], "false", {}) == ["localhost"]

"""Slurm without Slurm: batch scripts and command lines as literals, what its programs print, what is said of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_ray.exceptions import ConfigurationError
from hpc_ray.launcher import submission
from hpc_ray.launcher.cli import cli
from hpc_ray.slurm import commands, job, scheduler
from hpc_ray.slurm.commands import JobState
from hpc_ray.slurm.output import Tail

# ------------------------------------------------------------------ the batch script


def test_smallest_script():
    assert (
        job.batch_script(job.Job(script="train.py"))
        == """\
#!/bin/bash
# Written by `hpc-ray submit`. Each task is a rank; the lowest of a host leads its node, rank 0 the script.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=hpc-ray-%j.out
#SBATCH --signal=USR1@60
#SBATCH --no-requeue

exec srun --kill-on-bad-exit=1 hpc-ray run train.py
"""
    )


def test_largest_script():
    wanted = job.Job(
        script="code/train it.py",
        arguments=("--lr", "0.1", "a b"),
        run_options=("--as-ray",),
        job_name="my job",
        nodes=4,
        ntasks_per_node=2,
        cpus_per_task=8,
        gpus_per_node="a100:4",
        mem="64G",
        time="1-00:00:00",
        partition="gpu",
        account="phys",
        qos="long",
        constraint="nvme&ib",
        array="1-10%4",
        dependency="afterok:12",
        error="err-%j.txt",
        exclusive=True,
        requeue=True,
        signal_s=120,
        lines=("--reservation=course", "--mail-type=END"),
        setup=("module load openmpi", "source ~/venv/bin/activate"),
        container="apptainer exec --nv image.sif",
        mpi="pmix",
    )
    assert (
        job.batch_script(wanted)
        == """\
#!/bin/bash
# Written by `hpc-ray submit`. Each task is a rank; the lowest of a host leads its node, rank 0 the script.
#SBATCH --job-name="my job"
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=a100:4
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --partition=gpu
#SBATCH --account=phys
#SBATCH --qos=long
#SBATCH --constraint=nvme&ib
#SBATCH --array=1-10%4
#SBATCH --dependency=afterok:12
#SBATCH --output=hpc-ray-%A_%a.out
#SBATCH --error=err-%j.txt
#SBATCH --exclusive
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --reservation=course
#SBATCH --mail-type=END

module load openmpi
source ~/venv/bin/activate
srun --kill-on-bad-exit=1 --mpi=pmix --cpus-per-task=8 apptainer exec --nv image.sif hpc-ray run --as-ray \
'code/train it.py' --lr 0.1 'a b' &
child=$!
for signal in TERM USR1; do trap "kill -$signal $child" $signal; done
while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done  # a signal ends wait, not the child
# 138: ended by SIGUSR1, as the time is nearly over; the same job once more, from the script's last checkpoint.
if [ "$code" -eq 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
    )


def test_script_that_survives_lost_nodes():
    """The head is the batch script's own process: Slurm's warning goes there, and to no step."""
    text = job.batch_script(job.Job(script="train.py", nodes=4, survive_nodes=True, mpi="pmix"))
    assert "#SBATCH --no-kill\n#SBATCH --signal=B:USR1@60\n" in text
    assert text.endswith("\n\nexec hpc-ray run --survive-nodes train.py\n")
    again = job.batch_script(job.Job(script="train.py", nodes=4, survive_nodes=True, requeue=True))
    assert "\nhpc-ray run --survive-nodes train.py &\nchild=$!\n" in again


def test_script_of_a_node_that_joins():
    wanted = job.Job(
        script="", job_name="node", cpus_per_task=4, gpus_per_node="a100:2", partition="gpu", output=job.NODE_OUTPUT, signal_s=0,
        lines=("--reservation=x",), setup=("module load cuda",), container="apptainer exec image.sif",
    )  # fmt: skip
    assert job.join_script(wanted, "/home/me/my join", "hpc-ray/slurm-job", {"disk": 2.0}) == """#!/bin/bash
# Written by `hpc-ray autoscale`: a node more for a cluster that runs.
#SBATCH --job-name=node
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=a100:2
#SBATCH --partition=gpu
#SBATCH --output=hpc-ray-node-%j.out
#SBATCH --no-requeue
#SBATCH --reservation=x

module load cuda
exec apptainer exec image.sif hpc-ray start --join '/home/me/my join' --block --resources '{"disk": 2.0}' \
--labels hpc-ray/slurm-job="$SLURM_JOB_ID"
"""


def test_tasks_in_all_stand_without_tasks_per_node():
    lines = job.directives(job.Job(script="a.py", nodes=2, ntasks=7))
    assert "--ntasks=7" in lines and not [line for line in lines if line.startswith("--ntasks-per-node")]
    assert job.Job(script="a.py", nodes=2, ntasks=7).tasks == 7
    assert job.Job(script="a.py", nodes=2, ntasks_per_node=3).tasks == 6


def test_no_signal_where_none_is_wanted():
    assert not [line for line in job.directives(job.Job(script="a.py", signal_s=0)) if line.startswith("--signal")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nodes": 0}, "--nodes must be at least 1, it is 0"),
        ({"nodes": 3, "ntasks": 2}, "3 nodes need at least as many tasks, but --ntasks is 2"),
        ({"nodes": 2, "ntasks_per_node": 2, "survive_nodes": True}, "one task on each node, but 4 tasks on 2 nodes"),
        ({"survive_nodes": True, "container": "apptainer exec a.sif"}, "--survive-nodes starts its nodes by srun"),
        ({"time": "soon"}, "--time 'soon' is not"),
        ({"mem": "64 GB"}, "--mem '64 GB' is not a number with K, M, G or T"),
        ({"lines": ("reservation=x",)}, "not an option of sbatch"),
        ({"partition": "a\nrm -rf"}, "--partition must be one line"),
    ],
)
def test_what_cannot_be_is_refused_before_slurm(fields, words):
    with pytest.raises(ConfigurationError, match=words):
        job.batch_script(job.Job(script="a.py", **fields))


@pytest.mark.parametrize("time", ["30", "30:00", "1:00:00", "2-0", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_times_that_slurm_takes(time):
    assert f"--time={time}" in job.directives(job.Job(script="a.py", time=time)) and job.check(job.Job(script="a.py", time=time)) is None


@pytest.mark.parametrize(
    ("library", "offered", "chosen"),
    [
        ("Open MPI v5.0.11, package: …", ["none", "pmi2", "pmix", "pmix_v4"], "pmix"),
        ("Open MPI v5.0.11, package: …", ["none", "pmix_v3", "pmix_v4"], "pmix_v4"),
        ("Open MPI v5.0.11, package: …", ["none", "pmi2"], ""),
        ("MPICH Version:      5.0.2", ["none", "pmi2", "pmix"], "pmi2"),
        ("Intel(R) MPI Library 2021.11", ["pmi2"], "pmi2"),
        ("MPI VERSION    : CRAY MPICH version 8.1", ["none", "cray_shasta", "pmi2"], "cray_shasta"),
        ("", ["pmix"], ""),
    ],
)
def test_the_mpi_of_srun_follows_the_library(library, offered, chosen):
    assert job.mpi_type(library, offered) == chosen


def test_templates_are_batch_scripts():
    """bash can read them, and each starts ranks by srun, or nodes over TCP, as its last act."""
    found = sorted(Path(job.__file__).with_name("templates").glob("*.sbatch"))
    assert [path.name for path in found] == ["array.sbatch", "one_node.sbatch", "several_nodes.sbatch", "survive_nodes.sbatch"]
    for path in found:
        lines = path.read_text().splitlines()
        last = "exec hpc-ray run --survive-nodes " if path.stem == "survive_nodes" else "exec srun "
        assert lines[0] == "#!/bin/bash" and lines[-1].startswith(last)
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
        head = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert max(head) < first_command, "sbatch stops reading options at the first command"


# ------------------------------------------------------------------ command lines


def test_command_lines():
    assert commands.sbatch_command() == ["sbatch", "--parsable"]
    assert commands.scontrol_command("12_3") == ["scontrol", "--oneliner", "show", "job", "12_3"]
    assert commands.sacct_command("12") == [
        "sacct", "--jobs=12", "--allocations", "--noheader", "--parsable2",
        "--format=JobID,State,ExitCode,NodeList,Elapsed,Timelimit,WorkDir,JobName",
    ]  # fmt: skip
    assert commands.squeue_command("eve") == ["squeue", "--noheader", "--user=eve", "--format=%i %j"]
    assert commands.jobs_named_command("eve", "n") == ["squeue", "--noheader", "--user=eve", "--name=n", "--format=%i %T"]
    assert commands.read_squeue("12 PENDING\n13 RUNNING\n14 COMPLETING\n15 FAILED\n\n") == {"12": "PENDING", "13": "RUNNING"}
    assert commands.scancel_command("12") == ["scancel", "12"]
    assert commands.scancel_command("12", "USR1") == ["scancel", "--signal=USR1", "12"]
    assert commands.sinfo_command() == ["sinfo", "--noheader", "--format=%R|%a|%l|%D|%c|%m|%G"]
    assert commands.mpi_list_command() == ["srun", "--mpi=list"]
    assert commands.version_command() == ["scontrol", "--version"]
    assert commands.config_command() == ["scontrol", "show", "config"]
    assert " ".join(commands.one_on_each_node(3, "pmix", ["hostname"])) == (
        "srun --overlap --nodes=3 --ntasks=3 --ntasks-per-node=1 --mpi=pmix hostname"
    )
    assert job.run_command(job.Job(script="a.py")) == "srun --kill-on-bad-exit=1 hpc-ray run a.py"
    assert job.run_command(job.Job(script="a.py", survive_nodes=True)) == "hpc-ray run --survive-nodes a.py"


def test_an_outer_job_is_not_seen_by_sbatch():
    outer = {"PATH": "/bin", "SLURM_JOB_ID": "1", "SLURM_CONF": "/c", "SLURMD_NODENAME": "n", "SBATCH_ACCOUNT": "phys"}
    assert scheduler.clean(outer) == {"PATH": "/bin", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "phys"}


# ------------------------------------------------------------------ what is printed

FAILED = (
    "JobId=9 ArrayJobId=8 ArrayTaskId=1 JobName=my job UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901753 "
    "Nice=0 Account=(null) QOS=(null) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "ExitCode=3:0 RunTime=00:00:07 TimeLimit=UNLIMITED TimeMin=N/A StartTime=2026-11-21T11:09:19 "
    "ReqNodeList=(null) ExcNodeList=(null) NodeList=node1 BatchHost=node1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "WorkDir=/home/ann StdErr=/dev/null StdIn=/dev/null StdOut=/home/ann/a b.out Power= \n"
)


def test_scontrol_is_read():
    (state,) = commands.read_scontrol(FAILED)
    assert state == JobState(
        "8_1", "FAILED", "NonZeroExitCode", 3, 0, "node1", "00:00:07", "", "2026-11-21T11:09:19", "/home/ann/a b.out", "my job"
    )
    assert state.exit_code == 3 and not state.active
    assert state.describe() == "job 8_1 FAILED (NonZeroExitCode) on node1 for 00:00:07 exit code 3"


def test_tasks_of_an_array_are_in_order():
    text = "".join(f"JobId={9 + n} ArrayJobId=8 ArrayTaskId={n} JobState=RUNNING\n" for n in (10, 2, 1))
    assert [state.job for state in commands.read_scontrol(text)] == ["8_1", "8_2", "8_10"]


def test_sacct_is_read():
    text = (
        "12|CANCELLED by 1000|0:15|node[1-2]|00:01:00|1-00:00:00|/home/eve|train\n"
        "12.batch|x\n"
        "13|COMPLETED|0:0|None assigned|00:00:01|UNLIMITED|/h|t\n"
    )
    cancelled, completed = commands.read_sacct(text)
    assert (cancelled.state, cancelled.exit_code, cancelled.nodes) == ("CANCELLED", 143, "node[1-2]")
    assert cancelled.output == "/home/eve/hpc-ray-12.out"
    assert (completed.state, completed.exit_code, completed.nodes, completed.limit) == ("COMPLETED", 0, "", "")


@pytest.mark.parametrize(("printed", "number"), [("12\n", "12"), ("12;cluster\n", "12"), ("oh no\n", ""), ("warning: x\n17\n", "17")])
def test_sbatch_is_read(printed, number):
    assert commands.read_sbatch(printed) == number


@pytest.mark.parametrize(
    "printed",
    [
        "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n",
        "srun: MPI types are...\nsrun: pmix\nsrun: none\nsrun: cray_shasta\nsrun: pmi2\nsrun: pmix_v4\n",
    ],
)
def test_mpi_list_is_read(printed):
    assert commands.read_mpi_list(printed) == ["pmix", "none", "cray_shasta", "pmi2", "pmix_v4"]


@pytest.mark.parametrize(("printed", "version"), [("slurm 23.11.4\n", "23.11.4"), ("slurm-wlm 22.05.8\n", "22.05.8"), ("", "")])
def test_version_is_read(printed, version):
    assert commands.read_version(printed) == version


def test_configuration_is_read():
    printed = (
        "Configuration data as of 2026-11-21T12:00:00\nKillWait                = 30 sec\nMpiDefault              = pmix\n"
        "MpiParams               = (null)\n\nSlurmctld(primary) at head is UP\n"
    )
    assert commands.read_config(printed) == {"KillWait": "30 sec", "MpiDefault": "pmix", "MpiParams": "(null)"}


def test_partitions_for_people():
    text = "debug|up|infinite|3|4|24105|(null)\ngpu|down|1-00:00:00|8|64+|512000|gpu:a100:4\n"
    assert commands.read_sinfo(text) == (
        "  debug: 3 nodes of 4 CPUs and 24105 MB, at most infinite\n"
        "  gpu: 8 nodes of 64+ CPUs and 512000 MB, gpu:a100:4, at most 1-00:00:00, down"
    )


@pytest.mark.parametrize(
    ("state", "code", "active"),
    [
        (JobState("1", "COMPLETED"), 0, False),
        (JobState("1", "TIMEOUT"), 1, False),
        (JobState("1", "CANCELLED", signal=15), 143, False),
        (JobState("1", "OUT_OF_MEMORY", signal=125), 253, False),
        (JobState("1", "NODE_FAIL"), 1, False),
        (JobState("1", "PREEMPTED"), 1, False),
        (JobState("1", "FAILED", code=2), 2, False),
        (JobState("1", "PENDING"), 1, True),
        (JobState("1", "COMPLETING"), 1, True),
    ],
)
def test_how_a_job_ended(state, code, active):
    assert (state.exit_code, state.active) == (code, active)


def test_a_job_that_never_starts_says_what_to_do():
    stuck = JobState("11", "PENDING", "PartitionNodeLimit")
    assert stuck.describe() == (
        "job 11 PENDING (PartitionNodeLimit: the partition has not so many nodes: cancel it and ask for fewer, or another --partition)"
    )


def test_complaints_of_slurm_come_with_advice():
    assert scheduler.advice_for("sbatch: error: invalid partition specified: nope")[0] == "sinfo"
    assert "--constraint" in scheduler.advice_for("Batch job submission failed: Invalid feature specification")[1]
    assert scheduler.advice_for("something else") == ("", "")
    assert scheduler.is_transient("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert not scheduler.is_transient("Invalid job id specified")


# ------------------------------------------------------------------ following


def test_output_that_grows_begins_anew_and_cuts_letters(tmp_path):
    path = tmp_path / "out"
    tail = Tail(str(path))
    assert tail.read() == ""
    path.write_bytes("schö".encode()[:-1])
    assert tail.read() == "sch"
    path.write_bytes("schön\n".encode())
    assert tail.read_all() == "ön\n"
    path.write_bytes(b"new\n")
    assert tail.read() == "new\n"


class Recorded(submission._Plain):
    def __init__(self):
        self.told: list[str] = []

    def state(self, states, changed):
        if changed:
            self.told.append(" ".join(state.state for state in states))

    def write(self, text):
        self.told.append(text)


def test_a_follower_tells_states_once_and_the_output(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("before\n")
    answers = iter(
        [
            [JobState("5", "PENDING", output=str(path))],
            scheduler.Unreachable("down"),
            [JobState("5", "RUNNING", output=str(path))],
            [JobState("5", "RUNNING", output=str(path))],
            [JobState("5", "FAILED", code=3, output=str(path))],
        ]
    )

    def states(number):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(scheduler, "states", states)
    view = Recorded()
    follower = submission.Follower("5", view, show_output=True)
    ends = []
    for look in range(5):
        ends.append(follower.look(100.0 * look))
        if look == 2:
            path.write_text("before\nafter\n")
    assert ends == [False, False, False, False, True]
    assert view.told == ["PENDING", "RUNNING", "before\n", "after\n", "FAILED"]
    assert follower.exit_code() == 3


def test_a_silent_slurm_is_given_up_after_a_while(monkeypatch):
    def states(number):
        raise scheduler.Unreachable("down")

    monkeypatch.setattr(scheduler, "states", states)
    follower = submission.Follower("5", Recorded(), show_output=True)
    assert follower.look(0.0) is False
    with pytest.raises(scheduler.Unreachable):
        follower.look(submission._PATIENCE_S + 1)


def test_tasks_of_an_array_are_marked():
    assert submission._marked("a\nb\n", "5_1") == "(5_1) a\n(5_1) b\n"


# ------------------------------------------------------------------ the commands, without Slurm


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("pass")
    return tmp_path


def test_dry_run_needs_no_slurm(no_slurm):
    result = CliRunner().invoke(cli, ["submit", "-N", "2", "--command", "hpc-ray", "--dry-run", "train.py", "--nodes", "7"])
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=2\n" in result.output
    assert result.output.endswith("exec srun --kill-on-bad-exit=1 hpc-ray run train.py --nodes 7\n")


def test_without_slurm_it_says_so(no_slurm):
    result = CliRunner().invoke(cli, ["submit", "train.py"])
    assert isinstance(result.exception, scheduler.SlurmError)
    assert "there is no sbatch on PATH" in str(result.exception) and "--dry-run" in str(result.exception)


def test_a_script_that_is_not_there(no_slurm):
    result = CliRunner().invoke(cli, ["submit", "trian.py"])
    assert isinstance(result.exception, ConfigurationError) and "'trian.py' does not exist" in str(result.exception)


@pytest.mark.parametrize("command", [["status", "123"], ["logs", "123"], ["logs", "-f", "123_4"], ["cancel", "123"]])
def test_a_number_means_a_job(no_slurm, command):
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, scheduler.SlurmError), result.output
    assert "on PATH" in str(result.exception)

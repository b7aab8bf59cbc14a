"""Hosts and the command lines that start nodes on them, as literals."""

import os
import shlex

import pytest

from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.launcher import host, hosts, member, world

MEMBER = shlex.join(world.MEMBER_COMMAND)


def test_hosts():
    assert hosts.read_hosts("node1,node2:4, node1,") == ["node1", "node2"]
    assert hosts.read_hosts("10.0.0.1:2,fd00::1") == ["10.0.0.1", "fd00::1"]
    assert hosts.read_hostfile("node1 slots=4\n# a remark\n\nnode2:8 # fast\nnode1\n") == ["node1", "node2"]


def test_nodelists_of_slurm():
    assert hosts.expand_nodelist("login") == ["login"]
    assert hosts.expand_nodelist("a[1-3,07],b,c[09-11]x[1,2]") == [
        *("a1", "a2", "a3", "a07", "b"),
        *("c09x1", "c09x2", "c10x1", "c10x2", "c11x1", "c11x2"),
    ]
    with pytest.raises(ConfigurationError, match="cannot be read"):
        hosts.expand_nodelist("a[1-x]")


def test_cpus_of_a_job():
    assert hosts.cpus_per_node({"SLURM_JOB_CPUS_PER_NODE": "4(x3)"}) == 4
    assert hosts.cpus_per_node({"SLURM_JOB_CPUS_PER_NODE": "16(x2),8"}) == 8
    assert hosts.cpus_per_node({}) is None


def test_srun():
    launch = hosts.srun_launch(["node2", "node3"], 4)
    assert shlex.join(launch.argv) == (
        "srun --mpi=none --no-kill --kill-on-bad-exit=0 --overlap --input=none --cpu-bind=none --nodes 2 --ntasks 2 "
        f"--ntasks-per-node=1 --nodelist node2,node3 --cpus-per-task 4 {MEMBER}"
    )
    assert launch.hosts == ["node2", "node3"] and not launch.by_stdin
    assert "--cpus-per-task" not in hosts.srun_launch(["node2"], None).argv


def test_an_agent():
    launch = hosts.agent_launch("node2", "ssh -p 2222", "/home/a b")
    assert launch.argv == ["ssh", "-p", "2222", "node2", f"cd '/home/a b' 2>/dev/null; exec {MEMBER} -"]
    assert launch.hosts == ["node2"] and launch.by_stdin


def test_how_nodes_are_started():
    assert hosts.plan_launches([], None, "/w", {"SLURM_JOB_ID": "7"}) == []
    assert [launch.argv[0] for launch in hosts.plan_launches(["a", "b"], None, "/w", {"SLURM_JOB_ID": "7"})] == ["srun"]
    by_ssh = hosts.plan_launches(["a", "b"], None, "/w", {})
    assert [launch.argv[:5] for launch in by_ssh] == [["ssh", "-x", "-o", "BatchMode=yes", name] for name in ("a", "b")]
    assert [launch.argv[0] for launch in hosts.plan_launches(["a"], "rsh", "/w", {"SLURM_JOB_ID": "7"})] == ["rsh"]


def test_what_other_hosts_get_of_the_environment():
    given = {"PATH": "/bin", "HOME": "/root", "HPC_RAY_HEARTBEAT_S": "2", "HPC_RAY_LAUNCH_PLAN": "{}", "TMPDIR": "/scratch"}
    assert hosts.passed_variables(given) == {"PATH": "/bin", "HPC_RAY_HEARTBEAT_S": "2"}


def test_hosts_that_are_this_one():
    assert hosts.split(["localhost"]) == (True, [])
    assert hosts.split(["127.0.0.1", "no-such-host.invalid"]) == (True, ["no-such-host.invalid"])


def test_interfaces():
    assert host.interface_address("lo") == "127.0.0.1"
    assert host.interface_address("10.1.2.3") == "10.1.2.3"
    assert host.interface_address("fd00::1") == "fd00::1"
    with pytest.raises(ConfigurationError, match="it has lo"):
        host.interface_address("nothing7")


def test_settings(monkeypatch):
    monkeypatch.setenv("HPC_RAY_TRANSPORT", "udp")
    with pytest.raises(ConfigurationError, match='must be "mpi" or "tcp"'):
        Settings.from_environment()
    monkeypatch.setenv("HPC_RAY_TRANSPORT", "tcp")
    assert Settings.from_environment().transport == "tcp"
    with pytest.raises(ConfigurationError, match="at least twice"):
        Settings.from_environment({"heartbeat_s": 1, "heartbeat_timeout_s": 1.5})


def test_invitations(tmp_path):
    path = str(tmp_path / "join")
    invitation = {"session": "s", "addresses": [["10.0.0.1", 7]], "secret": "ab"}
    member.write_invitation(path, invitation)
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == ["join"]
    assert member.read_invitation(path) == invitation
    member.remove_invitation(path, "another session")
    assert os.path.exists(path)
    os.chmod(path, 0o640)
    with pytest.raises(LaunchError, match="readable by nobody else"):
        member.read_invitation(path)
    os.chmod(path, 0o600)
    member.remove_invitation(path, "s")
    with pytest.raises(LaunchError, match="--join-file"):
        member.read_invitation(path)
    (tmp_path / "other").write_text("[1]")
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(LaunchError, match="is no file of"):
        member.read_invitation(str(tmp_path / "other"))
    with pytest.raises(LaunchError, match="cannot be written"):
        member.write_invitation(str(tmp_path / "no" / "join"), invitation)

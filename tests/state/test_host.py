"""What a host lets us use, by the words of Slurm and the kernel."""

import pytest

from hpc_ray.launcher import host


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1, 4-5", {0, 1, 4, 5}), ("all", set()), ("1-x", set())]
)
def test_lists_of_cpus(text, cpus):
    assert host.cpu_list(text) == cpus


MACHINE = set(range(64))


@pytest.mark.parametrize(
    ("bound", "allowed", "granted", "ours"),
    [
        ({0}, MACHINE, None, MACHINE),  # mpirun bound us to a core, on a machine of our own
        ({0}, set(range(8)), None, set(range(8))),  # … in a container
        ({0, 1}, set(range(8)), 8, set(range(8))),  # Slurm: two ranks with a core each, the job's cpuset has eight
        ({0}, MACHINE, 64, MACHINE),  # Slurm: a whole machine
        ({4, 5, 6, 7}, MACHINE, 4, {4, 5, 6, 7}),  # Slurm without cpusets: the others belong to other jobs
        ({4}, MACHINE, 4, {4}),  # … and nobody knows which are ours
    ],
)
def test_a_node_gets_what_its_job_was_given(bound, allowed, granted, ours):
    assert host.widened(bound, allowed, granted) == ours


@pytest.mark.parametrize(
    ("variables", "megabytes"),
    [
        ({}, 0),
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_CPUS_ON_NODE": "4"}, 0),
        ({"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "4"}, 4000),
        ({"SLURM_MEM_PER_GPU": "8000", "SLURM_GPUS_ON_NODE": "2"}, 16000),
    ],
)
def test_memory_that_slurm_gave(variables, megabytes):
    assert host.granted_memory(variables) == megabytes << 20


def test_cpus_that_slurm_gave():
    assert host.granted_cpus({"SLURM_CPUS_ON_NODE": "4"}) == 4
    assert host.granted_cpus({}) is None and host.granted_cpus({"SLURM_CPUS_ON_NODE": "72(x2)"}) is None


def test_resources_follow_the_grant(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert host.cpu_count() == 1
    assert host.memory_bytes()[0] <= 512 << 20


def test_gpus_of_several_ranks():
    assert host.joined(["0,1", "2,3"]) == "0,1,2,3"
    assert host.joined(["0", "0"]) == "0"  # a device cgroup each: every rank calls its own 0
    assert host.joined(["", ""]) == ""


FIB_TRIE = """Main:
  +-- 10.77.0.0/24 2 0 2
     |-- 10.77.0.0
        /24 link UNICAST
     |-- 10.77.0.1
        /32 host LOCAL
     |-- 10.77.0.255
        /32 link BROADCAST
     +-- 127.0.0.0/31 1 0 0
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
Local:
     |-- 10.77.0.1
        /32 host LOCAL
     |-- 192.0.2.7
        /32 host LOCAL
"""


def test_addresses_of_a_host_from_which_no_way_leads_out():
    assert host.local_addresses(FIB_TRIE) == ["10.77.0.1", "192.0.2.7"]
    assert host.local_addresses("") == []

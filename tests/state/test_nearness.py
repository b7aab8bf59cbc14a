"""Which CPUs are next to a GPU, by files such as the driver and the kernel make them."""

import pytest

from hpc_ray.launcher import nearness

UUIDS = {"0000:18:00.0": "GPU-aaaa-1", "0000:5E:00.0": "GPU-bbbb-2", "0000:AF:00.0": "GPU-cccc-3"}
NEAR = {"0000:18:00.0": "0-3,8-11", "0000:5e:00.0": "0-3,8-11", "0000:af:00.0": "4-7,12-15"}
FIRST, SECOND = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}


@pytest.fixture
def near(tmp_path):
    for address, uuid in UUIDS.items():
        (tmp_path / "gpus" / address).mkdir(parents=True)
        (tmp_path / "gpus" / address / "information").write_text(f"Model: \t\t NVIDIA A100\nGPU UUID: \t {uuid}\nDevice Minor: \t 0\n")
    for address, cpus in NEAR.items():
        (tmp_path / "devices" / address).mkdir(parents=True)
        (tmp_path / "devices" / address / "local_cpulist").write_text(f"{cpus}\n")
    return lambda *names: nearness.cpus_near(list(names), str(tmp_path / "gpus"), str(tmp_path / "devices"))


@pytest.mark.parametrize(
    ("names", "cpus"),
    [
        (["0"], FIRST),
        (["2"], SECOND),
        (["0", "1"], FIRST),
        (["1", "2"], FIRST | SECOND),
        (["GPU-cccc-3"], SECOND),
        (["GPU-c"], SECOND),  # CUDA takes any beginning that is enough
        (["GPU-"], set()),  # not enough
        (["3"], set()),
        (["MIG-GPU-aaaa-1/1/0"], set()),
        (["0", "7"], set()),
    ],
)
def test_cpus_near(near, names, cpus):
    assert near(*names) == cpus


def test_no_driver(tmp_path):
    assert nearness.cpus_near(["0"], str(tmp_path / "absent"), str(tmp_path)) == set()


JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("names", "visible", "variables", "found"),
    [
        (["1"], ["0", "1"], {}, ["1"]),
        (["1"], [], {}, ["1"]),
        (["GPU-aaaa-1"], ["GPU-aaaa-1"], JOB, ["GPU-aaaa-1"]),
        (["1"], ["0", "1"], JOB | {"SLURM_JOB_GPUS": "4,6"}, ["6"]),  # confined: counted anew
        (["6"], ["4", "6"], JOB | {"SLURM_JOB_GPUS": "4,6"}, ["6"]),  # not confined
        (["1"], ["0", "1"], JOB | {"SLURM_JOB_GPUS": "4,6,7,8", "SLURM_STEP_GPUS": "7,8"}, ["8"]),
        (["1"], ["0", "1"], JOB | {"SLURM_JOB_GPUS": "4-6"}, []),
        (["1"], ["0", "1"], JOB | {"SLURM_JOB_GPUS": "4"}, []),
        (["1"], ["0", "1"], JOB, []),
        (["5"], ["0", "1"], JOB | {"SLURM_JOB_GPUS": "4,6"}, []),
    ],
)
def test_names_of_a_job_are_found_on_the_host(names, visible, variables, found):
    assert nearness.host_wide(names, visible, variables) == found


@pytest.mark.parametrize(
    ("near", "own", "needed", "cpus"),
    [
        ({0, 1}, {0, 1, 2, 3}, 1, {0, 1}),
        ({0, 1}, {1, 2, 3}, 0.5, {1}),
        ({0, 1}, {0, 1, 2, 3}, 3, {0, 1, 2, 3}),  # not enough for what was asked for
        ({0, 1}, {2, 3}, 1, {2, 3}),  # none of them is ours
        (set(), {2, 3}, 1, {2, 3}),
    ],
)
def test_never_fewer_than_were_asked_for(near, own, needed, cpus):
    assert nearness.cpus_for(near, own, needed) == cpus

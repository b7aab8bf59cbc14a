"""Objects that the store has no room for: put, results, arguments; what is moved, what stays, what is left on the disk."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hpc_ray import exceptions
from hpc_ray.client import context
from hpc_ray.config import Settings
from hpc_ray.experimental import get_object_locations
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import session
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STORE = 32 << 20
LARGE = 4 << 20  # eight of these do not fit, with their headers

pytestmark = pytest.mark.usefixtures("no_leaks_in_module")


@pytest.fixture(scope="module")
def spill_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spill")


@pytest.fixture(scope="module")
def ray(no_leaks_in_module, spill_folder):
    import hpc_ray

    hpc_ray.init(num_cpus=4, object_store_memory=STORE, object_spilling_directory=str(spill_folder), log_to_driver=False)
    yield hpc_ray
    hpc_ray.shutdown()
    assert not any(path.is_file() for path in spill_folder.rglob("*"))


@pytest.fixture
def files(ray, eventually):
    """The files of spilled objects. When a test is over there are none."""
    folder = Path(context.client.config.spill_dir)

    def names():
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    yield names
    gc.collect()
    eventually(lambda: not names() and context.client.store.statistics()["objects"] == 0, "all is freed, also on the disk")


def array(number, size=LARGE):
    return np.full(size, number % 256, np.uint8)


def same(value, number, size=LARGE):
    return value.nbytes == size and value[0] == value[size // 2] == value[-1] == number % 256


def test_more_than_fits_is_kept(ray, files):
    references = [ray.put(array(i)) for i in range(20)]
    assert len(files()) >= 12
    order = list(range(20)) * 2
    random.Random(5).shuffle(order)
    assert all(same(ray.get(references[i]), i) for i in order)


def test_the_least_recently_used_go_first(ray, files):
    references = [ray.put(array(i)) for i in range(6)]
    assert not files()
    assert same(ray.get(references[0]), 0)  # used again
    more = [ray.put(array(i)) for i in range(6, 9)]
    store = context.client.files
    on_disk = [store.on_disk(reference._entry.result.handle) for reference in references + more]
    assert on_disk[0] is False and on_disk[1:3] == [True, True] and not any(on_disk[4:])
    found = get_object_locations(references[:2])
    assert [found[r]["did_spill"] for r in references[:2]] == [False, True]


def test_values_in_use_stay_where_they_are(ray, files):
    references = [ray.put(array(i)) for i in range(4)]
    values = ray.get(references)
    addresses = [value.ctypes.data for value in values]
    more = [ray.put(array(i)) for i in range(4, 20)]
    assert all(same(value, i) for i, value in enumerate(values))
    assert [value.ctypes.data for value in ray.get(references)] == addresses  # the same memory: they are still in the arena
    assert all(same(value, i + 4) for i, value in enumerate(ray.get(more)))


def test_all_at_once_in_use(ray, files):
    """More values than the store holds, all with living views: there is no room to be made, and none is needed."""
    references = [ray.put(array(i)) for i in range(16)]
    values = ray.get(references)
    assert all(same(value, i) for i, value in enumerate(values))
    more = ray.get([ray.put(array(i)) for i in range(16)])
    assert all(same(value, i) for i, value in enumerate(more))
    del references
    gc.collect()
    assert all(same(value, i) for i, value in enumerate(values))  # a view outlives its object, also on the disk


def test_values_read_from_the_disk_are_like_others(ray, files):
    reference = ray.put({"a": array(1), "b": [array(2), "text"], "empty": np.zeros(0)})
    rest = [ray.put(array(i)) for i in range(10)]
    assert context.client.files.on_disk(reference._entry.result.handle)
    value = ray.get(reference)
    assert same(value["a"], 1) and same(value["b"][0], 2) and value["empty"].size == 0
    with pytest.raises(ValueError, match="read-only"):
        value["a"][0] = 3
    assert len(rest) == 10


def test_an_object_larger_than_the_store(ray, files):
    size = STORE + LARGE
    reference = ray.put(array(7, size))
    assert len(files()) == 1
    assert same(ray.get(reference), 7, size)

    @ray.remote
    def double(value):
        return value * 2

    assert same(ray.get(double.remote(reference)), 14, size)


def test_results_and_arguments(ray, files):
    @ray.remote
    def make(i):
        return array(i)

    @ray.remote
    def check(i, value):
        return same(value, i)

    references = [make.remote(i) for i in range(30)]
    assert all(ray.get([check.remote(i, reference) for i, reference in enumerate(references)]))


def test_many_at_a_time_from_many_processes(ray, files):
    @ray.remote
    def churn(seed):
        choice = random.Random(seed)
        kept = {}
        for i in range(60):
            kept[choice.randrange(8)] = (i, ray.put(array(i, 1 << 20)))
            number, reference = choice.choice(list(kept.values()))
            if not same(ray.get(reference), number, 1 << 20):
                return False
        return True

    assert ray.get([churn.remote(seed) for seed in range(4)]) == [True] * 4


def test_files_go_with_a_killed_owner(ray, files, eventually):
    @ray.remote
    class Owner:
        def keep(self):
            self.references = [ray.put(array(i)) for i in range(12)]
            return os.getpid()

    owner = Owner.remote()
    pid = ray.get(owner.keep.remote())
    assert len(files()) >= 4
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not files(), "the raylet has swept")


def test_open_files_do_not_grow_with_spilled_values(ray, files):
    before = len(os.listdir("/proc/self/fd"))
    values = ray.get([ray.put(array(i)) for i in range(16)])
    assert len(os.listdir("/proc/self/fd")) == before and len(values) == 16


def test_a_full_disk_is_an_error_and_leaves_nothing(ray, files):
    """A limit on the size of files stands for a full disk."""

    @ray.remote(max_retries=0)
    def put_a_large_one():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, LARGE))
        ray.put(array(1, STORE + LARGE))

    with pytest.raises(exceptions.OutOfDiskError, match="object_spilling_directory"):
        ray.get(put_a_large_one.remote())
    assert not files()


def test_a_folder_that_cannot_be_made(no_leaks, tmp_path):
    import hpc_ray

    if context.client is not None:
        hpc_ray.shutdown()
    (tmp_path / "file").write_text("")
    hpc_ray.init(num_cpus=1, object_store_memory=STORE, _system_config={"object_spilling_directory": str(tmp_path / "file")})
    try:
        kept = []
        with pytest.raises(exceptions.ObjectStoreFullError, match=r"cannot be spilled to .*Not a directory"):
            for i in range(20):
                kept.append(hpc_ray.put(array(i)))
        assert len(kept) == 7 and all(same(hpc_ray.get(reference), i) for i, reference in enumerate(kept))
        kept.clear()
        gc.collect()
        assert same(hpc_ray.get(hpc_ray.put(array(3))), 3)
    finally:
        hpc_ray.shutdown()


def test_relative_folder_is_refused():
    with pytest.raises(exceptions.ConfigurationError, match="absolute path"):
        Settings.from_environment({"object_spilling_directory": "here"})


DRIVER = """
import hpc_ray, os, sys, numpy
hpc_ray.init(num_cpus=1, object_store_memory=32 << 20, object_spilling_directory=sys.argv[1])
kept = [hpc_ray.put(numpy.zeros(4 << 20, numpy.uint8)) for _ in range(12)]
print(len(kept), flush=True)
sys.stdin.read()
"""


def test_files_of_a_session_that_was_killed_as_a_whole_are_swept(no_leaks, tmp_path, eventually):
    """The next start removes them."""
    process = subprocess.Popen(python_command("-c", DRIVER, str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None and process.stdout.readline()
    [name] = [name for name, _ in session.running() if (tmp_path / f"hpc_ray-{os.getuid()}" / name).is_dir()]
    leader = json.loads(Path(session.base_dir(), name, "node-0", "lock").read_text())["pid"]
    os.kill(leader, signal.SIGKILL)  # first the one that would clean up
    process.kill()
    session.kill_leftovers(name, "0", leader)
    process.communicate()
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    eventually(lambda: name in session.sweep(), "all have let go of the folder's lock")
    assert not list(tmp_path.rglob("*"))


def test_spilled_objects_travel_between_full_nodes(no_leaks, tmp_path):
    """Both stores are too small for all of them: they leave from files, and arrive in files."""
    import hpc_ray

    if context.client is not None:
        hpc_ray.shutdown()
    hpc_ray.init(num_nodes=2, num_cpus=1, object_store_memory=STORE, object_spilling_directory=str(tmp_path), log_to_driver=False)
    try:
        here = hpc_ray.get_runtime_context().get_node_id()
        there = next(node["NodeID"] for node in hpc_ray.nodes() if node["NodeID"] != here)

        @hpc_ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(there, soft=False))
        def make(i, size=LARGE):
            return array(i, size)

        references = [make.remote(i) for i in range(16)]
        values = hpc_ray.get(references)  # all in use here
        assert all(same(value, i) for i, value in enumerate(values))
        large = hpc_ray.get(make.remote(16, STORE + LARGE))
        assert same(large, 16, STORE + LARGE)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} == {"node-0", "node-1"}
        del values, large
        references.clear()
    finally:
        hpc_ray.shutdown()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))

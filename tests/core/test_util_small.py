"""The smaller helpers: serializers, what cannot be pickled, metrics, keys, runtime environments, names."""

from __future__ import annotations

import io
import pickle
import threading

import pytest

from hpc_ray import exceptions, util
from hpc_ray.experimental import get_object_locations, internal_kv
from hpc_ray.experimental.tqdm_ray import tqdm
from hpc_ray.job_config import JobConfig
from hpc_ray.runtime_env import RuntimeEnv, RuntimeEnvConfig
from hpc_ray.util import metrics


class Locked:
    def __init__(self, value):
        self.value = value
        self.lock = threading.Lock()


def test_registered_serializers(ray):
    read = ray.remote(lambda locked: locked.value)
    with pytest.raises(TypeError):
        ray.put(Locked(1))
    util.register_serializer(Locked, serializer=lambda locked: locked.value, deserializer=lambda value: Locked(value + 1))
    try:
        assert ray.get(ray.put([Locked(1)]))[0].value == 2
        assert ray.get(read.remote(Locked(5))) == 6  # the deserializer travels with the value
        assert ray.get(read.remote({"a": Locked(5)}["a"])) == 6
    finally:
        util.deregister_serializer(Locked)
    util.deregister_serializer(Locked)
    with pytest.raises(TypeError):
        ray.put(Locked(1))


def test_what_cannot_be_pickled():
    lock, printed = threading.Lock(), io.StringIO()

    def uses_lock():
        return lock

    def calls_it():
        return uses_lock()

    assert util.inspect_serializability([1], print_file=printed) == (True, set())
    for value, path in (
        (uses_lock, ("it", "lock")),
        (Locked(1), ("it", "lock")),
        ([lock], ("it",)),
        (calls_it, ("it", "uses_lock", "lock")),
    ):
        good, failures = util.inspect_serializability(value, name="it", print_file=printed)
        assert not good and [failure.path for failure in failures] == [path]
    (shallow,) = util.inspect_serializability(uses_lock, name="it", depth=0, print_file=printed)[1]
    assert shallow.obj is uses_lock
    assert "lock" in printed.getvalue()


def test_metrics():
    counter = metrics.Counter("test_total", "words", ("kind",)).set_default_tags({"kind": "a"})
    counter.inc()
    counter.inc(2, tags={"kind": "b"})
    pickle.loads(pickle.dumps(counter)).inc(4, tags={"kind": "b"})  # the same series
    metrics.Gauge("test_level").set(5)
    metrics.Gauge("test_level").set(None)
    histogram = metrics.Histogram("test_size", boundaries=[1, 10])
    for value in (0.5, 5, 50):
        histogram.observe(value)
    found = {(row["name"], row["tags"].get("kind")): row["value"] for row in metrics.collect() if row["name"].startswith("test_")}
    assert found["test_total", "a"] == 1 and found["test_total", "b"] == 6 and found["test_level", None] == 5
    assert found["test_size", None] == {"boundaries": [1, 10], "counts": [1, 1, 1], "sum": 55.5, "count": 3}
    assert counter.info == {"name": "test_total", "description": "words", "tag_keys": ("kind",), "default_tags": {"kind": "a"}}
    for error, wrong in (
        (ValueError, lambda: metrics.Counter("")),
        (TypeError, lambda: metrics.Counter(5)),
        (TypeError, lambda: metrics.Counter("test_x", tag_keys=["a"])),
        (ValueError, lambda: metrics.Histogram("test_x", boundaries=[])),
        (ValueError, lambda: metrics.Histogram("test_x", boundaries=[0])),
        (ValueError, lambda: counter.inc(0)),
        (TypeError, lambda: counter.inc("1")),
        (TypeError, lambda: counter.inc(tags={"kind": 1})),
        (ValueError, lambda: counter.set_default_tags({"other": "x"})),
        (ValueError, lambda: metrics.Counter("test_y", tag_keys=("a",)).inc()),
    ):
        with pytest.raises(error):
            wrong()
    with pytest.warns(UserWarning, match="no name for a metric"):
        metrics.Counter("test-dash").inc()
    assert not [row for row in metrics.collect() if row["name"] == "test-dash"]


def test_keys(ray):
    assert internal_kv._internal_kv_initialized()
    assert internal_kv._internal_kv_put("key", "one") is False
    assert internal_kv._internal_kv_put("key", "two", overwrite=False) is True
    assert internal_kv._internal_kv_put("key", "other", namespace="room") is False
    assert internal_kv._internal_kv_get(b"key") == b"one" and internal_kv._internal_kv_get("key", namespace="room") == b"other"
    assert internal_kv._internal_kv_exists("key") and internal_kv._internal_kv_list("k") == [b"key"]
    assert ray.get(ray.remote(lambda: internal_kv._internal_kv_get("key")).remote()) == b"one"
    assert [internal_kv._internal_kv_del("key"), internal_kv._internal_kv_del("key")] == [1, 0]
    assert internal_kv._internal_kv_get("key") is None
    assert internal_kv._internal_kv_del("k", del_by_prefix=True, namespace="room") == 1
    with pytest.raises(AssertionError):
        internal_kv._internal_kv_put(5, "x")


def test_names_and_places(ray):
    assert util.get_node_ip_address() == ray.nodes()[0]["NodeManagerAddress"]
    actor = ray.remote(num_cpus=0)(Locked).options(name="listed").remote(1)
    far = ray.remote(num_cpus=0)(Locked).options(name="far", namespace="away").remote(1)
    assert util.list_named_actors() == ["listed"]
    assert {"name": "far", "namespace": "away"} in util.list_named_actors(all_namespaces=True)
    del actor, far
    assert [util.log_once("a test"), util.log_once("a test")] == [True, False]
    with pytest.raises(ConnectionError, match="auto"):
        util.connect("localhost:10001")
    util.disconnect()
    big, small = ray.put(b"x" * 500_000), ray.put(1)
    places = get_object_locations([big, small])
    assert places[big]["node_ids"] == [ray.get_runtime_context().get_node_id()] and places[big]["object_size"] >= 500_000
    assert places[small]["node_ids"] == []


def test_progress(capsys):
    assert list(tqdm(range(3), desc="steps")) == [0, 1, 2]
    assert "steps: 3/3" in capsys.readouterr().err


def test_runtime_env(tmp_path):
    env = RuntimeEnv(env_vars={"A": "1"}, pip=["x", "y"], working_dir=str(tmp_path))
    assert env["pip"] == {"packages": ["x", "y"], "pip_check": False} and env.has_pip() and not env.has_conda()
    assert env.get("no", 3) == 3 and env.env_vars() == {"A": "1"}
    assert RuntimeEnv.deserialize(env.serialize()) == env == pickle.loads(pickle.dumps(env))
    env.set("env_vars", {"B": "2"})
    assert env.to_dict()["env_vars"] == {"B": "2"}
    assert RuntimeEnv(config={"setup_timeout_seconds": -1})["config"]["eager_install"] is True
    assert RuntimeEnvConfig() == {"setup_timeout_seconds": 600, "eager_install": True, "log_files": []}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"env_vars": {"A": 1}}, TypeError),
        ({"env_vars": 5}, TypeError),
        ({"pip": 5}, TypeError),
        ({"pip": "no such file.txt"}, ValueError),
        ({"pip": {}}, ValueError),
        ({"pip": ["a"], "conda": "b"}, ValueError),
        ({"pip": ["a"], "uv": ["b"]}, ValueError),
        ({"conda": 5}, TypeError),
        ({"working_dir": "/no/such/folder"}, ValueError),
        ({"working_dir": 5}, TypeError),
        ({"py_modules": "x"}, TypeError),
        ({"image_uri": "x", "pip": ["a"]}, ValueError),
        ({"config": 5}, TypeError),
        ({"config": {"setup_timeout_seconds": 0}}, ValueError),
        ({"config": {"eager_install": 1}}, TypeError),
    ],
)
def test_runtime_envs_that_cannot_be(fields, error):
    with pytest.raises(error):
        RuntimeEnv(**fields)


def test_job_config():
    config = JobConfig(metadata={"a": "b"}, default_actor_lifetime="detached")
    config.set_metadata("c", "d")
    assert config.metadata == {"a": "b", "c": "d"}
    with pytest.raises(ValueError, match="lifetime"):
        JobConfig(default_actor_lifetime="long")
    assert issubclass(exceptions.RuntimeEnvSetupError, exceptions.RayError)

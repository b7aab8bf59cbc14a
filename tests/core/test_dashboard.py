"""The web page, the lists as JSON, the metrics; and the commands that look into a running session."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import hpc_ray
from hpc_ray.interpreter import python_command
from hpc_ray.launcher import cli
from hpc_ray.util.metrics import Counter, Histogram


@pytest.fixture(autouse=True)
def ended(no_leaks):
    yield
    hpc_ray.shutdown()


def start(**options):
    return hpc_ray.init(**{"num_cpus": 1, "log_to_driver": False, **options})


def fetch(context, path):
    with urllib.request.urlopen(f"http://{context.dashboard_url}{path}", timeout=20) as answer:
        return answer.read().decode()


def rows(context, path):
    return json.loads(fetch(context, f"/api/v0/{path}"))["data"]["result"]["result"]


def test_pages():
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    context = start(include_dashboard=True)
    assert context.dashboard_url.startswith("127.0.0.1:") and context.address_info["webui_url"] == context.dashboard_url

    @hpc_ray.remote
    def counts():
        Counter("calls_of_this", "How often.", tag_keys=("kind",)).inc(2, {"kind": 'a "kind"'})
        Histogram("sizes_of_this", boundaries=[1, 2]).observe(1.5)

    hpc_ray.get(counts.remote())
    assert "<title>hpc_ray</title>" in fetch(context, "/")
    (row,) = rows(context, "tasks?filter_keys=name&filter_values=counts&detail=1")
    assert row["state"] == "FINISHED" and row["end_time_ms"]
    assert rows(context, "tasks/summarize")["cluster"]["summary"]["counts"]["state_counts"] == {"FINISHED": 1}
    assert "task::counts" in {event["cat"] for event in json.loads(fetch(context, "/timeline"))}
    metrics = fetch(context, "/metrics")
    assert re.search(r'^ray_calls_of_this\{kind="a \\"kind\\"",.*\} 2$', metrics, re.MULTILINE)
    assert re.search(r'^ray_sizes_of_this_bucket\{.*le="\+Inf"\} 1$', metrics, re.MULTILINE)
    assert 'ray_tasks{Name="counts",State="FINISHED"} 1' in metrics
    for path in ("/api/v0/nothing", "/api/v0/tasks?filter_keys=no&filter_values=1", "/api/v0/tasks?limit=x"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            fetch(context, path)
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"http://{context.dashboard_url}/", data=b"x", timeout=20)
    hpc_ray.shutdown()
    with pytest.raises(urllib.error.URLError):
        fetch(context, "/")


def test_ports():
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=str(port)):
            start(dashboard_port=port)
    assert not hpc_ray.is_initialized()
    with pytest.raises(OSError, match="99999"):
        start(dashboard_port=99999)
    assert not hpc_ray.is_initialized()
    assert start(dashboard_host="127.0.0.1", dashboard_port=port).dashboard_url == f"127.0.0.1:{port}"


@pytest.mark.parametrize("wish", [None, False])
def test_no_dashboard(wish):
    assert start(include_dashboard=wish).dashboard_url == ""


def test_without_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "hpc_ray.dashboard.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.warns(UserWarning, match=r"uvicorn is not installed.*hpc-ray\[dashboard\]"):
        context = start(include_dashboard=True)
    assert context.dashboard_url == "" and hpc_ray.is_initialized()


PROGRAM = """
import hpc_ray as ray
ray.init(address="auto")
@ray.remote
def seen():
    print("printed")
@ray.remote
class Kept:
    pass
kept = Kept.options(name="kept", lifetime="detached", namespace="x").remote()
ray.get([kept.__ray_ready__.remote(), seen.remote(), seen.remote()])
"""


def test_commands(tmp_path, monkeypatch):
    def run(*arguments, status=0):
        command = python_command("-c", "from hpc_ray.launcher.cli import main; main()", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    assert "'nowhere' does not run" in run("list", "tasks", "--address", "nowhere", status=1)
    name = run("start", "--num-cpus", "2").split()[2]
    monkeypatch.setenv("HPC_RAY_ADDRESS", name)
    try:
        subprocess.run(python_command("-c", PROGRAM), check=True, timeout=60)
        tasks = json.loads(run("list", "tasks", "--filter", "name=seen", "--format", "json", "--detail"))
        assert [task["state"] for task in tasks] == ["FINISHED", "FINISHED"]  # the program has left them
        assert run("list", "actors", "-f", "state!=DEAD").split()[-1] == "x"
        assert "seen  FINISHED 2" in run("summary", "tasks")
        assert tasks[0]["task_id"] in run("get", "tasks", tasks[0]["task_id"])
        run("timeline", "-o", "out.json")
        assert "task::seen" in {event["cat"] for event in json.loads((tmp_path / "out.json").read_text())}
        assert "gcs.log" in run("logs")
        assert "not like" in run("list", "tasks", "--filter", "name", status=2)
        assert "there are no actors" in run("get", "actors", "ab" * 16, status=1)
        for wrong, words in {
            "list tasks --limit -1": "-1",
            "list tasks --filter nothing=1": "nothing",
            "get tasks xyz": "'xyz'",
            "logs ../../passwd": "'../../passwd'",
            "logs --node-id none": "none",
            "timeline -o none/out.json": "none/out.json",
            "dashboard --port 99999": "99999",
            "dashboard --host not.a.host.invalid": "not.a.host.invalid",
        }.items():
            text = run(*wrong.split(), status=1)
            assert words in text and "Traceback" not in text
        assert [job["status"] for job in json.loads(run("list", "jobs", "--format", "json"))] == ["SUCCEEDED"]
    finally:
        run("stop", name)


def test_the_commands_are_named():
    for module in set(cli._LATER.values()):
        named = {name for name, where in cli._LATER.items() if where == module}
        assert named == set(importlib.import_module(module).COMMANDS)

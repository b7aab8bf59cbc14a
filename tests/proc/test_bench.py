"""The benchmark runs as a user would start it, with what is installed for these tests as the engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(tmp_path, *arguments, runner="core"):
    if importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    # The runner imports no engine, so it may stand beside the bare sources.
    return subprocess.run(
        [sys.executable, "-m", f"bench.{runner}", "--out", str(tmp_path / "found"), "--python", f"hpc_ray={sys.executable}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.usefixtures("no_leaks")
def test_two_rows_of_hpc_ray_alone(tmp_path):
    rows = "^tasks, one at a time|^latency of a task"
    found = bench(tmp_path, "--against", "--rows", rows, "--rounds", "2", "--seconds", "0.1", "--no-nodes")
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["engines"] == ["hpc_ray"]
    assert set(report["rows"]) == {"tasks, one at a time", *(f"latency of a task, p{share}" for share in (50, 99, 99.9))}
    assert all(row["median"]["hpc_ray"] > 0 for row in report["rows"].values())
    assert "tasks, one at a time" in (tmp_path / "found.txt").read_text()


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    found = bench(tmp_path, "--against", "--rows", "^get small", "--rounds", "1", "--python", "hpc_ray=/nowhere/python")
    assert found.returncode != 0
    assert "there is no such engine or file" in found.stderr


def test_no_row_of_this_name(tmp_path):
    found = bench(tmp_path, "--against", "--rows", "no such row", "--rounds", "1", "--no-nodes")
    assert found.returncode == 1
    assert "nothing was measured" in found.stdout


@pytest.mark.thorough
def test_scale_predicts_and_checks(tmp_path):
    """With costs that are given: what is slow is to measure them."""
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    prices = {"wake_s": 1e-5, "submit_s": 1e-5, "task_s": 1e-5, "events": {"gcs": {"other": [[1, 5e-6]]}}}
    costs = {"date": "today", "machine": {}, "costs": {"jitter": 0.0, "boot_s": 0.1}, "prices": prices}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    files = ("--costs", str(tmp_path / "costs.json"))
    found = bench(tmp_path, *files, "--check", "2", "--rounds", "1", "--seconds", "0.2", "--nodes", "4", "40", runner="scale")
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["predicted"]["40"]["local"]["value"] > 5 * report["predicted"]["4"]["local"]["value"]
    assert set(report["checked"]["2"]) == {"start", "local", "spread", "actors", "broadcast", "recovery"}
    assert "nodes die" in (tmp_path / "found.txt").read_text()
    assert (tmp_path / "found.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_bare_compares_with_the_machine_itself(tmp_path):
    found = bench(tmp_path, "--rounds", "1", "--turns", "1", "--mib", "16", runner="bare")
    assert found.returncode == 0, found.stdout + found.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert set(parts) == {"compute", "rollouts", "evolution", "put", "send"}
    assert all(len(row["ours"]) == len(row["bare"]) == 1 and row["share"] > 0 for row in parts.values())
    assert "16 MiB to another virtual node" in (tmp_path / "found.txt").read_text()


@pytest.mark.thorough
def test_footprint_watches_a_cluster_that_runs(tmp_path):
    """Not one that is stopped, as an engine is while another is measured: that takes exactly nothing."""
    found = bench(tmp_path, "--workers", "2", "--idle", "1", "--against", runner="footprint")
    assert found.returncode == 0, found.stdout + found.stderr
    figures = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert set(figures) == {"hpc_ray"}
    assert all(value > 0 for figure, value in figures["hpc_ray"].items() if figure != "listening ports"), figures

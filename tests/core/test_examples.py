"""The examples run, each as a user would start it; the large one learns, in each of its three ways."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "host_actor": ("train", "sklearn"),
    "weight_averaging": ("train", "sklearn"),
    "parameter_server": ("train", "sklearn"),
    "train_digits": ("train", "torch", "sklearn", "matplotlib"),
    "modin_tables": ("libraries", "modin", "pandas", "sklearn"),
    "grid_search": ("libraries", "joblib", "sklearn"),
    "dask_graph": ("libraries", "dask", "sklearn"),
    "parallel_solver": ("openmpi", "mpi4py"),
}
SMALL = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "train_digits")
LONG = ("dask_graph", "grid_search", "host_actor")
WAYS = ("allreduce", "ps", "async-ps")
# Of the large one: the least accuracy (%), and options. In short with two workers, as what takes longest is that each imports torch.
TRAININGS = {"short": (85.0, ["--workers", "2", "--epochs", "4"]), "whole": (97.0, [])}
each_training = pytest.mark.parametrize("training", ["short", pytest.param("whole", marks=pytest.mark.thorough)])


def run(name, cwd, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=110, check=False
    )


def need(name):
    extra, *modules = NEEDS.get(name, ("",))
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'hpc-ray[{extra}]'")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.thorough if name in LONG else ()) for name in SMALL])
def test_small_example(name, tmp_path):
    need(name)
    found = run(name, tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.fixture(scope="module")
def hashes():
    """Hash of the final weights, by way and training."""
    return {}


@each_training
@pytest.mark.parametrize("way", WAYS)
def test_training_on_digits(way, training, tmp_path, hashes):
    need("train_digits")
    least, options = TRAININGS[training]
    found = run("train_digits", tmp_path, "--sync", way, "--quiet", *options)
    assert found.returncode == 0, found.stderr
    accuracy = re.search(r"test accuracy +([\d.]+)%", found.stdout)
    assert accuracy, found.stdout
    assert float(accuracy[1]) >= least
    assert (tmp_path / f"train_digits-{way}.png").stat().st_size > 10_000
    weights = re.search(r"sha256 (\w+)", found.stdout)
    assert weights
    hashes[way, training] = weights[1]


@each_training
def test_synchronous_ways_agree_to_the_last_bit(training, hashes):
    """They add the same numbers in the same order, whoever does it; so each reproduces, too."""
    need("train_digits")
    assert hashes["allreduce", training] == hashes["ps", training]

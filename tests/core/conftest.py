"""Behaviour of the public names on one node. The tests of a file share a session, ``ray``, and leave it as they found it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest


@pytest.fixture(scope="module", autouse=True)
def travels_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers cannot import test files; functions and classes of one are sent as code."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture(scope="module")
def ray(shared_cluster: ModuleType) -> ModuleType:
    return shared_cluster


@pytest.fixture
def store(ray: ModuleType) -> Callable[[], dict[str, int]]:
    """Statistics of this node's object store."""
    from hpc_ray.client import context

    client = context.client
    assert client is not None
    return client.store.statistics


@pytest.fixture(autouse=True)
def all_resources_free(request: pytest.FixtureRequest, eventually: Callable[..., Any]) -> Iterator[None]:
    """After each test what it used is free again, so that tests do not get into each other's way."""
    ray = request.getfixturevalue("ray") if "ray" in request.fixturenames else None
    yield
    if ray is not None:
        # The total each time: that of a placement group just removed may still be in it.
        eventually(lambda: ray.available_resources() == ray.cluster_resources(), "all resources free")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder for ``working_dir``."""
    folder = tmp_path / "project"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name, text in {
        "data.txt": "data",
        "of_the_project.py": "VALUE = 'project'\n",
        "deep/deeper/kept.txt": "kept",
        "deep/deeper/left.log": "left",
        "notes.md": "notes",
        "tool.sh": "#!/bin/sh\necho tool\n",
        ".gitignore": "*.log\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "tool.sh").chmod(0o755)
    return folder


@pytest.fixture
def wheel() -> Callable[..., str]:
    """``wheel(folder, name, version, code, requires="")`` makes one, without a builder; its path."""

    def make(folder: Path, name: str, version: str, code: str, requires: str = "") -> str:
        path = folder / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        needed = f"Requires-Dist: {requires}\n" if requires else ""
        contents = {
            f"{name}/__init__.py": code,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(path, "w") as file:
            for inner, text in contents.items():
                file.writestr(inner, text)
            file.writestr(f"{info}/RECORD", "".join(f"{inner},,\n" for inner in contents) + f"{info}/RECORD,,\n")
        return str(path)

    return make

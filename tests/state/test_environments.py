"""Which files go into a package, what packages are called, and what inherits what. No session."""

from __future__ import annotations

import json
import zipfile

import pytest

from hpc_ray.environments import packages
from hpc_ray.environments.ignore import Rules, travel
from hpc_ray.packing import _merged


@pytest.mark.parametrize(
    ("lines", "out", "kept"),
    [
        (["*.log"], ["a.log", "x/y/a.log"], ["a.logs", "log"]),
        (["/a.txt"], ["a.txt"], ["x/a.txt"]),
        (["x/a.txt"], ["x/a.txt"], ["y/x/a.txt"]),
        (["build/"], ["build/", "x/build/"], ["build", "rebuild/"]),
        (["**/cache"], ["cache", "x/y/cache"], ["caches"]),
        (["x/**"], ["x/a", "x/y/z"], ["x/", "y/x/a"]),
        (["x/**/z"], ["x/z", "x/y/z", "x/a/b/z"], ["z", "xz"]),
        (["*.txt", "!keep.txt"], ["a.txt"], ["keep.txt", "x/keep.txt"]),
        (["!a", "a"], ["a"], []),
        (["a?c", "d[0-9]", "e[!0-9]"], ["abc", "d1", "ex"], ["ac", "dx", "e1", "a/c"]),
        (["# a", "", "   ", r"\#b", r"\!c"], ["#b", "!c"], ["# a", "b"]),
        (["./here"], ["here"], ["x/there"]),
        (["a.b+c"], ["a.b+c"], ["axb+c", "a.bbc"]),
    ],
)
def test_patterns(lines, out, kept):
    rules = Rules("", lines)
    for path in (*out, *kept):
        assert rules.leaves_out(path.rstrip("/"), path.endswith("/")) == (path in out), path


def test_rules_of_a_folder_hold_below_it():
    rules = Rules("inner/", ["/a", "b"])
    assert [rules.leaves_out(path, False) for path in ("inner/a", "inner/x/a", "inner/x/b")] == [True, False, True]


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def test_travel(tmp_path):
    make(tmp_path, "a.txt", "b.log", "x/c.log", "x/d.txt", "x/left/e.txt", "y/f.txt")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "x" / ".rayignore").write_text("left/\n")
    (tmp_path / "y" / "circle").symlink_to(tmp_path)
    (tmp_path / "y" / "link.txt").symlink_to(tmp_path / "b.log")
    (tmp_path / "y" / "broken").symlink_to(tmp_path / "nowhere")
    assert [name for name, _ in travel(tmp_path, ["a.*"])] == [
        ".gitignore", "x/", "x/.rayignore", "x/d.txt", "y/", "y/f.txt", "y/link.txt",
    ]  # fmt: skip


class Table:
    """The GCS's key-value table."""

    def __init__(self):
        self.values = {}
        self.asked = []

    def __call__(self, name, /, *, key, value=None, namespace):
        assert namespace == packages.NAMESPACE
        self.asked.append(name)
        if name == "kv_put":
            self.values[key] = value
        return {"kv_exists": key in self.values, "kv_get": self.values.get(key)}.get(name)


def test_a_package_goes_and_comes(tmp_path):
    """PACKAGE-1, PACKAGE-2"""
    table, root = Table(), tmp_path / "node"
    source = tmp_path / "source"
    make(source, "a.txt", "x/b.sh", ".git/config", "x/__pycache__/b.pyc")
    (source / "x" / "b.sh").chmod(0o755)
    (source / "large").write_bytes(bytes(range(256)) * 20_000)
    uri = packages.upload(table, source, limit=1 << 30)
    assert uri.endswith("/source.zip")
    written = table.asked.count("kv_put")
    assert packages.upload(table, source, limit=1 << 30) == uri
    assert table.asked.count("kv_put") == written
    place = packages.place(table, uri, root)
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()) == ["a.txt", "large", "x/b.sh"]
    assert (place / "x/b.sh").stat().st_mode & 0o111 and not (place / "a.txt").stat().st_mode & 0o111
    table.values.clear()
    assert packages.place(table, uri, root) == place  # it is there
    with pytest.raises(ValueError, match="not in this session"):
        packages.place(table, uri, tmp_path / "other")
    assert not (tmp_path / "other" / place.name).exists()


def test_a_package_that_was_not_finished_is_made_anew(tmp_path):
    table = Table()
    make(tmp_path / "source", "a.txt")
    uri = packages.upload(table, tmp_path / "source", with_name=True, limit=1 << 30)
    last = table.values.pop(uri[len(packages.GCS) :].partition("/")[0].encode())
    with pytest.raises(ValueError, match="not in this session"):
        packages.place(table, uri, tmp_path / "node")
    assert packages.upload(table, tmp_path / "source", with_name=True, limit=1 << 30) == uri
    assert table.values[uri[len(packages.GCS) :].partition("/")[0].encode()] == last
    assert (packages.place(table, uri, tmp_path / "node") / "source" / "a.txt").read_text() == "a.txt"


def test_an_archive_cannot_leave_its_folder(tmp_path):
    file = tmp_path / "bad.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../outside.txt", "x")
    place = packages.place(Table(), file.as_uri(), tmp_path / "deep" / "node")
    assert not list(tmp_path.glob("outside.txt")) and not list((tmp_path / "deep").glob("outside.txt"))
    assert (place / "outside.txt").exists() or not list(place.iterdir())


@pytest.mark.parametrize("uri", ["s3://a/b.zip", "https://a/b.rar", "gs://x"])
def test_uris_that_no_node_can_get(uri):
    with pytest.raises(ValueError, match="not a valid URI"):
        packages.check_uri(uri, packages.ARCHIVES)


@pytest.mark.parametrize(
    ("parent", "own", "both"),
    [
        ({}, {"env_vars": {"A": "1"}}, {"env_vars": {"A": "1"}}),
        ({"env_vars": {"A": "1", "B": "1"}}, {"env_vars": {"B": "2"}}, {"env_vars": {"A": "1", "B": "2"}}),
        ({"working_dir": "x", "env_vars": {"A": "1"}}, {"working_dir": "y"}, {"working_dir": "y", "env_vars": {"A": "1"}}),
        ({"py_modules": ["x"]}, {"py_modules": ["y"]}, {"py_modules": ["y"]}),
        ({"uv": {"packages": ["x"]}}, {"pip": {"packages": ["y"]}}, {"pip": {"packages": ["y"]}}),
        (
            {"worker_process_setup_hook": "f", "_setup_hook": "gcs://x/hook"},
            {"worker_process_setup_hook": "m.f"},
            {"worker_process_setup_hook": "m.f"},
        ),
    ],
)
def test_inheritance(parent, own, both):
    found = _merged(json.dumps(parent) if parent else "", own)
    assert json.loads(found) == both
    assert found == json.dumps(both, sort_keys=True)

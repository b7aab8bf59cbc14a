"""Packages: files that a program gives to its workers, by content.

A folder becomes a zip whose bytes depend on the files alone; its hash is its name. It goes once, in chunks, into the GCS's
key-value table, from where nodes that share no file system get it; each node unpacks it once into its session folder.

PACKAGE-1 (by content): the same files give the same URI; a URI always stands for the same files.
PACKAGE-2 (whole): a package is announced after its last chunk, and unpacked beside its place and then renamed; so what is
found is whole, whoever was killed.
PACKAGE-3 (gone with the session): all of it lies in the session's folder and in the session's table.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from hpc_ray.environments.ignore import travel

Ask = Callable[..., Any]  # a question to the GCS: ask("kv_get", key=…, namespace=…)

NAMESPACE = b"runtime_env"
GCS = "gcs://"
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.xz")
REMOTE = ("file://", "https://", "http://")
DEFAULT_EXCLUDES = (".git", ".venv", "venv", "__pycache__")
CHUNK_BYTES = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that equal files give equal bytes
_SHOWN = 5  # large files that an error names


def is_uri(text: str) -> bool:
    return "://" in text


def check_uri(uri: str, endings: Sequence[str]) -> None:
    """Raises ValueError for one that a node could not get, or not unpack."""
    if not uri.startswith((GCS, *REMOTE)):
        raise ValueError(
            f"{uri} is not a valid URI here: nodes can get {', '.join(REMOTE)}. Copy it to a file system first, or give a folder."
        )
    if not uri.partition("?")[0].endswith(tuple(endings)):
        raise ValueError(f"{uri} is not a valid URI here: it should end in {', '.join(endings)}")


def upload(ask: Ask, path: Path, *, excludes: Sequence[str] = (), with_name: bool = False, limit: int) -> str:
    """Put a folder or a file into the table, if it is not there yet; its URI. Blocks.

    Args:
        excludes: patterns as in ``.gitignore``.
        with_name: the package contains the folder (or ``.py`` file) itself, for import, instead of what is in it.
        limit: bytes of the package.

    Raises:
        ValueError: it is larger than the limit; the text names the largest files.
    """
    with tempfile.TemporaryFile() as file:
        if path.is_dir() or path.suffix == ".py":
            name = path.stem + ".zip"
            _zip(path, file, [*DEFAULT_EXCLUDES, *excludes], with_name, limit)
        else:
            name = path.name
            if path.stat().st_size > limit:
                raise ValueError(f"{path} has {_mib(path.stat().st_size)}; a package may have {_mib(limit)}")
            with path.open("rb") as source:
                shutil.copyfileobj(source, file)
        return _store(ask, file, name)


def upload_bytes(ask: Ask, data: bytes, name: str) -> str:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        return _store(ask, file, name)


def _store(ask: Ask, file: IO[bytes], name: str) -> str:
    file.seek(0)
    found = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        found.update(chunk)
    digest = found.hexdigest()[:32]
    if not ask("kv_exists", key=digest.encode(), namespace=NAMESPACE):
        file.seek(0)
        number = 0
        while chunk := file.read(CHUNK_BYTES):
            ask("kv_put", key=f"{digest}/{number}".encode(), value=chunk, namespace=NAMESPACE)
            number += 1
        ask("kv_put", key=digest.encode(), value=str(number).encode(), namespace=NAMESPACE)  # PACKAGE-2
    return f"{GCS}{digest}/{name}"


def _zip(path: Path, file: IO[bytes], excludes: Sequence[str], with_name: bool, limit: int) -> None:
    import zipfile

    if path.is_dir():
        prefix = path.name + "/" if with_name else ""
        found = [(prefix + relative, source) for relative, source in travel(path, excludes)]
        if with_name:
            found.insert(0, (prefix, path))
    else:
        found = [(path.name, path)]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for relative, source in found:
            info = zipfile.ZipInfo(relative, _EPOCH)
            if relative.endswith("/"):
                info.external_attr = (stat.S_IFDIR | 0o755) << 16 | 0x10
                package.writestr(info, b"")
                continue
            executable = source.stat().st_mode & 0o111
            info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            with source.open("rb") as reader, package.open(info, "w", force_zip64=True) as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
            if file.tell() > limit:
                raise ValueError(_too_large(path, found, limit))


def _too_large(path: Path, found: list[tuple[str, Path]], limit: int) -> str:
    sizes = sorted(((source.stat().st_size, relative) for relative, source in found if source.is_file()), reverse=True)
    largest = ", ".join(f"{relative} ({_mib(size)})" for size, relative in sizes[:_SHOWN])
    return (
        f"the package of {path} is larger than {_mib(limit)} (the setting package_bytes). Its largest files are {largest}. "
        "Leave files out with runtime_env={'excludes': [...]}, .gitignore or .rayignore, or keep them on a file system that all "
        "nodes share."
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def read(ask: Ask, uri: str) -> bytes:
    """All bytes of a package."""
    return b"".join(_chunks(ask, uri))


def _chunks(ask: Ask, uri: str) -> Iterator[bytes]:
    digest = uri[len(GCS) :].partition("/")[0]
    count = ask("kv_get", key=digest.encode(), namespace=NAMESPACE)
    if count is None:
        raise ValueError(f"{uri} is not in this session")
    for number in range(int(count)):
        yield ask("kv_get", key=f"{digest}/{number}".encode(), namespace=NAMESPACE)


def place(ask: Ask, uri: str, root: Path) -> Path:
    """Get a package onto this node, once; the folder with what was in it, or the file of a wheel. Blocks.

    Raises:
        ValueError, OSError: it cannot be had or unpacked.
    """
    digest, _, name = uri[len(GCS) :].partition("/") if uri.startswith(GCS) else _remote_name(uri)
    target = root / digest
    with locked(root, digest):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=root) as beside:
                file = Path(beside, name)
                with file.open("wb") as writer:
                    if uri.startswith(GCS):
                        writer.writelines(_chunks(ask, uri))
                    else:
                        _download(uri, writer)
                made = Path(beside, "made")
                made.mkdir()
                if name.endswith(".whl"):
                    file.rename(made / name)
                else:
                    _unpack(file, made)
                    if not uri.startswith(GCS):
                        made = _without_single_folder(made)
                made.rename(target)  # PACKAGE-2
    return target / name if name.endswith(".whl") else target


def _remote_name(uri: str) -> tuple[str, str, str]:
    return hashlib.sha256(uri.encode()).hexdigest()[:32], "/", uri.partition("?")[0].rpartition("/")[2]


def _download(uri: str, writer: IO[bytes]) -> None:
    import urllib.request

    with urllib.request.urlopen(uri, timeout=60) as reader:
        shutil.copyfileobj(reader, writer)


def _unpack(file: Path, target: Path) -> None:
    import tarfile
    import zipfile

    if file.name.endswith(".zip"):
        with zipfile.ZipFile(file) as package:
            for info in package.infolist():
                made = package.extract(info, target)
                mode = info.external_attr >> 16 & 0o777
                if mode and not info.is_dir():
                    os.chmod(made, mode)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")


def _without_single_folder(folder: Path) -> Path:
    """Archives from elsewhere often wrap everything in one folder."""
    inner = list(folder.iterdir())
    return inner[0] if len(inner) == 1 and inner[0].is_dir() else folder


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """One process of the node at a time; freed also when it is killed. Blocks."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

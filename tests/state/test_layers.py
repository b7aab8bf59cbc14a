"""The layers of the package, as its imports have them (ARCHITECTURE.md, "Layers").

Reads the sources of the four folders, not the installed package; nothing is imported. A failing test names file and line.

An edge is an import, also one below ``if TYPE_CHECKING:``, which counts for the layers but not for cycles. The fork server knows
the entry points of the roles by name only (``"hpc_ray.worker:main"``), and imports them in the forked child: no edge.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Where each source folder lands in the package (meson.build).
FOLDERS = {
    "hpc_ray": "hpc_ray",
    "collectives": "hpc_ray.collectives",
    "launcher": "hpc_ray.launcher",
    "slurm": "hpc_ray.slurm",
}


class Group(NamedTuple):
    """Modules that belong together. They may import one another, without a cycle, and groups of lower layers."""

    layer: int
    modules: str  # names below hpc_ray, of modules or of packages; the empty package is written "."
    highest: int = 99  # may import layers up to this one only
    beside: str = ""  # groups of the same layer that it may import


GROUPS = {
    "facade": Group(6, "."),
    "public": Group(
        5,
        "actor api client_builder cloudpickle cluster_utils commands cross_language dag dashboard experimental job_config"
        " mpi observation options packing placement"
        " remote_function runtime_context runtime_env session types uploads util",
    ),
    "worker": Group(4, "worker", beside="launcher"),
    "launcher": Group(4, "launcher", highest=2),  # brings up processes; knows no role from inside
    "simulator": Group(4, "simulator"),
    "gcs": Group(3, "gcs"),
    "raylet": Group(3, "raylet"),
    "client": Group(3, "client"),
    "collectives": Group(3, "collectives"),
    "environments": Group(3, "environments"),  # beside those who ask for them and make them
    "deciding": Group(2, "machine scheduling"),  # what the two states share
    "serving": Group(2, "serving", beside="deciding core"),  # what the two servers share
    "transport": Group(2, "transport", beside="core"),
    "core": Group(2, "_core"),
    "spilling": Group(2, "spilling", beside="core"),
    "messages": Group(1, "protocol serialize"),
    "basis": Group(0, "as_ray exceptions ids config clock interpreter version worker_log"),
    "slurm": Group(0, "slurm", beside="basis"),
}
# Distributions other than the standard library that a layer may use. Optional ones (mpi4py, torch, cupy …) are imported inside
# functions only: test_optional_packages.
THIRD_PARTY = {
    "basis": {"msgspec"},
    "messages": {"msgspec", "cloudpickle"},
    "deciding": {"msgspec"},
    "slurm": set(),
}
OPTIONAL = {"torch", "cupy", "mpi4py", "numpy", "matplotlib", "sklearn", "pandas", "starlette", "uvicorn"}
# … but for modules that are themselves imported inside a function only.
NEEDS_OPTIONAL = {"hpc_ray.transport.mpi", "hpc_ray.dashboard.server"}
_FRESH = "a script in a new interpreter: its import path is set first"
_START = "import hpc_ray is under 100 ms: what is needed by those who use it only is imported by them"
# Imports of our own inside a function: {(module, imported): reason}.
INSIDE_FUNCTIONS = {
    ("hpc_ray.worker.fresh", "hpc_ray.as_ray"): _FRESH,
    ("hpc_ray.worker.fresh", "hpc_ray.worker"): _FRESH,
    ("hpc_ray.worker.fresh", "hpc_ray._core"): _FRESH,
    ("hpc_ray.worker.fresh", "hpc_ray.config"): _FRESH,
    ("hpc_ray.session", "hpc_ray.dashboard.server"): "for those who want the page, and have what it needs",
    ("hpc_ray.session", "hpc_ray.launcher.local"): _START,
    ("hpc_ray.session", "hpc_ray.launcher.world"): _START,
    ("hpc_ray.mpi", "hpc_ray.launcher.steps"): _START,
    ("hpc_ray.packing", "hpc_ray.uploads"): _START,
    ("hpc_ray.launcher.rank", "hpc_ray.transport.mpi"): "MPI is started in the rank alone, after the node's process is forked",
}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def sources() -> dict[str, Path]:
    """Module name → file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join([package, *parts])] = path
    found["hpc_ray._core"] = ROOT / "hpc_ray" / "_core.pyi"
    return found


SOURCES = sources()


def statements(node: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function, for_types
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from statements(child, in_function or is_function, for_types or is_types)


def imports_of(module: str, path: Path) -> Iterator[Import]:
    is_package = path.name == "__init__.py"
    for statement, in_function, for_types in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            base = statement.module or ""
            if statement.level:
                anchor = module.split(".")[: len(module.split(".")) - statement.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            # `from package import name`: the module of that name if there is one, else the package itself
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in statement.names]
        for name in dict.fromkeys(names):
            yield Import(module, name, statement.lineno, in_function, for_types)


IMPORTS = [found for module, path in SOURCES.items() if path.suffix == ".py" for found in imports_of(module, path)]
OWN = [found for found in IMPORTS if found.imported.partition(".")[0] == "hpc_ray"]


def group_of(module: str) -> str | None:
    if module == "hpc_ray":
        return "facade"
    rest = module.removeprefix("hpc_ray.")
    for name, group in GROUPS.items():
        for entry in group.modules.split():
            if rest == entry or rest.startswith(entry + "."):
                return name
    return None


def allowed(importer: str, imported: str) -> bool:
    """By the groups' names."""
    source, target = GROUPS[importer], GROUPS[imported]
    if importer == imported:
        return True
    if target.layer > source.highest:
        return False
    return target.layer < source.layer or (target.layer == source.layer and imported in source.beside.split())


def test_every_module_has_a_layer():
    assert not [module for module in SOURCES if group_of(module) is None], "say in GROUPS where these belong"


def test_every_import_of_ours_exists():
    assert not [str(found) for found in OWN if found.imported not in SOURCES]


def test_imports_go_down():
    wrong = []
    for found in OWN:
        importer, imported = group_of(found.importer), group_of(found.imported)
        if importer and imported and imported != "facade" and not allowed(importer, imported):
            wrong.append(f"{found}: {importer} (layer {GROUPS[importer].layer}) may not import {imported}")
    assert not wrong


def test_roles_do_not_know_each_other():
    """The table itself says so; this keeps it from being edited away."""
    for one in ("gcs", "raylet", "client", "collectives"):
        for other in ("gcs", "raylet", "client", "collectives"):
            assert one == other or not allowed(one, other)
        assert not allowed("launcher", one)


def test_no_cycles():
    """Between modules, at the time of import."""
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in OWN:
        if not found.in_function and not found.for_types and found.imported in graph:
            graph[found.importer].add(found.imported)
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        if module in path:
            raise AssertionError(" → ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_the_facade_is_not_imported_from_within():
    wrong = [str(found) for found in OWN if found.imported == "hpc_ray"]
    assert not wrong, "write `from hpc_ray.<module> import …`; the facade imports everything"


def test_no_import_of_ours_hides_in_a_function():
    hidden = {(found.importer, found.imported) for found in OWN if found.in_function}
    assert not hidden - set(INSIDE_FUNCTIONS), "import at the top, or say in INSIDE_FUNCTIONS why not"
    assert not set(INSIDE_FUNCTIONS) - hidden, "INSIDE_FUNCTIONS names imports that are no longer there"


def test_low_layers_use_little_else():


    wrong = []
    for found in IMPORTS:
        top = found.imported.partition(".")[0]
        used = THIRD_PARTY.get(group_of(found.importer) or "")
        if used is not None and not found.in_function and top != "hpc_ray" and top not in sys.stdlib_module_names | used:
            wrong.append(str(found))
    assert not wrong


def test_optional_packages():
    """Not at the top of a module: ``import hpc_ray`` works without them and does not pay for them."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported.partition(".")[0] in OPTIONAL
        and not (found.in_function or found.for_types or found.importer in NEEDS_OPTIONAL)
    ]
    assert not wrong
    assert not [
        str(found) for found in OWN if found.imported in NEEDS_OPTIONAL and not (found.in_function or found.for_types)
    ]


def test_this_test_sees_imports():
    """A reader that finds nothing would pass everything."""
    assert len(OWN) > 100
    assert any(found.importer == "hpc_ray.client.client" and found.imported == "hpc_ray._core" for found in OWN)
    assert any(found.for_types for found in OWN) and any(found.in_function for found in OWN)

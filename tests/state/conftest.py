"""The deciding halves are plain Python: where the native core is not built, they are tested from the source tree."""

import importlib
import sys
import types
from pathlib import Path

try:
    importlib.import_module("hpc_ray")
except ImportError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "hpc_ray"]:
        del sys.modules[name]
    package = types.ModuleType("hpc_ray")
    package.__path__ = [str(Path(__file__).parents[2] / "hpc_ray")]
    sys.modules["hpc_ray"] = package

"""Entry of a worker that needs an interpreter of its own (see ``environment``): a script, ``fresh.py NOTE``.

The import path is set before anything of hpc_ray is imported: this interpreter may know nothing of it."""

import json
import os
import sys


def main() -> None:
    """Does not return."""
    note = json.loads(sys.argv[1])
    own = sys.path[0 if getattr(sys.flags, "safe_path", False) else 1 :]
    path = note["path"]
    if note["own"]:  # another executable keeps its own packages, below what PYTHONPATH has put first
        path = [*own, *(entry for entry in path if entry not in own)]
    # A working_dir may be a source tree of hpc_ray itself; what runs here is what runs in the session.
    sys.path[:] = [entry for entry in path if entry not in note["first"] or not os.path.exists(os.path.join(entry, "hpc_ray"))]
    from hpc_ray import as_ray, worker
    from hpc_ray._core import Segment
    from hpc_ray.config import decode_config

    sys.path[:] = path
    if as_ray.VARIABLE in os.environ:
        as_ray.install()
    sys.argv[:] = [""]
    os.set_inheritable(note["fd"], False)
    worker.main(Segment.attach(note["fd"]), decode_config(note["config"]), note["token"], entered=True)


if __name__ == "__main__":
    main()

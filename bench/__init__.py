"""How fast and how heavy hpc_ray is, beside other engines: ``python -m bench.core``, ``python -m bench.footprint``.

Run from the project's folder, never installed. The runner imports no engine; each runs in an environment and a process of
its own (``engines``), so the bare sources beside this folder are in nobody's way.
"""

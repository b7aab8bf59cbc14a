"""Slurm: what a job is (``job``), Slurm's own programs (``commands``), and talking to it (``scheduler``, ``output``).

The batch script and every command line are pure functions, and so is the reading of what the programs print; only
``scheduler`` runs them. ``templates/`` has batch scripts to start from by hand.
"""

"""Slurm: submit, walltime, requeue; every command line is a pure function."""

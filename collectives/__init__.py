"""Collective operations among groups of actors and tasks: MPI, shared memory and NCCL."""

"""A whole cluster in one thread under a virtual clock: the real GCS and raylet states among modelled processes.

For tests of failure without sleeping, and for the study of machines that nobody has at hand: costs are arguments.
Relies on the two states; knows nothing of ``_core``. Workers, owners, fork servers and links are models of a page
each. ``cluster.Simulator`` is where to start.

Without ``costs.Prices`` only latencies count. With them each process has a queue, and everything that it does takes a core of its
host for as long as was measured (``bench/costs.py``); messages between nodes go through the two links.

SIM-1 (deterministic): the same seed and the same calls give the same run.
SIM-2 (order): messages of one process to another arrive in order; a death notice arrives after all its subject had
sent (PROTO-3). Messages of different senders race, by a random latency.
SIM-3 (at rest): ``check`` holds when nothing is under way: states validate, and owners got an answer for everything.
"""

"""The rows that other engines can express, in their own words and under the same names as in ``programs``.

Dask distributed, mpi4py.futures and unidist on MPI; and two floors: a process and a pipe or pool of ``multiprocessing``, and
bare lanes of hpc_ray, that is shared memory without anything of Ray's on top.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

from serve import call_latency, row, serve

MIB = bytes(1 << 20)


def small_value(*_):
    return b"ok"


def link(value):
    return value


def zeros():
    return bytes(1 << 20)


class Actor:
    def small_value(self):
        return b"ok"

    def size_of(self, value):
        return len(value)


def one(call):
    """A row's step: this, once."""

    def step():
        call()
        return 1

    return lambda engine: step


def many(count, call):
    def step():
        call()
        return count

    return lambda engine: step


def latency(name, call):
    row(name, "µs", figures=True, less_is_better=True)(lambda engine, seconds: call_latency(call, seconds))


# ---------------------------------------------------------------- Dask


def dask(cpus):
    import distributed

    begin = time.perf_counter()
    cluster = distributed.LocalCluster(n_workers=cpus, threads_per_worker=1, dashboard_address=None)
    client = distributed.Client(cluster)
    submit = lambda f, *args: client.submit(f, *args, pure=False)  # noqa: E731
    submit(small_value).result()
    told = {"version": distributed.__version__, "init_s": time.perf_counter() - begin}
    actor = client.submit(Actor, actor=True).result()
    kept = client.scatter(0)

    def chain():
        future = submit(link, 0)
        for _ in range(999):
            future = submit(link, future)
        future.result()

    def fan_in():
        parts = client.scatter(list(range(10_000)), hash=False)
        assert submit(len, parts).result() == 10_000

    row("get small")(one(kept.result))
    row("put small")(one(lambda: client.scatter(0, hash=False)))
    row("tasks, one at a time")(one(lambda: submit(small_value).result()))
    row("tasks, 1k at once")(many(1000, lambda: client.gather([submit(small_value) for _ in range(1000)])))
    row("1:1 actor calls, one at a time")(one(lambda: actor.small_value().result()))
    row("1:1 actor calls, 1k at once")(many(1000, lambda: [f.result() for f in [actor.small_value() for _ in range(1000)]]))
    row("chain of 1k tasks", "links/s")(many(1000, chain))
    row("fan-in of 10k arguments", "arguments/s")(many(10_000, fan_in))
    row("1 MiB by value to an actor", "calls/s")(many(20, lambda: [f.result() for f in [actor.size_of(MIB) for _ in range(20)]]))
    row("1 MiB results of tasks", "results/s")(many(20, lambda: client.gather([submit(zeros) for _ in range(20)])))
    latency("latency of a task", lambda: submit(small_value).result())
    latency("latency of an actor call", lambda: actor.small_value().result())
    return client, told


# ---------------------------------------------------------------- mpi4py.futures


def mpi4py(cpus):
    begin = time.perf_counter()
    import mpi4py
    from mpi4py.futures import MPIPoolExecutor

    pool = MPIPoolExecutor(max_workers=cpus)
    pool.submit(small_value).result()
    told = {"version": mpi4py.__version__, "init_s": time.perf_counter() - begin}

    def results(calls):
        return [future.result() for future in calls]

    row("tasks, one at a time")(one(lambda: pool.submit(small_value).result()))
    row("tasks, 1k at once")(many(1000, lambda: results([pool.submit(small_value) for _ in range(1000)])))
    row("1 MiB results of tasks", "results/s")(many(20, lambda: results([pool.submit(zeros) for _ in range(20)])))
    latency("latency of a task", lambda: pool.submit(small_value).result())
    return pool, told


# ---------------------------------------------------------------- unidist


def unidist(cpus):
    begin = time.perf_counter()
    os.environ["UNIDIST_CPUS"] = str(cpus)
    import unidist

    unidist.init()
    f = unidist.remote(small_value)
    unidist.get(f.remote())
    told = {"version": unidist.__version__.partition("+")[0], "init_s": time.perf_counter() - begin}
    g, make, kept = unidist.remote(link), unidist.remote(zeros), unidist.put(0)
    actor = unidist.remote(Actor).remote()

    def chain():
        ref = g.remote(0)
        for _ in range(999):
            ref = g.remote(ref)
        unidist.get(ref)

    row("get small")(one(lambda: unidist.get(kept)))
    row("put small")(one(lambda: unidist.put(0)))
    row("tasks, one at a time")(one(lambda: unidist.get(f.remote())))
    row("tasks, 1k at once")(many(1000, lambda: unidist.get([f.remote() for _ in range(1000)])))
    row("1:1 actor calls, one at a time")(one(lambda: unidist.get(actor.small_value.remote())))
    row("1:1 actor calls, 1k at once")(many(1000, lambda: unidist.get([actor.small_value.remote() for _ in range(1000)])))
    row("chain of 1k tasks", "links/s")(many(1000, chain))
    row("1 MiB results of tasks", "results/s")(many(20, lambda: unidist.get([make.remote() for _ in range(20)])))
    latency("latency of a task", lambda: unidist.get(f.remote()))
    latency("latency of an actor call", lambda: unidist.get(actor.small_value.remote()))
    return unidist, told


# ---------------------------------------------------------------- the floors


def echo(pipe):
    """A process that answers each message, until the other end is closed."""
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(b"ok" if len(message) < 100 else str(len(message)).encode())


def processes(cpus):
    begin = time.perf_counter()
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    context.Process(target=echo, args=(other,), daemon=True).start()
    other.close()
    pool = context.Pool(cpus)
    pool.apply(small_value)
    told = {"version": "", "init_s": time.perf_counter() - begin}

    def call(message=b"call"):
        pipe.send_bytes(message)
        pipe.recv_bytes()

    def calls():
        for _ in range(10):  # a pipe holds a few hundred messages, so no more are on their way at once
            for _ in range(100):
                pipe.send_bytes(b"call")
            for _ in range(100):
                pipe.recv_bytes()

    row("tasks, one at a time")(one(lambda: pool.apply(small_value)))
    row("tasks, 1k at once")(many(1000, lambda: pool.map(small_value, range(1000), 1)))
    row("1:1 actor calls, one at a time")(one(call))
    row("1:1 actor calls, 1k at once")(many(1000, calls))
    row("1 MiB by value to an actor", "calls/s")(many(20, lambda: [call(MIB) for _ in range(20)]))
    row("1 MiB results of tasks", "results/s")(many(20, lambda: [a.get() for a in [pool.apply_async(zeros) for _ in range(20)]]))
    latency("latency of a task", lambda: pool.apply(small_value))
    latency("latency of an actor call", call)
    return pool, told


def lanes(cpus):
    from hpc_ray import __version__
    from hpc_ray._core import Segment, set_parent_death_signal

    begin = time.perf_counter()
    segment = Segment(node=0, arena_bytes=64 << 20, max_lanes=64)
    lane = segment.open_lane()
    if os.fork() == 0:
        set_parent_death_signal(9)
        answers = segment.open_lane()
        answers.send(lane.address, b"here")
        while True:
            for source, message in answers.receive():
                answers.send(source, b"ok" if len(message) < 100 else b"1048576")
    ((echo_address, _),) = lane.receive()
    told = {"version": __version__, "init_s": time.perf_counter() - begin}

    def call(message=b"call"):
        lane.send(echo_address, message)
        lane.receive()

    def calls():
        for _ in range(1000):
            lane.send(echo_address, b"call")
        got = 0
        while got < 1000:
            got += len(lane.receive())

    row("1:1 actor calls, one at a time")(one(call))
    row("1:1 actor calls, 1k at once")(many(1000, calls))
    row("1 MiB by value to an actor", "calls/s")(many(20, lambda: [call(MIB) for _ in range(20)]))
    latency("latency of an actor call", call)
    return segment, told


ENGINES = {engine.__name__: engine for engine in (dask, mpi4py, unidist, processes, lanes)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    serve(lambda: ENGINES[arguments.engine](arguments.cpus))

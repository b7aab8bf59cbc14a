"""Three ranks with an arena each and nothing else of a node: what MPITransport promises, checked and measured.

Started by test_transport.py with mpirun. Rank 0 prints one JSON line.
"""

import json
import os
import random
import sys
import time
import zlib

from mpi4py import MPI

from hpc_ray import _core
from hpc_ray.ids import LINK_LANE, address_of
from hpc_ray.transport import TransferEnded
from hpc_ray.transport.mpi import MPITransport

world = MPI.COMM_WORLD
node, nodes = world.rank, world.size
segment = _core.Segment(node=node, arena_bytes=512 << 20)
lane = segment.open_lane(LINK_LANE)
store = _core.Store(segment, lane)
received: dict[int, list[tuple[int, int]]] = {}  # from node: (number, checksum of the rest)
bad = []


def deliver(source_node, source, destination, payload):
    data = bytes(payload)
    number = int.from_bytes(data[:8], "little")
    expected = received.setdefault(source_node, [])
    if number != len(expected) or int.from_bytes(data[8:12], "little") != zlib.crc32(data[12:]):
        bad.append((source_node, number, len(expected)))
    if source != address_of(source_node, 20, 1) or destination != address_of(node, 21, 1):
        bad.append(("address", source, destination))
    expected.append((number, len(data)))


transport = MPITransport(world, list(range(nodes)), store, deliver)
report = {}


def pump(until):
    ended = []
    deadline = time.monotonic() + 60
    while not until(ended):
        if time.monotonic() > deadline:
            print("stuck", node, {k: len(v) for k, v in received.items()}, file=sys.stderr, flush=True)
            world.Abort(1)
        ended += transport.poll()
    return ended


# Messages: everybody to everybody, sizes from nothing to several chunks.
count = 3000
chance = random.Random(node)
others = [other for other in range(nodes) if other != node]
start = time.perf_counter()
for number in range(count):
    size = chance.choice([0, 10, 100, 1000, 20_000]) if number % 100 else chance.choice([300_000, 1_000_000])
    body = chance.randbytes(size)
    message = number.to_bytes(8, "little") + zlib.crc32(body).to_bytes(4, "little") + body
    for other in others:
        transport.send(other, address_of(node, 20, 1), address_of(other, 21, 1), message)
    if number % 10 == 0:
        transport.poll()
pump(lambda _: all(len(received.get(other, ())) == count for other in others) and not transport.busy)
report["messages_s"] = time.perf_counter() - start
report["bad"] = len(bad)
world.Barrier()

# Objects: sizes around the edges and 64 MiB, both directions at once, all under way together.
sizes = [0, 1, 7, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 64 << 20, *(chance.randrange(1, 3 << 20) for _ in range(8))]
mine = {}
for index, size in enumerate(sizes):
    handle = store.create(index.to_bytes(28, "little"), size, lane.address)
    data = random.Random(node * 1000 + index).randbytes(size)
    if size:
        store.write_buffer(handle)[:] = data
    store.seal(handle)
    mine[index] = (handle, size, zlib.crc32(data))
offers = world.allgather(mine)
wanted = {}
for other in others:
    for index, (handle, size, checksum) in offers[other].items():
        block = store.create((100 + 100 * other + index).to_bytes(28, "little"), size, lane.address)
        number = other * 1000 + index
        wanted[number] = (block, checksum)
        transport.transfer(number, other, handle, block, size)
transport.transfer(9999, others[0], offers[others[0]][0][0] + (77 << 32), wanted[others[0] * 1000 + 1][0], 1)
expected = len(wanted) + 1
ended = pump(lambda ended: sum(isinstance(event, TransferEnded) for event in ended) == expected)
errors = {event.transfer_id: event.error for event in ended if event.error}
report["refused"] = errors.pop(9999, None)
report["errors"] = errors
for number, (block, checksum) in wanted.items():
    store.seal(block)
    if zlib.crc32(store.get(block)) != checksum:
        report["errors"][number] = "checksum"
while_others = world.Ibarrier()
pump(lambda _: while_others.Test())

# How fast: one object of 64 MiB, again and again, and bare MPI between the same buffers.
size, rounds = 64 << 20, 8
if node == 1:
    source = store.create((9000).to_bytes(28, "little"), size, lane.address)
    store.write_buffer(source)[:] = bytes(size)
    store.seal(source)
source = world.bcast(source if node == 1 else None, 1)
if node == 0:
    block = store.create((9001).to_bytes(28, "little"), size, lane.address)
    store.write_buffer(block)[:] = bytes(size)
    start = time.perf_counter()
    for index in range(rounds):
        transport.transfer(20_000 + index, 1, source, block, size)
        pump(lambda ended: any(isinstance(event, TransferEnded) for event in ended))
    report["object_GB_s"] = round(rounds * size / (time.perf_counter() - start) / 1e9, 2)
barrier = world.Ibarrier()
pump(lambda _: barrier.Test())
if node == 0:
    start = time.perf_counter()
    for _ in range(rounds):
        world.Recv([store.write_buffer(block), MPI.BYTE], 1, 5)
    report["bare_GB_s"] = round(rounds * size / (time.perf_counter() - start) / 1e9, 2)
elif node == 1:
    pin = memoryview(store.get(source))
    for _ in range(rounds):
        world.Send([pin, MPI.BYTE], 0, 5)

closed = transport.close(10)
reports = world.gather({**report, "closed": closed, "pid": os.getpid()})
if node == 0:
    print(json.dumps(reports), flush=True)

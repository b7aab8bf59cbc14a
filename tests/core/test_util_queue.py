"""The queue."""

from __future__ import annotations

import asyncio
import pickle
import queue as standard

import pytest

from hpc_ray import exceptions
from hpc_ray.util.queue import Empty, Full, Queue


@pytest.fixture
def queue(ray):
    made = Queue(maxsize=2)
    yield made
    made.shutdown(force=True)


def test_first_in_first_out(ray, queue):
    queue.put("a")
    queue.put(None)
    assert queue.full() and len(queue) == queue.qsize() == 2
    assert [queue.get(timeout=0), queue.get_nowait()] == ["a", None]
    assert queue.empty()


def test_limits(queue):
    for attempt in (lambda: queue.get(block=False), lambda: queue.get(timeout=0.01), lambda: queue.get_nowait_batch(1)):
        with pytest.raises(standard.Empty) as caught:
            attempt()
        assert isinstance(caught.value, Empty)
    queue.put_nowait_batch([1, 2])
    for attempt in (lambda: queue.put(3, block=False), lambda: queue.put(3, timeout=0), lambda: queue.put_nowait_batch([3])):
        with pytest.raises(standard.Full) as caught:
            attempt()
        assert isinstance(caught.value, Full)
    assert queue.get_nowait_batch(2) == [1, 2]
    for wrong, error in ((lambda: queue.get(timeout=-1), ValueError), (lambda: queue.put(1, timeout=-1), ValueError)):
        with pytest.raises(error):
            wrong()
    for wrong in (lambda: queue.put_nowait_batch(5), lambda: queue.get_nowait_batch("2")):
        with pytest.raises(TypeError):
            wrong()


def test_between_tasks(ray, queue):
    @ray.remote
    def produce(queue):
        for i in range(20):
            queue.put(i)

    @ray.remote
    def consume(queue):
        return [queue.get(timeout=30) for _ in range(20)]

    done = produce.remote(queue)
    assert ray.get(consume.remote(queue)) == list(range(20))
    ray.get(done)


def test_in_asyncio(queue):
    async def drive():
        waiting = asyncio.ensure_future(queue.get_async(timeout=30))
        await asyncio.sleep(0.01)
        await queue.put_async("late")
        assert await waiting == "late"
        with pytest.raises(Empty):
            await queue.get_async(block=False)
        await queue.put_async(1)
        await queue.put_async(2, block=False)
        with pytest.raises(Full):
            await queue.put_async(3, block=False)
        with pytest.raises(exceptions.RayTaskError):
            await queue.put_async(3, timeout=0.01)

    asyncio.run(drive())


def test_end(ray):
    queue = Queue(actor_options={"name": "a queue", "num_cpus": 1})
    queue.put([ray.put("inside")])
    assert ray.get(queue.get()[0]) == "inside"
    assert ray.get_actor("a queue") == queue.actor
    copy = pickle.loads(pickle.dumps(Empty("text")))
    assert isinstance(copy, Empty) and copy.args == ("text",)
    queue.shutdown()
    queue.shutdown()
    with pytest.raises(AttributeError, match="shut down"):
        queue.put(1)

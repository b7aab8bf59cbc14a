"""Task graphs: bind and execute, and compiled graphs."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import signal
import threading

import numpy as np
import pytest

from hpc_ray.dag import ClassMethodNode, ClassNode, DAGContext, DAGNode, FunctionNode, InputNode, MultiOutputNode
from hpc_ray.exceptions import ActorDiedError, RayCgraphCapacityExceeded, RayChannelError, RayChannelTimeoutError, RayTaskError
from hpc_ray.experimental.compiled_dag_ref import CompiledDAGFuture, CompiledDAGRef


class Worker:
    """What the graphs of this file are made of."""

    def __init__(self, step=1):
        self.step = step
        self.seen = []

    def add(self, x, more=0):
        self.seen.append(x)
        return x + self.step + more

    def both(self, x):
        return x, -x

    def join(self, *items):
        return list(items)

    def give(self, value):
        return value

    def raise_for(self, x):
        if x == 0:
            raise ZeroDivisionError("of the test")
        return x

    def wait_at(self, gate, x):
        gate.wait()
        return x

    def get_seen(self):
        return self.seen

    def pid(self):
        return os.getpid()

    def leave(self, x):
        raise SystemExit(3)


@pytest.fixture
def make(ray):
    """Make an actor of Worker; it ends with the test."""
    made = []

    def make(*args, **options):
        cls = ray.remote(Worker)
        made.append((cls.options(**options) if options else cls).remote(*args))
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)


@pytest.fixture
def build():
    """Compile; torn down after the test."""
    made = []

    def build(node, **options):
        made.append(node.experimental_compile(**options))
        return made[-1]

    yield build
    for graph in made:
        graph.teardown()


def chain(*methods):
    """Each method takes what the one before it gave."""
    with InputNode() as value:
        node = value
        for method in methods:
            node = method.bind(node)
    return node


# ------------------------------------------------------------------ bind and execute


def test_nothing_runs_before_execute(ray, tmp_path):
    @ray.remote
    def touch(name):
        (tmp_path / name).write_text("")
        return name

    node = touch.bind("a")
    assert isinstance(node, FunctionNode) and not list(tmp_path.iterdir())
    assert ray.get(node.execute()) == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_each_node_runs_once(ray):
    @ray.remote
    def draw():
        return os.urandom(8)

    @ray.remote
    def pair(a, b):
        return a, b

    one = draw.bind()
    first, second = ray.get(pair.bind(one, one).execute())
    assert first == second
    again = ray.get(pair.bind(one, one).execute())
    assert again[0] != first


def test_nodes_in_containers_and_keywords(ray):
    @ray.remote
    def one():
        return 1

    @ray.remote
    def look(items, *, table):
        return ray.get(items), ray.get(table["key"][0])

    assert ray.get(look.bind([one.bind(), one.bind()], table={"key": (one.bind(), 2)}).execute()) == ([1, 1], 1)


@pytest.mark.parametrize(
    ("args", "kwargs", "part"),
    [
        ((1, 2), {}, lambda x: (x[0], x[1])),
        ((1,), {"b": 2}, lambda x: (x[0], x.b)),
        (([1, 2],), {}, lambda x: (x[0], x[1])),
        (({"a": 1, "b": 2},), {}, lambda x: (x["a"], x["b"])),
        ((complex(1, 2),), {}, lambda x: (x.real, x.imag)),
    ],
)
def test_parts_of_the_input(ray, args, kwargs, part):
    @ray.remote
    def pair(a, b):
        return a, b

    with InputNode() as x:
        node = pair.bind(*part(x))
    assert ray.get(node.execute(*args, **kwargs)) == (1, 2)


def test_a_long_chain(ray):
    """Longer than Python recurses."""

    @ray.remote
    def increment(x):
        return x + 1

    with InputNode() as node:
        pass
    for _ in range(1500):
        node = increment.bind(node)
    assert ray.get(node.execute(0)) == 1500


def test_actors_in_a_graph(ray, make):
    actor = ray.remote(Worker).bind(10)
    assert isinstance(actor, ClassNode)
    actor.add.bind(1)
    actor.add.bind(2)
    node = actor.get_seen.bind()
    assert isinstance(node, ClassMethodNode)
    assert ray.get(node.execute()) == [1, 2]
    assert ray.get(node.execute()) == [1, 2], "a new actor each time"
    handle = make(5)
    assert ray.get(chain(handle.add, handle.add).execute(1)) == 11


def test_several_values(ray, make):
    actor = make()
    with InputNode() as x:
        plus, minus = actor.both.options(num_returns=2).bind(x)
        node = MultiOutputNode([actor.join.bind(plus, minus), minus])
    assert ray.get(node.execute(3)) == [[3, -3], -3]


def test_options_of_nodes(ray):
    @ray.remote
    def name():
        return ray.get_runtime_context().get_task_name()

    assert ray.get(name.options(name="other").bind().execute()) == "other"


def test_graphs_travel(ray):
    """A graph is a value: it can be pickled, and run elsewhere."""

    @ray.remote
    def increment(x):
        return x + 1

    @ray.remote
    def run(graph):
        return ray.get(graph[0].execute(5))

    with InputNode() as x:
        node = increment.bind(increment.bind(x))
    assert ray.get(run.remote([node])) == 7


def test_misuse_of_nodes(ray):
    @ray.remote
    def f(x):
        return x

    with pytest.raises(AttributeError, match="cannot be used again"):
        f.bind(1).bind(2)
    with pytest.raises(AttributeError, match="execute"):
        f.bind(1).remote()
    with pytest.raises(AttributeError):
        ray.remote(Worker).bind().no_such_method  # noqa: B018
    with pytest.raises(ValueError, match="InputNode"), InputNode() as x:
        ray.remote(Worker).bind(x)
    with pytest.raises(AssertionError, match="context manager"):
        f.bind(InputNode()).execute(1)
    with InputNode() as x, InputNode() as y, pytest.raises(AssertionError, match="unique"):
        f.bind([x, y]).execute(1)
    with pytest.raises(ValueError, match="any args"):
        InputNode(1)
    with pytest.raises(ValueError, match="Invalid input type"):
        MultiOutputNode(f.bind(1))
    with pytest.raises(ValueError, match="nccl"):
        f.bind(1).with_tensor_transport("nccl")


# ------------------------------------------------------------------ compiled graphs


def test_a_compiled_chain(ray, make, build):
    a, b = make(1), make(10)
    graph = build(chain(a.add, b.add))
    for i in range(20):
        reference = graph.execute(i)
        assert isinstance(reference, CompiledDAGRef)
        assert ray.get(reference) == i + 11
    assert ray.get(a.get_seen.remote()) == list(range(20)), "ordinary calls run in between"
    assert ray.get(b.get_seen.remote()) == list(range(1, 21))


def test_the_shapes_of_graphs(ray, make, build):
    """Branches, joins, steps of one actor after one another, constants, keywords, parts of the input, several values."""
    a, b = make(1), make(10)
    with InputNode() as x:
        first = a.add.bind(x[0], more=x.more)
        again = a.add.bind(first)  # in the same process
        plus, minus = b.both.options(num_returns=2).bind(again)
        joined = a.join.bind(first, "constant", plus, minus, x[0])
        graph = build(MultiOutputNode([joined, minus, first]))
    for i in range(5):
        references = graph.execute(i, more=100)
        assert ray.get(references) == [[i + 101, "constant", i + 102, -i - 102, i], -i - 102, i + 101]
    assert ray.get(a.get_seen.remote()) == [value for i in range(5) for value in (i, i + 101)], "GRAPH-1"


def test_results_in_any_order_and_once(ray, make, build):
    graph = build(chain(make().add))
    references = [graph.execute(i) for i in range(5)]
    assert [ray.get(references[i]) for i in (3, 0, 4, 1, 2)] == [4, 1, 5, 2, 3]
    with pytest.raises(ValueError, match="only be called once"):
        ray.get(references[0])
    assert not graph._executions


def test_only_so_many_in_flight(ray, make, build):
    graph = build(chain(make().add), _max_inflight_executions=2)
    kept = [graph.execute(i) for i in range(2)]
    with pytest.raises(RayCgraphCapacityExceeded, match="2 in-flight"):
        graph.execute(2)
    assert ray.get(kept[1]) == 2, "and with it the first is fetched"
    for i in range(10):
        graph.execute(i)  # nobody wants the result
    assert ray.get(graph.execute(7)) == 8
    assert ray.get(kept[0]) == 1


def test_only_so_many_results_wait(ray, make, build):
    graph = build(chain(make().add), _max_buffered_results=1)
    kept = [graph.execute(i) for i in range(3)]
    with pytest.raises(RayCgraphCapacityExceeded, match="buffered"):
        ray.get(kept[2])
    assert ray.get(kept) == [1, 2, 3]


def test_errors_travel_along(ray, make, build):
    a, b = make(), make()
    graph = build(chain(a.raise_for, b.add))
    references = [graph.execute(i) for i in (1, 0, 2)]
    with pytest.raises(ZeroDivisionError, match="of the test") as caught:
        ray.get(references[1])
    assert isinstance(caught.value, RayTaskError) and "raise_for" in str(caught.value)
    assert ray.get([references[0], references[2]]) == [2, 3]
    assert ray.get(b.get_seen.remote()) == [1, 2], "a step with a failed input does not run"


def test_an_error_in_one_output(ray, make, build):
    a, b = make(), make()
    with InputNode() as x:
        graph = build(MultiOutputNode([a.raise_for.bind(x), b.add.bind(x)]))
    bad, good = graph.execute(0)
    assert ray.get(good) == 1
    with pytest.raises(ZeroDivisionError):
        ray.get(bad)
    assert ray.get(graph.execute(1)) == [1, 2]


def test_what_cannot_be_pickled(ray, make, build):
    graph = build(chain(make().give))
    with pytest.raises(TypeError, match="serialize"):
        graph.execute(threading.Lock())
    assert ray.get(graph.execute(1)) == 1


def test_large_values_lie_in_the_arena(ray, make, build, store, eventually):
    before = store()["objects"]
    a, b = make(), make()
    graph = build(chain(a.add, b.add), _max_inflight_executions=2)
    for i in range(6):
        value = ray.get(graph.execute(np.full(200_000, i)))
        assert value[0] == i + 2 and value[-1] == i + 2
        assert not value.flags.writeable
        assert store()["objects"] <= before + 3 * 3, "held for two executions only"
    kept = value
    graph.teardown()
    del value
    eventually(lambda: store()["objects"] <= before + 1, "what the graph held is free")
    assert kept[0] == 7


def test_references_in_values(ray, make, build):
    a, b = make(), make()
    graph = build(chain(a.give, b.give), _max_inflight_executions=1)
    for i in range(5):
        (reference,) = ray.get(graph.execute([ray.put(np.full(50_000, i))]))
        assert ray.get(reference)[0] == i


def test_timeouts(ray, make, build, gate):
    a = make()
    with InputNode() as x:
        graph = build(a.wait_at.bind(gate, x))
    reference = graph.execute(1)
    for timeout in (0, 0.01):
        with pytest.raises(RayChannelTimeoutError, match="execution 0") as caught:
            ray.get(reference, timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
    gate.open()
    assert ray.get(reference, timeout=-1) == 1


def test_the_default_timeout(ray, make, build, gate, monkeypatch):
    monkeypatch.setattr(DAGContext.get_current(), "get_timeout", 0)
    a = make()
    with InputNode() as x:
        graph = build(a.wait_at.bind(gate, x))
    with pytest.raises(RayChannelTimeoutError):
        ray.get(graph.execute(1))
    gate.open()


def test_threaded_and_asyncio_actors(ray, make, build):
    @ray.remote
    class Async:
        async def add(self, x):
            await asyncio.sleep(0)
            return x + 100

        def plain(self, x):
            return x + 1000

    actor = Async.remote()
    graph = build(chain(make(1, max_concurrency=2).add, actor.add, actor.plain))
    assert [ray.get(graph.execute(i)) for i in range(20)] == [i + 1101 for i in range(20)]
    graph.teardown()
    ray.kill(actor)


def test_asyncio(ray, make, build):
    graph = build(MultiOutputNode([chain(make().raise_for)]), enable_asyncio=True)

    async def one(i):
        (future,) = await graph.execute_async(i)
        assert isinstance(future, CompiledDAGFuture)
        value = await future
        with pytest.raises(ValueError, match="once"):
            await future
        return value

    async def many():
        return await asyncio.gather(*[one(i) for i in range(-1, 5)], return_exceptions=True)

    found = asyncio.run(many())
    assert isinstance(found.pop(1), ZeroDivisionError) and found == [-1, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="execute_async"):
        graph.execute(1)


def test_two_graphs_of_the_same_actors(ray, make, build):
    a, b = make(1), make(10)
    one, other = build(chain(a.add, b.add)), build(chain(b.add, a.add))
    found = [ray.get([one.execute(i), other.execute(-i)]) for i in range(10)]
    assert found == [[i + 11, 11 - i] for i in range(10)]


def test_a_graph_made_by_an_actor(ray, make):
    """The driver of a graph is any process."""

    @ray.remote
    class Driver:
        def __init__(self, workers):
            self.graph = chain(*[worker.add for worker in workers]).experimental_compile()

        def run(self, x):
            return ray.get(self.graph.execute(x))

    workers = [make(1), make(10)]
    driver = Driver.remote(workers)
    assert ray.get([driver.run.remote(i) for i in range(5)]) == [11, 12, 13, 14, 15]
    ray.kill(driver)
    assert ray.get([worker.add.remote(1) for worker in workers]) == [2, 11]


# ------------------------------------------------------------------ ends


def test_teardown(ray, make, build):
    a = make()
    graph = build(chain(a.add))
    reference = graph.execute(1)
    assert not graph.is_teardown
    graph.teardown()
    graph.teardown()
    assert graph.is_teardown
    for use in (lambda: graph.execute(1), lambda: ray.get(graph.execute(2))):
        with pytest.raises(RayChannelError, match="torn down"):
            use()
    del reference
    assert ray.get(a.add.remote(1)) == 2
    again = build(chain(a.add))
    assert ray.get(again.execute(1)) == 2


def test_teardown_ends_a_wait(ray, make, build, gate):
    a = make()
    with InputNode() as x:
        graph = build(a.wait_at.bind(gate, x))
    reference = graph.execute(1)
    found = []

    def wait():
        try:
            ray.get(reference, timeout=-1)
        except RayChannelError as error:
            found.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    gate.await_arrivals(1)
    ending = threading.Thread(target=graph.teardown)
    ending.start()
    waiter.join(timeout=60)
    assert not waiter.is_alive() and found
    gate.open()
    ending.join(timeout=60)
    assert not ending.is_alive()


def test_teardown_that_kills(ray, make, build, gate):
    a = make()
    build(chain(a.add)).teardown(kill_actors=True)
    with pytest.raises(ActorDiedError):
        ray.get(a.wait_at.remote(gate, 1))


def test_a_graph_that_is_dropped(ray, make, eventually):
    a = make()
    count = """
def programs(instance):
    from hpc_ray.client import graphs
    return len(graphs._host.graphs)
"""
    namespace = {}
    exec(count, namespace)
    graph = chain(a.add).experimental_compile()
    assert ray.get(graph.execute(1)) == 2
    assert ray.get(a.__ray_call__.remote(namespace["programs"])) == 1
    del graph
    eventually(lambda: ray.get(a.__ray_call__.remote(namespace["programs"])) == 0, "the actor has forgotten it")


@pytest.mark.parametrize("options", [{}, {"max_restarts": 1}])
def test_a_dead_actor_ends_the_wait(ray, make, build, gate, options):
    a, b = make(1), make(10, **options)
    pid = ray.get(b.pid.remote())
    with InputNode() as x:
        graph = build(b.wait_at.bind(gate, a.add.bind(x)))
    reference = graph.execute(1)
    gate.await_arrivals(1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError, match=b._actor_id.hex()):
        ray.get(reference, timeout=-1)
    with pytest.raises(ActorDiedError):
        graph.execute(2)
    gate.open()
    graph.teardown()
    assert ray.get(a.add.remote(1)) == 2, "the others live on"


def test_an_actor_that_leaves(ray, make, build):
    graph = build(chain(make().add, make().leave))
    with pytest.raises(ActorDiedError):
        ray.get(graph.execute(1), timeout=-1)


def test_a_dead_actor_cannot_be_compiled(ray, make):
    a = make()
    ray.kill(a)
    with pytest.raises(ActorDiedError):
        chain(a.add).experimental_compile()


# ------------------------------------------------------------------ misuse


def test_references_stay_where_they_are(ray, make, build):
    graph = build(chain(make().add))
    reference = graph.execute(1)
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="CompiledDAGRef cannot be"):
            use(reference)
    with pytest.raises(TypeError):
        ray.wait([reference])
    assert ray.get(reference) == 2


def _bad_graphs(ray, a):
    @ray.remote
    def task(x):
        return x

    for text, end in [
        ("actor method", task.bind),
        ("already created", ray.remote(Worker).bind().add.bind),
        ("at least one other DAGNode", lambda x: MultiOutputNode([a.add.bind(x), a.add.bind(1)])),
        ("container", lambda x: a.add.bind([x])),
        ("directly", lambda x: MultiOutputNode([a.add.bind(x), a.add.bind(x[0])])),
        ("Each output", lambda x: MultiOutputNode([a.add.bind(x), x])),
        ("exactly one InputNode", lambda x: MultiOutputNode([])),
    ]:
        with InputNode() as x:
            yield text, end(x)
    with InputNode() as x:
        a.add.bind(x)
        yield "leaf nodes", a.add.bind(x)
    with InputNode() as x:
        x.unused  # noqa: B018
        yield "unused", a.add.bind(x.used)


def test_graphs_that_cannot_be_compiled(ray, make):
    for text, node in _bad_graphs(ray, make()):
        with pytest.raises(ValueError, match=text):
            node.experimental_compile()


def test_misuse_of_compiled_graphs(ray, make, build):
    a = make()
    with InputNode() as x:
        node = a.add.bind(x[0], more=x.more)
    graph = build(node)
    assert isinstance(node, DAGNode)
    with pytest.raises(ValueError, match="multiple times"):
        node.experimental_compile()
    for args, kwargs, text in [((), {"more": 1}, "1 positional"), ((1,), {}, "`more`"), ((1,), {"more": 1, "b": 2}, "`b`")]:
        with pytest.raises(ValueError, match=text):
            graph.execute(*args, **kwargs)
    with pytest.raises(ValueError, match="positive"):
        a.add.bind(1).experimental_compile(_buffer_size_bytes=0)
    with pytest.raises(ValueError, match="GPU"):
        a.add.bind(1).experimental_compile(_overlap_gpu_communication=True)
    assert ray.get(graph.execute(1, more=2)) == 4

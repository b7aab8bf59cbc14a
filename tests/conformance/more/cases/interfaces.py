"""Options, arguments and results of single calls in which we once differed from Ray."""

import asyncio
import time
from fractions import Fraction

from caselib import attempt, case, main, sub, wait_until


def kinds(ray, thunks):
    """Of each thunk: what is raised, or its value."""
    return {name: attempt(ray, thunk) for name, thunk in thunks.items()}


def case_zero_means_default(ray):
    """``max_concurrency=0`` and ``max_pending_calls=0`` are as if nothing was said."""

    @ray.remote
    class Actor:
        def run(self):
            time.sleep(0.1)
            return 1

    one_by_one = Actor.options(max_concurrency=0).remote()
    ray.get(one_by_one.run.remote())
    begin = time.monotonic()
    ray.get([one_by_one.run.remote() for _ in range(3)])
    unlimited = Actor.options(max_pending_calls=0).remote()
    return [time.monotonic() - begin > 0.25, ray.get([unlimited.run.remote() for _ in range(4)])]


def case_labels_are_checked(ray):
    """What is no label is refused before anything is sent."""

    @ray.remote
    def run():
        return True

    class Actor:
        pass

    group = sub(ray, "util").placement_group
    long = "a" * 64
    selectors = [{"a b": "c"}, {"": "b"}, {"-a": "b"}, {"a/b/c": "b"}, {long: "b"}, {"a": long}, {"a": "!"}, {"a": "!!b"}]
    good = [{"ray.io/zone": "b"}, {"A.b/c": "b"}, {"a": ""}, {"a": "!in(b, c)"}, {}]
    fallbacks = [[{"label_selector": {"a b": "c"}}], [{"label_selector": "a"}]]
    return [
        [attempt(ray, lambda s=s: bool(run.options(label_selector=s))) for s in selectors + good],
        [attempt(ray, lambda s=s: group([{"CPU": 1}], bundle_label_selector=[s])) for s in selectors],
        attempt(ray, lambda: group([{"CPU": 1}], bundle_label_selector={"a": "b"})),
        [attempt(ray, lambda f=f: run.options(fallback_strategy=f)) for f in fallbacks],
        bool(run.options(fallback_strategy=[{"label_selector": None}])),
        attempt(ray, lambda: ray.remote(label_selector={"a b": "c"})(Actor)),
    ]


def case_numbers_of_wait(ray):
    """What ``wait`` takes as ``num_returns``."""
    references = [ray.put(i) for i in range(3)]

    def wait(count):
        return lambda: [len(part) for part in ray.wait(references, num_returns=count)]

    return kinds(
        ray,
        {
            "1.0": wait(1.0),
            "1.5": wait(1.5),
            "fraction": wait(Fraction(2)),
            "true": wait(True),
            "3.5": wait(3.5),
            "none": wait(None),
            "text": wait("1"),
        },
    )


def case_timeouts_of_get(ray):
    """``get`` waits for ever if its timeout is negative."""

    @ray.remote
    def sleep():
        time.sleep(0.3)
        return 1

    return kinds(
        ray,
        {
            "negative": lambda: ray.get(sleep.remote(), timeout=-1),
            "fraction": lambda: ray.get(sleep.remote(), timeout=Fraction(20)),
            "nan": lambda: ray.get(sleep.remote(), timeout=float("nan")),
            "wait nan": lambda: ray.wait([sleep.remote()], timeout=float("nan")),
            "list": lambda: ray.get(sleep.remote(), timeout=[1]),
            "wait text": lambda: ray.wait([sleep.remote()], timeout="1"),
        },
    )


def case_callbacks_of_references(ray):
    """They get the value, or the error, also when it is long there."""
    found = []

    @ray.remote
    def one():
        return 1

    @ray.remote
    def fail():
        raise ValueError("no")

    good, bad = one.remote(), fail.remote()
    same = good._on_completed(found.append) == good
    bad._on_completed(found.append)
    wait_until(lambda: len(found) == 2)
    good._on_completed(found.append)
    wait_until(lambda: len(found) == 3)
    errors = [item for item in found if isinstance(item, ray.exceptions.RayTaskError)]
    return [same, found.count(1), [type(error.cause).__name__ for error in errors]]


def case_generators_as_arguments(ray):
    """They cannot be passed on; the error says so."""

    @ray.remote
    def count():
        yield 1

    @ray.remote
    def take(what):
        return 1

    says = ("ObjectRefGenerator", "serializ")
    return [
        attempt(ray, lambda: take.remote(count.remote()), says=says),
        attempt(ray, lambda: take.remote([count.remote()]), says=says),
        attempt(ray, lambda: ray.put(count.remote()), says=says),
    ]


def case_coroutines_as_values(ray):
    """Only a coroutine function's is awaited; one that something else returns cannot travel."""

    async def five():
        return 5

    @ray.remote
    def run():
        return five()

    class Plain:
        def give(self):
            return five()

    class Asyncio(Plain):
        async def wait(self):
            return await five()

        async def give_in_turn(self):
            return five()

        def future(self):
            future = asyncio.get_running_loop().create_future()
            future.set_result(1)
            return future

        @staticmethod
        async def static():
            return 6

        @classmethod
        async def of_class(cls):
            return 7

    plain, actor = ray.remote(Plain).remote(), ray.remote(Asyncio).remote()
    calls = {
        "task": run.remote(),
        "plain": plain.give.remote(),
        "asyncio": actor.give.remote(),
        "in turn": actor.give_in_turn.remote(),
        "future": actor.future.remote(),
        "through call": actor.__ray_call__.remote(lambda self: five()),
        "awaited": actor.wait.remote(),
        "static": actor.static.remote(),
        "of class": actor.of_class.remote(),
    }
    found = kinds(ray, {name: lambda r=reference: ray.get(r, timeout=20) for name, reference in calls.items()})
    return [found, attempt(ray, lambda: ray.remote(five))]


def case_options_and_call_in_one(ray):
    """``_remote`` of functions, classes and methods, which older programs use."""

    @ray.remote
    def run(x, y=0):
        return x, y, ray.get_runtime_context().get_task_name()

    @ray.remote
    class Actor:
        def __init__(self, x=0):
            self.x = x

        def run(self, y=0):
            return self.x, y

    actor = Actor._remote(args=[1], num_cpus=0)
    return [
        ray.get(run._remote((1,), {"y": 2}, name="named")),
        ray.get(run._remote(args=[3])),
        run._remote([4], num_returns=0),
        ray.get([actor.run._remote(), actor.run._remote([5]), actor.run._remote(kwargs={"y": 6}, name="named")]),
        ray.get(Actor._remote().run.remote()),
        attempt(ray, lambda: actor.run._remote(nothing=1)),
    ]


def case_empty_names(ray):
    """Of tasks and calls: as if there were none."""

    @ray.remote(name="")
    def run():
        return ray.get_runtime_context().get_task_name()

    @ray.remote
    class Actor:
        def run(self):
            return ray.get_runtime_context().get_task_name()

    calls = run.remote(), run.options(name="").remote(), Actor.remote().run.options(name="").remote()
    return [ray.get(list(calls)), attempt(ray, lambda: Actor.options(name="").remote())]


def case_kinds_of_accelerators(ray):
    """All are there, also where the node has none."""
    found = ray.get_runtime_context().get_accelerator_ids()
    return [set(found) >= {"GPU", "TPU", "NPU", "HPU", "neuron_cores"}, sum(map(len, found.values()))]


@case(init=None, needs=("cluster",))
def case_arguments_of_clusters(ray):
    """Those that say something of the dashboard or of ports are taken, whatever they mean."""
    arguments = {"num_cpus": 1, "include_dashboard": False, "dashboard_port": 8266, "min_worker_port": 0, "max_worker_port": 0}
    cluster = sub(ray, "cluster_utils").Cluster(initialize_head=True, head_node_args=arguments)
    ray.init(address=cluster.address, log_to_driver=False)
    found = ray.cluster_resources()["CPU"]
    ray.shutdown()
    cluster.shutdown()
    return found


@case(init=None, needs=("reinit",))
def case_names_of_the_session(ray):
    """What ``init`` tells of the session, apart from its values."""
    context = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    info = context.address_info
    name = ray.get_runtime_context().get_session_name()
    found = [
        {key in info: key for key in ("gcs_address", "redis_address", "raylet_socket_name", "object_store_address")}.keys() == {True},
        [info[key] for key in ("redis_address", "metrics_export_port", "dashboard_agent_listen_port", "webui_url")],
        info["address"] == info["gcs_address"] == ray.get_runtime_context().gcs_address,
        context.dashboard_url,
        name.count("session"),
        name in info["session_dir"],
    ]
    ray.shutdown()
    return found


if __name__ == "__main__":
    main()

"""Behaviour in which we once differed from Ray; each case found one or several of these."""

import asyncio
import os
import pickle
import time

from caselib import Gate, Tally, attempt, case, main, sub, wait_until

ONE_CPU = {"num_cpus": 1}
CANCELLED = ("RayTaskError", "TaskCancelledError", "RayError")


def catch(thunk):
    """The exception itself."""
    try:
        thunk()
    except BaseException as error:
        return error
    return None


def case_running_task_cancelled(ray):
    """The error of a task that was interrupted is the task's, with its traceback."""
    tally = Tally()

    @ray.remote
    def sleep():
        tally.add()
        for _ in range(600):
            time.sleep(0.05)

    reference = sleep.remote()
    tally.reach(1)
    ray.cancel(reference)
    return attempt(ray, lambda: ray.get(reference, timeout=20), isa=CANCELLED, says=("sleep()", "was cancelled"))


@case(init=ONE_CPU)
def case_waiting_task_cancelled(ray):
    """That of one that had not started is plain."""
    gate = Gate()

    @ray.remote
    def hold():
        return gate.wait()

    holder, waiting = hold.remote(), hold.remote()
    ray.cancel(waiting)
    outcome = attempt(ray, lambda: ray.get(waiting, timeout=20), isa=CANCELLED)
    gate.open()
    return [outcome, ray.get(holder)]


def case_running_actor_call_cancelled(ray):
    """A method that returns although it was cancelled, and a coroutine."""
    tally = Tally()

    @ray.remote
    class Plain:
        def wait(self):
            tally.add()
            while not ray.get_runtime_context().is_canceled():
                time.sleep(0.01)
            return "heeded"

    @ray.remote
    class Async:
        async def wait(self):
            tally.add()
            await asyncio.sleep(50)

    found = []
    for number, actor in enumerate([Plain.remote(), Async.remote()], 1):
        reference = actor.wait.remote()
        tally.reach(number)
        ray.cancel(reference)
        found.append(attempt(ray, lambda: ray.get(reference, timeout=20), isa=CANCELLED))  # noqa: B023
    return found


def case_is_canceled_elsewhere(ray):
    """Drivers and coroutines cannot ask whether they are cancelled."""

    @ray.remote
    class Async:
        async def ask(self):
            return ray.get_runtime_context().is_canceled()

    return [
        attempt(ray, lambda: ray.get_runtime_context().is_canceled()),
        attempt(ray, lambda: ray.get(Async.remote().ask.remote())),
    ]


def case_error_of_an_argument(ray):
    """A task whose argument failed has that error, and its text says so."""

    @ray.remote
    def fails():
        raise ValueError("first")

    @ray.remote
    def after(x):
        return x

    said = ("after", "At least one of the input arguments", "fails", "ValueError: first")
    return attempt(ray, lambda: ray.get(after.remote(fails.remote())), isa=("ValueError",), says=said)


def case_text_of_errors(ray):
    """The text begins with the task, without frames of the engine; an actor's tells which one it was."""

    @ray.remote
    def inner():
        raise ValueError("deep")

    @ray.remote
    def outer():
        return ray.get(inner.remote())

    @ray.remote
    class Actor:
        def __repr__(self):
            return "THE ACTOR"

        def fail(self):
            raise KeyError("k")

    text = str(catch(lambda: ray.get(outer.remote())))
    actor = Actor.remote()
    other = str(catch(lambda: ray.get(actor.fail.remote())))
    return {
        "first": text.split("(")[0].endswith("ray::outer"),
        "no_header": "Traceback" not in text,
        "last": text.endswith("ValueError: deep"),
        "own_frames": "/client/" in text or "/worker/" in text,
        "actor": ["repr=THE ACTOR" in other, "actor_id=" + actor._actor_id.hex() in other, "Actor.fail()" in other],
    }


def case_texts_of_dead_actors(ray):
    """Why an actor is dead."""

    @ray.remote
    class Actor:
        def leave(self):
            ray.actor.exit_actor()

        def crash(self):
            os._exit(3)

        def hello(self):
            return "hello"

    found = []
    for end in (ray.kill, lambda actor: actor.leave.remote(), lambda actor: actor.crash.remote()):
        actor = Actor.remote()
        ray.get(actor.hello.remote())
        end(actor)
        text = str(catch(lambda: ray.get(actor.hello.remote())))  # noqa: B023
        words = ("died unexpectedly before finishing", "killed by `ray.kill`", "exit_actor() is called", "worker process has died")
        found.append([word in text for word in words])
    return found


def case_errors_of_strange_classes(ray):
    """Exceptions whose classes are made in C, or have no room for attributes, are caught by their class."""

    @ray.remote
    def fails(error):
        raise error

    errors = [MemoryError("m"), FileNotFoundError(2, "no", "f"), UnicodeDecodeError("utf8", b"x", 0, 1, "why"), StopIteration("s")]
    return [attempt(ray, lambda e=e: ray.get(fails.remote(e)), isa=(type(e), "RayTaskError")) for e in errors]


def case_closed_loops(ray):
    """A loop that ends while references are awaited does not disturb what comes later."""

    @ray.remote
    def slow(x):
        time.sleep(0.5)
        return x

    async def give_up():
        return await asyncio.wait([asyncio.ensure_future(slow.remote(1))], timeout=0.1)

    asyncio.run(give_up())
    time.sleep(1)
    found = []
    slow.remote(7).future().add_done_callback(lambda future: found.append(future.result()))
    return [wait_until(lambda: found), found]


def case_futures_can_be_cancelled(ray):
    """Cancelling a concurrent future only ends the waiting."""

    @ray.remote
    def slow():
        time.sleep(0.5)
        return 1

    reference = slow.remote()
    future = reference.future()
    return [future.running(), future.cancel(), future.cancelled(), ray.get(reference)]


def case_end_of_a_stream(ray):
    """What a stream says when all has been taken; get returns it as it is."""

    @ray.remote
    def numbers():
        yield 1

    stream = numbers.remote()
    items = [ray.get(reference) for reference in stream]
    return [items, stream.next_ready(), stream.is_finished(), ray.get(stream.completed()), ray.get(stream) is stream]


def case_namespaces_of_actors(ray):
    """An actor that was given another namespace looks for names in its program's."""

    @ray.remote
    class Actor:
        def look(self):
            self.child = Actor.options(name="child").remote()
            found = attempt(ray, lambda: ray.get_actor("parent"))["raised"]
            return [ray.get_runtime_context().namespace, found, ray.get_actor("child") == self.child]

    parent = Actor.options(name="parent", namespace="elsewhere").remote()
    namespace, *rest = ray.get(parent.look.remote())
    return [namespace == ray.get_runtime_context().namespace, *rest]


def case_names_that_are_no_text(ray):
    """get_actor refuses them."""
    return [attempt(ray, lambda name=name: ray.get_actor(name)) for name in (5, "", None, "nobody")]


def case_function_names(ray):
    """get_task_function_name is the script's or module's name, and the function's."""

    @ray.remote
    def look():
        return ray.get_runtime_context().get_task_function_name()

    @ray.remote
    class Actor:
        def __init__(self):
            self.made = ray.get_runtime_context().get_task_function_name()

        def look(self):
            return [self.made, ray.get_runtime_context().get_task_function_name()]

    return [ray.get(look.remote()), ray.get(look.options(name="other").remote()), ray.get(Actor.remote().look.remote())]


def case_fallback_strategy(ray):
    """Other labels will do where those wanted lead nowhere."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}

    @ray.remote
    def run():
        return True

    def outcome(fallback, **more):
        return attempt(ray, lambda: ray.get(run.options(fallback_strategy=fallback, **more).remote(), timeout=20))

    nowhere = {"label_selector": {"nobody": "has"}}
    return [
        outcome([{"label_selector": here}], **nowhere),
        outcome([nowhere, {"label_selector": here}], **nowhere),
        outcome([], label_selector=here),
        outcome(5),
        attempt(ray, lambda: run.options(label_selector={"a": "in()"})),
    ]


def case_options_refused(ray):
    """Which kind of error an option of the wrong kind is."""

    @ray.remote
    def run():
        return True

    @ray.remote
    class Actor:
        @ray.method(concurrency_group="nowhere")
        def run(self):
            return True

    return [
        attempt(ray, lambda: run.options(placement_group=5)),
        attempt(ray, lambda: run.options(retry_exceptions=None)),
        attempt(ray, lambda: run.options(retry_exceptions=[BaseException])),
        attempt(ray, lambda: Actor.remote().run.remote()),
        attempt(ray, lambda: ray.method(name="x")),
    ]


def case_exceptions_as_actors(ray):
    """A class that derives from an exception, or from a dict, can be an actor's."""

    class Failure(Exception):
        def name(self):
            return type(self).__name__

    class Table(dict):
        def fill(self):
            self["a"] = 1
            return len(self)

    return [ray.get(ray.remote(Failure).remote().name.remote()), ray.get(ray.remote(Table).remote().fill.remote())]


@case(init=ONE_CPU)
def case_what_is_all_taken(ray):
    """Resources of which nothing is left are not listed as available."""
    gate = Gate()

    @ray.remote
    def hold():
        return gate.wait()

    reference = hold.remote()
    gone = wait_until(lambda: "CPU" not in ray.available_resources())
    gate.open()
    return [gone, ray.get(reference)]


def case_nil_references(ray):
    """The reference to nothing can be copied, and is refused by get."""
    nil = ray.ObjectRef.nil()
    return [pickle.loads(pickle.dumps(nil)) == nil, attempt(ray, lambda: ray.get(nil, timeout=5))]


def case_methods_of_a_handle(ray):
    """dir of a handle lists the methods."""

    @ray.remote
    class Actor:
        def run(self):
            pass

        def _helper(self):
            pass

    return [name for name in dir(Actor.remote()) if not name.startswith("__")]


def case_pool_of_wrong_results(ray):
    """A pool goes on after a function that submitted nothing."""

    @ray.remote
    class Actor:
        def double(self, x):
            return 2 * x

    pool = ray.util.ActorPool([Actor.remote()])
    pool.submit(lambda actor, x: x, 1)
    refused = catch(pool.get_next) is not None
    return [refused, list(pool.map(lambda actor, x: actor.double.remote(x), [1, 2]))]


@case(init={"num_cpus": 2, "include_dashboard": True}, needs=["state"])
def case_state_names(ray):
    """Classes are listed by their qualified names; work that is not to be recorded is not listed."""
    state = sub(ray, "util.state")

    @ray.remote
    class Actor:
        def run(self):
            return 1

    @ray.remote
    def seen():
        return 1

    actor = Actor.remote()
    ray.get([actor.run.remote(), seen.remote(), seen.options(name="unseen", enable_task_events=False).remote()])
    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready())
    ray.util.remove_placement_group(group)
    wait_until(lambda: len(state.list_tasks()) >= 3)
    time.sleep(1)
    [row] = state.list_actors()
    names = sorted(task.name for task in state.list_tasks())
    return [row.class_name, names, sorted(state.summarize_actors()["cluster"]["summary"])]


if __name__ == "__main__":
    main()

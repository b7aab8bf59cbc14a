"""A function becomes a task, a class becomes an actor, and an array becomes an object that all of them can read.

From "Introduction to Ray" (the pages "Python → Ray API" and "Ray Task") and from "Ray: Distributed Python for AI" ("Tasks",
"Actors"). What to look at: `.remote(...)` returns at once, with a reference to a value that does not exist yet; `ray.get`
waits for it. One call can return several values, each with a reference of its own.
"""

import hpc_ray as ray
import numpy as np


def regular_function():
    return 1


@ray.remote
def remote_function():
    return 1


@ray.remote
def f(a, b):
    return a + b


@ray.remote
class Cls:
    def __init__(self, x):
        self.x = x

    def f(self, a):
        self.x += a
        return self.x

    def g(self, a):
        return self.x * a


@ray.remote
class Foo:
    @ray.method(num_returns=2)
    def bar(self):
        return 1, 2


def main():
    print("a function, called:", regular_function())
    print("a task:            ", ray.get(remote_function.remote()))

    references = [f.remote(a, a + 1) for a in range(1, 5)]  # Four tasks, side by side.
    print("four tasks:        ", ray.get(references))

    cls = Cls.remote(10)
    references = [cls.f.remote(1), cls.f.remote(2), cls.g.remote(2)]  # One after the other, in this order.
    print("an actor's state:  ", ray.get(references))

    first, second = Foo.remote().bar.remote()
    print("two results:       ", ray.get(first), "and", ray.get(second))

    a = np.arange(1, 10e6)
    obj_a = ray.put(a)
    b = ray.get(obj_a) * 2
    print("an object:         ", b[:3], "...", b[-1])


if __name__ == "__main__":
    ray.init()
    main()

"""Objects: put once, read by many, copied to nobody.

From "Introduction to Ray" (the page "Distributed object store"). What to look at:

- `ray.put` stores an array; what is passed to the tasks is the reference, and a task sees the array itself.
- Reading is free of copies: the array that `ray.get` returns *is* the shared memory. So it cannot be written to.
- A reference *inside* another value, as in a list, is passed as it is. The task decides what to get, and when.
- A task can put objects too, and return references to them.
"""

import hpc_ray as ray
import numpy as np


@ray.remote
def sum(a, b):
    return a + b


@ray.remote
def partial_sum(a, part, parts):
    """Reads its part of an array that all the tasks share."""
    return float(np.array_split(a, parts)[part].sum())


@ray.remote
def longest(references):
    """Gets the objects one by one: a list of references is passed as a list of references."""
    return max(len(ray.get(reference)) for reference in references)


@ray.remote
def squares(n):
    """Leaves an array in the store, and returns the reference."""
    return [ray.put(np.arange(n) ** 2)]


def main():
    a, b = np.arange(5), np.full(5, 10)
    a_x = ray.put(a)
    b_x = ray.put(b)
    s_x = sum.remote(a_x, b_x)
    val = ray.get(s_x)
    print("sum of two objects:", val)

    large = ray.put(np.ones(10_000_000))  # 80 MB, in the store once.
    parts = [partial_sum.remote(large, part, 8) for part in range(8)]
    print("80 MB, read by eight tasks:", ray.get(parts))

    first, second = ray.get(large), ray.get(large)
    print("got twice, in memory once:", np.shares_memory(first, second))
    try:
        first[0] = 2.0
    except ValueError as error:
        print("it cannot be changed:", error)

    print("longest of a list of references:", ray.get(longest.remote([a_x, large, b_x])))
    [reference] = ray.get(squares.remote(6))
    print("put by a task, got by the driver:", ray.get(reference))


if __name__ == "__main__":
    ray.init()
    main()

"""An actor that counts: state that lives in a process of its own, and that many can use.

From "Introduction to Ray" (the page "Function → Task, Class → Actor"), where the counter has a GPU; so has this one, if there
is any. What to look at: the actor does its calls one at a time, in the order in which a caller made them, so nothing
is counted twice or lost. A handle to it can be passed on like any other value: here to tasks, which all count.
"""

import hpc_ray as ray


@ray.remote(num_cpus=0)  # It takes a machine's time only in moments.
class Counter(object):
    def __init__(self):
        self.value = 0

    def inc(self):
        self.value += 1
        return self.value


@ray.remote
def count_primes(counter, numbers):
    """Calls the counter once for each prime number among these."""
    calls = [counter.inc.remote() for n in numbers if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    ray.get(calls)


def main():
    gpus = ray.cluster_resources().get("GPU", 0)
    c = Counter.options(num_gpus=1 if gpus else 0).remote()
    id4 = c.inc.remote()
    id5 = c.inc.remote()
    print("two calls:", ray.get([id4, id5]))

    counter = Counter.remote()
    ray.get([count_primes.remote(counter, range(start, start + 250)) for start in range(0, 1000, 250)])
    print("primes below 1000, counted by four tasks:", ray.get(counter.inc.remote()) - 1)


if __name__ == "__main__":
    ray.init()
    main()

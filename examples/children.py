"""Four actors of one class, each with a state of its own.

From "Distributed Machine Learning with Ray" (the page "Actors"). What to look at: the calls to `grow` are not waited for;
as each actor keeps the order of its calls, all children have grown by the time they greet.
"""

import random

import hpc_ray as ray

baby_names = ["Ada", "Alan", "Barbara", "Donald", "Edsger", "Frances", "Grace", "John", "Leslie", "Margaret"]


@ray.remote
class Child(object):
    def __init__(self, seed):
        self.name = random.Random(seed).choice(baby_names)  # The talk has no seed: other names in each run.
        self.age = 1

    def grow(self):
        self.age += 1

    def greet(self):
        return f"My name is {self.name} and I am {self.age} years old"


def main():
    children = [Child.options(num_cpus=0.25).remote(seed) for seed in range(4)]
    [c.grow.remote() for c in children]
    futures = [c.greet.remote() for c in children]
    print("\n".join(ray.get(futures)))


if __name__ == "__main__":
    ray.init()
    main()

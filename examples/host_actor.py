"""Actors that have loaded a model, and answer with it.

From "Introduction to Ray" (the page "Ray Actor": a `HostActor` with its GPUs and a model from a checkpoint) and from "Ray:
Distributed Python for AI" ("Distributed Inference": copies of a model, each with a part of the batch, and the parts of the
answer put together in the right order). What to look at: the checkpoint is put into the object store once and handed to the
actors by reference; the pool gives each batch to an actor that is free, and returns the answers in the order of the batches.
"""

import os
import sys

import hpc_ray as ray
import numpy as np

try:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
except ImportError:
    sys.exit("host_actor.py needs scikit-learn: pip install 'hpc-ray[train]'")


@ray.remote(num_cpus=0.25)
class HostActor:
    def __init__(self, checkpoint):
        self.model = checkpoint
        self.devices = os.environ.get("CUDA_VISIBLE_DEVICES") or "no GPU"

    def inference(self, data):
        return self.model.predict(data)

    def f(self, output):
        return f"{output} {self.devices}"


@ray.remote
def train(images, labels):
    """The checkpoint: a model that knows handwritten digits."""
    return LogisticRegression(max_iter=200).fit(images, labels)


def main():
    images, labels = load_digits(return_X_y=True)
    checkpoint = train.remote(images[:1000] / 16, labels[:1000])

    gpus = min(4, int(ray.cluster_resources().get("GPU", 0)))
    actor = HostActor.options(num_gpus=gpus).remote(checkpoint)
    print(ray.get(actor.f.remote("hi")))  # "hi 0,1,2,3" where there are four GPUs.
    print("predictions:", ray.get(actor.inference.remote(images[1000:1010] / 16)))
    print("the digits: ", labels[1000:1010])

    copies = [actor] + [HostActor.remote(checkpoint) for _ in range(3)]
    pool = ray.util.ActorPool(copies)
    batches = np.array_split(images[1000:] / 16, 16)
    answers = np.concatenate(list(pool.map(lambda actor, batch: actor.inference.remote(batch), batches)))
    print(f"{len(answers)} digits by {len(copies)} actors: {(answers == labels[1000:]).mean():.1%} right")


if __name__ == "__main__":
    ray.init()
    main()

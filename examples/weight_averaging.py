"""Several copies of a network learn for themselves for a while, then all go on from the mean of their weights.

From "Ray: a distributed execution framework for emerging AI applications" (the page "Weight-Averaging Networks"); the idea is
that of parallelized SGD (Zinkevich et al., 2010). What to look at: the new weights are put into the object store once per
round and passed to all actors by reference. The images are the handwritten digits that scikit-learn ships.
"""

import sys

import hpc_ray as ray
import numpy as np

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("weight_averaging.py needs scikit-learn: pip install 'hpc-ray[train]'")

NUM_ACTORS, NUM_ITERS = 4, 8


class Network:
    """Two layers, in NumPy."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.layers = [rng.normal(0, 0.1, (65, 48)), rng.normal(0, 0.1, (49, 10))]

    def get_weights(self):
        return np.concatenate([layer.ravel() for layer in self.layers])

    def set_weights(self, weights):
        first = self.layers[0].size
        self.layers = [weights[:first].reshape(65, 48).copy(), weights[first:].reshape(49, 10).copy()]

    def forward(self, images):
        """What goes into each layer, with a one for the bias; and the probabilities."""
        first = np.pad(images, ((0, 0), (0, 1)), constant_values=1)
        second = np.pad(np.maximum(first @ self.layers[0], 0), ((0, 0), (0, 1)), constant_values=1)
        scores = np.exp(second @ self.layers[1])
        return first, second, scores / scores.sum(1, keepdims=True)

    def train(self, images, labels, steps):
        for step in range(steps):
            part = slice(32 * step % len(images), 32 * step % len(images) + 32)
            first, second, error = self.forward(images[part])
            error[np.arange(len(error)), labels[part]] -= 1
            inner = (error @ self.layers[1][:-1].T) * (second[:, :-1] > 0)
            self.layers[1] -= 0.1 * second.T @ error / len(error)
            self.layers[0] -= 0.1 * first.T @ inner / len(error)

    def accuracy(self, images, labels):
        return (self.forward(images)[2].argmax(1) == labels).mean()


@ray.remote(num_cpus=0.25)
class Actor(object):
    def __init__(self):
        self.network = Network()

    def step(self, weights, images, labels):
        self.network.set_weights(weights)
        self.network.train(images, labels, steps=100)
        return self.network.get_weights()

    def get_weights(self):
        return self.network.get_weights()


def main():
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    train, test = order[:1400], order[1400:]

    def get_random_batch():
        batch = rng.choice(train, 400, replace=False)
        return images[batch], labels[batch]

    actors = [Actor.remote() for _ in range(NUM_ACTORS)]
    weights = actors[0].get_weights.remote()
    network = Network()
    for i in range(NUM_ITERS):
        weights_to_average = []
        for actor in actors:
            batch_images, batch_labels = get_random_batch()
            weights_to_average.append(actor.step.remote(weights, batch_images, batch_labels))
        average_weights = np.mean(ray.get(weights_to_average), axis=0)
        weights = ray.put(average_weights)

        network.set_weights(average_weights)
        print(f"round {i + 1}: {network.accuracy(images[test], labels[test]):.1%} of the test digits right")


if __name__ == "__main__":
    ray.init()
    main()

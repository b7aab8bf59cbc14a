"""A model that is too large for one server: its parameters lie in shards, and workers come and go as they like.

From "Distributed Machine Learning with Ray" (the pages "Distributed training with the parameter server") and the paper that
they name (Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014). What to look at: the workers
are tasks that are handed the handles of the servers, so they talk to the servers themselves and the driver is in nobody's
way; it only has a look now and then. Each shard is pulled and pushed by itself, and no worker waits for another.

The workers' gradients arrive in another order in each run, so the figures differ a little between runs. `train_digits.py`
has a synchronous server, which is reproducible.
"""

import sys

import hpc_ray as ray
import numpy as np

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("parameter_server.py needs scikit-learn: pip install 'hpc-ray[train]'")

SHARDS, WORKERS, ROUNDS = 2, 4, 150


@ray.remote(num_cpus=0)
class ParameterServer:
    """Some of the parameters."""

    def __init__(self, size):
        self.parameters = np.zeros(size)
        self.pushes = 0

    def pull(self):
        return self.parameters.copy()  # What is returned must not change any more.

    def push(self, gradient):
        self.parameters -= 0.2 * gradient
        self.pushes += 1

    def count(self):
        return self.pushes


def pull_all(servers):
    """The whole model, a row of 65 weights for each digit: all shards are asked at once."""
    return np.concatenate(ray.get([server.pull.remote() for server in servers])).reshape(10, 65)


def probabilities(parameters, images):
    scores = np.exp(images @ parameters[:, :64].T + parameters[:, 64])
    return scores / scores.sum(1, keepdims=True)


@ray.remote(num_cpus=0.25)
def worker(servers, images, labels, rank):
    """Learns from its part of the data."""
    images, labels = images[rank::WORKERS], labels[rank::WORKERS]
    rng = np.random.default_rng(rank)
    for _ in range(ROUNDS):
        batch = rng.choice(len(images), 32)
        error = probabilities(pull_all(servers), images[batch])
        error[np.arange(32), labels[batch]] -= 1
        gradient = np.hstack([error.T @ images[batch], error.sum(0)[:, None]]) / 32
        shards = np.array_split(gradient.ravel(), len(servers))
        ray.get([server.push.remote(shard) for server, shard in zip(servers, shards)])


def main():
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1400], order[1400:]

    sizes = [len(shard) for shard in np.array_split(np.zeros(650), SHARDS)]
    servers = [ParameterServer.remote(size) for size in sizes]
    shared = ray.put(images[train]), ray.put(labels[train])
    running = [worker.remote(servers, *shared, rank) for rank in range(WORKERS)]
    while running:
        finished, running = ray.wait(running, num_returns=len(running), timeout=0.5)
        ray.get(finished)  # Raises what went wrong in a worker, if anything did.
        accuracy = (probabilities(pull_all(servers), images[test]).argmax(1) == labels[test]).mean()
        pushes = ray.get(servers[0].count.remote())
        print(f"after {pushes:4} gradients: {accuracy:.1%} of the test digits right")


if __name__ == "__main__":
    ray.init()
    main()

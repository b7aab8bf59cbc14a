"""Experiments side by side, each of which runs many simulations side by side.

From "Ray: a distributed execution framework for emerging AI applications" (the page "A Reinforcement Learning Experiment").
What to look at: `experiment` is a task that calls tasks and waits for them. A task that waits lends its CPU to others, so
this ends on a machine with a single CPU too. The seeds fix all that is random: each run prints the same.

The system is a rocket that has to land softly; a simulation tries a policy with a little noise added, and with the same
noise taken away, and tells from the two landings in which direction to change it (an evolution strategy).
"""

import math

import hpc_ray as ray
import numpy as np

GRAVITY, THRUST, TIME_STEP = 1.62, 4.0, 0.2  # On the Moon, in m and s.
FALLING = np.array([-1.0, 0.0, 0.0, 0.0])  # The policy to begin with: a little thrust, whatever happens.


class Policy:
    """How much thrust to give, from 0 to 1, at what height and speed."""

    def __init__(self, learning_rate, noise):
        self.learning_rate, self.noise = learning_rate, noise
        self.weights = FALLING

    def update(self, gradients):
        gradient = np.mean(gradients, axis=0)
        self.weights = self.weights + self.learning_rate * gradient / (np.linalg.norm(gradient) + 1e-9)


def land(weights, seed):
    """The speed at which the rocket touches down; its speed and height together, if it is still up after two minutes."""
    rng = np.random.default_rng(seed)
    bias, for_height, for_speed, for_energy = weights.tolist()
    height, speed = rng.uniform(80, 120), rng.uniform(-20, 0)
    for _ in range(600):
        drive = bias + for_height * height / 100 + for_speed * speed / 10 + for_energy * speed**2 / (height + 5)
        thrust = 1 / (1 + math.exp(-max(-50.0, min(50.0, drive))))
        speed += (THRUST * thrust - GRAVITY) * TIME_STEP
        height += speed * TIME_STEP
        if height <= 0:
            return -speed
    return abs(speed) + height


@ray.remote(num_cpus=0.5)
def simulation(policy, seed):
    """The gradient of how softly the rocket lands, estimated from two landings from the same height."""
    noise = np.random.default_rng([seed, 1]).normal(size=policy.weights.shape)
    up, down = (land(policy.weights + sign * policy.noise * noise, seed) for sign in (1, -1))
    return (down - up) / (2 * policy.noise) * noise


@ray.remote
def experiment(config):
    policy = Policy(**config)
    for i in range(30):
        # Launch some simulations in parallel and aggregate the results.
        gradients = ray.get([simulation.remote(policy, seed=16 * i + j) for j in range(16)])
        # Update the model.
        policy.update(gradients)
    return policy


def main():
    config_list = [{"learning_rate": rate, "noise": noise} for rate in (0.1, 0.4) for noise in (0.1, 0.5)]
    tests = range(10_000, 10_100)
    print(f"at first: lands at {np.mean([land(FALLING, seed) for seed in tests]):.1f} m/s")
    # Launch a number of experiments in parallel.
    policies = ray.get([experiment.remote(config) for config in config_list])
    for config, policy in zip(config_list, policies):
        speeds = [land(policy.weights, seed) for seed in tests]
        print(f"{config}: lands at {np.mean(speeds):.1f} m/s, at worst {max(speeds):.1f} m/s")


if __name__ == "__main__":
    ray.init()
    main()

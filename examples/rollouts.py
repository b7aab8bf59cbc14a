"""A policy learns to balance a pole on a cart, from what happens when it tries.

From "Ray: Distributed Python for AI" (the page "RL Example": `rollout` and `train_policy`), with the names of that page. What
to look at: the k rollouts of a round are tasks, the policy goes into the object store once per round, and the policy's
update needs all of them. Who waits for fewer, with `ray.wait`, gets the fine-grained graph of the paper's "Rollout Task
Graphs" instead; here the sum has a fixed order, and each run prints the same.
"""

import math

import hpc_ray as ray
import numpy as np

K, LONGEST = 16, 200  # Rollouts per round; steps after which a rollout has been balanced well enough.


class Environment:
    """A cart that is pushed to the left or to the right, with a pole on it (Barto, Sutton, Anderson, 1983)."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def initial_state(self):
        self.steps = 0
        self.state = self.rng.uniform(-0.05, 0.05, 4)
        return self.state

    def has_terminated(self):
        position, _, angle, _ = self.state
        return abs(position) > 2.4 or abs(angle) > 0.21 or self.steps == LONGEST

    def step(self, action):
        position, speed, angle, turning = self.state.tolist()
        push = 10.0 if action else -10.0
        sin, cos = math.sin(angle), math.cos(angle)
        carried = (push + 0.05 * turning**2 * sin) / 1.1
        fall = (9.8 * sin - cos * carried) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        pull = carried - 0.05 * fall * cos / 1.1
        change = np.array([speed, pull, turning, fall])
        self.state = self.state + 0.02 * change
        self.steps += 1
        return self.state, 1.0


class Policy:
    """The probability to push to the right, as the logistic function of a weighted sum."""

    def __init__(self):
        self.weights = np.zeros(4)

    def probability(self, state):
        return 1 / (1 + math.exp(-float(self.weights @ state)))

    def compute(self, state, rng):
        return rng.random() < self.probability(state)

    def update(self, trajectories):
        """Makes likelier what went on for longer than the mean (the REINFORCE rule)."""
        togo = [np.arange(len(trajectory), 0, -1) for trajectory in trajectories]
        mean, spread = np.concatenate(togo).mean(), np.concatenate(togo).std() + 1e-9
        gradient, count = np.zeros(4), 0
        for trajectory, returns in zip(trajectories, togo):
            for (state, action, _), value in zip(trajectory, returns):
                gradient += (action - self.probability(state)) * state * (value - mean) / spread
                count += 1
        new = Policy()
        new.weights = self.weights + 40.0 * gradient / count
        return new


@ray.remote(num_cpus=0.5)
def rollout(policy, seed):
    """Evaluates a policy by interacting with the environment."""
    environment, rng = Environment(seed), np.random.default_rng([seed, 1])
    trajectory = []
    state = environment.initial_state()
    while not environment.has_terminated():
        action = policy.compute(state, rng)  # Serving
        next_state, reward = environment.step(action)  # Simulation
        trajectory.append((state, action, reward))
        state = next_state
    return trajectory


def train_policy():
    """Improves the policy iteratively until it converges."""
    policy = Policy()
    for round in range(60):
        shared = ray.put(policy)
        trajectories = ray.get([rollout.remote(shared, seed=K * round + i) for i in range(K)])
        mean = np.mean([sum(reward for _, _, reward in trajectory) for trajectory in trajectories])
        print(f"round {round:2}: {mean:5.1f} steps {'#' * int(mean / 4)}")
        if mean > 0.95 * LONGEST:
            break
        policy = policy.update(trajectories)  # Training
    return policy


def main():
    print("weights:", np.round(train_policy().weights, 2))


if __name__ == "__main__":
    ray.init()
    main()

"""A robot that gets its actions from a policy far away, and cannot wait for them.

From "Ray: a distributed execution framework for emerging AI applications" (the page "Controlling a Simulated Robot in Real
Time"): how many actions arrive within a budget of so many milliseconds, and does the robot keep its balance? What to look
at: `ray.wait` with a timeout. An action that is late is dropped, and the robot moves on as before.

The robot is a cart with a pole on it that somebody pushes now and then; each action lasts 20 ms in its own time. How many
actions are late depends on the machine, so the figures differ between runs.
"""

import math

import hpc_ray as ray
import numpy as np

ACTIONS, BUDGETS_MS = 100, (30, 10, 3, 1, 0.5, 0.3, 0.1, 0.05)


class Robot:
    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.state = np.zeros(4)  # position, speed, angle, speed of turning
        self.fallen = False

    def move(self, force):
        """20 ms in which the force stays as it is."""
        for _ in range(4):
            _, speed, angle, turning = self.state.tolist()
            sin, cos = math.sin(angle), math.cos(angle)
            carried = (force + 0.05 * turning**2 * sin) / 1.1
            fall = (9.8 * sin - cos * carried) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
            change = np.array([speed, carried - 0.05 * fall * cos / 1.1, turning, fall])
            self.state = self.state + 0.005 * change
        if self.rng.random() < 0.1:
            self.state[3] += self.rng.normal(0, 0.5)  # A push.
        self.fallen = self.fallen or abs(self.state[2]) > 0.6
        return self.state


@ray.remote(num_cpus=0.5)
class Policy:
    def compute(self, state):
        """The force that brings the pole upright and the cart to the middle."""
        return float(np.dot([1.0, 2.0, 30.0, 6.0], state))


def control(policy, budget_s):
    """The share of actions that came in time, and whether the robot kept its balance."""
    robot, state, force, in_time = Robot(), np.zeros(4), 0.0, 0
    for _ in range(ACTIONS):
        action = policy.compute.remote(state)
        ready, _ = ray.wait([action], timeout=budget_s)
        if ready:
            force = ray.get(action)
            in_time += 1
        state = robot.move(force)
    return in_time / ACTIONS, not robot.fallen


def main():
    policy = Policy.remote()
    print("time budget (ms)  actions fulfilled  keeps its balance")
    for budget_ms in BUDGETS_MS:
        ray.get(policy.compute.remote(np.zeros(4)))  # The policy is up, and done with all that was late.
        fulfilled, stable = control(policy, budget_ms / 1000)
        print(f"{budget_ms:16}  {fulfilled:17.0%}  {'yes' if stable else 'no':>17}")


if __name__ == "__main__":
    ray.init()
    main()

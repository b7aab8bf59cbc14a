"""Trains a small network on real handwritten digits, split over several workers that keep in step in one of three ways.

The digits are the 1,797 scanned ones of the UCI "optdigits" set that scikit-learn ships; nothing is downloaded. ``--sync``
chooses how the workers, which are actors, combine what they learn from their parts of each batch:

  allreduce   every worker has a model of its own; they add up their gradients among themselves (reduce-scatter, all-gather)
  ps          one parameter-server actor has the model, adds up all gradients of a step and hands out new weights
  async-ps    the same server takes each gradient as it comes; nobody waits for the slowest

What to look at: the functions `allreduce`, `parameter_server` and `async_parameter_server`. They are all that is distributed
here, a few lines each. They only *describe* the work: the driver handles references to gradients and weights, never the
numbers, which go from actor to actor; and as a call returns at once, the description runs some steps ahead of the work.

The two synchronous ways give the same weights to the last bit in every run with the same seed and number of workers, since
sums are always added in the order of the workers' ranks. They agree with each other too: both print the same hash.

    python examples/train_digits.py                                        # this machine, 4 workers
    python examples/train_digits.py --sync async-ps --workers 8
    mpirun -n 6 hpc-ray run --nodes 3 examples/train_digits.py --sync ps   # three nodes

The ideas are those of the parameter server (Li et al., 2014), of Downpour SGD (Dean et al., 2012) and of allreduce, as the
talks on Ray tell them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import click
import hpc_ray as ray
import numpy as np

# Torch is imported where it is used, which is in the actors: the driver does without, and so is up at once.

TRAIN_IMAGES, TEST_IMAGES = 1437, 360
STEPS_AHEAD = 8  # How far the driver describes the work ahead of what is done.


@dataclass(frozen=True)
class Plan:
    """What all actors have to agree on."""

    sync: str
    workers: int
    epochs: int
    batch: int  # Images per step, over all workers together.
    lr: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return TRAIN_IMAGES // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


# ---------------------------------------------------------------------------------------------------- the data, the model


def load_digits():
    """The digits in a training and a test part, the same ones for everyone: (images, labels), (images, labels)."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]  # n x 1 x 8 x 8, from 0 to 1
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images, digits.target, test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    return (train_images, train_labels), (test_images, test_labels)


def distort(images, rng):
    """The images turned, scaled and shifted a little, each differently, so that no network can learn them by heart."""
    import torch

    n = len(images)
    angle, scale = rng.uniform(-0.2, 0.2, n), rng.uniform(0.9, 1.1, n)
    right, down = rng.uniform(-0.15, 0.15, (2, n))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrices = np.stack([[cos, -sin, right], [sin, cos, down]]).transpose(2, 0, 1).astype(np.float32)
    grid = torch.nn.functional.affine_grid(torch.tensor(matrices), images.shape, align_corners=False)
    return torch.nn.functional.grid_sample(torch.tensor(images), grid, align_corners=False)


class Replica:
    """A copy of the model, with its optimizer; gradients and weights go in and out as one flat array.

    All replicas begin with the same weights: they are drawn from the plan's seed.
    """

    def __init__(self, plan: Plan):
        import torch
        from torch import nn

        torch.set_num_threads(1)  # The workers share a machine; and one thread adds up in one order.
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.batches = 0.0  # How many went into the updates.
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=5e-4)

    def gradient(self, images, labels):
        """The loss summed over the images, and its gradient divided by the size of the whole batch.

        So the gradients of all workers add up to the mean over the batch, in whatever parts it was dealt.
        """
        import torch

        self.model.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(images), torch.tensor(labels), reduction="sum")
        (loss / self.plan.batch).backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in self.parameters]).numpy()

    def update(self, gradient, part: float = 1.0):
        """A step of the optimizer with the gradient of a batch, or a shorter one with that of a part of a batch.

        The learning rate rises over the first fifth of the training and then sinks to zero.
        """
        import torch

        done = self.batches / self.plan.steps
        self.batches += part
        rate = min(done / 0.2, 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))
        self.optimizer.param_groups[0]["lr"] = self.plan.lr * rate * part
        pieces = torch.tensor(gradient).split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces):
            parameter.grad = piece.view_as(parameter)
        self.optimizer.step()

    def weights(self):
        import torch

        return torch.nn.utils.parameters_to_vector(self.parameters).detach().numpy()

    def set_weights(self, weights):
        import torch

        torch.nn.utils.vector_to_parameters(torch.tensor(weights), self.parameters)

    def accuracy(self, images, labels) -> float:
        import torch

        with torch.no_grad():
            return float((self.model(torch.tensor(images)).argmax(1).numpy() == labels).mean())


# ------------------------------------------------------------------------------------------------------------- the actors


class Member:
    """What workers and server have in common: a replica, the test, and a diary of what they did when."""

    def __init__(self, plan: Plan, test):
        self.plan = plan
        self.replica = Replica(plan)
        self.test = test
        self.diary = []  # (what, start, end), in seconds by this node's clock, which should agree with the others'

    @contextlib.contextmanager
    def doing(self, what: str):
        start = time.time()
        yield
        self.diary.append((what, start, time.time()))

    def evaluate(self) -> float:
        with self.doing("test"):
            return self.replica.accuracy(*self.test)

    def report(self):
        """The node this actor is on, its diary, and the hash of its weights."""
        weights = hashlib.sha256(self.replica.weights().tobytes()).hexdigest()
        return ray.get_runtime_context().get_node_id(), self.diary, weights


@ray.remote
class Worker(Member):
    """Computes gradients on its part of each batch."""

    def __init__(self, plan: Plan, test, rank: int, train):
        super().__init__(plan, test)
        self.rank = rank
        self.images, self.labels = train  # Read-only arrays in shared memory: the workers of a node have one copy.

    def gradient(self, step: int, weights=None, shares: int = 1):
        """The loss on this worker's part of a step's batch; then the gradient, in so many shares.

        It is taken at `weights`, or without any at those that the replica has.
        """
        if weights is not None:
            with self.doing("exchange"):
                self.replica.set_weights(weights)
        with self.doing("compute"):
            mine = self.part_of_batch(step)
            images = distort(self.images[mine], np.random.default_rng([self.plan.seed, step, self.rank]))
            loss, gradient = self.replica.gradient(images, self.labels[mine])
            return loss, *np.array_split(gradient, shares)

    def part_of_batch(self, step: int):
        """Which images are this worker's. Each epoch deals all images anew; those that fill no batch have a rest."""
        epoch, step = divmod(step, self.plan.steps_per_epoch)
        order = np.random.default_rng([self.plan.seed, epoch]).permutation(TRAIN_IMAGES)
        return order[step * self.plan.batch :][: self.plan.batch][self.rank :: self.plan.workers]

    def add(self, *shares):
        with self.doing("exchange"):
            return sum_in_order(shares)

    def apply(self, loss: float, *shares) -> float:
        """Makes the step that all workers make, and hands the loss through: who has it knows that the step is made."""
        with self.doing("exchange"):
            self.replica.update(np.concatenate(shares))
            return loss


@ray.remote
class ParameterServer(Member):
    """Has the weights; takes gradients."""

    def weights(self):
        return self.replica.weights()

    def apply(self, *gradients):
        """Makes a step with the sum of these gradients, and returns the new weights."""
        with self.doing("exchange"):
            self.replica.update(sum_in_order(gradients), part=len(gradients) / self.plan.workers)
            return self.replica.weights()


def sum_in_order(arrays):
    """First to last, whoever came first: floating-point numbers in another order have another sum."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


# ------------------------------------------------------------------------------------------------ the three ways to train
# Each yields step by step the references to the losses of all workers.


def allreduce(workers, server, plan: Plan):
    """All get the sum of all gradients, with nobody in the middle: every worker adds up one share of it."""
    count = len(workers)
    for step in range(plan.steps):
        # Each worker cuts its gradient into as many shares as there are workers ...
        found = [w.gradient.options(num_returns=1 + count).remote(step, shares=count) for w in workers]
        losses, shares = [f[0] for f in found], [f[1:] for f in found]
        # ... worker i adds up everybody's share i (reduce-scatter) ...
        sums = [worker.add.remote(*(s[i] for s in shares)) for i, worker in enumerate(workers)]
        # ... and all take all the sums (all-gather).
        yield [worker.apply.remote(loss, *sums) for worker, loss in zip(workers, losses)]


def parameter_server(workers, server, plan: Plan):
    """The server adds up the gradients of all workers, which begin the next step at its new weights."""
    weights = server.weights.remote()
    for step in range(plan.steps):
        losses, gradients = zip(*[w.gradient.options(num_returns=2).remote(step, weights) for w in workers])
        weights = server.apply.remote(*gradients)
        yield losses


def async_parameter_server(workers, server, plan: Plan):
    """Who brings a gradient gets the newest weights and goes on. Gradients may come some updates too late."""
    weights = server.weights.remote()
    running, losses = {}, []  # running: gradient -> its worker, step and loss

    def start(worker, step):
        loss, gradient = worker.gradient.options(num_returns=2).remote(step, weights)
        running[gradient] = worker, step, loss

    for worker in workers:
        start(worker, 0)
    while running:
        [gradient], _ = ray.wait(list(running), num_returns=1)
        worker, step, loss = running.pop(gradient)
        weights = server.apply.remote(gradient)
        if step + 1 < plan.steps:
            start(worker, step + 1)
        losses.append(loss)
        if len(losses) == len(workers):  # As many images as a batch has.
            yield losses
            losses = []


WAYS = {"allreduce": allreduce, "ps": parameter_server, "async-ps": async_parameter_server}


# ------------------------------------------------------------------------------------------------------------- the driver


@dataclass
class Outcome:
    """What a training left behind."""

    nodes: int = 0
    start_s: float = 0.0  # Until all actors were up.
    train_s: float = 0.0
    losses: list = field(default_factory=list)  # mean over the batch, one per step
    accuracies: list = field(default_factory=list)  # on the test part, one per epoch
    diaries: dict = field(default_factory=dict)  # name of an actor -> its diary
    weights: str = ""  # hash of the final weights
    images: int = 0  # seen so far

    @property
    def throughput(self) -> float:
        return self.images / self.train_s


def train(plan: Plan, on_step) -> Outcome:
    """Sets up the actors and has them train; calls `on_step(outcome so far)` after each step."""
    outcome = Outcome()
    began = time.perf_counter()
    train_part, test_part = (ray.put(part) for part in load_digits())
    # A small share of a CPU each, so that all of them find a place however small the machine is.
    cpus = min(0.25, round(ray.cluster_resources()["CPU"] / (2 * plan.workers), 4))
    place = {"num_cpus": cpus, "scheduling_strategy": "SPREAD"}
    workers = [Worker.options(**place).remote(plan, test_part, rank, train_part) for rank in range(plan.workers)]
    actors = {f"worker {rank}": worker for rank, worker in enumerate(workers)}
    server = None
    if plan.sync != "allreduce":
        server = actors["server"] = ParameterServer.options(num_cpus=0).remote(plan, test_part)
    leader = server or workers[0]  # Whose weights are tested.

    def reports():
        return dict(zip(actors, ray.get([actor.report.remote() for actor in actors.values()])))

    outcome.nodes = len({node for node, _, _ in reports().values()})
    outcome.start_s = time.perf_counter() - began

    def finish(losses, accuracy):
        outcome.losses.append(sum(ray.get(list(losses))) / plan.batch)
        if not math.isfinite(outcome.losses[-1]):
            raise FloatingPointError(f"the loss is {outcome.losses[-1]} at step {len(outcome.losses)}")
        if accuracy is not None:
            outcome.accuracies.append(ray.get(accuracy))
        outcome.train_s = time.perf_counter() - began
        outcome.images += plan.batch
        on_step(outcome)

    began = time.perf_counter()
    ahead = deque()
    for step, losses in enumerate(WAYS[plan.sync](workers, server, plan), 1):
        ahead.append((losses, leader.evaluate.remote() if step % plan.steps_per_epoch == 0 else None))
        if len(ahead) > STEPS_AHEAD:
            finish(*ahead.popleft())
    while ahead:
        finish(*ahead.popleft())

    last = reports()
    outcome.diaries = {name: diary for name, (_, diary, _) in last.items()}
    hashes = {last["server"][2]} if server else {weights for _, _, weights in last.values()}
    if len(hashes) > 1:
        raise RuntimeError("the workers' models have come apart")
    [outcome.weights] = hashes
    return outcome


@contextlib.contextmanager
def progress_bar(plan: Plan):
    """A line on stderr that shows how the training goes; gives the function to call after each step."""
    from rich import console, progress

    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn()]
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"starting {plural(plan.workers, 'worker')}", total=plan.steps)

        def on_step(outcome: Outcome):
            step = len(outcome.losses)
            text = f"epoch {-(-step // plan.steps_per_epoch)}/{plan.epochs}  loss {outcome.losses[-1]:.3f}"
            if outcome.accuracies:
                text += f"  test {outcome.accuracies[-1]:.1%}"
            bar.update(task, completed=step, description=f"{text}  {outcome.throughput:,.0f} images/s")

        yield on_step


# what an actor does -> its colour in the picture, and its name there
LEGEND = {
    "compute": ("#4c78a8", "computes a gradient"),
    "exchange": ("#f58518", "communicates: adds up, takes over"),
    "test": ("#54a24b", "runs the test"),
    "wait": ("#e6e6e6", "waits for others and their data"),
}


def draw(plan: Plan, outcome: Outcome, path: Path):
    """Writes a picture: the learning curves; below, what each actor did in a few steps, and in all of the training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10})
    layout = [["loss", "accuracy"], ["steps", "shares"]]
    figure, axes = plt.subplot_mosaic(layout, figsize=(11, 6.5), layout="constrained", height_ratios=[1.2, 1])
    result = f"{outcome.accuracies[-1]:.1%} of the test digits right, {outcome.throughput:,.0f} images/s"
    figure.suptitle(f"{plural(plan.workers, 'worker')}, {plan.sync}: {result}", fontsize=12)

    epochs = np.arange(1, plan.steps + 1) / plan.steps_per_epoch
    smooth = np.convolve(outcome.losses, np.ones(plan.steps_per_epoch) / plan.steps_per_epoch, "valid")
    axes["loss"].plot(epochs, outcome.losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes["loss"].plot(epochs[plan.steps_per_epoch - 1 :], smooth, color="#1f4e79", label="mean over an epoch")
    axes["loss"].set(title="Loss on the training digits", xlabel="epoch", yscale="log", xlim=(0, plan.epochs))
    axes["loss"].legend(frameon=False)
    percent = 100 * np.array(outcome.accuracies)
    axes["accuracy"].plot(np.arange(1, plan.epochs + 1), percent, color="#54a24b", marker="o", markersize=3)
    axes["accuracy"].set(title="Test digits that are right (%)", xlabel="epoch", xlim=(0, plan.epochs))
    axes["accuracy"].set(ylim=(min(90, percent[-1] - 5), 100.4))
    axes["accuracy"].grid(axis="y", color="#eeeeee")

    from_s, to_s = some_steps(outcome.diaries["worker 0"], count=5)
    for row, diary in enumerate(outcome.diaries.values()):
        first, last = diary[0][1], diary[-1][2]
        spans = {what: [(start, end - start) for w, start, end in diary if w == what] for what in LEGEND}
        spent = {what: sum(length for _, length in spans[what]) for what in LEGEND}
        spans["wait"], spent["wait"] = [(first, last - first)], last - first - sum(spent.values())
        left = 0.0
        for what, (colour, _) in LEGEND.items():
            bars = [((start - from_s) * 1000, length * 1000) for start, length in spans[what]]
            axes["steps"].broken_barh(bars, (row - 0.38, 0.76), color=colour, zorder=1 if what == "wait" else 2)
            share = 100 * spent[what] / (last - first)
            axes["shares"].barh(row, share, 0.76, left, color=colour)
            if share > 5:
                text = {"ha": "center", "va": "center", "color": "black" if what == "wait" else "white"}
                axes["shares"].text(left + share / 2, row, f"{share:.0f}", **text)
            left += share
    axes["steps"].set(title="What they did in a few steps", xlabel="milliseconds", xlim=(0, (to_s - from_s) * 1000))
    axes["shares"].set(title="What they did in all of the training (% of the time)", xlim=(0, 100))
    for axis in axes["steps"], axes["shares"]:
        axis.set_yticks(range(len(outcome.diaries)), outcome.diaries)
        axis.set_ylim(len(outcome.diaries) - 0.5, -0.5)
        axis.tick_params(left=False)
        axis.spines["left"].set_visible(False)
    handles = [patches.Patch(color=colour, label=name) for colour, name in LEGEND.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def some_steps(diary, count: int):
    """From when to when a worker computed so many gradients, from the middle of the training on."""
    starts = [start for what, start, _ in diary if what == "compute"] + [diary[-1][2]]
    middle = max(0, min(len(starts) // 2, len(starts) - 1 - count))
    return starts[middle], starts[min(middle + count, len(starts) - 1)]


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def demand(**modules: bool):
    """Ends the program with a sentence on what to install, if a module that is needed is not there."""
    missing = [name for name, needed in modules.items() if needed and importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing).replace("sklearn", "scikit-learn")
        error = click.ClickException(f"this example needs {names}: pip install 'hpc-ray[train]'")
        error.exit_code = 2
        raise error


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--sync", type=click.Choice(list(WAYS)), default="allreduce", help="How the workers keep in step.")
@click.option("--workers", type=click.IntRange(1), default=4, help="How many actors share the work.")
@click.option("--epochs", type=click.IntRange(1), default=25, help="How often each digit is seen.")
@click.option("--batch", type=click.IntRange(1, TRAIN_IMAGES), default=128, help="Digits per step, over all workers.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=0.008, help="The highest learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the weights, the order and the distortions.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="[default: train_digits-SYNC.png]")
@click.option("--no-plot", is_flag=True, help="Draw no picture.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def main(sync, workers, epochs, batch, lr, seed, plot, no_plot, quiet):
    """Train a network on handwritten digits with several workers."""
    plan = Plan(sync, workers, epochs, batch, lr, seed)
    path = plot or Path(f"train_digits-{sync}.png")
    if batch < workers:
        raise click.BadParameter(f"{batch} is too few for {workers} workers.", param_hint="'--batch'")
    if not no_plot and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder '{path.parent}'.", param_hint="'--plot'")
    demand(torch=True, sklearn=True, matplotlib=not no_plot, rich=not quiet)

    if not ray.is_initialized():
        ray.init()
    try:
        with contextlib.nullcontext(lambda outcome: None) if quiet else progress_bar(plan) as on_step:
            outcome = train(plan, on_step)
    except FloatingPointError as error:
        raise click.ClickException(f"{error}; try a lower --lr") from None

    right, images = round(outcome.accuracies[-1] * TEST_IMAGES), outcome.images
    owner = "the server's" if sync != "allreduce" else "all workers' alike"
    print(f"{sync}: {plural(workers, 'worker')} on {plural(outcome.nodes, 'node')}, up in {outcome.start_s:.1f} s")
    print(f"test accuracy  {outcome.accuracies[-1]:.2%}  ({right} of {TEST_IMAGES} digits)")
    print(f"throughput     {outcome.throughput:,.0f} images/s  ({images:,} in {outcome.train_s:.1f} s)")
    print(f"weights        sha256 {outcome.weights[:16]}, {owner}")
    if not no_plot:
        draw(plan, outcome, path)
        print(f"picture        {path}")


if __name__ == "__main__":
    main()

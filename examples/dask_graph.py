"""Dask's arrays and delayed functions with hpc_ray as their scheduler.

What to look at: Dask plans, hpc_ray's tasks compute; what one task of the graph makes and another uses goes from worker to worker.
Results are compared with those of NumPy and of Dask's own scheduler, on the handwritten digits that come with scikit-learn.

    pip install 'hpc-ray[libraries]'
    python examples/dask_graph.py
"""

import dask
import dask.array
import numpy as np
from sklearn.datasets import load_digits

import hpc_ray as ray
from hpc_ray.util.dask import ray_dask_get


@dask.delayed
def share_of(labels, digit):
    return digit, float((labels == digit).mean())


@dask.delayed
def table(shares):
    return dict(shares)


def main():
    ray.init(num_cpus=4, ignore_reinit_error=True)
    images, labels = load_digits(return_X_y=True)
    chunked = dask.array.from_array(images, chunks=(300, 64))
    centred = chunked - chunked.mean(axis=0)
    covariance = (centred.T @ centred) / (len(images) - 1)
    shares = table([share_of(labels, digit) for digit in range(10)])
    with dask.config.set(scheduler=ray_dask_get):
        found, counted = dask.compute(covariance, shares)
    assert np.allclose(found, np.cov(images.T))
    assert counted == shares.compute(scheduler="synchronous")
    strength = np.linalg.eigvalsh(found)[::-1]
    print(f"covariance of {images.shape[1]} pixels: as NumPy's; {strength[:10].sum() / strength.sum():.1%} of it in 10 directions")
    print("digits:", " ".join(f"{digit}: {share:.1%}" for digit, share in counted.items()))


if __name__ == "__main__":
    main()

"""Pandas tables in parallel: Modin, a library written for Ray, runs on hpc_ray without knowing it.

`hpc_ray.install_as_ray()` makes `import ray` give hpc_ray, here and in the workers. What to look at: every result is compared
with that of pandas itself, on the handwritten digits that come with scikit-learn (1,797 images of 64 pixels).

    pip install 'hpc-ray[libraries]'
    python examples/modin_tables.py
    hpc-ray run --as-ray program.py        # the same for a program that cannot be changed
"""

import os
import time

import hpc_ray

hpc_ray.install_as_ray()
os.environ.setdefault("MODIN_ENGINE", "ray")
os.environ.setdefault("MODIN_CPUS", "4")

import modin.pandas
import pandas
from sklearn.datasets import load_digits


def ink(row):
    return row.iloc[:64].sum()


def mean_image(table):
    return table.groupby("target").mean()


def statistics(table):
    return table.describe()


def darkest(table):
    table = table.assign(ink=table.apply(ink, axis=1))
    return table.sort_values(["ink", "target", "pixel_2_3", "pixel_4_4"], ascending=False).head(10)[["target", "ink"]]


def pixels_that_tell_apart(table):
    means = table.groupby("target").mean()
    return (means.max() - means.min()).sort_values(ascending=False).head(8).round(9)


def joined_with_names(table):
    names = type(table)({"target": range(10), "name": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]})
    return table.merge(names, on="target").groupby("name")["pixel_3_4"].agg(["count", "mean", "max"])


def main():
    digits = load_digits(as_frame=True).frame
    table = modin.pandas.DataFrame(digits)
    for question in (mean_image, statistics, darkest, pixels_that_tell_apart, joined_with_names):
        started = time.perf_counter()
        found = question(table)
        found = found._to_pandas()
        took = time.perf_counter() - started
        expected = question(digits)
        compare = pandas.testing.assert_series_equal if isinstance(expected, pandas.Series) else pandas.testing.assert_frame_equal
        compare(found, expected)
        print(f"{question.__name__:24} the same as pandas' ({took:.2f} s)")
    print(f"computed by {type(table).__module__.partition('.')[0]} on {int(hpc_ray.cluster_resources()['CPU'])} CPUs of hpc_ray")


if __name__ == "__main__":
    main()

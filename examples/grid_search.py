"""scikit-learn's grid search over the cluster: joblib's backend "ray".

What to look at: nothing in the search knows of hpc_ray; `joblib.parallel_config("ray")` sends its fits to a pool of actors. The
scores are those that one process finds, to the last digit.

    pip install 'hpc-ray[libraries]'
    python examples/grid_search.py
"""

import time

import joblib
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import hpc_ray as ray
from hpc_ray.util.joblib import register_ray


def search():
    images, labels = load_digits(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "gamma": [0.0003, 0.001, 0.003]}
    return GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(images, labels)


def main():
    ray.init(num_cpus=2, ignore_reinit_error=True)
    register_ray()
    started = time.perf_counter()
    with joblib.parallel_config("ray"):
        found = search()
    took = time.perf_counter() - started
    with joblib.parallel_config("sequential"):
        expected = search()
    assert (found.cv_results_["mean_test_score"] == expected.cv_results_["mean_test_score"]).all()
    print(f"27 fits by actors in {took:.2f} s; the scores are those of one process")
    print(f"best: {found.best_params_}, right in {found.best_score_:.2%} of the cases")


if __name__ == "__main__":
    main()

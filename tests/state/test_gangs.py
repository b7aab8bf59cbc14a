"""The deciding parts of gangs: what lease one needs, whether a node can hold it, and who gets which GPUs."""

from __future__ import annotations

import json

import pytest

from hpc_ray import options
from hpc_ray.protocol import UNIT, Shape, Strategy
from hpc_ray.worker.environment import without_ranks
from hpc_ray.worker.gangs import share


def shape(env="", **amounts):
    return Shape({name: round(amount * UNIT) for name, amount in amounts.items()}, b"job1", Strategy(), env)


class Nodes:
    """A client that knows nodes."""

    def __init__(self, *totals):
        self.answer = [{"alive": alive, "total": {k: v * UNIT for k, v in total.items()}} for alive, total in totals]

    def query(self, destination, name):
        assert name == "nodes"
        return self.answer


def test_a_leader_leads_gangs_of_one_size_and_hands_nothing_on():
    plain, dressed = shape(CPU=4), shape('{"env_vars": {"A": "1"}}', CPU=4)
    texts = [options.led_by_one(one, ranks).runtime_env for one in (plain, dressed) for ranks in (2, 4)]
    assert len(set(texts)) == 4
    assert json.loads(texts[3]) == {"_mpi_ranks": 4, "env_vars": {"A": "1"}}
    assert [without_ranks(text) for text in texts] == ["", "", dressed.runtime_env, dressed.runtime_env]
    assert options.led_by_one(plain, 2).resources == plain.resources


@pytest.mark.parametrize(
    ("totals", "wanted", "ranks", "room"),
    [
        ([(True, {"CPU": 4})], {"CPU": 4}, 4, None),
        ([(True, {"CPU": 4})], {"CPU": 5}, 5, 4),
        ([(True, {"CPU": 4}), (True, {"CPU": 4})], {"CPU": 8}, 8, 4),  # all on one node
        ([(True, {"CPU": 4}), (False, {"CPU": 64})], {"CPU": 8}, 8, 4),
        ([(True, {"CPU": 4})], {"CPU": 3}, 6, None),  # half a CPU each
        ([(True, {"CPU": 8, "GPU": 2})], {"CPU": 4, "GPU": 4}, 4, 2),
        ([(True, {"CPU": 8})], {"CPU": 2, "GPU": 2}, 2, 0),
        ([], {"CPU": 2}, 2, 0),
        ([], {}, 2, None),
    ],
)
def test_room(totals, wanted, ranks, room):
    if room is None:
        options.check_room("f()", shape(**wanted), ranks, Nodes(*totals))
    else:
        with pytest.raises(ValueError, match=f"room for {room}\\. Start larger nodes"):
            options.check_room("f()", shape(**wanted), ranks, Nodes(*totals))


@pytest.mark.parametrize(
    ("gpus", "each", "wanted"),
    [
        ([3, 5], 1, [[3], [5]]),
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([7], 0.5, [[7], [7]]),
        ([0, 1], 0.5, [[0], [0], [1], [1]]),
        ([0, 1, 2], 0.75, [[0], [0, 1], [1, 2], [2]]),
        ([], 0, [[], []]),
    ],
)
def test_gpus_of_the_ranks(gpus, each, wanted):
    given = [[index, UNIT] for index in gpus]
    found = [[index for index, _ in share(given, rank, each)] for rank in range(len(wanted))]
    assert found == wanted

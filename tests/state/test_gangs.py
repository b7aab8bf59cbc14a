"""The deciding parts of gangs: how one lies, what lease and room it needs, and who gets which GPUs."""

from __future__ import annotations

import json
import os

import pytest

from hpc_ray import options
from hpc_ray.client.rooms import Room, share
from hpc_ray.ids import node_of
from hpc_ray.launcher import steps, world
from hpc_ray.protocol import UNIT, Gang, Shape, Strategy
from hpc_ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from hpc_ray.worker.environment import without_ranks


def shape(env="", **amounts):
    return Shape({name: round(amount * UNIT) for name, amount in amounts.items()}, b"job1", Strategy(), env)


class Client:
    """One that knows nodes, and a GCS that places groups on them in turn."""

    job_id = b"\0\0\0\1"
    node = 0

    def __init__(self, *totals, alive=(), labels=(), gpus=(), fails=""):
        self.rows = [
            {
                "alive": index not in alive,
                "total": {key: round(amount * UNIT) for key, amount in total.items()},
                "labels": dict(labels[index]) if labels else {},
                "node_id": bytes([index]) * 28,
                "index": index,
                "hostname": f"host{index}",
            }
            for index, total in enumerate(totals)
        ]
        self.gpus = gpus  # of each bundle
        self.fails = fails  # the question that the GCS does not answer well
        self.asked = []

    def query(self, destination, name, **arguments):
        self.asked.append((name, arguments))
        if name == self.fails:
            raise RuntimeError(name)
        if name == "nodes":
            return self.rows
        if name == "create_placement_group":
            self.bundles = arguments["bundles"]
        if name == "bundle_instances":
            mine = range(node_of(destination), len(self.bundles), len(self.rows))
            return {str(number): {"GPU": [[index, UNIT] for index in self.gpus[number]]} for number in mine}
        if name == "placement_group_table":
            return {"nodes": [self.rows[number % len(self.rows)]["node_id"] for number in range(len(self.bundles))]}
        return "CREATED"


def test_a_leader_leads_gangs_of_one_size_and_hands_nothing_on():
    plain, dressed = shape(CPU=4), shape('{"env_vars": {"A": "1"}}', CPU=4)
    texts = [options.led_by_one(one, ranks).runtime_env for one in (plain, dressed) for ranks in (2, 4)]
    assert len(set(texts)) == 4
    assert json.loads(texts[3]) == {"_mpi_ranks": 4, "env_vars": {"A": "1"}}
    assert [without_ranks(text) for text in texts] == ["", "", dressed.runtime_env, dressed.runtime_env]
    assert options.led_by_one(plain, 2).resources == plain.resources


@pytest.mark.parametrize(
    ("totals", "each", "ranks", "per_node", "wanted"),
    [
        ([{"CPU": 4}], {"CPU": 1}, 4, 0, "one"),
        ([{"CPU": 4}], {"CPU": 1}, 5, 0, "room for 4: 4 on 1 node"),
        ([{"CPU": 4}, {"CPU": 4}], {"CPU": 1}, 8, 0, "several"),
        ([{"CPU": 4}, {"CPU": 4}], {"CPU": 1}, 9, 0, "room for 8: 4, 4 on 2 nodes"),
        ([{"CPU": 4}], {"CPU": 0.5}, 6, 0, "one"),
        ([{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 1}, 4, 0, "room for 2"),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 1, "GPU": 2}], {"CPU": 1, "GPU": 1}, 3, 0, "several"),
        ([{"CPU": 8}], {"CPU": 1, "GPU": 1}, 2, 0, "room for 0"),
        ([], {"CPU": 1}, 2, 0, "room for 0: none on 0 nodes"),
        ([{}], {}, 2, 0, "one"),
        ([{"CPU": 4}, {"CPU": 4}], {"CPU": 1}, 4, 2, "several"),  # would fit, but shall not
        ([{"CPU": 4}, {"CPU": 1}], {"CPU": 1}, 4, 2, "2 on each node, and there is room for 5"),
        ([{"CPU": 4}, {"CPU": 1}], {"CPU": 1}, 3, 2, "several"),
        ([{"CPU": 4}], {"CPU": 1}, 3, 2, "2 on each node"),
        ([{"CPU": 4}], {"CPU": 1}, 3, 3, "one"),
        ([{}, {}], {}, 4, 2, "several"),
    ],
)
def test_how_a_gang_lies(totals, each, ranks, per_node, wanted):
    amounts = {key: round(amount * UNIT) for key, amount in each.items()}
    scaled = [{key: amount * UNIT for key, amount in total.items()} for total in totals]
    rooms = sorted((options.room_for(amounts, total, ranks) for total in scaled), reverse=True)
    if wanted in ("one", "several"):
        assert options.lies_on_several("f()", ranks, per_node, amounts, rooms) == (wanted == "several")
    else:
        with pytest.raises(ValueError, match=wanted):
            options.lies_on_several("f()", ranks, per_node, amounts, rooms)


def test_the_leader_of_a_gang_on_several_nodes_takes_nothing():
    client = Client({"CPU": 4, "GPU": 4}, {"CPU": 4, "GPU": 4}, {"CPU": 64}, alive=[2])
    here, lease = options.gang_of("f()", {"mpi_ranks": 4, "num_gpus": 0.5}, client)
    assert (here.spread, lease.resources) == (False, {"CPU": 4 * UNIT, "GPU": 2 * UNIT})
    there, lease = options.gang_of("f()", {"mpi_ranks": 8, "scheduling_strategy": "SPREAD"}, client)
    assert (there.spread, there.even, there.each, lease.resources) == (True, True, {"CPU": UNIT}, {})
    with pytest.raises(ValueError, match="room for 8: 4, 4 on 2 nodes"):
        options.gang_of("f()", {"mpi_ranks": 9}, client)


def test_labels_count():
    client = Client({"CPU": 4}, {"CPU": 4}, labels=[{"kind": "a"}, {"kind": "b"}])
    with pytest.raises(ValueError, match="room for 4: 4 on 1 node"):
        options.gang_of("f()", {"mpi_ranks": 8, "label_selector": {"kind": "a"}}, client)
    gang, _ = options.gang_of("f()", {"mpi_ranks": 8, "label_selector": {"kind": "in(a, b)"}}, client)
    assert gang.labels == {"kind": ["in", ["a", "b"]]}
    node = NodeAffinitySchedulingStrategy("00" * 28, soft=False)
    with pytest.raises(ValueError, match="cannot be in another one"):
        options.gang_of("f()", {"mpi_ranks": 4, "mpi_ranks_per_node": 2, "scheduling_strategy": node}, client)


def test_ranks_of_one_node_are_neighbours():
    client = Client({"CPU": 2}, {"CPU": 2})
    room = Room.take(client, Gang(3, {"CPU": UNIT}, spread=True))
    assert (room.nodes, room.hosts) == ([0, 0, 1], ["host0", "host0", "host1"])
    room.give_back()
    room.give_back()
    names = [name for name, _ in client.asked]
    assert names == ["create_placement_group", "wait_placement_group", "placement_group_table", "nodes", "remove_placement_group"]
    made = client.asked[0][1]
    assert (made["strategy"], made["owned"], made["bundles"]) == ("PACK", True, [{"CPU": UNIT}] * 3)


def test_ranks_per_node_and_their_gpus():
    client = Client({}, {}, gpus=[(4, 5), (0, 1), (2,)])
    room = Room.take(client, Gang(5, {"CPU": UNIT, "GPU": UNIT // 2}, 0.5, 2, spread=True))
    assert client.asked[0][1]["strategy"] == "STRICT_SPREAD"
    assert client.asked[0][1]["bundles"] == [{"CPU": 2 * UNIT, "GPU": UNIT}] * 2 + [{"CPU": UNIT, "GPU": UNIT // 2}]
    assert room.nodes == [0, 0, 0, 1, 1]
    found = [[index for index, _ in each["GPU"]] for each in room.instances]
    assert found == [[4], [4], [2], [0], [0]]


@pytest.mark.parametrize("question", ["wait_placement_group", "placement_group_table", "nodes"])
def test_a_room_that_is_not_had_is_given_back(question):
    client = Client({"CPU": 2}, fails=question)
    with pytest.raises(RuntimeError, match=question):
        Room.take(client, Gang(2, {"CPU": UNIT}, spread=True))
    assert client.asked[-1][0] == "remove_placement_group"


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


@pytest.mark.parametrize(
    ("family", "version", "wanted"),
    [
        ("openmpi", (5, 0), ["-x", "A", "--host", "n1:2,n2:1", "p"]),
        ("openmpi", (4, 1), ["-x", "A", "--map-by", "seq", "--host", "n1,n1,n2", "p"]),
        ("mpich", (5, 0), ["m", "-n", "3", "-hosts", "n1:2,n2:1", "p"]),
    ],
)
def test_command_lines_for_several_hosts(family, version, wanted):
    mpirun = world.MPIRun("m", family, version)
    line = world.mpirun_command(mpirun, 3, ["p"], world.on_hosts(mpirun, [("n1", 2), ("n2", 1)]), passed=("A",))
    assert line[-len(wanted) :] == wanted


@pytest.mark.parametrize(
    ("command", "environments", "wanted"),
    [
        (["prterun", "-n", "2", "p"], [{}, {}], {}),
        (["mpirun", "--prtemca", "plm_ssh_agent", "rsh"], [{}], {"PRTE_MCA_plm_ssh_agent": "rsh"}),
        (["mpirun"], [{"PRTE_MCA_plm_ssh_agent": "a", "HOME": "/"}, {}], {"PRTE_MCA_plm_ssh_agent": "a"}),
        ([], [{}, {"OMPI_MCA_plm_rsh_agent": "a"}], {"OMPI_MCA_plm_rsh_agent": "a", "PRTE_MCA_plm_ssh_agent": "a"}),
        (["mpiexec", "-launcher", "ssh", "--iface", "ib0"], [{"HYDRA_LAUNCHER": "rsh"}], {"HYDRA_LAUNCHER": "ssh", "HYDRA_IFACE": "ib0"}),
    ],
)
def test_how_a_launcher_reaches_hosts(command, environments, wanted):
    assert world.reach_of(command, *environments) == wanted


@pytest.mark.parametrize(
    ("begun", "up", "wanted"),
    [
        ("", "", "a: 2 not begun; b: 1 not begun"),
        ("aa", "", "a: 2 in MPI_Init; b: 1 not begun"),
        ("aab", "a", "a: 1 up, 1 in MPI_Init; b: 1 in MPI_Init"),
    ],
)
def test_how_far_ranks_have_come(begun, up, wanted):
    assert steps.progress("aab", begun, up) == wanted


def test_what_a_step_has_printed(tmp_path):
    log = tmp_path / "logs" / f"worker-{os.getpid()}.err"
    log.parent.mkdir()
    early = steps.Printed(str(tmp_path))
    assert early.tail() == ""
    log.write_bytes(b"of an earlier step\n")
    printed = steps.Printed(str(tmp_path))
    assert (early.tail(), printed.tail()) == ("of an earlier step", "")
    with log.open("ab") as file:
        file.write(b"srun: Job 1 step creation temporarily disabled, retrying\n")
    assert printed.tail() == "srun: Job 1 step creation temporarily disabled, retrying"
    with log.open("ab") as file:
        file.write(b"a" * 10_000 + b"z")
    assert 1000 < len(printed.tail()) < 5000 and printed.tail().endswith("az")

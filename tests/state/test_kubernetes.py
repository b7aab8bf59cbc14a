"""The manifest for Kubernetes, as far as it can be checked without a cluster: the MPI Operator's schema, and our command line."""

from __future__ import annotations

import re

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra test)")

from pathlib import Path  # noqa: E402

from hpc_ray.launcher import cli  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "kubernetes"

# Fields of MPIJob v2beta1 and what they may be, from the operator's CRD.
SPEC = {
    "slotsPerWorker": int,
    "runLauncherAsWorker": bool,
    "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
    "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
    "sshAuthMountPath": str,
    "runPolicy": dict,
    "mpiReplicaSpecs": dict,
}
RUN_POLICY = {
    "cleanPodPolicy": {"All", "Running", "None"},
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "schedulingPolicy": dict,
    "suspend": bool,
}
REPLICA = {"replicas": int, "restartPolicy": {"Never", "OnFailure", "Always", "ExitCode"}, "template": dict}
CONTAINER = {
    "name": str, "image": str, "command": list, "args": list, "workingDir": str, "env": list, "resources": dict, "volumeMounts": list,
    "securityContext": dict, "readinessProbe": dict, "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
}  # fmt: skip


def check(found, fields, where):
    for name, value in found.items():
        assert name in fields, f"{where} has no field {name}"
        kind = fields[name]
        assert value in kind if isinstance(kind, set) else type(value) is kind, f"{where}.{name} is {value!r}"


@pytest.fixture(scope="module")
def documents():
    with open(FOLDER / "mpijob.yaml") as file:
        return list(yaml.safe_load_all(file))


@pytest.fixture(scope="module")
def job(documents):
    return documents[1]


def container(job, role):
    (only,) = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["containers"]
    return only


def test_the_operators_fields(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", job["metadata"]["name"]), "it becomes part of host names"
    check(job["spec"], SPEC, "spec")
    check(job["spec"]["runPolicy"], RUN_POLICY, "spec.runPolicy")
    assert set(job["spec"]["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        check(replica, REPLICA, role)
        check(container(job, role), CONTAINER, role)
        assert all(isinstance(word, str) for word in container(job, role)["command"] + container(job, role)["args"])
        assert all(isinstance(amount, str) for amount in container(job, role)["resources"]["limits"].values())
    assert job["spec"]["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1


def test_the_launchers_command_is_ours(job):
    """One rank for each slot of each worker, from the operator's hostfile."""
    name, *words = container(job, "Launcher")["command"] + container(job, "Launcher")["args"]
    assert name == "hpc-ray" and words[0] == "run"
    given = cli.run.make_context("run", words[1:]).params
    assert given["ranks"] == job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
    assert given["mpirun_options"] == ("--hostfile", "/etc/mpi/hostfile")
    assert given["script"] == "/program/pi.py"


def test_the_program_is_in_all_pods(documents, job):
    program = documents[0]
    assert (program["apiVersion"], program["kind"]) == ("v1", "ConfigMap")
    compile(program["data"]["pi.py"], "pi.py", "exec")
    for role in ("Launcher", "Worker"):
        mounts = {mount["name"]: mount["mountPath"] for mount in container(job, role)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["volumes"]}
        assert set(mounts) == set(volumes)
        assert mounts["program"] == "/program"
        assert volumes["program"]["configMap"]["name"] == program["metadata"]["name"]


def test_pods_can_be_reached(job):
    """Image, operator and sshd agree on user, keys and port."""
    image = (FOLDER / "Dockerfile").read_text()
    home = job["spec"]["sshAuthMountPath"].removesuffix("/.ssh")
    assert f"WORKDIR {home}\n" in image and "--uid 1000" in image
    worker = container(job, "Worker")
    assert worker["command"] == ["/usr/sbin/sshd"] and worker["args"] == ["-De", "-f", f"{home}/.sshd_config"]
    port = worker["readinessProbe"]["tcpSocket"]["port"]
    assert image.count(f"Port {port}") == 2  # of the client and of the server
    assert {container(job, role)["securityContext"]["runAsUser"] for role in ("Launcher", "Worker")} == {1000}
    assert len({container(job, role)["image"] for role in ("Launcher", "Worker")}) == 1


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_pages_name_files_that_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / link).is_file(), link

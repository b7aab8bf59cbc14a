"""The runtime context and what the cluster says about itself."""

import os

from caselib import attempt, case, main

TWO = {"num_cpus": 2, "num_gpus": 1, "resources": {"slot": 3}}


def case_driver_context(ray):
    """What the driver knows about itself."""
    context = ray.get_runtime_context()
    return {
        "job": len(context.get_job_id()),
        "node": context.get_node_id() == ray.nodes()[0]["NodeID"],
        "worker": len(context.get_worker_id()),
        "task": context.get_task_id(),
        "task_name": context.get_task_name(),
        "actor": context.get_actor_id(),
        "actor_name": context.get_actor_name(),
        "group": context.get_placement_group_id(),
        "assigned": attempt(ray, context.get_assigned_resources),
        "current_actor": attempt(ray, lambda: context.current_actor),
        "same_object": context is ray.get_runtime_context(),
    }


def case_task_context(ray):
    """What a task knows about itself."""
    driver = ray.get_runtime_context()

    @ray.remote
    def look():
        context = ray.get_runtime_context()
        return {
            "job": context.get_job_id(),
            "node": context.get_node_id(),
            "worker": context.get_worker_id(),
            "task": context.get_task_id(),
            "name": context.get_task_name(),
            "actor": context.get_actor_id(),
            "actor_name": context.get_actor_name(),
            "group": context.get_placement_group_id(),
            "assigned": context.get_assigned_resources(),
            "namespace": context.namespace,
        }

    reference = look.remote()
    seen = ray.get(reference)
    return {
        "job": seen["job"] == driver.get_job_id(),
        "node": seen["node"] == driver.get_node_id(),
        "worker": [len(seen["worker"]), seen["worker"] != driver.get_worker_id()],
        "task": seen["task"] == reference.task_id().hex(),
        "namespace": seen["namespace"] == driver.namespace,
        "rest": [seen[k] for k in ("name", "actor", "actor_name", "group", "assigned")],
    }


def case_actor_context(ray):
    """What an actor knows about itself."""

    @ray.remote(num_cpus=1)
    class Looker:
        def __init__(self):
            self.first = ray.get_runtime_context().get_actor_id()

        def look(self):
            context = ray.get_runtime_context()
            return {
                "actor": context.get_actor_id(),
                "first": self.first,
                "name": context.get_actor_name(),
                "task": context.get_task_id(),
                "task_name": context.get_task_name(),
                "assigned": context.get_assigned_resources(),
                "current": context.current_actor,
            }

    looker = Looker.options(name="looker").remote()
    one, two = ray.get([looker.look.remote(), looker.look.remote()])
    return {
        "same_actor": one["actor"] == two["actor"] == one["first"],
        "is_the_handles": one["actor"] == looker._actor_id.hex(),
        "new_task": one["task"] != two["task"],
        "handle": one["current"] == looker,
        "rest": [one[k] for k in ("name", "task_name", "assigned")],
    }


def case_nested_task_context(ray):
    """A nested task has the same job, another task id."""

    @ray.remote
    def inner():
        context = ray.get_runtime_context()
        return context.get_job_id(), context.get_task_id()

    @ray.remote
    def outer():
        context = ray.get_runtime_context()
        return (context.get_job_id(), context.get_task_id()), ray.get(inner.remote())

    outside, inside = ray.get(outer.remote())
    return [outside[0] == inside[0], outside[1] != inside[1]]


def case_old_context_names(ray):
    """The older spelling of the context's fields still works."""

    @ray.remote
    def look():
        context = ray.get_runtime_context()
        return [
            context.job_id.hex() == context.get_job_id(),
            context.node_id.hex() == context.get_node_id(),
            context.task_id.hex() == context.get_task_id(),
            sorted(context.get()),
        ]

    return ray.get(look.remote())


@case(init=TWO)
def case_cluster_resources(ray):
    """The totals of the cluster."""
    total = ray.cluster_resources()
    return {
        "named": {name: total[name] for name in ("CPU", "GPU", "slot")},
        "memory": total["memory"] > 0,
        "object_store_memory": total["object_store_memory"] > 0,
        "node": sum(name.startswith("node:") for name in total) >= 1,
        "floats": all(isinstance(value, float) for value in total.values()),
    }


@case(init=TWO, needs=["one_node"])
def case_nodes(ray):
    """The list of nodes describes this one."""
    [node] = ray.nodes()
    return {
        "alive": node["Alive"],
        "id": [
            len(node["NodeID"]),
            node["NodeID"] == ray.get_runtime_context().get_node_id(),
        ],
        "resources": {name: node["Resources"][name] for name in ("CPU", "GPU", "slot")},
        "keys": [
            key
            for key in (
                "NodeID",
                "Alive",
                "NodeManagerAddress",
                "NodeManagerHostname",
                "NodeManagerPort",
                "ObjectStoreSocketName",
                "RayletSocketName",
                "Resources",
                "Labels",
                "alive",
                "NodeName",
            )
            if key in node
        ],
        "host": node["NodeManagerHostname"] == os.uname().nodename,
        "address": node["NodeManagerAddress"] == ray.util.get_node_ip_address(),
    }


def case_node_labels(ray):
    """Every node carries a label with its id."""
    labels = ray.get_runtime_context().get_node_labels()
    return labels.get("ray.io/node-id") == ray.get_runtime_context().get_node_id()


def case_runtime_env_in_context(ray):
    """A task can see its runtime environment."""

    @ray.remote
    def look():
        return ray.get_runtime_context().runtime_env.get("env_vars")

    changed = look.options(runtime_env={"env_vars": {"LOOK": "here"}})
    return [ray.get(look.remote()), ray.get(changed.remote())]


def case_temp_dir_and_session(ray):
    """The session has a name, the same everywhere, and a directory."""

    @ray.remote
    def look():
        return ray.get_runtime_context().get_session_name()

    context = ray.get_runtime_context()
    return [
        ray.get(look.remote()) == context.get_session_name(),
        context.get_session_name().startswith("session_"),
        os.path.isdir(context.get_temp_dir()),
    ]


if __name__ == "__main__":
    main()

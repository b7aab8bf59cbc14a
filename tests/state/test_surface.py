"""The public names and their parameters, compared with Ray's: ``ray_2_60.json``, made by ``surface.py``.

Each difference has its reason here; a reason whose difference is gone is an error too, so that the list stays true.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
from pathlib import Path

import pytest

hpc_ray = pytest.importorskip("hpc_ray")
if not hasattr(hpc_ray, "init"):
    pytest.skip("needs the built package", allow_module_level=True)

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("surface", HERE / "surface.py")
assert _spec is not None and _spec.loader is not None
surface = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(surface)

# Pattern of "module:name" or "module:Class.member" (the package itself: ":name") → why hpc_ray has it not, or otherwise.
REASONS: dict[str, str] = {
    # names that say why when they are asked for
    ":_config": "settings are init(_system_config=...)",
    ":autoscaler": "the scheduler grants nodes",
    ":internal": "has no public names",
    ":widgets": "drawings of the dashboard",
    "dag:CollectiveOutputNode": "collectives are called in the methods",
    "dag:COLLECTIVE_OPERATION_KEY": "collectives are called in the methods",
    "dag:DAGNODE_TYPE_KEY": "graphs are not written as JSON",
    "dag:DAGOperationFuture": "GPU transports",
    "dag:GPUFuture": "GPU transports",
    "dag:plot": "graphs are not drawn",
    "util:iter": "deprecated in Ray",
    "util:pdb": "needs a port",
    "util:ray_debugpy": "needs a port",
    "util.collective:*_multigpu": "several GPUs of a process, through NCCL",
    "util.collective:register_collective_backend": "other backends are called directly",
    "util.collective.types:*Options": "arguments of Ray's own backends",
    # made by the runtime, never by programs
    "actor:ActorHandle.__init__": "made by remote()",
    "actor:ActorMethod.__init__": "made by the handle",
    "remote_function:RemoteFunction.__init__": "made by @remote",
    "runtime_context:RuntimeContext.__init__": "made by get_runtime_context()",
    ":ObjectRefGenerator.__init__": "made by remote()",
    "dag:FunctionNode.__init__": "made by bind()",
    "dag:ClassNode.__init__": "made by bind()",
    "dag:ClassMethodNode.__init__": "made by bind()",
    # ids
    ":*ID.__init__": "from bytes; Ray's are compiled and tell (*args, **kwargs)",
    ":ObjectRef.__init__": "from bytes; Ray's are compiled and tell (*args, **kwargs)",
    ":*.redis_shard_hash": "there is no Redis",
    ":ActorID.of": "an id is not made from counters",
    ":TaskID.for_*": "an id is not made from counters",
    ":TaskID.actor_id": "not part of a task's id",
    ":Object*.call_site": "not recorded",
    ":Object*.from_random": "an id says who owns the object, so none is random",
    ":Object*.owner_address": "an address here is no protocol message",
    ":Object*.tensor_transport": "everything goes through the object store",
    ":ObjectRefGenerator.a*": "raise NotImplementedError in Ray",
    ":ObjectRefGenerator.close": "raises NotImplementedError in Ray",
    ":ObjectRefGenerator.send": "raises NotImplementedError in Ray",
    ":ObjectRefGenerator.throw": "raises NotImplementedError in Ray",
    # errors
    "exceptions:*.to_bytes": "errors travel as pickles, not as protocol buffers",
    "exceptions:*.from_bytes": "errors travel as pickles, not as protocol buffers",
    "exceptions:*.from_ray_exception": "errors travel as pickles, not as protocol buffers",
    "exceptions:RayTaskError.make_dual_exception_instance": "a step of as_instanceof_cause()",
    "exceptions:ActorDiedError.from_task_error": "a step of the runtime",
    "exceptions:A*Error.__init__": "has a default, or the text is the only argument",
    "exceptions:CrossLanguageError.__init__": "the text is the only argument",
    "exceptions:NodeDiedError.__init__": "the text is the only argument",
    "exceptions:O*Error.__init__": "has defaults, and a field more",
    "exceptions:R*Error.__init__": "has defaults, and other texts as such",
    "exceptions:TaskUnschedulableError.__init__": "has a default",
    # cluster_utils
    "cluster_utils:AutoscalingCluster": "the scheduler grants nodes",
    "cluster_utils:Cluster.__init__": "max_nodes: standby ranks of the MPI world",
    "cluster_utils:Cluster.remaining_processes_alive": "the death of a node's process is the death of the node",
    # graphs
    "dag:*.apply_functional": "how Ray's libraries rewrite graphs",
    "dag:*.apply_recursive": "how Ray's libraries rewrite graphs",
    "dag:*.traverse_and_apply": "how Ray's libraries rewrite graphs",
    "dag:*.type_hint": "of GPU transports",
    "dag:*.get_result_type": "for a web page that draws graphs",
    "dag:InputNode.set_context": "a step of `with`",
    "dag:DAGContext.__init__": "no buffer sizes, no GPU communication; defaults come from the environment when it is made",
    # experimental
    "experimental:*nixl*": "transports of GPU tensors",
    "experimental:*Tensor*": "transports of GPU tensors",
    "experimental:*tensor*": "transports of GPU tensors",
    "experimental:CommunicatorMetadata": "transports of GPU tensors",
    "experimental:RDTManager": "transports of GPU tensors",
    "experimental:set_target_*": "transports of GPU tensors",
    "experimental:set_resource": "removed from Ray; it only raises",
    "experimental.internal_kv:internal_kv_get_gcs_client": "a client of Ray's own protocol",
    "experimental.tqdm_ray:instance": "bars need no manager here",
    # settings of jobs and environments
    "job_config:JobConfig.__init__": "no switch for lineage",
    "job_config:JobConfig.*_logging_config": "logging is given to init()",
    "runtime_env:RuntimeEnv.get_extension": "plug-ins of Ray's agents",
    "runtime_env:RuntimeEnvConfig.*": "no protocol buffers",
    # util
    "util.accelerators:tpu": "no TPUs",
    "util.debug:Suspect": "a detector of leaks in Ray's own tests",
    "util.multiprocessing:Pool.starmap_async": "chunksize, which multiprocessing has",
    "util.placement_group:validate_placement_group": "a step of placement_group()",
    "util.scheduling_strategies:*Exist*.__init__": "says what is wrong with Exists(value)",
    "util.serialization:StandaloneSerializationContext": "a step of Ray's own serialisation",
    "util.state:StateApiClient.*": "takes what the list functions take, instead of objects of Ray's",
    "util.state:list_cluster_events": "nothing records events of the autoscaler",
}


def differences() -> list[str]:
    """What Ray has and hpc_ray has not, or has with other parameters. What hpc_ray has more is no difference."""
    theirs = json.loads((HERE / "ray_2_60.json").read_text())
    ours = surface.surface("hpc_ray", list(theirs))
    found = []
    for module, names in theirs.items():
        if module not in ours:
            found.append(f"{module}:")
            continue
        for name, wanted in names.items():
            have = ours[module].get(name)
            if wanted == "declared only":  # Ray has it not either
                continue
            if have is None:
                found.append(f"{module}:{name}")
            elif isinstance(wanted, dict) and "class" in wanted:
                members = have.get("class", {}) if isinstance(have, dict) else {}
                for member, parameters in wanted["class"].items():
                    if member not in members or members[member] != parameters:
                        found.append(f"{module}:{name}.{member}")
            elif have != wanted:
                found.append(f"{module}:{name}")
    return found


DIFFERENCES = differences()


def test_every_difference_has_a_reason():
    unexplained = [one for one in DIFFERENCES if not any(fnmatch.fnmatchcase(one, pattern) for pattern in REASONS)]
    assert not unexplained, "\n".join(unexplained)


def test_every_reason_has_a_difference():
    idle = [pattern for pattern in REASONS if not fnmatch.filter(DIFFERENCES, pattern)]
    assert not idle, "\n".join(idle)


def test_the_table_is_there():
    """An empty one would agree with everything."""
    theirs = json.loads((HERE / "ray_2_60.json").read_text())
    assert len(theirs) >= 30 and len(theirs[""]) > 40 and "class" in theirs["actor"]["ActorHandle"]

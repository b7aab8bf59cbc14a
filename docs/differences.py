"""Where hpc_ray's public names differ from Ray's, and why: one list for ``docs/ray.md`` and for ``tests/state/test_surface.py``.

What Ray has is in ``tests/state/ray_2_60.json``, made by ``tests/state/surface.py``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

STATE = Path(__file__).parent.parent / "tests" / "state"
TABLE = STATE / "ray_2_60.json"
_spec = importlib.util.spec_from_file_location("surface", STATE / "surface.py")
assert _spec is not None and _spec.loader is not None
_surface: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_surface)

# Pattern of "module:name" or "module:Class.member" (the package itself: ":name") → why hpc_ray has it not, or otherwise.
REASONS: dict[str, str] = {
    # names that say why when they are asked for
    ":_config": "settings are `init(_system_config=...)` or variables HPC_RAY_*",
    ":autoscaler": "`hpc-ray autoscale` adds nodes by Slurm jobs while work waits for them",
    ":internal": "has no public names in Ray either",
    ":widgets": "tables for notebooks; `init(include_dashboard=True)` serves a page",
    "dag:CollectiveOutputNode": "call hpc_ray.util.collective inside the methods",
    "dag:COLLECTIVE_OPERATION_KEY": "call hpc_ray.util.collective inside the methods",
    "dag:DAGNODE_TYPE_KEY": "graphs are not written as JSON",
    "dag:DAGOperationFuture": "GPU transports",
    "dag:GPUFuture": "GPU transports",
    "dag:plot": "graphs are not drawn",
    "util:iter": "deprecated in Ray; use generators, or `util.map_unordered`",
    "util:pdb": "needs a port; use a debugger in the driver, or print",
    "util:ray_debugpy": "needs a port; call debugpy.listen() in the task",
    "util.collective:*_multigpu": "several GPUs of a process, through NCCL",
    "util.collective:register_collective_backend": "call another backend directly in the members",
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
    "experimental:*nixl*": "transports of GPU tensors; tensors go through the object store",
    "experimental:*Tensor*": "transports of GPU tensors; tensors go through the object store",
    "experimental:*tensor*": "transports of GPU tensors; tensors go through the object store",
    "experimental:CommunicatorMetadata": "transports of GPU tensors; tensors go through the object store",
    "experimental:RDTManager": "transports of GPU tensors; tensors go through the object store",
    "experimental:set_target_*": "transports of GPU tensors; tensors go through the object store",
    "experimental:set_resource": "removed from Ray, where it only raises; give resources to init()",
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
}

# The same patterns → what is better than in Ray, in names that programs use with the same meaning.
BETTER: dict[str, str] = {
    ":init": "a session in 0.1 s; no ports, no daemons; `num_nodes=3` makes several nodes on one machine",
    ":shutdown": "nothing is left, also after kill -9",
    "cluster_utils:Cluster": "nodes really talk MPI",
    "util.collective:init_collective_group": "members may be tasks and the driver too; the death of one ends every wait",
    "util.placement_group:placement_group": "amounts below zero are refused (in Ray they can end the raylet)",
    "exceptions:RayTaskError": "what `get` raises has the cause's class, and its `args` too",
    "util.queue:Queue": "Full and Empty tell the counts and the time",
}


def differences() -> list[str]:
    """What Ray has and hpc_ray has not, or has with other parameters. What hpc_ray has more is no difference."""
    theirs = json.loads(TABLE.read_text())
    ours = _surface.surface("hpc_ray", list(theirs))
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

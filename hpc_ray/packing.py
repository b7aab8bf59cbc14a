"""From a runtime environment as it is given to one that travels: files become packages, and what is not said is inherited.

Used by ``init``, remote functions and actors. What it makes is JSON with sorted keys (``protocol.Shape.runtime_env``): equal
environments are equal texts, and share workers.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from hpc_ray.client import context
from hpc_ray.client.client import Client
from hpc_ray.runtime_env import RuntimeEnv

MAX_BYTES = 100_000  # of the text: it travels with every worker that is asked for

_INSTEAD = {
    "conda": "compute nodes rarely reach its channels. Use py_executable='/path/of/the/environment/bin/python', or load a module "
    "in the job script",
    "container": "a worker is forked on its node and shares its memory. Start the whole program in the container (apptainer exec "
    "image ... python program.py)",
    "image_uri": "a worker is forked on its node and shares its memory. Start the whole program in the container (apptainer exec "
    "image ... python program.py)",
    "_nsight": "use py_executable='nsys profile python'",
    "_rocprof_sys": "use py_executable='rocprof-sys-python'",
    "java_jars": "there is no Java here",
}


def check(given: Any) -> RuntimeEnv:
    """The environment, checked.

    Raises:
        TypeError, ValueError: it cannot be, or is not offered here.
    """
    if not isinstance(given, dict):
        raise TypeError(f"runtime_env must be dict or RuntimeEnv, but got: {type(given)}")
    env = RuntimeEnv(**given)
    for name, instead in _INSTEAD.items():
        if name in env:
            raise ValueError(f"runtime_env[{name.lstrip('_')!r}] is not offered by hpc_ray: {instead}.")
    unknown = sorted(name for name, _ in env.plugins())
    if unknown:
        logging.getLogger("hpc_ray").warning("runtime_env does not know %s, which changes nothing", ", ".join(unknown))
    return env


def packed(given: dict[str, Any] | None, client: Client, inherited: str = "") -> str:
    """The environment as text, "" for the plain one. Uploads the packages that the session does not have; a folder is read once
    in a session. Blocks.

    Raises:
        TypeError, ValueError: it cannot be; among these, a package that is too large.
    """
    if not given:
        return inherited
    key = inherited + json.dumps(given, sort_keys=True, default=id)
    known = client.environments.get(key)
    if known is None:
        from hpc_ray.uploads import Upload  # a program without environments does without its imports

        known = client.environments[key] = _merged(inherited, Upload(client).fields(check(given))), dict(given)
    return known[0]


def portable(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a function or class for another process: with packages instead of this node's files."""
    env, client = options.get("runtime_env"), context.client
    if not env or client is None:
        return options
    return {**options, "runtime_env": json.loads(packed(env, client))}


def _merged(inherited: str, own: dict[str, Any]) -> str:
    """Own fields instead of inherited ones; variables one by one."""
    parent = json.loads(inherited) if inherited else {}
    if "worker_process_setup_hook" in own:
        parent.pop("_setup_hook", None)
    if "pip" in own or "uv" in own:  # one of the two
        parent = {name: value for name, value in parent.items() if name not in ("pip", "uv")}
    fields = {**parent, **own}
    if "env_vars" in parent and "env_vars" in own:
        fields["env_vars"] = {**parent["env_vars"], **own["env_vars"]}
    text = json.dumps(fields, sort_keys=True) if fields else ""
    if len(text) > MAX_BYTES:
        raise ValueError(f"this runtime_env has {len(text)} characters; at most {MAX_BYTES} can be. Put long texts into a file.")
    return text

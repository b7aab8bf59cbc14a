"""The older way to connect: ``client(address).namespace(name).env(environment).connect()``; ``init`` does the same."""

from __future__ import annotations

from typing import Any

from hpc_ray.session import Context, init


class ClientBuilder:
    """What to connect to, and as what. Its methods return it, so that calls can be chained.

    Args:
        address: as for ``init``.
    """

    def __init__(self, address: str | None):
        self.address = address
        self._options: dict[str, Any] = {}

    def env(self, env: dict[str, Any]) -> ClientBuilder:
        """The runtime environment of the program's tasks and actors."""
        self._options["runtime_env"] = env
        return self

    def namespace(self, namespace: str) -> ClientBuilder:
        """The namespace of its named actors."""
        self._options["namespace"] = namespace
        return self

    def connect(self) -> Context:
        """``init(address, ...)`` with what was said before. Blocks until connected; raises what ``init`` raises."""
        return init(self.address, **self._options)


def client(address: str | None = None, _deprecation_warn_enabled: bool = True) -> ClientBuilder:
    """A connection to be made: ``client(address).connect()``, the same as ``init(address)``, which new programs call."""
    return ClientBuilder(address)

"""What the driver of a compiled graph tells an actor: the actor's part, as data.

Used by ``dag.compiled_dag_node`` in the driver and by ``worker.graphs`` in the actor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Slot(NamedTuple):
    """Stands for a value of the graph among the arguments of a step."""

    number: int


class Receiver(NamedTuple):
    """Who gets values of a step, and which."""

    address: int
    inbox: bytes
    slots: tuple[int, ...]


class Step(NamedTuple):
    """A method to call."""

    method: str
    args: tuple[Any, ...]  # Slots, and values that are always the same
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]  # the slots among them
    outputs: tuple[int, ...]  # where its values go; several: one item of it to each
    local: frozenset[int]  # outputs that later steps of this actor read
    receivers: list[Receiver]


class Program(NamedTuple):
    """What one actor does in a graph."""

    inbox: bytes
    driver: int  # address; when it dies the graph ends
    inflight: int
    steps: list[Step]


class Host(Protocol):
    """What runs programs in an actor."""

    def open(self, program: Program) -> None: ...

    def close(self, inbox: bytes) -> None: ...


_host: Host | None = None


def install(host: Host) -> None:
    """Make this process ready for programs."""
    global _host
    _host = host


def open_graph(instance: Any, program: Program) -> None:
    """In an actor, by ``__ray_call__``: take part in a graph from now on.

    Raises:
        AttributeError: the actor does not have one of the methods.
    """
    assert _host is not None
    _host.open(program)


def close_graph(instance: Any, inbox: bytes) -> None:
    """In an actor, by ``__ray_call__``: take part no longer; a step that runs has ended before."""
    assert _host is not None
    _host.close(inbox)

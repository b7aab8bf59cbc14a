"""The frame of both roles: handlers, tables, layers."""

import ast
import re
from pathlib import Path

import pytest

from hpc_ray import protocol
from hpc_ray.exceptions import IllegalTransition
from hpc_ray.gcs.actors import ACTOR_STEPS
from hpc_ray.gcs.groups import GROUP_STEPS
from hpc_ray.gcs.state import GcsState
from hpc_ray.machine import History, Machine, TimerFired, death_text, handles
from hpc_ray.raylet.bundles import BUNDLE_STEPS
from hpc_ray.raylet.copies import PULL_STEPS
from hpc_ray.raylet.state import RayletState
from hpc_ray.raylet.workers import WORKER_STEPS

SOURCE = Path(__file__).parents[2] / "hpc_ray"
TABLES = [ACTOR_STEPS, GROUP_STEPS, BUNDLE_STEPS, PULL_STEPS, WORKER_STEPS]


def receivers(message):
    """The right-hand sides of the arrows in a message's docstring."""
    found = set()
    for side in re.findall(r"→\s*([^→;]*)", message.__doc__.split("Answer")[0].split(":")[0]):
        found |= {word for word in ("raylet", "GCS") if re.search(rf"\b{word}s?\b", side)}
    return found


@pytest.mark.parametrize(("role", "state"), [("raylet", RayletState), ("GCS", GcsState)])
def test_each_message_has_its_handler(role, state):
    """PROTO-1, from the docstrings of the messages."""
    wanted = {message for message in protocol.ALL_MESSAGES if role in receivers(message)}
    have = {event for event in state._handlers if event in protocol.ALL_MESSAGES}
    assert {cls.__name__ for cls in wanted - have} == set()
    assert {cls.__name__ for cls in have - wanted} <= {"NodeDied"}  # the link's own notice, at the GCS


def test_a_second_handler_is_refused():
    """MACHINE-3"""
    with pytest.raises(TypeError, match="both handle TimerFired"):

        class Twice(Machine):
            @handles(TimerFired)
            def on_it_too(self, event, source):
                pass


@pytest.mark.parametrize("state", [RayletState, GcsState])
def test_parts_do_not_override_one_another(state):
    seen = {}
    for cls in state.__mro__[:-1]:
        if cls.__name__ in ("Machine", "Part"):
            continue
        for name, value in vars(cls).items():
            if callable(value) and not name.startswith("__"):
                assert name not in seen, f"{cls.__name__}.{name} hides behind {seen[name]}"
                seen[name] = cls.__name__


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_illegal_steps_raise_with_their_story(table):
    """MACHINE-1"""
    history = History()
    history.add("x", 1.0, "was born")
    states = list(table.steps)
    assert set().union(*table.steps.values()) <= set(states)
    for start in states:
        for end in states:
            if end in table.steps[start]:
                table.check("x", start, end, "event", history)
            else:
                with pytest.raises(IllegalTransition, match="was born") as caught:
                    table.check("x", start, end, "event", history)
                assert caught.value.start == start.name
    assert any(not ends for ends in table.steps.values()), "no final state"


def test_roles_do_not_import_one_another():
    allowed = {"raylet": "gcs", "gcs": "raylet"}
    for folder, other in allowed.items():
        for path in (SOURCE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert not node.module.startswith(f"hpc_ray.{other}"), path
                    assert node.module != "hpc_ray._core" or path.name == "server.py", path
                    assert "client" not in node.module and node.module.rpartition(".")[2] != "worker", path


def test_death_texts():
    assert death_text(9) == ("CRASHED", "killed by SIGKILL")
    assert death_text(11 | 0x80) == ("CRASHED", "killed by SIGSEGV")
    assert death_text(1 << 8) == ("CRASHED", "exit code 1")


def test_words_of_the_dead_are_dropped():
    """MACHINE-4"""
    state = GcsState()
    state.remember_gone(77)
    assert state.handle(protocol.Query(1, "nodes", {}), 77, 0.0) == []
    assert len(state.handle(protocol.Query(1, "nodes", {}), 78, 0.0)) == 1

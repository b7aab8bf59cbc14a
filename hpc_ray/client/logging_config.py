"""How a program's own log records look, in the driver and in its tasks and actors: what ``init(logging_config=...)`` takes.

Used by ``session`` in drivers and by the worker, which gets the configuration as JSON with its first lease of a job.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hpc_ray.client import context

ENCODINGS = ("TEXT", "JSON")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}
_TEXT = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"


@dataclass
class LoggingConfig:
    """The root logger of the driver and of all its tasks and actors.

    Each record also says which job, worker, node, actor and task wrote it, and has what the program gave as ``extra``.

    Args:
        encoding: "TEXT", or "JSON": one object a line.
        log_level: a name or a number of the standard library's ``logging``.
        additional_log_standard_attrs: more attributes of ``logging.LogRecord`` to show, by name.

    Raises:
        ValueError: an encoding, a level or an attribute that there is not.
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"Invalid encoding type: {self.encoding}. Valid encoding types are: {list(ENCODINGS)}")
        if isinstance(self.log_level, str) and not isinstance(logging.getLevelName(self.log_level), int):
            raise ValueError(f"Unknown level: {self.log_level!r}; the standard library's logging has DEBUG, INFO, WARNING …")
        for name in self.additional_log_standard_attrs:
            if name not in _STANDARD:
                raise ValueError(
                    f"Unknown python logging standard attribute: {name}. The valid attributes are: {sorted(_STANDARD)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LoggingConfig:
        """From a dict of fields; what is no field is left out."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in d.items() if name in known})


class _Formatter(logging.Formatter):
    def __init__(self, config: LoggingConfig):
        super().__init__(_TEXT)
        self._as_json = config.encoding == "JSON"
        self._additional = config.additional_log_standard_attrs

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {}
        if self._as_json:
            found = {
                "asctime": self.formatTime(record),
                "levelname": record.levelname,
                "message": record.getMessage(),
                "filename": record.filename,
                "lineno": record.lineno,
                "process": record.process,
            }
            if record.exc_info:
                found["exc_text"] = self.formatException(record.exc_info)
        for name in self._additional:
            found[name] = getattr(record, name, None)
        found.update((name, value) for name, value in vars(record).items() if name not in _STANDARD)
        found.update(_who())
        found["timestamp_ns"] = int(record.created * 1e9)
        if self._as_json:
            return json.dumps(found, default=repr)
        return super().format(record) + "".join(f" {name}={value}" for name, value in found.items())


def _who() -> dict[str, str]:
    """The ids and names of the code that logs; what does not apply is left out."""
    client = context.client
    if client is None or client.welcome is None:
        return {}
    found = {"job_id": client.job_id.hex(), "worker_id": client.worker_id.hex(), "node_id": client.welcome.node_id.hex()}
    actor, task = context.actor, context.task.get()
    if actor is not None:
        found["actor_id"] = actor.spec.actor_id.hex()
    if task is not None:
        found |= {"task_id": task.task_id.hex(), "task_name": task.name, "task_func_name": task.function_name}
    if actor is not None and actor.spec.name:
        found["actor_name"] = actor.spec.name
    return found


_installed: tuple[logging.Handler, int] | None = None  # and the level that the root logger had


def use_logging(text: str) -> None:
    """Make records of this process look as ``text`` says, a LoggingConfig as JSON; "" gives the root logger back."""
    global _installed
    if text == context.logging:
        return
    context.logging = text
    root = logging.getLogger()
    if _installed is not None:
        handler, level = _installed
        root.removeHandler(handler)
        root.setLevel(level)
        _installed = None
    if text:
        config = LoggingConfig.from_dict(json.loads(text))
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter(config))
        _installed = handler, root.level
        root.addHandler(handler)
        root.setLevel(config.log_level)

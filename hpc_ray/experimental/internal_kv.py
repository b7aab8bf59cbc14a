"""The key-value table of the GCS. Keys and values are bytes; text is taken as UTF-8. Each call asks the GCS, and blocks."""

from __future__ import annotations

from typing import Any

from hpc_ray.ids import GCS_ADDRESS
from hpc_ray.session import ensure_connected, is_initialized

Text = str | bytes


def _bytes(text: Text) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    assert isinstance(text, bytes), f"keys, values and namespaces are str or bytes, not {type(text).__name__}"
    return text


def _ask(name: str, namespace: Text | None, **arguments: Any) -> Any:
    return ensure_connected().query(GCS_ADDRESS, name, namespace=_bytes(namespace or b""), **arguments)


def _internal_kv_initialized() -> bool:
    """Whether there is a session, and with it a table."""
    return is_initialized()


def _internal_kv_get(key: Text, *, namespace: Text | None = None) -> bytes | None:
    """The value of a key; None if it is not there."""
    return _ask("kv_get", namespace, key=_bytes(key))


def _internal_kv_exists(key: Text, *, namespace: Text | None = None) -> bool:
    return _ask("kv_exists", namespace, key=_bytes(key))


def _internal_kv_put(key: Text, value: Text, overwrite: bool = True, *, namespace: Text | None = None) -> bool:
    """Set a key; whether it was there before. Without ``overwrite`` one that was there keeps its value."""
    return not _ask("kv_put", namespace, key=_bytes(key), value=_bytes(value), overwrite=overwrite)


def _internal_kv_del(key: Text, *, del_by_prefix: bool = False, namespace: Text | None = None) -> int:
    """Delete a key, or all that begin with it; how many there were."""
    return _ask("kv_del", namespace, key=_bytes(key), by_prefix=del_by_prefix)


def _internal_kv_list(prefix: Text, *, namespace: Text | None = None) -> list[bytes]:
    """The keys that begin with ``prefix``."""
    return _ask("kv_keys", namespace, prefix=_bytes(prefix))


def _internal_kv_reset() -> None:
    """Without effect: the table is reached through the session."""

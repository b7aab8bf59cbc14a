"""The key-value table. The part of ``GcsState`` that keeps it.

KEY-1 (durable): a put or delete is journalled before it is answered.
"""

from __future__ import annotations

from hpc_ray.gcs.part import Part


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else bytes(text)


class Keys(Part):
    """Keys and values are bytes; text is taken as UTF-8."""

    def init_keys(self) -> None:
        self.keys: dict[bytes, dict[bytes, bytes]] = {}

    def query_kv_put(self, key: bytes, value: bytes, namespace: bytes = b"", overwrite: bool = True) -> bool:
        """True if the key is new."""
        key, namespace = _bytes(key), _bytes(namespace)
        table = self.keys.setdefault(namespace, {})
        new = key not in table
        if new or overwrite:
            table[key] = _bytes(value)
            self.journal("key", _journal_key(namespace, key), table[key])
        return new

    def query_kv_get(self, key: bytes, namespace: bytes = b"") -> bytes | None:
        return self.keys.get(_bytes(namespace), {}).get(_bytes(key))

    def query_kv_multi_get(self, keys: list[bytes], namespace: bytes = b"") -> dict[bytes, bytes]:
        table = self.keys.get(_bytes(namespace), {})
        return {key: table[key] for key in map(_bytes, keys) if key in table}

    def query_kv_exists(self, key: bytes, namespace: bytes = b"") -> bool:
        return _bytes(key) in self.keys.get(_bytes(namespace), {})

    def query_kv_keys(self, prefix: bytes = b"", namespace: bytes = b"") -> list[bytes]:
        prefix = _bytes(prefix)
        return [key for key in self.keys.get(_bytes(namespace), {}) if key.startswith(prefix)]

    def query_kv_del(self, key: bytes, namespace: bytes = b"", by_prefix: bool = False) -> int:
        """How many there were."""
        key, namespace = _bytes(key), _bytes(namespace)
        table = self.keys.get(namespace, {})
        doomed = [name for name in table if name.startswith(key)] if by_prefix else [key] if key in table else []
        for name in doomed:
            del table[name]
            self.journal("key", _journal_key(namespace, name), None)
        return len(doomed)

    def restore_key(self, journal_key: bytes, value: bytes) -> None:
        length = int.from_bytes(journal_key[:4], "big")
        namespace, key = journal_key[4 : 4 + length], journal_key[4 + length :]
        self.keys.setdefault(namespace, {})[key] = value


def _journal_key(namespace: bytes, key: bytes) -> bytes:
    return len(namespace).to_bytes(4, "big") + namespace + key

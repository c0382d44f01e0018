"""Key material that cannot reach a log by accident."""

from __future__ import annotations

import hmac
from typing import Final


class Secret:
    """Bytes that are compared in constant time and never shown by `repr`, `str` or `format`."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value: Final = bytes(value)

    def reveal(self) -> bytes:
        """The bytes themselves; the one place where they leave."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"


NO_SECRET: Final = Secret(b"")

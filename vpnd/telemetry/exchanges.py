"""How many IKE messages of each exchange came and went, for the daemon and for each connection (strongSwan's `swanctl --counters`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from vpnd.ike.iana import Exchange

_EXCHANGES: Final = {
    Exchange.IKE_SA_INIT: "ike-init",
    Exchange.IKE_AUTH: "ike-auth",
    Exchange.CREATE_CHILD_SA: "create-child",
    Exchange.INFORMATIONAL: "info",
}
REKEYINGS: Final = ("ike-rekey-init", "ike-rekey-resp", "child-rekey")
NAMES: Final = (
    *REKEYINGS,
    "invalid",
    "invalid-spi",
    *(f"{exchange}-{way}-{kind}" for exchange in _EXCHANGES.values() for way in ("in", "out") for kind in ("req", "resp")),
)
"""strongSwan's, in its order."""


class ExchangeCounters:
    """A message that goes out counts once, however often and in however many pieces it is sent; one that comes in, once it is found to be the peer's."""

    def __init__(self) -> None:
        self._all: Counter[str] = Counter()
        self._of: dict[str, Counter[str]] = {}  # by connection; bounded by those that are loaded

    def message(self, connection: str, exchange: int, *, incoming: bool, response: bool) -> None:
        name = _EXCHANGES.get(Exchange(exchange)) if exchange in _EXCHANGES else None
        if name is not None:
            self.add(f"{name}-{'in' if incoming else 'out'}-{'resp' if response else 'req'}", connection)

    def add(self, name: str, connection: str | None = None) -> None:
        """`connection` None: it is nobody's."""
        self._all[name] += 1
        if connection is not None:
            self._of.setdefault(connection, Counter())[name] += 1

    def everything(self) -> Mapping[str, int]:
        return {name: self._all[name] for name in NAMES}

    def of(self, connection: str) -> Mapping[str, int] | None:
        """None while nothing was counted for it."""
        counted = self._of.get(connection)
        return None if counted is None else {name: counted[name] for name in NAMES}

    @property
    def connections(self) -> list[str]:
        return list(self._of)

    def reset(self, connection: str | None = None) -> None:
        """Of one connection, or else of the daemon."""
        (self._all if connection is None else self._of.get(connection, Counter())).clear()

    def forget(self, connection: str) -> None:
        """It is unloaded."""
        self._of.pop(connection, None)

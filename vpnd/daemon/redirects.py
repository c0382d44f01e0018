"""Where gateways sent us (RFC 5685): the next IKE SA of a connection goes there, but not round and round."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from vpnd.ike.gateway_id import GatewayId

MAX_REDIRECTS: Final = 5  # of one connection within LOOP_PERIOD, both as RFC 5685 section 7 suggests
LOOP_PERIOD: Final = 300.0  # s


@dataclass(frozen=True, slots=True)
class Redirection:
    gateway: GatewayId
    origin: GatewayId  # who sent us


class Redirects:
    """By connection name. Only authenticated gateways, and those whom we asked ourselves, make entries."""

    def __init__(self) -> None:
        self._next: dict[str, Redirection] = {}
        self._recent: dict[str, deque[float]] = {}

    def admits(self, connection: str, now: float) -> bool:
        """Whether it may be sent on once more."""
        recent = self._recent.get(connection, deque())
        while recent and now - recent[0] >= LOOP_PERIOD:
            recent.popleft()
        return len(recent) < MAX_REDIRECTS

    def sent(self, connection: str, redirection: Redirection, now: float) -> None:
        self._next[connection] = redirection
        self._recent.setdefault(connection, deque(maxlen=MAX_REDIRECTS)).append(now)

    def next(self, connection: str) -> Redirection | None:
        return self._next.get(connection)

    def forget(self, connection: str) -> None:
        """It is configured no more."""
        self._next.pop(connection, None)
        self._recent.pop(connection, None)

    def take(self, connection: str) -> Redirection | None:
        """For an IKE SA that begins now; should that fail, the next one goes to the configured gateway again."""
        return self._next.pop(connection, None)

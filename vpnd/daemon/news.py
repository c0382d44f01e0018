"""What the daemon says: one line for the log and for everybody who listens on the control socket."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from vpnd.control.backend import DaemonEvent, LogLine
from vpnd.daemon.entry import Entry

log = structlog.get_logger("ike")


class News:
    """Its subscribers hear every event until they leave."""

    def __init__(self) -> None:
        self._subscribers: dict[int, Callable[[DaemonEvent], None]] = {}
        self._subscription = 0

    def subscribe(self, listener: Callable[[DaemonEvent], None]) -> Callable[[], None]:
        """Call what it returns to leave."""
        self._subscription += 1
        ticket = self._subscription
        self._subscribers[ticket] = listener
        return lambda: self._subscribers.pop(ticket, None) and None

    def publish(self, event: DaemonEvent) -> None:
        for listener in list(self._subscribers.values()):
            listener(event)

    def say(self, text: str, entry: Entry | None = None, *, group: str = "IKE", level: int = 1, warning: bool = False) -> None:
        name, number = (entry.sa.connection.name, entry.sa.unique_id) if entry else (None, None)
        (log.warning if warning else log.info)(text, **({"connection": name, "ike": number} if entry else {}))
        self.publish(LogLine(group, level, name, number, text))

"""What is wrong with a peer's message, and what to tell the peer."""

from __future__ import annotations

from vpnd.ike.iana import NotifyType


class MalformedMessage(Exception):
    """A peer's message breaks the syntax. `notify` and `data` are the notification that says so on the wire.

    `field` names the place (`SA.proposal.length`), `detail` what was wrong with it.
    """

    def __init__(self, field: str, detail: str, notify: int = NotifyType.INVALID_SYNTAX, data: bytes = b"") -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail
        self.notify = notify
        self.data = data


class IntegrityFailure(Exception):
    """An encrypted payload does not verify: the message is dropped without an answer (RFC 7296 section 2.21)."""

"""Message ids of an IKE SA: a window of one in each direction (RFC 7296 sections 2.1 to 2.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernel_shim.model import Endpoint
from vpnd.ike.context import Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.fragments import Outgoing


@dataclass(slots=True)
class Outstanding:
    """A request of ours that the peer has not answered. Times are monotonic seconds."""

    message_id: int
    exchange: int
    message: Outgoing
    plain: bool
    tries: int
    schedule: Retransmission
    next_at: float
    copies: int = 0
    doubt: tuple[Reason, str] | None = None  # an unprotected error came: what it would mean

    @classmethod
    def sent(
        cls, message_id: int, exchange: int, message: Outgoing, *, plain: bool, tries: int | None, schedule: Retransmission, now: float, random: float
    ) -> Outstanding:
        tries = schedule.tries if tries is None else min(tries, schedule.tries)
        return cls(message_id, exchange, message, plain, tries, schedule, now + schedule.delay(0, random))

    def copy(self, now: float, random: float) -> bool:
        """At `next_at`: whether to send another copy; if not, the peer is silent."""
        if self.copies >= self.tries:
            return False
        self.copies += 1
        self.next_at = now + self.schedule.delay(self.copies, random)
        return True

    def question(self, reason: Reason, detail: str, grace: float, now: float) -> None:
        """An answer that anybody may have sent says that it is over: believed once `grace` seconds brought no better one."""
        if self.doubt is None:
            self.doubt = reason, detail
            self.next_at = min(self.next_at, now + grace)


@dataclass(slots=True)
class Inbox:
    """The peer's requests: the next id, and the last answer with the request that it answers (of one in fragments: its first)."""

    expected: int = 0
    request: bytes = field(default=b"", repr=False)
    response: Outgoing = field(default_factory=Outgoing)
    repeats: int = 0  # of the last request

    def is_repeated(self, message_id: int, datagram: bytes) -> bool:
        """RFC 7296 section 2.1: a retransmission has the same octets; its answer then has, too. Of fragments only the first counts (RFC 7383 section 2.6.1)."""
        return message_id == self.expected - 1 and bool(self.response) and datagram == self.request

    def answered(self, datagram: bytes, response: Outgoing) -> None:
        self.request, self.response = datagram, response
        self.expected += 1
        self.repeats = 0


@dataclass(slots=True)
class Serving:
    """A request of the peer's that is being worked at."""

    datagram: bytes = field(repr=False)  # of one in fragments: the first
    message_id: int
    exchange: int
    local: Endpoint
    remote: Endpoint
    piece: int = 0  # octets of a fragment of it; 0: it came whole

"""Message ids of an IKE SA: a window of one in each direction (RFC 7296 sections 2.1 to 2.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernel_shim.model import Endpoint
from vpnd.ike.context import Retransmission
from vpnd.ike.effects import Reason


@dataclass(slots=True)
class Outstanding:
    """A request of ours that the peer has not answered. Times are monotonic seconds."""

    message_id: int
    exchange: int
    datagram: bytes = field(repr=False)
    plain: bool
    tries: int
    schedule: Retransmission
    next_at: float
    copies: int = 0
    doubt: tuple[Reason, str] | None = None  # an unprotected error came: what it would mean

    @classmethod
    def sent(
        cls, message_id: int, exchange: int, datagram: bytes, *, plain: bool, tries: int | None, schedule: Retransmission, now: float, random: float
    ) -> Outstanding:
        tries = schedule.tries if tries is None else min(tries, schedule.tries)
        return cls(message_id, exchange, datagram, plain, tries, schedule, now + schedule.delay(0, random))

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
    """The peer's requests: the next id, and the last answer with the request that it answers."""

    expected: int = 0
    request: bytes = field(default=b"", repr=False)
    response: bytes = field(default=b"", repr=False)

    def repeats(self, message_id: int, datagram: bytes) -> bool:
        """RFC 7296 section 2.1: a retransmission has the same octets; its answer then has, too."""
        return message_id == self.expected - 1 and bool(self.response) and datagram == self.request

    def answered(self, datagram: bytes, response: bytes) -> None:
        self.request, self.response = datagram, response
        self.expected += 1


@dataclass(slots=True)
class Serving:
    """A request of the peer's that is being worked at."""

    datagram: bytes = field(repr=False)
    message_id: int
    exchange: int
    local: Endpoint
    remote: Endpoint

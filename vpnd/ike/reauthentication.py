"""When the peers are to prove anew who they are (RFC 7296 section 2.8.3), and how a responder says so (RFC 4478)."""

from __future__ import annotations

from typing import Final

from vpnd.ike.iana import NotifyType
from vpnd.ike.session import REKEY_AGAIN, Session
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload

SHORTEST: Final = 60.0  # s; a peer that gives us less time does not get more of ours
LIFETIME_LENGTH: Final = 4  # octets; RFC 4478 section 3
MARGIN: Final = 0.1  # of the peer's time, within which we are to be done


def plan(session: Session) -> None:
    """Once both sides are authenticated: when we are to begin, and when the IKE SA ends if nobody did."""
    connection = session.connection
    if not connection.reauth_time:
        return
    end = session.now + connection.reauth_time + connection.over_time
    session.reauth_end = end
    if session.initiator:
        session.reauth_at = session.now + max(0.0, connection.reauth_time - connection.rand_time * session.random())
    else:
        # RFC 4478 section 1: it is the initiator's to begin; should it not, we do
        session.reauth_at = end - connection.over_time / 2


def lifetime_payloads(session: Session) -> tuple[NotifyPayload, ...]:
    """A responder's AUTH_LIFETIME (RFC 4478 section 3), for the last IKE_AUTH answer: until we end the IKE SA."""
    if session.reauth_end is None:
        return ()
    return (NotifyPayload(NotifyType.AUTH_LIFETIME, int(session.reauth_end - session.now).to_bytes(LIFETIME_LENGTH, "big")),)


def heed(session: Session, message: Message) -> None:
    """Begin before the time that the responder gives us is over."""
    notify = message.notify(NotifyType.AUTH_LIFETIME)
    if notify is None or len(notify.data) != LIFETIME_LENGTH or not session.asked_first:
        return
    seconds = max(SHORTEST, float(int.from_bytes(notify.data, "big")))
    due = session.now + seconds * (1 - MARGIN * (0.5 + session.random() / 2))
    session.reauth_at = due if session.reauth_at is None else min(session.reauth_at, due)


def again(session: Session) -> None:
    """The reauthentication came to nothing; the IKE SA stands until it ends."""
    session.reauth_at = session.now + REKEY_AGAIN * (1 + session.random())

"""Post-quantum pre-shared keys (RFC 8784): a secret mixed into the keys of an IKE SA once it is known who the peer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from vpnd.ike.authenticate import NoCredentials, PeerRefused
from vpnd.ike.iana import NotifyType
from vpnd.ike.identity import Identity
from vpnd.ike.session import Session
from vpnd.ike.steps import IkeCrypto
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import AuthPayload, NotifyPayload

ID_FIXED: Final = 2  # RFC 8784 section 5.1: the PPK_ID is what an administrator configured
MAX_SHOWN: Final = 64  # octets of a peer's PPK_ID in a log line


@dataclass(frozen=True, slots=True)
class Ppk:
    """A PPK that both sides may have. `keys` are those of the IKE SA with it mixed in."""

    id: bytes
    keys: IkeCrypto = field(repr=False)


# Initiator


def of_initiator(session: Session) -> Ppk | None:
    """The PPK that we propose. Raises NoCredentials when the connection demands one and there is none."""
    connection = session.connection
    secret = None
    why = "the peer knows no post-quantum pre-shared keys"
    if session.peer_knows_ppk and connection.ppk_id is not None:
        secret = session.context.credentials.ppk(connection.ppk_id.data)
        why = f"no post-quantum pre-shared key for '{connection.ppk_id}'"
    if secret is not None and connection.ppk_id is not None:
        return Ppk(connection.ppk_id.data, session.keys.with_ppk(secret))
    if connection.ppk_required:
        raise NoCredentials(f"{why}, and the connection requires one")
    return None


def request_payloads(ppk: Ppk, without: AuthPayload | None) -> list[NotifyPayload]:
    """RFC 8784 section 3: which PPK AUTH was made with, and, where the peer need not have it, what AUTH would be `without` it."""
    payloads = [NotifyPayload(NotifyType.PPK_IDENTITY, bytes((ID_FIXED,)) + ppk.id)]
    return [*payloads, NotifyPayload(NotifyType.NO_PPK_AUTH, without.data)] if without is not None else payloads


def taken(session: Session, ppk: Ppk | None, response: Message) -> Ppk | None:
    """What the responder made of our proposal. Raises PeerRefused when it goes without though the connection demands a PPK."""
    used = ppk if response.notify(NotifyType.PPK_IDENTITY) is not None else None
    if used is None and session.connection.ppk_required:
        raise PeerRefused("the peer does not use the post-quantum pre-shared key that the connection requires")
    return used


# Responder


def of_responder(session: Session, request: Message, auth: AuthPayload) -> tuple[Ppk | None, AuthPayload]:
    """The PPK that the initiator used, if we have it, and the AUTH payload to check. `session.connection` must be chosen. Raises PeerRefused.

    RFC 8784 section 3 has the cases as a table.
    """
    required = session.connection.ppk_required
    proposed = request.notify(NotifyType.PPK_IDENTITY) if session.peer_knows_ppk else None
    if proposed is None or len(proposed.data) < 2 or proposed.data[0] != ID_FIXED:
        if required:
            raise PeerRefused("the peer proposes no post-quantum pre-shared key, and the connection requires one")
        # of a type that we do not know: only the AUTH without it can be checked
        return None, _without(request, auth) if proposed is not None else auth
    ppk_id = proposed.data[1:]
    wanted = session.connection.ppk_id
    fits = wanted is None or Identity(wanted.type, ppk_id).matches(wanted)
    secret = session.context.credentials.ppk(ppk_id) if fits else None
    if secret is not None:
        return Ppk(ppk_id, session.keys.with_ppk(secret)), auth
    if required:
        raise PeerRefused(f"no post-quantum pre-shared key for '{_shown(ppk_id)}', and the connection requires one")
    return None, _without(request, auth)


def _without(request: Message, auth: AuthPayload) -> AuthPayload:
    alternative = request.notify(NotifyType.NO_PPK_AUTH)
    if alternative is None:
        raise PeerRefused("the peer requires a post-quantum pre-shared key that we do not have")
    return AuthPayload(auth.method, alternative.data)


def _shown(ppk_id: bytes) -> str:
    return ascii(ppk_id[:MAX_SHOWN].decode("ascii", "backslashreplace"))[1:-1]


# Both


def apply(session: Session, ppk: Ppk | None) -> None:
    """RFC 8784 section 3: from now on, CHILD_SAs included, the keys are those with the PPK."""
    if ppk is not None:
        session.crypto, session.ppk = ppk.keys, True

"""The vocabulary in which exchanges are written.

An exchange of ours is a generator that reads top-down. It yields what it waits for (`AllocateSpi`, `Ask`, `KeepWaiting`, `Tell`)
and is resumed with the answer. `vpnd.ike.sa` drives it: message ids, retransmissions and time-outs are no concern of it.
An exchange of the peer's is a generator too; it may wait for an SPI and returns a `Response`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self, TypeVar

from kernel_shim.model import SaId, Spi
from kernel_shim.secret import Secret
from vpnd.ike.context import ChildRequest
from vpnd.ike.crypto.sk import SkCipher
from vpnd.ike.effects import AllocateSpi, IkeClosed, Reason
from vpnd.ike.iana import FIRST_STATUS_NOTIFY, NotifyType, name_of
from vpnd.ike.keymat import IkeKeys, IkeSuite, with_ppk
from vpnd.ike.state import Child
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload, Payload

if TYPE_CHECKING:
    from vpnd.ike.session import Session

T = TypeVar("T")

NONCE_LENGTH: Final = 32  # octets; RFC 7296 section 2.10 asks for half the PRF's key at least


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request and wait for the peer's answer. `plain` is a whole message to go out unprotected (IKE_SA_INIT)."""

    exchange: int
    payloads: Sequence[Payload] = ()
    plain: bytes | None = field(default=None, repr=False)
    tries: int | None = None  # copies before the peer counts as silent; None: as the settings say


@dataclass(frozen=True, slots=True)
class KeepWaiting:
    """The answer counts for nothing, since anybody may have sent it; unless a better one comes soon, it was `reason`."""

    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a request whose answer nobody waits for, because the IKE SA ends here."""

    exchange: int
    payloads: Sequence[Payload]


Steps = Generator["AllocateSpi | Ask | KeepWaiting | Tell", object, T]


@dataclass(frozen=True, slots=True)
class Rival:
    """The peer's rekeying of the SA that we are rekeying ourselves. Of the four nonces the lowest loses (RFC 7296 sections 2.8.1 and 2.8.2)."""

    lowest: bytes = field(repr=False)
    child_id: int = 0
    ike: Session | None = None


CONFIRM: Final = "CHILD_CONFIRM"  # asks whether the peer has our answer, which made a CHILD_SA


@dataclass(slots=True, eq=False)
class Task:
    """An exchange of ours; `begin` starts it on the IKE SA that is current then.

    `child` is the CHILD_SA that it is to bring up, until that is settled; `target` the id of the one that it rekeys or deletes.
    """

    name: str
    begin: Callable[[Session, Task], Steps[None]] = field(repr=False)
    child: ChildRequest | None = None
    target: int = 0
    steps: Steps[None] | None = field(default=None, repr=False)
    asked: bool = False  # its request is on the wire
    attempts: int = 0  # that ended with TEMPORARY_FAILURE
    answered: bool = False  # put off until the peer has our last answer
    rival: Rival | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """Our answer. `install` comes up around it: inbound SA, answer, outbound SA. `fallback` is the answer if the kernel refuses the inbound one."""

    payloads: tuple[Payload, ...] = ()
    install: Child | None = None
    fallback: tuple[Payload, ...] = ()
    close: IkeClosed | None = None
    keys: IkeCrypto | None = field(default=None, repr=False)  # of all messages after it


@dataclass(frozen=True, slots=True)
class IkeCrypto:
    suite: IkeSuite
    keys: IkeKeys = field(repr=False)
    send: SkCipher = field(repr=False)
    receive: SkCipher = field(repr=False)

    @classmethod
    def of(cls, suite: IkeSuite, keys: IkeKeys, initiator: bool) -> IkeCrypto:
        send, receive = keys.ciphers(suite, initiator)
        return cls(suite, keys, send, receive)

    def with_ppk(self, ppk: Secret) -> Self:
        """RFC 8784 section 3; messages are protected as before."""
        return replace(self, keys=with_ppk(self.suite.prf, self.keys, ppk))


def allocate(session: Session, request: AllocateSpi) -> Steps[SaId | None]:
    """Wait for an inbound SPI; None when the kernel gives none. It is held until it is installed or given back."""
    spi = yield request
    return session.hold(SaId(request.local.address, Spi(spi))) if isinstance(spi, int) else None


def ask(request: Ask | KeepWaiting) -> Steps[Message]:
    """Wait for the peer's answer."""
    message = yield request
    assert isinstance(message, Message)
    return message


def first_error(message: Message) -> NotifyPayload | None:
    """RFC 7296 section 3.10.1: the first notification of an error; an unrecognized one counts as an error too."""
    return next((payload for payload in message.payloads if isinstance(payload, NotifyPayload) and payload.type < FIRST_STATUS_NOTIFY), None)


ERROR_REASONS: Final = {
    NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD: Reason.UNSUPPORTED_CRITICAL_PAYLOAD,
    NotifyType.INVALID_SYNTAX: Reason.INVALID_SYNTAX,
    NotifyType.NO_PROPOSAL_CHOSEN: Reason.NO_PROPOSAL_CHOSEN,
    NotifyType.INVALID_KE_PAYLOAD: Reason.INVALID_KE_PAYLOAD,
    NotifyType.AUTHENTICATION_FAILED: Reason.PEER_AUTHENTICATION_FAILED,
    NotifyType.NO_ADDITIONAL_SAS: Reason.NO_ADDITIONAL_SAS,
    NotifyType.TS_UNACCEPTABLE: Reason.TS_UNACCEPTABLE,
    NotifyType.TEMPORARY_FAILURE: Reason.TEMPORARY_FAILURE,
    NotifyType.CHILD_SA_NOT_FOUND: Reason.PEER_DELETED,
}


def error_name(error: NotifyPayload) -> str:
    """For a log line: the notification's name in RFC 7296."""
    return name_of(NotifyType, error.type)


def reason_of(error: NotifyPayload) -> Reason:
    return next((reason for notify, reason in ERROR_REASONS.items() if notify == error.type), Reason.PEER_ERROR)

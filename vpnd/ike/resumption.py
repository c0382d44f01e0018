"""Tickets for session resumption (RFC 5723): a responder's sealed memory of an IKE SA, kept by its initiator.

A `TicketOffice` seals and opens tickets under keys that rotate and live in memory only; a `Wallet` keeps those that we were given.
A ticket is good for one IKE SA. Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kernel_shim.secret import Secret
from vpnd.ike.crypto import Entropy
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.payloads import SaPayload
from vpnd.ike.wire.proposals import decode_sa, encode_sa
from vpnd.ike.wire.reader import Reader, Writer

LIFETIME: Final = 8 * 3600.0  # s of a ticket, and of a key that seals tickets: one opens for one to two of it
MAX_AGE: Final = 24 * 3600.0  # s since the peers last proved who they are; resumption after resumption does not put it off
MAX_SPENT: Final = 524_288  # tickets that must not be taken again, some 170 octets each: for 100,000 IKE SAs rekeyed every 2 hours; beyond, all are void
CROWD: Final = 1024  # of these, from which on expired ones are looked for
MAX_TICKETS: Final = 10_000  # that we keep, one a connection
MAX_TICKET: Final = 4096  # octets of a ticket that we keep

NEVER: Final = 1e12  # s
KEY_LENGTH: Final = 32
NONCE_LENGTH: Final = 12
ID_LENGTH: Final = 16


@dataclass(frozen=True, slots=True)
class Resumable:
    """What an IKE SA leaves behind for its successor. `d` is its SK_d, `authenticated_at` when the peers last proved who they are.

    `basis` digests what that proof rested upon; with anything else it is worth nothing. `proof_ends`: a certificate in it is no longer valid then.
    """

    connection: str
    local_id: Identity
    remote_id: Identity
    proposal: Proposal
    d: Secret
    ppk: bool
    authenticated_at: float
    expires: float
    basis: bytes = field(default=b"", repr=False)
    proof_ends: float = NEVER
    id: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Of a responder, for us: `data` is opaque."""

    data: bytes = field(repr=False)
    state: Resumable


class Wallet:
    """The tickets that we may use, by connection."""

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}

    def keep(self, ticket: Ticket) -> None:
        if len(ticket.data) <= MAX_TICKET:
            self._tickets.pop(ticket.state.connection, None)
            self._tickets[ticket.state.connection] = ticket
            while len(self._tickets) > MAX_TICKETS:
                del self._tickets[next(iter(self._tickets))]

    def take(self, connection: str, now: float) -> Ticket | None:
        """For one attempt: it is not given again."""
        ticket = self._tickets.pop(connection, None)
        return ticket if ticket is not None and now < ticket.state.expires else None

    def drop(self, connection: str) -> None:
        self._tickets.pop(connection, None)


class TicketOffice:
    """Makes tickets without memory of them, and remembers those that were used."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._generation = 0
        self._since: float | None = None  # the first use
        self._current = AESGCM(entropy(KEY_LENGTH))
        self._previous: AESGCM | None = None
        self._spent: dict[bytes, float] = {}  # id: when it would have expired
        self._crowded = CROWD  # how many of them, before those that have expired are forgotten

    def seal(self, state: Resumable, now: float, ticket_id: bytes = b"") -> tuple[bytes, bytes]:
        """(id, ticket). The id goes into it in place of that of `state`; all tickets of one IKE SA have the same, and are spent together."""
        self._rotate(now)
        ticket_id, nonce = ticket_id or self._entropy(ID_LENGTH), self._entropy(NONCE_LENGTH)
        generation = self._generation.to_bytes(4, "big")
        return ticket_id, generation + nonce + self._current.encrypt(nonce, _encode(state, ticket_id), generation)

    def open(self, ticket: bytes, now: float) -> Resumable | None:
        """None for what is not ours, too old or used."""
        self._rotate(now)
        generation, nonce, sealed = ticket[:4], ticket[4 : 4 + NONCE_LENGTH], ticket[4 + NONCE_LENGTH :]
        number = int.from_bytes(generation, "big")
        key = self._current if number == self._generation else self._previous if number == self._generation - 1 else None
        if key is None or len(ticket) > MAX_TICKET or len(nonce) < NONCE_LENGTH:
            return None
        try:
            state = _decode(key.decrypt(nonce, sealed, generation))
        except (InvalidTag, MalformedMessage, ValueError):
            return None
        return state if now < state.expires and state.id not in self._spent else None

    def spend(self, ticket_id: bytes, now: float) -> bool:
        """From now on it does not open. False when that was so before."""
        if ticket_id in self._spent:
            return False
        if len(self._spent) >= min(self._crowded, MAX_SPENT):
            self._spent = {each: expires for each, expires in self._spent.items() if now < expires}
            self._crowded = max(CROWD, 2 * len(self._spent))
        if len(self._spent) >= MAX_SPENT:
            self._change(now)
            self._change(now)
            self._spent.clear()
        self._spent[ticket_id] = now + LIFETIME
        return True

    def _rotate(self, now: float) -> None:
        if self._since is None:
            self._since = now
        if now - self._since >= LIFETIME:
            stale = now - self._since >= 2 * LIFETIME
            self._change(now)
            if stale:
                self._previous = None

    def _change(self, now: float) -> None:
        self._previous, self._current = self._current, AESGCM(self._entropy(KEY_LENGTH))
        self._generation += 1
        self._since = now


class Resumption:
    """Of one daemon: the tickets that it gives and those that it was given."""

    def __init__(self, entropy: Entropy) -> None:
        self.office = TicketOffice(entropy)
        self.wallet = Wallet()


def _encode(state: Resumable, ticket_id: bytes) -> bytes:
    writer = Writer()
    writer.put(ticket_id)
    for moment in (state.authenticated_at, state.expires, state.proof_ends):
        writer.put(int(moment * 1000).to_bytes(8, "big"))
    writer.u8(state.ppk)
    for value in (state.connection.encode(), state.local_id.body(), state.remote_id.body(), state.d.reveal(), state.basis):
        writer.u16(len(value))
        writer.put(value)
    encode_sa(SaPayload((state.proposal,)), writer)
    return writer.bytes()


def _decode(data: bytes) -> Resumable:
    reader = Reader(data, "ticket")
    ticket_id = reader.take(ID_LENGTH)
    authenticated_at, expires, proof_ends = (int.from_bytes(reader.take(8), "big") / 1000 for _ in range(3))
    ppk = bool(reader.u8())
    name, local_id, remote_id, d, basis = (reader.take(reader.u16()) for _ in range(5))
    (proposal,) = decode_sa(reader).proposals
    local, remote = Identity(local_id[0], local_id[4:]), Identity(remote_id[0], remote_id[4:])
    return Resumable(name.decode(), local, remote, proposal, Secret(d), ppk, authenticated_at, expires, basis, proof_ends, ticket_id)

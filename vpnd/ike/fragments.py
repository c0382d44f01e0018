"""IKE fragmentation (RFC 7383): a message too long for one datagram travels as several, each of them protected by itself.

Sending: `seal` makes an `Outgoing`, which can be sealed anew in smaller pieces when the path turns out narrower (`refit`).
Receiving: a `Reassembly` for each direction of an IKE SA holds the authentic fragments of one message; a `ReassemblyBudget` bounds what all of them hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kernel_shim.model import PORT_NAT_T, Endpoint
from vpnd.ike import iana
from vpnd.ike.crypto import Entropy
from vpnd.ike.crypto.sk import SkCipher, seal_chain
from vpnd.ike.wire.header import GENERIC_LENGTH, HEADER_LENGTH, Header, encode_header, generic_header
from vpnd.ike.wire.message import encode_payloads
from vpnd.ike.wire.payloads import Payload, SkfPayload

# Of the specifications.
IP_AND_UDP: Final = {4: 20 + 8, 6: 40 + 8}  # octets before the IKE message, without options
NON_ESP_MARKER_LENGTH: Final = 4  # RFC 3948 section 2.2
SMALLEST_PACKET: Final = {4: 576, 6: 1280}  # RFC 7383 section 2.5.1: whole IP packets that every path is taken to carry
FITS_EVERY_PATH: Final = SMALLEST_PACKET[4] - IP_AND_UDP[4] - NON_ESP_MARKER_LENGTH  # octets of IKE message
NUMBERS_LENGTH: Final = 4  # Fragment Number and Total Fragments

# Of this implementation.
MAX_REASSEMBLED: Final = 65536  # octets of one message: room for the longest chain of post-quantum certificates
MAX_FRAGMENTS: Final = 160  # of one message: that many octets in packets of 576
REASSEMBLY_SECONDS: Final = 30.0  # an incomplete message is given up after this long; its sender repeats all of it anyway
MAX_HELD: Final = 16 * 1024 * 1024  # octets of incomplete messages of all IKE SAs; peers that are not authenticated get half of it


@dataclass(frozen=True, slots=True)
class Inner:
    """What an encrypted message holds, unfragmented and unpadded: `first` is the type of the first payload of `chain`."""

    first: int
    chain: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message as it goes over the wire, sealed once. `inner` is kept where `limit` could turn out too great for a path; see `refit`."""

    datagrams: tuple[bytes, ...] = field(default=(), repr=False)
    limit: int = 0
    header: Header | None = None
    inner: Inner | None = None

    def __bool__(self) -> bool:
        return bool(self.datagrams)


def packet_limit(endpoint: Endpoint, packet: int) -> int:
    """The octets of IKE message that an IP packet of `packet` octets from the local `endpoint` carries."""
    marker = NON_ESP_MARKER_LENGTH if endpoint.port == PORT_NAT_T else 0
    return packet - IP_AND_UDP[endpoint.address.version] - marker


def seal(header: Header, payloads: Sequence[Payload], cipher: SkCipher, entropy: Entropy, limit: int) -> Outgoing:
    """All payloads encrypted: in one message, or, when it would be longer than `limit` octets, in fragments of at most that. `limit` 0: never fragmented.

    Raises ValueError when a payload does not fit its length field.
    """
    inner = Inner(*encode_payloads(payloads))
    return _seal(header, inner, cipher, entropy, limit)


def refit(outgoing: Outgoing, cipher: SkCipher, entropy: Entropy, limit: int) -> Outgoing:
    """For a path that carries only `limit` octets: the same message in smaller fragments, sealed anew; as it is when it fits (RFC 7383 section 2.5.2)."""
    if outgoing.inner is None or outgoing.header is None or not 0 < limit < outgoing.limit or max(map(len, outgoing.datagrams)) <= limit:
        return outgoing
    return _seal(outgoing.header, outgoing.inner, cipher, entropy, limit)


def _seal(header: Header, inner: Inner, cipher: SkCipher, entropy: Entropy, limit: int) -> Outgoing:
    length = HEADER_LENGTH + GENERIC_LENGTH + cipher.sealed_length(len(inner.chain))
    if limit and length > limit:
        return Outgoing(_fragments(header, inner, cipher, entropy, limit), limit, header, inner)
    datagram = seal_chain(header, inner.first, inner.chain, cipher, entropy)
    # what fits every path is never sealed anew
    return Outgoing((datagram,)) if length <= FITS_EVERY_PATH else Outgoing((datagram,), limit, header, inner)


def _fragments(header: Header, inner: Inner, cipher: SkCipher, entropy: Entropy, limit: int) -> tuple[bytes, ...]:
    size = _plaintext_of(cipher, limit - HEADER_LENGTH - GENERIC_LENGTH - NUMBERS_LENGTH)
    parts = [inner.chain[start : start + size] for start in range(0, len(inner.chain), size)]
    datagrams = []
    for number, part in enumerate(parts, 1):
        length = GENERIC_LENGTH + NUMBERS_LENGTH + cipher.sealed_length(len(part))
        # RFC 7383 section 2.5: the type of the first payload stands in the first fragment, 0 in the others
        first = inner.first if number == 1 else iana.Payload.NONE
        associated = (
            encode_header(header, iana.Payload.SKF, HEADER_LENGTH + length)
            + generic_header(first, length)
            + number.to_bytes(2, "big")
            + len(parts).to_bytes(2, "big")
        )
        datagrams.append(associated + cipher.seal(associated, part, entropy))
    return tuple(datagrams)


def _plaintext_of(cipher: SkCipher, room: int) -> int:
    """The most octets of plaintext whose sealed form has at most `room` octets."""
    size = room
    while (excess := cipher.sealed_length(size) - room) > 0:
        size -= excess
    return size


class ReassemblyBudget:
    """What the incomplete messages of all IKE SAs of a daemon may hold together, in octets."""

    def __init__(self, limit: int = MAX_HELD) -> None:
        self._limit = limit
        self.held = 0

    def take(self, octets: int, *, authenticated: bool) -> bool:
        """Whether there is room; strangers get no more than half, so that they cannot crowd out who is authenticated."""
        if self.held + octets > (self._limit if authenticated else self._limit // 2):
            return False
        self.held += octets
        return True

    def give(self, octets: int) -> None:
        self.held -= octets


class Reassembly:
    """The fragments of one message of the peer's, which all passed their integrity check."""

    def __init__(self, budget: ReassemblyBudget) -> None:
        self._budget = budget
        self._parts: dict[int, bytes] = {}
        self._message_id = -1
        self._total = 0
        self._octets = 0
        self._first_type = 0
        self.first_datagram = b""  # that of the first fragment of the message that is being put together, or was put together last
        self.deadline: float | None = None

    def wants(self, message_id: int, fragment: SkfPayload) -> bool:
        """RFC 7383 section 2.6: what is looked at before the cost of decryption. A larger total replaces what is there, a smaller one is out of date."""
        if fragment.total > MAX_FRAGMENTS:
            return False
        if message_id != self._message_id or fragment.total > self._total:
            return True
        return fragment.total == self._total and fragment.number not in self._parts

    def add(self, message_id: int, fragment: SkfPayload, part: bytes, datagram: bytes, *, authenticated: bool, now: float) -> Inner | None:
        """An authentic fragment that was wanted; the message once it is complete. What passes a bound costs the message."""
        if message_id != self._message_id or fragment.total != self._total:
            self.clear()
            self._message_id, self._total, self.deadline = message_id, fragment.total, now + REASSEMBLY_SECONDS
        if self._octets + len(part) > MAX_REASSEMBLED or not self._budget.take(len(part), authenticated=authenticated):
            self.clear()
            return None
        self._parts[fragment.number] = part
        self._octets += len(part)
        if fragment.number == 1:
            self._first_type, self.first_datagram = fragment.first, datagram
        if len(self._parts) < self._total:
            return None
        inner = Inner(self._first_type, b"".join(self._parts[number] for number in range(1, self._total + 1)))
        first = self.first_datagram
        self.clear()
        self.first_datagram = first
        return inner

    def clear(self) -> None:
        self._budget.give(self._octets)
        self._parts.clear()
        self._message_id, self._total, self._octets, self._first_type = -1, 0, 0, 0
        self.first_datagram = b""
        self.deadline = None

    def expire(self, now: float) -> None:
        if self.deadline is not None and now >= self.deadline:
            self.clear()

"""ICMP and ICMPv6 errors to the sender of a packet that cannot go on (RFC 792, RFC 1191, RFC 1812, RFC 4443)."""

from __future__ import annotations

import struct
from enum import Enum
from typing import Final

from kernel_shim.packet.checksum import checksum, partial_sum, pseudo_header_sum
from kernel_shim.packet.ip import PROTOCOL_ICMP, PROTOCOL_ICMPV6, Buffer, Layout, build_header

# Specifications
_QUOTE_LIMIT_V4: Final = 576 - 20 - 8  # RFC 1812 section 4.3.2.3: the whole error is at most 576 bytes
_QUOTE_LIMIT_V6: Final = 1280 - 40 - 8  # RFC 4443 section 2.4 (c)
_ERRORS_V4: Final = frozenset({3, 4, 5, 11, 12})
_SMALLEST_EXTENDED_QUOTE: Final = 128  # RFC 4884 section 4
_REDIRECT_V6: Final = 137
_ERROR_TTL: Final = 64

# Limits of this implementation: RFC 1812 section 4.3.2.8 and RFC 4443 section 2.4 (f) ask for one.
ERRORS_PER_SECOND: Final = 1000.0
ERROR_BURST: Final = 100.0


class IcmpError(Enum):
    """Type and code for IPv4, then for IPv6."""

    HOST_UNREACHABLE = ((3, 1), (1, 3))
    PROHIBITED = ((3, 13), (1, 1))
    TOO_BIG = ((3, 4), (2, 0))
    TIME_EXCEEDED = ((11, 0), (3, 0))


class RateLimit:
    """A token bucket."""

    def __init__(self, per_second: float = ERRORS_PER_SECOND, burst: float = ERROR_BURST) -> None:
        self._per_second, self._burst = per_second, burst
        self._tokens, self._filled = burst, 0.0

    def allow(self, now: float) -> bool:
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._filled) * self._per_second)
        self._filled = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def error_packet(error: IcmpError, packet: Buffer, parsed: Layout, mtu: int = 0, extension: bytes = b"", origin: bytes = b"") -> bytes | None:
    """The error about `packet`, to its source; None when the RFCs forbid one.

    Without `origin`, an address of the same version, it comes from the packet's own destination: a host refuses a packet from a TUN that claims one
    of the host's own addresses, and the destination is what its reverse path points at the TUN for.
    `mtu` is what TOO_BIG reports, in bytes of the IP packet. `extension` is an extension structure (RFC 4884), without
    effect on an ICMPv6 TOO_BIG, which has no room to say where it begins.
    """
    if parsed.fragment_offset or not _may_answer(error, packet, parsed):
        return None
    if parsed.version == 4:
        kind, code = error.value[0]
        quote, words = _quote(packet, parsed, _QUOTE_LIMIT_V4, extension, 4)
        body = bytearray(struct.pack("!BBHBBH", kind, code, 0, 0, words, mtu)) + quote
        body[2:4] = checksum(partial_sum(body)).to_bytes(2, "little")
        return build_header(4, origin or bytes(packet[16:20]), bytes(packet[12:16]), PROTOCOL_ICMP, len(body), _ERROR_TTL) + body
    kind, code = error.value[1]
    quote, words = _quote(packet, parsed, _QUOTE_LIMIT_V6, b"" if error is IcmpError.TOO_BIG else extension, 8)
    body = bytearray(struct.pack("!BBHI", kind, code, 0, words << 24 | mtu)) + quote
    source, destination = origin or bytes(packet[24:40]), bytes(packet[8:24])
    total = partial_sum(body) + pseudo_header_sum(source + destination, PROTOCOL_ICMPV6, len(body))
    body[2:4] = checksum(total).to_bytes(2, "little")
    return build_header(6, source, destination, PROTOCOL_ICMPV6, len(body), _ERROR_TTL) + body


def _quote(packet: Buffer, parsed: Layout, limit: int, extension: bytes, unit: int) -> tuple[bytes, int]:
    """What is quoted of `packet`, with `extension` behind, `limit` bytes at most; where the extension begins in units of `unit` bytes.

    RFC 4884 section 3.
    """
    if not extension:
        return bytes(packet[: min(parsed.length, limit)]), 0
    room = (limit - len(extension)) // unit * unit
    quoted = bytes(packet[: min(parsed.length, room)])
    quoted += bytes(max(_SMALLEST_EXTENDED_QUOTE - len(quoted), -len(quoted) % unit))
    return quoted + extension, len(quoted) // unit


def _may_answer(error: IcmpError, packet: Buffer, parsed: Layout) -> bool:
    """RFC 1812 section 4.3.2.7; RFC 4443 section 2.4 (e)."""
    kind = packet[parsed.upper] if parsed.upper < parsed.length else None
    if parsed.version == 4:
        if parsed.protocol == PROTOCOL_ICMP and (kind is None or kind in _ERRORS_V4):
            return False
        if packet[16] >= 224 or packet[16] == 0:  # multicast, reserved, limited broadcast
            return False
        return not (packet[12] >= 224 or packet[12] in (0, 127))
    if parsed.protocol == PROTOCOL_ICMPV6 and (kind is None or kind < 128 or kind == _REDIRECT_V6):
        return False
    if packet[24] == 0xFF and error is not IcmpError.TOO_BIG:
        return False
    unspecified_or_loopback = not any(packet[8:23]) and packet[23] in (0, 1)
    return packet[8] != 0xFF and not unspecified_or_loopback

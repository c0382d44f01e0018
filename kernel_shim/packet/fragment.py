"""Cutting an IPv4 packet without DF into fragments (RFC 791 section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kernel_shim.packet.ip import IPV4_HEADER, Buffer, Layout, refresh_header_checksum

SMALLEST_FRAGMENT: Final = 68  # RFC 791: the longest header and eight bytes

_COPIED: Final = 0x80  # an option with this bit stands in every fragment


def fragments(packet: Buffer, parsed: Layout, mtu: int) -> Iterator[bytearray]:
    """The fragments of `packet`, none longer than `mtu`, in order. A fragment may be cut again. `mtu` is at least SMALLEST_FRAGMENT."""
    header = bytes(packet[: parsed.upper])
    later = _header_of_later_fragments(header)
    position, first = parsed.upper, True
    while position < parsed.length:
        head = header if first else later
        room = (mtu - len(head)) & ~7
        end = min(position + room, parsed.length)
        if parsed.length - position <= mtu - len(head):
            end = parsed.length
        fragment = bytearray(head)
        fragment += packet[position:end]
        more = end < parsed.length or parsed.more_fragments
        fragment[0] = 0x40 | len(head) >> 2
        fragment[2:4] = len(fragment).to_bytes(2, "big")
        offset = (parsed.fragment_offset + position - parsed.upper) >> 3
        fragment[6:8] = (0x2000 * more | offset).to_bytes(2, "big")
        refresh_header_checksum(fragment)
        yield fragment
        position, first = end, False


def _header_of_later_fragments(header: bytes) -> bytes:
    options, kept, position = header[IPV4_HEADER:], bytearray(), 0
    while position < len(options):
        kind = options[position]
        if kind == 0:
            break
        size = 1 if kind == 1 else options[position + 1] if position + 1 < len(options) else 0
        if size == 0 or position + size > len(options):
            break
        if kind & _COPIED:
            kept += options[position : position + size]
        position += size
    kept += bytes(-len(kept) % 4)
    return header[:IPV4_HEADER] + bytes(kept)

"""Flow keys: the bytes that name a packet's flow, cut straight from its IPv4 or IPv6 header.

The full key is `source | destination | source port | destination port | protocol` in network byte order: 13 bytes for
IPv4, 37 for IPv6; the order is that of the header, so that one slice holds nearly all of it. A masked key leaves out the
fields that nobody reads. ICMP and ICMPv6 have `type << 8 | code` as both ports; a protocol without ports has zeros.

Cutting, in order: (1) an IPv4 header without options or fragmentation, before a protocol with ports; (2) IPv6 with the
upper protocol directly behind its header; (3) everything else, header by header, in `headers.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from kernel_shim.model import AddressRange, Flow, IPAddress, Policy, Selector, TrafficSelector
from kernel_shim.policy.fragments import FragmentMemory
from kernel_shim.policy.headers import PORT_PROTOCOLS, Headers, read_headers
from kernel_shim.reasons import DropReason

Buffer = bytes | bytearray | memoryview
Cut = Callable[[Buffer, int], bytes | None]

FULL_KEY_V4: Final = 13
FULL_KEY_V6: Final = 37


class FieldMask(IntFlag):
    """Fields of a packet that somebody reads to decide about it."""

    NONE = 0
    SOURCE = 1
    DESTINATION = 2
    PROTOCOL = 4
    SOURCE_PORT = 8
    DESTINATION_PORT = 16
    IF_ID = 32
    MARK = 64

    ADDRESSES = 3
    PORTS = 24
    FLOW = 31  # everything that a flow key can hold


def fields_of_selector(selector: Selector) -> FieldMask:
    """The fields that decide whether a packet matches `selector`."""
    mask = _fields_of_side(selector.source, FieldMask.SOURCE) | _fields_of_side(selector.destination, FieldMask.DESTINATION)
    if selector.protocol:
        mask |= FieldMask.PROTOCOL
    if not selector.source_ports.any:
        mask |= FieldMask.SOURCE_PORT | FieldMask.PROTOCOL
    if not selector.destination_ports.any:
        mask |= FieldMask.DESTINATION_PORT | FieldMask.PROTOCOL
    if selector.if_id:
        mask |= FieldMask.IF_ID
    if selector.mark.mask:
        mask |= FieldMask.MARK
    return mask


def fields_of_policy(policy: Policy) -> FieldMask:
    """The fields that choose `policy` and, under a template without a fixed destination, the peer."""
    mask = fields_of_selector(policy.selector)
    if any(template.destination is None or template.source is None for template in policy.templates):
        mask |= FieldMask.ADDRESSES
    return mask


def fields_of_traffic_selectors(source: tuple[TrafficSelector, ...], destination: tuple[TrafficSelector, ...]) -> FieldMask:
    """The fields that decide whether an SA's own selectors cover a packet."""
    mask = FieldMask.NONE
    for selectors, address, port in ((source, FieldMask.SOURCE, FieldMask.SOURCE_PORT), (destination, FieldMask.DESTINATION, FieldMask.DESTINATION_PORT)):
        for selector in selectors:
            mask |= _fields_of_side(selector.addresses, address)
            if selector.protocol:
                mask |= FieldMask.PROTOCOL
            if not selector.ports.any:
                mask |= port | FieldMask.PROTOCOL
    return mask


def _fields_of_side(addresses: AddressRange, flag: FieldMask) -> FieldMask:
    return FieldMask.NONE if addresses == AddressRange.everything(addresses.version) else flag


class FieldUsage:
    """The union of the field masks of things that come and go."""

    __slots__ = ("_counts", "mask")

    def __init__(self) -> None:
        self.mask = FieldMask.NONE
        self._counts: dict[int, int] = {}

    def add(self, mask: FieldMask) -> None:
        # Counted by whole mask, of which few differ, and not by field: one dict operation for a policy.
        key = int(mask)
        count = self._counts.get(key, 0)
        self._counts[key] = count + 1
        if not count:
            self.mask |= mask

    def remove(self, mask: FieldMask) -> None:
        key = int(mask)
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
            return
        del self._counts[key]
        union = 0
        for other in self._counts:
            union |= other
        self.mask = FieldMask(union)

    def clear(self) -> None:
        self._counts.clear()
        self.mask = FieldMask.NONE


# ---------------------------------------------------------------- full keys and flows

_FLOW_V4: Final = struct.Struct("!4s4sHHB")
_FLOW_V6: Final = struct.Struct("!16s16sHHB")


class MaskedFlow(NamedTuple):
    """A flow as far as a masked key tells it; None is a field that nobody reads."""

    version: int
    source: IPAddress | None
    destination: IPAddress | None
    protocol: int | None
    source_port: int | None
    destination_port: int | None


def flow_of_key(key: bytes) -> Flow:
    """The flow that a full key names. Raises ValueError when `key` is none."""
    if len(key) == FULL_KEY_V4:
        source, destination, source_port, destination_port, protocol = _FLOW_V4.unpack(key)
        return Flow(IPv4Address(source), IPv4Address(destination), protocol, source_port, destination_port)
    if len(key) == FULL_KEY_V6:
        source, destination, source_port, destination_port, protocol = _FLOW_V6.unpack(key)
        return Flow(IPv6Address(source), IPv6Address(destination), protocol, source_port, destination_port)
    raise ValueError(f"not a full flow key: {len(key)} bytes")


def key_of_flow(flow: Flow) -> bytes:
    """The full key of a flow."""
    ports = flow.source_port << 24 | flow.destination_port << 8 | flow.protocol
    return flow.source.packed + flow.destination.packed + ports.to_bytes(5, "big")


def flow_of_masked_key(key: bytes, mask: FieldMask) -> MaskedFlow:
    """The fields that a key cut under `mask` holds, None for the others. Raises ValueError when `key` was cut under another mask."""
    for version, size in ((4, 4), (6, 16)):
        prefix, pieces = _pieces(mask, size)
        if len(key) != len(prefix) + sum(piece.stop - piece.start for piece in pieces) or not key.startswith(prefix):
            continue
        full, at = bytearray(2 * size + 5), len(prefix)
        for piece in pieces:
            full[piece] = key[at : at + piece.stop - piece.start]
            at += piece.stop - piece.start
        flow = flow_of_key(bytes(full))
        return MaskedFlow(
            version,
            flow.source if mask & FieldMask.SOURCE else None,
            flow.destination if mask & FieldMask.DESTINATION else None,
            flow.protocol if mask & FieldMask.PROTOCOL else None,
            flow.source_port if mask & FieldMask.SOURCE_PORT else None,
            flow.destination_port if mask & FieldMask.DESTINATION_PORT else None,
        )
    raise ValueError(f"not a key of {mask!r}: {len(key)} bytes")


def _pieces(mask: FieldMask, size: int) -> tuple[bytes, tuple[slice, ...]]:
    """Which slices of a full key with addresses of `size` bytes make up a masked one, and what stands before them."""
    fields = (
        (FieldMask.SOURCE, 0, size),
        (FieldMask.DESTINATION, size, 2 * size),
        (FieldMask.SOURCE_PORT, 2 * size, 2 * size + 2),
        (FieldMask.DESTINATION_PORT, 2 * size + 2, 2 * size + 4),
        (FieldMask.PROTOCOL, 2 * size + 4, 2 * size + 5),
    )
    spans: list[tuple[int, int]] = []
    for field, begin, end in fields:
        if mask & field:
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
    # Without an address nothing else tells the two families apart.
    prefix = b"" if mask & FieldMask.ADDRESSES else b"\x04" if size == 4 else b"\x06"
    return prefix, tuple(slice(begin, end) for begin, end in spans)


# ---------------------------------------------------------------- cutting

# What follows addresses and ports in the key of a protocol with ports; None sends the packet down the slow path.
_PORTED: Final = tuple(bytes((number,)) if number in PORT_PROTOCOLS else None for number in range(256))
_BYTE: Final = tuple(bytes((number,)) for number in range(256))

# Version and IHL, total length, flags and fragment offset, protocol, then addresses (and ports).
_V4_PORTS: Final = struct.Struct("!BxHxxHxBxx12s")
_V4_ADDRESSES: Final = struct.Struct("!BxHxxxxxBxx8s")
# Version, payload length, next header, then addresses (and ports).
_V6_PORTS: Final = struct.Struct("!BxxxHBx36s")
_V6_ADDRESSES: Final = struct.Struct("!BxxxHBx32s")

_V4_NO_OPTIONS: Final = 0x45
_MORE_FRAGMENTS_OR_OFFSET: Final = 0x3FFF


class FlowKeys:
    """Cuts the flow key of a packet under the current mask.

    `cut(buffer, offset)` gives the key, or None for a packet that has none; `reason` then says why, until the next None.
    The buffer must end where the packet ends or later; bytes behind the packet are ignored. `cut` is replaced by
    `set_mask`: fetch it again then.

    A fragment that is not the first carries no ports: when ports are read they come from `fragments`, else from nobody.
    """

    def __init__(self, mask: FieldMask = FieldMask.FLOW, fragments: FragmentMemory | None = None) -> None:
        self.fragments = fragments if fragments is not None else FragmentMemory()
        self.reason = DropReason.NOT_IP
        self.mask = FieldMask.NONE
        self.cut: Cut
        self._cut_full = self._full_cutter()
        self._cut_protocol = self._address_cutter(with_protocol=True)
        self._apply(mask)

    def set_mask(self, mask: FieldMask) -> bool:
        """Cut by `mask` from now on. True when that changes anything; keys cut before are then of no use."""
        if mask & FieldMask.FLOW == self.mask:
            return False
        self._apply(mask)
        return True

    def flow(self, buffer: Buffer, offset: int = 0) -> Flow | None:
        """All that can be known of the packet's flow, whatever the mask; ports of a later fragment are 0 when its first is unknown."""
        key = self.full_key(buffer, offset)
        return None if key is None else flow_of_key(key)

    def full_key(self, buffer: Buffer, offset: int = 0) -> bytes | None:
        """The full key, whatever the mask. While no port is read, those of a later fragment are 0; else as `cut`."""
        if self.mask & FieldMask.PORTS:
            return self._cut_full(buffer, offset)
        headers = read_headers(buffer, offset)
        if isinstance(headers, DropReason):
            self.reason = headers
            return None
        return headers.addresses + (headers.ports or b"\0\0\0\0") + _BYTE[headers.protocol]

    def _apply(self, mask: FieldMask) -> None:
        self.mask = mask = mask & FieldMask.FLOW
        if mask == FieldMask.FLOW:
            self.cut = self._cut_full
        elif mask == FieldMask.ADDRESSES | FieldMask.PROTOCOL:
            self.cut = self._cut_protocol
        elif mask == FieldMask.ADDRESSES:
            self.cut = self._address_cutter(with_protocol=False)
        else:
            self.cut = self._partial_cutter(mask)

    def _full_cutter(self) -> Cut:
        v4, v6, slow, ported, error = _V4_PORTS.unpack_from, _V6_PORTS.unpack_from, self._slow_full, _PORTED, struct.error

        def cut(buffer: Buffer, offset: int = 0) -> bytes | None:
            try:
                first, total, fragment, protocol, key = v4(buffer, offset)
                if first == _V4_NO_OPTIONS:
                    tail = ported[protocol]
                    if tail is not None and not fragment & _MORE_FRAGMENTS_OR_OFFSET and 24 <= total <= len(buffer) - offset:
                        return key + tail  # type: ignore[no-any-return]
                elif first >> 4 == 6:
                    _, payload, protocol, key = v6(buffer, offset)
                    tail = ported[protocol]
                    if tail is not None and 4 <= payload <= len(buffer) - offset - 40:
                        return key + tail  # type: ignore[no-any-return]
            except error:
                pass
            return slow(buffer, offset)

        return cut

    def _address_cutter(self, *, with_protocol: bool) -> Cut:
        v4, v6, slow, error = _V4_ADDRESSES.unpack_from, _V6_ADDRESSES.unpack_from, self._slow_addresses, struct.error
        one, ported = _BYTE, _PORTED

        def cut(buffer: Buffer, offset: int = 0) -> bytes | None:
            try:
                first, total, protocol, key = v4(buffer, offset)
                if first == _V4_NO_OPTIONS:
                    if 20 <= total <= len(buffer) - offset:
                        return key + one[protocol] if with_protocol else key  # type: ignore[no-any-return]
                elif first >> 4 == 6 and not with_protocol:
                    _, payload, protocol, key = v6(buffer, offset)
                    if payload <= len(buffer) - offset - 40:
                        return key  # type: ignore[no-any-return]
                elif first >> 4 == 6:
                    _, payload, protocol, key = v6(buffer, offset)
                    if ported[protocol] is not None and payload <= len(buffer) - offset - 40:
                        return key + one[protocol]  # type: ignore[no-any-return]
            except error:
                pass
            return slow(buffer, offset, with_protocol)

        return cut

    def _partial_cutter(self, mask: FieldMask) -> Cut:
        prefix_v4, pieces_v4 = _pieces(mask, 4)
        prefix_v6, pieces_v6 = _pieces(mask, 16)
        if mask & FieldMask.PORTS:
            whole, hidden, longest_v4 = self._cut_full, b"", FULL_KEY_V4
        elif mask & FieldMask.PROTOCOL:
            # Zero ports that no slice takes, so that the protocol stands where it does in a full key.
            whole, hidden, longest_v4 = self._cut_protocol, b"\0\0\0\0", FULL_KEY_V4
        else:
            whole, hidden, longest_v4 = self._address_cutter(with_protocol=False), b"", 8

        def cut(buffer: Buffer, offset: int = 0) -> bytes | None:
            key = whole(buffer, offset)
            if key is None:
                return None
            if hidden:
                key = key[:-1] + hidden + key[-1:]
            if len(key) <= longest_v4:
                return prefix_v4 + b"".join([key[piece] for piece in pieces_v4])
            return prefix_v6 + b"".join([key[piece] for piece in pieces_v6])

        return cut

    def _slow_full(self, buffer: Buffer, offset: int) -> bytes | None:
        headers = read_headers(buffer, offset)
        if isinstance(headers, DropReason):
            self.reason = headers
            return None
        if headers.fragment is not None:
            resolved = self._remember_or_recall(headers, headers.fragment)
            if resolved is None:
                self.reason = DropReason.FRAGMENT_WITHOUT_FIRST
                return None
            return headers.addresses + resolved
        return headers.addresses + (headers.ports or b"\0\0\0\0") + _BYTE[headers.protocol]

    def _slow_addresses(self, buffer: Buffer, offset: int, with_protocol: bool) -> bytes | None:
        headers = read_headers(buffer, offset)
        if isinstance(headers, DropReason):
            self.reason = headers
            return None
        if not with_protocol:
            return headers.addresses
        if headers.fragment is not None and len(headers.addresses) == 32:
            # Only in IPv6 may the protocol itself be hidden, behind extension headers that the first fragment took along.
            resolved = self._remember_or_recall(headers, headers.fragment)
            if resolved is None:
                self.reason = DropReason.FRAGMENT_WITHOUT_FIRST
                return None
            return headers.addresses + resolved[-1:]
        return headers.addresses + _BYTE[headers.protocol]

    def _remember_or_recall(self, headers: Headers, identification: bytes) -> bytes | None:
        """Ports and protocol of a fragment: its own when it is the first, else those of the first one seen."""
        name = headers.addresses + identification
        if headers.first:
            value = (headers.ports or b"\0\0\0\0") + _BYTE[headers.protocol]
            self.fragments.remember(name, value)
            return value
        if headers.ports is not None:  # a protocol without ports hides nothing
            return headers.ports + _BYTE[headers.protocol]
        return self.fragments.recall(name)

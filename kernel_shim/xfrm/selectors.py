"""Selectors: what Linux can say of them, and the translation.

Linux knows address prefixes and ports under a mask; of ICMP it keeps the type where the source port is and the code where the destination
port is (include/net/xfrm.h, xfrm_flowi_sport and xfrm_flowi_dport), while `kernel_shim.model` has `type << 8 | code` on both sides.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Mapping
from ipaddress import ip_network
from typing import Final

from kernel_shim.model import (
    ANY_PORT,
    NO_MARK,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    AddressRange,
    Direction,
    Flow,
    KernelError,
    Mark,
    PortRange,
    Selector,
)
from kernel_shim.xfrm.constants import Attribute
from kernel_shim.xfrm.structs import MARK, NUMBER, MalformedMessage, SelectorStruct, family_of, pack_address, unpack, unpack_address, version_of

ICMP: Final = frozenset({PROTOCOL_ICMP, PROTOCOL_ICMPV6})

# Of an ICMP selector's `type << 8 | code`: which ranges the kernel's two masks can express.
_ONE_TYPE: Final = 0x100
_EVERYTHING: Final = 0x10000


def selector_struct(selector: Selector) -> SelectorStruct:
    """KernelError(EINVAL) that names the field which Linux cannot express."""
    source, destination = _prefix(selector.source, "source address"), _prefix(selector.destination, "destination address")
    if selector.protocol in ICMP:
        sport, sport_mask, dport, dport_mask = _icmp(selector)
    else:
        sport, sport_mask = _port_mask(selector.source_ports, "source port")
        dport, dport_mask = _port_mask(selector.destination_ports, "destination port")
    return SelectorStruct(
        daddr=pack_address(selector.destination.first),
        saddr=pack_address(selector.source.first),
        dport=dport,
        dport_mask=dport_mask,
        sport=sport,
        sport_mask=sport_mask,
        family=family_of(selector.version),
        prefixlen_d=destination,
        prefixlen_s=source,
        proto=selector.protocol,
    )


def selector_attributes(selector: Selector) -> dict[int, bytes]:
    """What of a selector stands beside its structure."""
    return mark_attributes(selector.mark) | if_id_attributes(selector.if_id)


def mark_attributes(mark: Mark) -> dict[int, bytes]:
    return {Attribute.MARK: MARK.pack(mark.value, mark.mask)} if mark != NO_MARK else {}


def set_mark_attributes(mark: Mark) -> dict[int, bytes]:
    """What packets are marked with that an SA has done its work on."""
    return {Attribute.SET_MARK: NUMBER.pack(mark.value), Attribute.SET_MARK_MASK: NUMBER.pack(mark.mask)} if mark != NO_MARK else {}


def if_id_attributes(if_id: int) -> dict[int, bytes]:
    return {Attribute.IF_ID: NUMBER.pack(if_id)} if if_id else {}


def selector_from(struct: SelectorStruct, attributes: Mapping[int, bytes]) -> Selector:
    """MalformedMessage for what no `Selector` can say: a mask with holes, a device or a user."""
    if struct.ifindex or struct.user:
        raise MalformedMessage("a selector of one device or user")
    source, destination = _range(struct.saddr, struct.prefixlen_s, struct.family), _range(struct.daddr, struct.prefixlen_d, struct.family)
    if struct.proto in ICMP:
        ports = _icmp_range(struct)
        source_ports, destination_ports = ports, ports
    else:
        source_ports, destination_ports = _port_range(struct.sport, struct.sport_mask), _port_range(struct.dport, struct.dport_mask)
    return Selector(source, destination, struct.proto, source_ports, destination_ports, if_id_from(attributes), mark_from(attributes))


def flow_from(struct: SelectorStruct) -> Flow:
    """The packet whose selectors these are; what its masks leave open is 0."""
    source, destination = unpack_address(struct.saddr, struct.family), unpack_address(struct.daddr, struct.family)
    sport, dport = struct.sport & struct.sport_mask, struct.dport & struct.dport_mask
    if struct.proto in ICMP:
        sport = dport = (sport & 0xFF) << 8 | dport & 0xFF
    return Flow(source, destination, struct.proto, sport, dport)


def mark_from(attributes: Mapping[int, bytes]) -> Mark:
    data = attributes.get(Attribute.MARK)
    return Mark(*unpack(MARK, data, "mark")) if data is not None else NO_MARK


def set_mark_from(attributes: Mapping[int, bytes]) -> Mark:
    """A kernel before 4.19 tells no mask: then all bits count."""
    data = attributes.get(Attribute.SET_MARK)
    if data is None:
        return NO_MARK
    (value,) = unpack(NUMBER, data, "mark to set")
    (mask,) = unpack(NUMBER, attributes.get(Attribute.SET_MARK_MASK, b"\xff" * NUMBER.size), "mask of the mark to set")
    return Mark(value, mask) if value or mask else NO_MARK


def if_id_from(attributes: Mapping[int, bytes]) -> int:
    data = attributes.get(Attribute.IF_ID)
    return int(unpack(NUMBER, data, "if_id")[0]) if data is not None else 0


def _prefix(addresses: AddressRange, name: str) -> int:
    size = int(addresses.last) - int(addresses.first) + 1
    if size & (size - 1) or int(addresses.first) % size:
        raise KernelError(errno.EINVAL, f"{name}: {addresses} is no prefix, and this kernel has no address ranges")
    return addresses.first.max_prefixlen - (size.bit_length() - 1)


def _range(address: bytes, prefixlen: int, family: int) -> AddressRange:
    first = unpack_address(address, family)
    if prefixlen > first.max_prefixlen:
        raise MalformedMessage(f"a prefix of {prefixlen} bits in IPv{version_of(family)}")
    return AddressRange.of(ip_network((first, prefixlen), strict=False))


def _port_mask(ports: PortRange, name: str) -> tuple[int, int]:
    size = ports.high - ports.low + 1
    if size & (size - 1) or ports.low % size:
        raise KernelError(errno.EINVAL, f"{name}: {ports.low}-{ports.high} is neither one port nor all, and this kernel has no port ranges")
    return ports.low, 0x10000 - size


def _port_range(port: int, mask: int) -> PortRange:
    free = 0xFFFF ^ mask
    if free & (free + 1):
        raise MalformedMessage(f"a port mask with holes: {mask:#06x}")
    low = port & mask
    return PortRange(low, low | free)


def standing_key(direction: Direction, selector: Selector) -> Hashable:
    """What the kernel tells two policies apart by."""
    attributes = selector_attributes(selector)
    return direction, selector_struct(selector).pack() + b"".join(bytes((kind,)) + value for kind, value in sorted(attributes.items()))


def _icmp(selector: Selector) -> tuple[int, int, int, int]:
    """sport, its mask, dport, its mask. Both sides' ranges name the same number, so what they share counts."""
    both = selector.source_ports.intersection(selector.destination_ports)
    size = both.high - both.low + 1 if both else 0
    if both is not None and size == _EVERYTHING:
        return 0, 0, 0, 0
    if both is not None and size == _ONE_TYPE and both.low % _ONE_TYPE == 0:
        return both.low >> 8, 0xFFFF, 0, 0
    if both is not None and size == 1:
        return both.low >> 8, 0xFFFF, both.low & 0xFF, 0xFFFF
    ranges = f"{selector.source_ports.low}-{selector.source_ports.high} and {selector.destination_ports.low}-{selector.destination_ports.high}"
    raise KernelError(errno.EINVAL, f"ICMP type and code: {ranges} is neither one type, nor one type and code, nor all")


def _icmp_range(struct: SelectorStruct) -> PortRange:
    if not struct.sport_mask and not struct.dport_mask:
        return ANY_PORT
    if struct.sport_mask == 0xFFFF and struct.sport <= 0xFF:
        if not struct.dport_mask:
            return PortRange(struct.sport << 8, struct.sport << 8 | 0xFF)
        if struct.dport_mask == 0xFFFF and struct.dport <= 0xFF:
            return PortRange(struct.sport << 8 | struct.dport, struct.sport << 8 | struct.dport)
    raise MalformedMessage(f"an ICMP selector of type {struct.sport}/{struct.sport_mask:#x}, code {struct.dport}/{struct.dport_mask:#x}")

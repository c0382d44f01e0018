"""Traffic Selector payloads (RFC 7296 section 3.13)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeVar

from kernel_shim.model import AddressRange, PortRange, TrafficSelector
from vpnd.ike.iana import TsType
from vpnd.ike.wire.payloads import TsiPayload, TsrPayload, UnknownSelector
from vpnd.ike.wire.reader import Reader, Writer

MAX_SELECTORS: Final = 255  # of one payload; the count's own range

_OPAQUE_START: Final = 65535
_ADDRESS_LENGTH: Final[dict[int, int]] = {TsType.IPV4_ADDR_RANGE: 4, TsType.IPV6_ADDR_RANGE: 16}

Ts = TypeVar("Ts", TsiPayload, TsrPayload)


def decode_ts(reader: Reader, kind: type[Ts]) -> Ts:
    count = reader.u8()
    reader.skip(3)
    if not count:
        raise reader.fail("no traffic selector")
    known: list[TrafficSelector] = []
    unknown: list[UnknownSelector] = []
    for _ in range(count):
        selector_type, protocol = reader.u8(), reader.u8()
        with reader.restrict_to(reader.u16() - 4, "TS.selector"):
            selector = _decode_selector(reader, selector_type, protocol)
        if isinstance(selector, TrafficSelector):
            known.append(selector)
        else:
            unknown.append(selector)
    return kind(tuple(known), tuple(unknown))


def encode_ts(payload: TsiPayload | TsrPayload, writer: Writer) -> None:
    """Raises ValueError for more than MAX_SELECTORS."""
    count = len(payload.selectors) + len(payload.unknown)
    if count > MAX_SELECTORS:
        raise ValueError(f"{count} traffic selectors do not fit one payload")
    writer.put(bytes((count, 0, 0, 0)))
    for selector in payload.selectors:
        addresses = selector.addresses
        length = 4 if addresses.version == 4 else 16
        writer.put(bytes((TsType.IPV4_ADDR_RANGE if length == 4 else TsType.IPV6_ADDR_RANGE, selector.protocol)))
        writer.u16(8 + 2 * length)
        writer.u16(selector.ports.low)
        writer.u16(selector.ports.high)
        writer.put(addresses.first.packed)
        writer.put(addresses.last.packed)
    for unknown in payload.unknown:
        writer.put(bytes((unknown.type, unknown.protocol)))
        writer.u16(4 + len(unknown.data))
        writer.put(unknown.data)


def _decode_selector(reader: Reader, selector_type: int, protocol: int) -> TrafficSelector | UnknownSelector:
    length = _ADDRESS_LENGTH.get(selector_type)
    if length is None:
        return UnknownSelector(selector_type, protocol, reader.rest())
    low, high = reader.u16(), reader.u16()
    first, last = reader.take(length), reader.take(length)
    # RFC 7296 section 3.13.1: 65535 to 0 is OPAQUE, ports that nobody can see; we have no policy for those.
    if low == _OPAQUE_START and high == 0:
        return UnknownSelector(selector_type, protocol, low.to_bytes(2, "big") + high.to_bytes(2, "big") + first + last)
    if low > high:
        raise reader.fail(f"ports {low} to {high}")
    if first > last:
        raise reader.fail("address range ends before it begins")
    family = IPv4Address if length == 4 else IPv6Address
    return TrafficSelector(AddressRange(family(first), family(last)), protocol, PortRange(low, high))

"""The traffic class octet of IPv4 and IPv6: six bits of DSCP (RFC 2474), two of ECN (RFC 3168), and what a tunnel does to it (RFC 6040)."""

from __future__ import annotations

from typing import Final, NamedTuple

from kernel_shim.packet.ip import Buffer

ECN: Final = 0x03
DSCP: Final = 0xFC
NOT_ECT: Final = 0
ECT_1: Final = 1
ECT_0: Final = 2
CE: Final = 3


class Decapsulated(NamedTuple):
    """`ecn` None: the packet is to be dropped. `alarm`: the two headers cannot both be right."""

    ecn: int | None
    alarm: bool = False


# RFC 6040 section 4.2, figure 4: by the ECN field inside, then by that outside, from Not-ECT to CE
_DECAPSULATION: Final = (
    (Decapsulated(NOT_ECT), Decapsulated(NOT_ECT, True), Decapsulated(NOT_ECT, True), Decapsulated(None, True)),
    (Decapsulated(ECT_1), Decapsulated(ECT_1), Decapsulated(ECT_1, True), Decapsulated(CE)),
    (Decapsulated(ECT_0), Decapsulated(ECT_1), Decapsulated(ECT_0), Decapsulated(CE)),
    (Decapsulated(CE), Decapsulated(CE, True), Decapsulated(CE), Decapsulated(CE)),
)


def decapsulated_ecn(inner: int, outer: int) -> Decapsulated:
    """What the ECN field of a packet becomes as it leaves a tunnel; of both arguments the two lowest bits count."""
    return _DECAPSULATION[inner & ECN][outer & ECN]


def traffic_class(packet: Buffer) -> int:
    """Of the IP packet that begins here."""
    return packet[1] if packet[0] >> 4 == 4 else (packet[0] & 15) << 4 | packet[1] >> 4


def set_traffic_class(packet: bytearray | memoryview, value: int) -> None:
    if packet[0] >> 4 == 6:
        packet[0], packet[1] = 0x60 | value >> 4, (value & 15) << 4 | packet[1] & 15
        return
    # RFC 1624: adjusted, not recomputed, so that a header damaged before stays visibly damaged.
    adjusted = (packet[10] << 8 | packet[11]) + packet[1] - value
    adjusted = (adjusted - 1 if adjusted < 0 else adjusted + (adjusted >= 0xFFFF)) & 0xFFFF
    packet[1] = value
    packet[10], packet[11] = adjusted >> 8, adjusted & 0xFF

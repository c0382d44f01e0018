"""Headers, fragments, and the ICMP errors that may and may not be sent."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, defragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Raw

from kernel_shim.packet.fragment import fragments
from kernel_shim.packet.icmp import ERROR_BURST, IcmpError, RateLimit, error_packet
from kernel_shim.packet.ip import Malformed, build_header, decrement_ttl, layout


def error(packet: object, kind: IcmpError = IcmpError.PROHIBITED, mtu: int = 0) -> bytes | None:
    raw = bytes(packet)  # type: ignore[call-overload]
    return error_packet(kind, raw, layout(raw), mtu)


def same_as_scapy(message: bytes) -> bool:
    parsed = IP(message) if message[0] >> 4 == 4 else IPv6(message)
    fresh = parsed.copy()
    if message[0] >> 4 == 4:
        del fresh.chksum, fresh[ICMP].chksum
    else:
        del fresh.payload.cksum
    return bytes(fresh) == message


def test_an_ipv4_error() -> None:
    message = error(IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=2) / Raw(bytes(1400)), IcmpError.TOO_BIG, 1300)
    assert message is not None
    assert same_as_scapy(message)
    parsed = IP(message)
    assert (parsed.src, parsed.dst, parsed[ICMP].type, parsed[ICMP].code, parsed[ICMP].nexthopmtu) == ("10.0.0.2", "10.0.0.1", 3, 4, 1300)
    assert len(message) == 576


def test_an_ipv6_error() -> None:
    message = error(IPv6(src="fd00::1", dst="fd00::2") / UDP() / Raw(bytes(1400)), IcmpError.TOO_BIG, 1300)
    assert message is not None
    assert same_as_scapy(message)
    assert IPv6(message)[ICMPv6PacketTooBig].mtu == 1300
    assert len(message) == 1280
    unreachable = error(IPv6(src="fd00::1", dst="fd00::2") / UDP(), IcmpError.HOST_UNREACHABLE)
    assert unreachable is not None
    assert IPv6(unreachable)[ICMPv6DestUnreach].code == 3


FORBIDDEN = [
    IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=3, code=1) / Raw(bytes(28)),
    IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=11) / Raw(bytes(28)),
    IP(src="10.0.0.1", dst="224.0.0.5") / UDP(),
    IP(src="10.0.0.1", dst="255.255.255.255") / UDP(),
    IP(src="0.0.0.0", dst="10.0.0.2") / UDP(),
    IP(src="127.0.0.1", dst="10.0.0.2") / UDP(),
    IP(src="239.1.1.1", dst="10.0.0.2") / UDP(),
    IP(src="10.0.0.1", dst="10.0.0.2", frag=10) / Raw(bytes(30)),
    IPv6(src="fd00::1", dst="ff02::1") / UDP(),
    IPv6(src="::", dst="fd00::2") / UDP(),
    IPv6(src="ff02::1", dst="fd00::2") / UDP(),
    IPv6(src="fd00::1", dst="fd00::2") / ICMPv6PacketTooBig(mtu=1280) / Raw(bytes(48)),
    IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment(offset=9, m=1, nh=17) / Raw(bytes(40)),
]


@pytest.mark.parametrize("packet", FORBIDDEN, ids=lambda p: p.summary())
def test_no_error_about(packet: object) -> None:
    assert error(packet) is None


@pytest.mark.parametrize(
    "packet",
    [
        IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8),
        IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP(),
        IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(),
    ],
    ids=lambda p: p.summary(),
)
def test_an_error_about(packet: object) -> None:
    message = error(packet)
    assert message is not None
    assert same_as_scapy(message)


def test_too_big_may_be_about_ipv6_multicast() -> None:
    assert error(IPv6(src="fd00::1", dst="ff05::1") / UDP(), IcmpError.TOO_BIG, 1280) is not None


def test_errors_are_limited() -> None:
    limit = RateLimit()
    assert sum(limit.allow(5.0) for _ in range(1000)) == ERROR_BURST
    assert sum(limit.allow(5.0625) for _ in range(1000)) == 62
    assert not limit.allow(4.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4000), st.integers(68, 1600), st.integers(0, 10))
def test_fragments_make_the_packet_again(length: int, mtu: int, options: int) -> None:
    raw = bytes(IP(src="10.0.0.1", dst="10.0.0.2", id=3, options=b"\x94\x04\0\0" * (options % 5) + b"\x01" * 4 * (options // 5)) / UDP() / Raw(bytes(length)))
    cut = [bytes(piece) for piece in fragments(raw, layout(raw), mtu)]
    assert all(len(piece) <= mtu for piece in cut)
    whole = bytes(defragment([IP(piece) for piece in cut])[0])
    assert whole[layout(whole).upper :] == raw[layout(raw).upper :]
    again = [bytes(smaller) for piece in cut for smaller in fragments(piece, layout(piece), 68)]
    assert bytes(defragment([IP(piece) for piece in again])[0])[-length:] == raw[-length:]


def test_ipv6_extension_headers_are_walked() -> None:
    raw = bytes(IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP() / Raw(b"x"))
    parsed = layout(raw)
    assert (parsed.protocol, parsed.upper, parsed.length) == (17, 56, len(raw))


def test_the_ttl_goes_down_and_the_checksum_with_it() -> None:
    packet = bytearray(bytes(IP(src="10.0.0.1", dst="10.0.0.2", ttl=2) / UDP()))
    assert decrement_ttl(packet)
    assert bytes(packet) == bytes(IP(src="10.0.0.1", dst="10.0.0.2", ttl=1) / UDP())
    assert not decrement_ttl(packet)
    six = bytearray(bytes(IPv6(src="fd00::1", dst="fd00::2", hlim=2) / UDP()))
    assert decrement_ttl(six)
    assert six[7] == 1
    assert not decrement_ttl(six)


def test_a_built_header_is_what_scapy_builds() -> None:
    built = build_header(4, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 17, 100)
    assert built == bytes(IP(src="10.0.0.1", dst="10.0.0.2", proto=17, flags="DF", id=0, len=120))


@pytest.mark.property
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.sampled_from([0x45, 0x4F, 0x60, None]))
def test_a_layout_is_within_the_packet(data: bytes, first: int | None) -> None:
    packet = bytearray(data)
    if first is not None and packet:
        packet[0] = first
    try:
        parsed = layout(packet)
    except Malformed:
        return
    assert parsed.upper <= parsed.length <= len(packet)
    message = error_packet(IcmpError.TOO_BIG, packet, parsed, 1300)
    assert message is None or len(message) <= 1280

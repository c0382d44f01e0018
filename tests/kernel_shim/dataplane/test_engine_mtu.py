"""Packets over the path's MTU: the sender hears of it, or they travel in fragments."""

from __future__ import annotations

import random

import pytest
from dataplane_pair import Pair, endpoints
from scapy.layers.inet import ICMP, IP, UDP, defragment
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.packet import Raw

from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.model import Lifetime, Mode

FAMILIES = [(4, 4), (4, 6), (6, 4), (6, 6)]


def reported(error: bytes) -> int:
    return int(IP(error)[ICMP].nexthopmtu) if error[0] >> 4 == 4 else int(IPv6(error)[ICMPv6PacketTooBig].mtu)


@pytest.mark.parametrize(("inner", "outer"), FAMILIES)
def test_what_is_reported_fits_and_one_byte_more_does_not(inner: int, outer: int) -> None:
    pair = Pair(inner, outer)
    pair.connect()
    pair.send(pair.packet(1, 1480))
    mtu = reported(pair.left.received()[0])
    headers = (20 if inner == 4 else 40) + 8
    pair.send(pair.packet(2, mtu - headers))
    sent = pair.left.sent()
    assert 1500 - 4 < len(sent[0].data) + 8 + (20 if outer == 4 else 40) <= 1500
    pair.send(pair.packet(3, mtu - headers + 1))
    assert pair.left.sent() == []
    assert reported(pair.left.received()[0]) == mtu
    assert pair.left.count("drop_too_big") == 2


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_super_packet_is_measured_by_its_segments(inner: int, proto: str) -> None:
    pair = Pair(inner)
    pair.connect()
    pair.left.engine.send(pair.super_frame(bytes(10_000), 1448, proto), pair.now)
    assert pair.left.sent() == []
    errors = pair.left.received()
    assert len(errors) == 1
    assert pair.left.count("drop_too_big") == 7
    if inner == 4:
        quoted = IP(bytes(IP(errors[0])[ICMP].payload))
        assert quoted.len == 1448 + (52 if proto == "tcp" else 28)


def test_transport_mode_reports_what_fits() -> None:
    pair = Pair(4, 4, Mode.TRANSPORT)
    pair.connect()
    pair.send(pair.packet(1, 1480))
    mtu = reported(pair.left.received()[0])
    pair.send(pair.packet(2, mtu - 28))
    assert 1500 - 4 < len(pair.left.sent()[0].data) + 28 <= 1500


def test_a_narrower_path_is_learnt_and_forgotten() -> None:
    pair = Pair()
    pair.connect()
    local, remote = endpoints()
    pair.left.engine.path_mtu(local, remote, 1300, pair.now)
    pair.send(pair.packet(1, 1300))
    assert reported(pair.left.received()[0]) < 1300
    pair.left.engine.path_mtu(local, remote, 60, pair.now)  # a forged report does not throttle the path to nothing
    pair.send(pair.packet(2, 300))
    assert len(pair.left.sent()) == 1
    pair.now += 700
    assert pair.left.engine.next_deadline() <= pair.now
    pair.left.engine.tick(pair.now)
    pair.send(pair.packet(3, 1300))
    assert len(pair.left.sent()) == 1


@pytest.mark.parametrize("big", [False, True])
def test_packets_without_df_travel_in_fragments(big: bool) -> None:
    pair = Pair()
    pair.connect()
    body = random.Random(1).randbytes(4000)
    source, destination = pair.hosts(9)
    if big:
        pair.left.engine.send(pair.super_frame(body, 1600, "udp", df=False), pair.now)
        pair.left.engine.flush(pair.now)
    else:
        pair.send(bytes(IP(src=source, dst=destination, id=5) / UDP(sport=1, dport=2) / Raw(body)))
    sent = pair.left.sent()
    assert all(len(datagram) + 28 <= 1500 for item in sent for datagram in item.datagrams())
    pair.right.take(sent, pair.now)
    whole = defragment([IP(packet) for packet in pair.right.received()])
    assert b"".join(bytes(packet[UDP].payload) for packet in whole) == body
    assert all(IP(bytes(packet)).chksum == packet.chksum for packet in whole if packet.chksum)


def test_a_path_is_checked_again_when_waiting_packets_leave() -> None:
    pair = Pair()
    pair.send(pair.packet(1, 1300), pair.packet(2, 100))
    pair.left.engine.path_mtu(*endpoints(), 1200, pair.now)
    pair.connect()
    pair.settle()
    assert pair.right.received() == [pair.packet(2, 100)]
    assert len(pair.left.received()) == 1


def test_errors_about_errors_and_too_many_errors_are_not_sent() -> None:
    pair = Pair(config=EngineConfig())
    pair.connect()
    source, destination = pair.hosts(9)
    error = bytes(IP(src=source, dst=destination, flags="DF") / ICMP(type=3, code=1) / Raw(bytes(1460)))
    pair.send(error)
    assert pair.left.received() == []
    pair.send(*[pair.packet(n, 1460) for n in range(300)])
    assert len(pair.left.received()) == 100
    assert pair.left.count("icmp_suppressed") == 201


def test_fragments_pass_through_a_policy_without_ports() -> None:
    pair = Pair()
    pair.connect()
    source, destination = pair.hosts(9)
    whole = IP(bytes(IP(src=source, dst=destination, id=9) / UDP() / Raw(bytes(3000))))
    fragments = [bytes(fragment) for fragment in whole.fragment(800)]
    pair.send(*fragments)
    pair.pass_on()
    assert pair.right.received() == fragments


def test_fragments_that_their_sa_no_longer_takes_are_counted() -> None:
    pair = Pair()
    pair.connect(hard=Lifetime(packets=2))
    source, destination = pair.hosts(9)
    pair.send(bytes(IP(src=source, dst=destination, id=5) / UDP(sport=1, dport=2) / Raw(bytes(6000))))
    assert sum(len(sent.datagrams()) for sent in pair.left.sent()) == 2
    assert pair.left.count("fragments_made") == 5
    assert pair.left.count("drop_sa_exhausted") == 3
    assert pair.left.count("drop_too_big") == 0

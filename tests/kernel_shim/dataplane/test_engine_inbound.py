"""What arrives: replays, early packets, moved peers, foreign inner packets, tunnels into tunnels, garbage."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address

import pytest
from dataplane_pair import OUTER, Gateway, Pair, Sent, endpoints, policy_pair, selector
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP

from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.dataplane.inbound import MAX_LARVAL_OCTETS
from kernel_shim.esp.wire import trailer
from kernel_shim.model import Direction, Endpoint, Expire, Mode, NewMapping, ReqId, SpiRequest, UdpEncapsulation
from kernel_shim.packet import virtio
from kernel_shim.policy.pending import MAX_QUEUE_BYTES, MAX_QUEUE_SEGMENTS
from kernel_shim.sa.entry import LARVAL_PACKETS


def one_by_one(sent: list[Sent]) -> list[Sent]:
    return [Sent(item.local, item.remote, datagram, len(datagram)) for item in sent for datagram in item.datagrams()]


def test_replayed_packets_are_dropped_alone_and_in_batches() -> None:
    pair = Pair()
    pair.connect()
    pair.left.engine.send(pair.super_frame(bytes(20_000), 1000), pair.now)
    sent = pair.left.sent()
    pair.right.take(sent, pair.now)
    assert len(pair.right.received()) == 20
    pair.right.take(sent, pair.now)
    pair.right.take(one_by_one(sent), pair.now)
    assert pair.right.received() == []
    assert pair.right.count("drop_replayed") == 40


def test_a_batch_with_a_gap_a_repetition_and_a_forgery_gives_the_rest() -> None:
    pair = Pair()
    pair.connect()
    packets = [pair.packet(n) for n in range(20)]
    pair.send(*packets)
    datagrams = pair.left.sent()[0].datagrams()
    forged = bytearray(datagrams[7])
    forged[30] ^= 1
    mixed = [*datagrams[:5], *datagrams[6:7], bytes(forged), datagrams[5], *datagrams[5:6], *datagrams[8:]]
    local, remote = endpoints()
    pair.right.engine.receive(remote, local, b"".join(mixed), len(datagrams[0]), pair.now)
    order = [0, 1, 2, 3, 4, 6, 5, *range(8, 20)]
    assert pair.right.received() == [packets[n] for n in order]
    assert pair.right.count("drop_icv_mismatch") == 1
    assert pair.right.count("drop_replayed") == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=120), st.booleans(), st.sampled_from([32, 64, 200]))
def test_whatever_the_network_does_no_packet_arrives_twice(order: list[int], esn: bool, window: int) -> None:
    pair = Pair()
    pair.connect(esn=esn, replay_window=window)
    packets = [pair.packet(n, 40 + n % 3) for n in range(300)]
    pair.send(*packets)
    datagrams = one_by_one(pair.left.sent())
    pair.right.take([datagrams[n] for n in order], pair.now)
    highest, accepted = -1, []
    for number in order:
        if number not in accepted and number > highest - window:
            accepted.append(number)
            highest = max(highest, number)
    assert pair.right.received() == [packets[number] for number in accepted]


@pytest.mark.parametrize("esn", [False, True])
def test_lost_packets_leave_the_rest_of_a_batch_together(esn: bool) -> None:
    pair = Pair()
    pair.connect(esn=esn)
    payload = bytes(random.Random(1).randbytes(30_000))
    pair.left.engine.send(pair.super_frame(payload, 1000), pair.now)
    sent = pair.left.sent()[0]
    datagrams = sent.datagrams()
    left = datagrams[:4] + datagrams[5:9] + datagrams[12:]
    pair.right.engine.receive(sent.remote, sent.local, b"".join(left), sent.segment, pair.now)
    assert len(pair.right.sink.frames) == 3
    assert len(pair.right.received()) == len(left)
    assert pair.right.count("batch_fallbacks") == 0
    pair.right.take(one_by_one([sent]), pair.now)
    assert len(pair.right.received()) == 4
    assert pair.right.count("drop_replayed") == len(left)


@pytest.mark.parametrize("big", [False, True])
def test_transport_mode_behind_a_nat_gets_its_checksums_repaired(big: bool) -> None:
    """The right host knows the left one by its NAT's address; the left one computed its checksums with its own."""
    pair = Pair(4, 4, Mode.TRANSPORT)
    outside = ip_address("203.0.113.7")
    for policy in policy_pair(OUTER[4][1], str(outside), OUTER[4][1], str(outside), Mode.TRANSPORT):
        pair.right.engine.add_policy(policy, pair.now)
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT), pair.now)
    pair.right.engine.add_sa(pair.sa(True, Direction.IN, source=outside), pair.now)
    if big:
        pair.left.engine.send(pair.super_frame(bytes(5000), 1000), pair.now)
    else:
        pair.send(pair.packet(1), pair.packet(2, proto="tcp"))
    for item in pair.left.sent():
        pair.right.engine.receive(item.remote, Endpoint(outside, 1024), item.data, item.segment, pair.now)
    got = pair.right.received()
    assert len(got) == (5 if big else 2)
    for packet in got:
        parsed = IP(packet)
        assert parsed.src == str(outside)
        fresh = parsed.copy()
        del fresh.payload.chksum
        assert bytes(fresh) == packet


def test_packets_for_a_larval_sa_wait_for_its_keys() -> None:
    pair = Pair()
    spi = pair.right.engine.get_spi(SpiRequest(ip_address(OUTER[4][0]), ip_address(OUTER[4][1]), Mode.TUNNEL, ReqId(7)), pair.now).sa.spi
    assert spi & 63 == 0
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT, spi=spi), pair.now)
    packets = [pair.packet(n) for n in range(LARVAL_PACKETS + 36)]
    pair.send(*packets)
    pair.pass_on()
    assert pair.right.received() == []
    pair.right.engine.update_sa(pair.sa(True, Direction.IN, spi=spi), pair.now)
    assert pair.right.received() == packets[:LARVAL_PACKETS]
    assert pair.right.count("drop_larval_overflow") == 36
    pair.send(pair.packet(101))
    pair.pass_on()
    assert pair.right.received() == [pair.packet(101)]


@pytest.mark.parametrize(("size", "fitting"), [(64, MAX_QUEUE_SEGMENTS), (1300, MAX_QUEUE_SEGMENTS), (8000, MAX_QUEUE_BYTES // 8100)])
def test_a_whole_queue_that_a_peer_lets_go_before_our_keys_are_in_arrives(size: int, fitting: int) -> None:
    pair = Pair(config=EngineConfig(udp_segmentation=True, path_mtu=9000))
    packets = [pair.packet(number, size) for number in range(fitting)]
    pair.send(*packets)  # they wait for the SA
    spi = pair.right.engine.get_spi(SpiRequest(ip_address(OUTER[4][0]), ip_address(OUTER[4][1]), Mode.TUNNEL, ReqId(7)), pair.now).sa.spi
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT, spi=spi, acquire=pair.left.acquires()[-1].sequence), pair.now)
    pair.settle()
    assert pair.right.received() == []
    pair.right.engine.update_sa(pair.sa(True, Direction.IN, spi=spi), pair.now)
    assert pair.right.received() == packets


def test_a_larval_sa_ends_and_its_packets_are_counted() -> None:
    pair = Pair()
    request = SpiRequest(ip_address(OUTER[4][0]), ip_address(OUTER[4][1]), Mode.TUNNEL, ReqId(7))
    spi = pair.right.engine.get_spi(request, pair.now).sa.spi
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT, spi=spi), pair.now)
    pair.send(pair.packet(1))
    pair.pass_on()
    pair.now += 1000
    pair.right.engine.tick(pair.now)
    assert pair.right.count("drop_larval_gone") == 1
    assert [event.hard for event in pair.right.events if isinstance(event, Expire)] == [True]
    assert pair.right.engine.sas() == []


def test_a_peer_behind_a_nat_that_moved_is_reported_once_it_is_authentic() -> None:
    pair = Pair()
    pair.connect()
    local, remote = endpoints()
    moved = Endpoint(ip_address("203.0.113.5"), 1024)
    pair.send(*[pair.packet(n) for n in range(3)])
    first, second, third = (item.data for item in one_by_one(pair.left.sent()))
    forged = bytearray(second)
    forged[-1] ^= 1
    engine = pair.right.engine
    engine.receive(remote, moved, bytes(forged), len(forged), pair.now)
    assert not [event for event in pair.right.events if isinstance(event, NewMapping)]
    engine.receive(remote, moved, second, len(second), pair.now)
    engine.receive(remote, local, first, len(first), pair.now + 5)  # late, from where the peer was before
    engine.receive(remote, moved, third, len(third), pair.now + 6)
    mappings = [event for event in pair.right.events if isinstance(event, NewMapping)]
    assert [(mapping.old, mapping.new) for mapping in mappings] == [(local, moved)]


def test_inner_packets_outside_the_sa_or_the_policy_are_dropped() -> None:
    pair = Pair()
    pair.connect(source_selectors=(selector("10.1.0.0/24"),), destination_selectors=(selector("10.2.0.0/16"),))
    # The sender's policies let everything into the SA that its own selectors let; the receiver's do not.
    wide = Pair(policies=False)
    for policy in policy_pair("10.0.0.0/8", "10.0.0.0/8", *OUTER[4]):
        wide.left.engine.add_policy(policy, wide.now)
    wide.connect()
    for host, name in ((300, "drop_selector_mismatch"), (9, None)):
        wide.send(wide.packet(host, host=host))
        pair.right.take(wide.left.sent(), pair.now)
        if name:
            assert pair.right.count(name) == 1
    assert pair.right.received() == [wide.packet(9)]
    other = Pair()
    other.connect()
    source = Pair(policies=False)
    source.nets = ("10.1.0.0/16", "10.9.0.0/16")
    for policy in policy_pair(*source.nets, *OUTER[4]):
        source.left.engine.add_policy(policy, source.now)
    source.connect()
    source.send(source.packet(1))
    source.left.engine.send(source.super_frame(bytes(5000), 1000), source.now)
    other.right.take(source.left.sent(), other.now)
    assert other.right.received() == []
    assert other.right.count("drop_policy_absent") == 6


def test_dummy_padded_and_wrong_inner_packets() -> None:
    pair = Pair()
    pair.connect()
    local, remote = endpoints()
    cipher = pair.cipher(True)  # for sealing what no engine would send
    inner = pair.packet(5)

    def sealed(sequence: int, payload: bytes, next_header: int) -> bytes:
        plaintext = payload + trailer(len(payload), 4, next_header)
        packet = memoryview(bytearray(len(plaintext) + cipher.shape.overhead))
        cipher.seal(sequence, plaintext, packet)
        return bytes(packet)

    cases = [(b"noise", 59), (inner + bytes(100), 4), (inner, 41), (inner[:10], 4), (inner, 17), (b"", 4), (b"", 59)]
    for sequence, (payload, next_header) in enumerate(cases, 1):
        datagram = sealed(sequence, payload, next_header)
        pair.right.engine.receive(remote, local, datagram, len(datagram), pair.now)
    assert pair.right.received() == [inner]
    assert pair.right.count("drop_dummy") == 2
    assert pair.right.count("drop_esp_malformed") == 4


def test_one_tunnel_leads_into_another() -> None:
    """left -> hub (which is also behind another tunnel) -> right, without the hub's host."""
    left, hub, right = Gateway(1), Gateway(2), Gateway(3)
    a, b, c = "192.0.2.1", "192.0.2.2", "192.0.2.3"
    first, second = Pair(policies=False), Pair(policies=False)
    now = 1.0

    def install(gateway: Gateway, mine: str, theirs: str, here: str, there: str, reqid: int) -> None:
        for policy in policy_pair(mine, theirs, here, there, reqid=reqid):
            gateway.engine.add_policy(policy, now)

    install(left, "10.1.0.0/16", "10.2.0.0/16", a, b, 1)
    install(hub, "10.2.0.0/16", "10.1.0.0/16", b, a, 1)
    install(hub, "10.1.0.0/16", "10.2.0.0/16", b, c, 2)
    install(right, "10.2.0.0/16", "10.1.0.0/16", c, b, 2)
    into = {"source": ip_address(a), "destination": ip_address(b), "reqid": ReqId(1)}
    on = {"source": ip_address(b), "destination": ip_address(c), "reqid": ReqId(2), "spi": 0x2000}
    left.engine.add_sa(first.sa(True, Direction.OUT, **into), now)
    hub.engine.add_sa(first.sa(True, Direction.IN, **into), now)
    right.engine.add_sa(second.sa(True, Direction.IN, **on), now)
    packet, frame = first.packet(1), first.super_frame(bytes(range(250)) * 40, 1000)
    left.engine.send(virtio.NO_OFFLOAD + packet, now)
    left.engine.send(frame, now)
    left.engine.flush(now)
    hub.take(left.sent(), now)
    assert hub.received() == []
    assert len(hub.acquires()) == 1  # the onward SA is missing; the packets wait for it
    hub.engine.add_sa(second.sa(True, Direction.OUT, **on), now)
    right.take(hub.sent(), now)
    got = [IP(raw) for raw in right.received()]
    assert len(got) == 11
    assert {piece.ttl for piece in got} == {63}
    assert b"".join(bytes(piece.payload.payload) for piece in got[1:]) == bytes(range(250)) * 40
    dying = bytearray(packet)
    dying[8] = 1
    dying[10:12] = IP(bytes(IP(packet).copy())).chksum.to_bytes(2, "big")
    left.engine.send(virtio.NO_OFFLOAD + bytes(dying), now)
    left.engine.flush(now)
    hub.take(left.sent(), now)
    assert hub.count("drop_ttl_expired") == 1
    assert IP(hub.received()[0])[ICMP].type == 11


def test_a_policy_for_everything_does_not_send_packets_back_where_they_came_from() -> None:
    pair = Pair(policies=False)
    for gateway, here, there in ((pair.left, *OUTER[4]), (pair.right, *OUTER[4][::-1])):
        for policy in policy_pair("0.0.0.0/0", "0.0.0.0/0", here, there):
            gateway.engine.add_policy(policy, pair.now)
    pair.connect()
    pair.send(pair.packet(1))
    pair.pass_on()
    assert pair.right.received() == [pair.packet(1)]


def test_damage_from_before_the_tunnel_stays_visible() -> None:
    pair = Pair()
    pair.connect()
    payload = random.Random(3).randbytes(10_000)
    frame = pair.super_frame(payload, 1000)
    pair.left.engine.send(frame, pair.now)
    pair.pass_on()
    packets = [bytearray(packet) for packet in pair.right.received()]
    packets[4][200] ^= 0xFF  # and the TCP checksum stays
    pair.send(*[bytes(packet) for packet in packets])
    pair.pass_on()
    assert pair.right.received() == [bytes(packet) for packet in packets]


def test_an_unknown_spi_a_keepalive_and_a_short_datagram() -> None:
    pair = Pair()
    local, remote = endpoints()
    for datagram in (b"\xff", b"\x01", b"", bytes(4), b"\x00\x00\x10\x00" + bytes(60)):
        pair.right.engine.receive(remote, local, datagram, len(datagram), pair.now)
    assert pair.right.count("drop_keepalive") == 1
    assert pair.right.count("drop_sa_unknown") == 1
    assert pair.right.count("drop_esp_malformed") == 2


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(-1, 500), st.booleans())
def test_garbage_inbound_raises_nothing(data: bytes, segment: int, known: bool) -> None:
    pair = _fuzzed
    local, remote = endpoints()
    if known:
        data = b"".join(pair.spi.to_bytes(4, "big") + data[i : i + 60] for i in range(0, len(data), 64))
    pair.right.engine.receive(remote, local, data, segment, pair.now)
    assert pair.right.received() == []


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 60), st.binary(min_size=1, max_size=4), st.integers(0, 3000), st.booleans(), st.integers(0, 255))
def test_damaged_frames_outbound_raise_nothing(position: int, damage: bytes, cut: int, big: bool, noise: int) -> None:
    pair = _fuzzed
    frame = bytearray(pair.super_frame(bytes(2900), 1000) if big else virtio.NO_OFFLOAD + pair.packet(1))
    frame[position : position + len(damage)] = damage
    del frame[len(frame) - min(cut, len(frame)) :]
    pair.left.engine.send(bytes(frame), pair.now)
    pair.left.engine.send(random.Random(noise).randbytes(len(frame)), pair.now)
    pair.left.engine.flush(pair.now)
    pair.right.take(pair.left.sent(), pair.now)
    pair.left.sink.frames.clear()
    pair.left.sink.clear.clear()
    pair.right.sink.frames.clear()


_fuzzed = Pair()
_fuzzed.connect()


def test_a_peer_that_moved_is_followed_by_an_update_of_sa_and_policy() -> None:
    pair = Pair()
    pair.connect()
    pair.send(pair.packet(1))
    before = pair.left.sent()[0]
    moved = ip_address("198.51.100.7")
    left = pair.left.engine
    left.update_sa(replace(pair.sa(True, Direction.OUT), destination=moved, encapsulation=UdpEncapsulation(4500, 61000)), pair.now)
    left.update_sa(replace(pair.sa(False, Direction.IN), source=moved, encapsulation=UdpEncapsulation(61000, 4500)), pair.now)
    for policy in left.policies():
        template = policy.templates[0]
        side = "destination" if policy.direction is Direction.OUT else "source"
        left.update_policy(replace(policy, templates=(replace(template, **{side: moved}),)), pair.now)
    pair.send(pair.packet(2))
    after = pair.left.sent()[0]
    assert after.remote == Endpoint(moved, 61000)
    assert int.from_bytes(after.data[4:8], "big") == int.from_bytes(before.data[4:8], "big") + 1
    assert pair.left.acquires() == []
    back = pair.packet(3, left=False)
    pair.send(back, left=False)
    for item in pair.right.sent():
        left.receive(item.remote, Endpoint(moved, 61000), item.data, item.segment, pair.now)
    assert pair.left.received() == [back]
    assert [event for event in pair.left.events if isinstance(event, NewMapping)] == []


def test_what_waits_for_all_larval_sas_is_bounded() -> None:
    pair = Pair(policies=False)
    local, remote = endpoints()
    engine = pair.right.engine

    def fill() -> int:
        for _ in range(300):
            spi = engine.get_spi(SpiRequest(local.address, remote.address, Mode.TUNNEL, ReqId(7)), pair.now).sa.spi
            flood = (spi.to_bytes(4, "big") + bytes(1396)) * 46
            engine.receive(remote, local, flood, 1400, pair.now)
        return 300 * 46 - pair.right.count("drop_larval_overflow") - pair.right.count("drop_larval_gone")

    assert fill() == MAX_LARVAL_OCTETS // 1400
    pair.now += 1000
    engine.tick(pair.now)
    assert pair.right.count("drop_larval_gone") == MAX_LARVAL_OCTETS // 1400
    before = pair.right.count("drop_larval_overflow")
    fill()
    assert pair.right.count("drop_larval_overflow") == 2 * before, "all room is free again"

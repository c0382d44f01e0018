"""Which SA, peer and flow a label belongs to: what comes by another way carries none, also once a packet like it was let in."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from dataplane_pair import OUTER, Pair, policy_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from label_pair import BLUE, RED, THERE, Pes, allowed, packet
from scapy.layers.inet import IP, TCP
from scapy.packet import Raw

from kernel_shim.model import Action, AddressRange, Direction, Endpoint, IPAddress, Mode, Policy, ReqId, Selector, TrafficSelector
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from kernel_shim.mpls.labels import Entry, Label, write_stack
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, TtlModel
from kernel_shim.mpls.node import LabelBinding, Tunnel, VrfRoute
from kernel_shim.packet import virtio


def labelled(*labels: int, ttl: int = 64) -> bytes:
    return write_stack([Entry(Label(label), 0, ttl) for label in labels]) + packet()


def seal(pair: Pes, frame: bytes) -> None:
    """The left one sends this IP packet in its SA, whatever the right one thinks of that SA."""
    pair.send(frame)
    pair.pass_on()


def gre(payload: bytes, source: str = OUTER[4][0]) -> bytes:
    return bytes(IP(src=source, dst=OUTER[4][1], proto=47) / Raw(bytes.fromhex("00008847") + payload))


def into(pair: Pes, **changes: object) -> None:
    """The right one's SA in is another than the left one believes."""
    pair.right.engine.add_sa(pair.sa(True, Direction.IN, **changes), pair.now)
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT), pair.now)


def test_an_sa_that_came_before_its_tunnel_carries_labels() -> None:
    pair = Pes()
    tunnel = pair.right.engine
    tunnel.remove_label_entry(Tunnel("left", ip_address(OUTER[4][1]), ip_address(OUTER[4][0])).key, pair.now)
    pair.connect()
    seal(pair, gre(labelled(RED)))
    assert pair.right.landed("red") == []
    assert len(pair.right.received()) == 1  # GRE like any other
    tunnel.put_label_entry(Tunnel("left", ip_address(OUTER[4][1]), ip_address(OUTER[4][0])), pair.now)
    seal(pair, gre(labelled(RED)))
    assert pair.right.landed("red") == [packet()]


def test_an_sa_for_something_else_carries_no_labels() -> None:
    """Between the same addresses: its own selectors, and whose policy it is."""
    dns = (TrafficSelector(AddressRange.host(ip_address(OUTER[4][0])), 17),)
    for changes, reason in (({"source_selectors": dns}, "selector_mismatch"), ({"reqid": ReqId(8)}, "policy_mismatch")):
        pair = Pes()
        into(pair, **changes)
        for _ in range(3):
            seal(pair, gre(labelled(RED)))
        assert pair.right.landed("red") == pair.right.received() == []
        assert pair.right.count(f"drop_{reason}") == 3


def test_an_sa_from_another_address_is_not_the_peers() -> None:
    pair = Pes()
    into(pair, source=ip_address("192.0.2.9"))
    for policy in policy_pair("192.0.2.2/32", "192.0.2.9/32", "192.0.2.2", "192.0.2.9", Mode.TRANSPORT):
        pair.right.engine.add_policy(policy, pair.now)
    seal(pair, gre(labelled(RED)))
    assert pair.right.landed("red") == []
    (host,) = pair.right.received()  # GRE like any other
    assert IP(host).src == "192.0.2.9"


def test_what_one_peer_may_send_another_may_not_even_if_it_is_remembered() -> None:
    """The same octets out of two SAs."""
    pair = Pes()
    pair.right.engine.put_label_entry(Tunnel("third", ip_address(OUTER[4][1]), ip_address("192.0.2.9")), pair.now)
    pair.right.engine.put_label_entry(Peer("third", allowed(BLUE)), pair.now)
    for policy in policy_pair("192.0.2.2/32", "192.0.2.9/32", "192.0.2.2", "192.0.2.9", Mode.TRANSPORT):
        pair.right.engine.add_policy(policy, pair.now)
    into(pair, source=ip_address("192.0.2.9"))
    pair.next_spis()
    pair.connect()
    for _ in range(2):
        seal(pair, gre(labelled(RED)))
    assert pair.right.landed("red") == [packet()] * 2
    pair.left.engine.delete_sa(pair.sa(True, Direction.OUT).id)  # the older one is left
    for _ in range(2):
        seal(pair, gre(labelled(RED)))
    assert pair.right.landed("red") == []
    assert pair.right.count("drop_mpls_label_forbidden") == 2


@pytest.mark.parametrize("what", ["another source", "a fragment", "another encapsulation"])
def test_other_packets_of_a_tunnel_sa_are_the_hosts(what: str) -> None:
    pair = Pes(mode=Mode.TUNNEL)
    pair.protect(("192.0.2.0/24", "192.0.2.0/24"))
    pair.connect()
    frame = gre(labelled(RED), "192.0.2.77" if what == "another source" else OUTER[4][0])
    if what == "a fragment":
        first = IP(frame)
        first.flags = "MF"
        del first.chksum
        frame = bytes(first)
    elif what == "another encapsulation":
        frame = bytes(IP(src=OUTER[4][0], dst=OUTER[4][1], proto=137) / Raw(labelled(RED)))
    seal(pair, frame)
    assert pair.right.landed("red") == []
    assert pair.right.received() == [frame]


def test_what_stands_behind_a_packet_is_left_out() -> None:
    pair = Pes()
    pair.connect()
    for number in range(3):
        seal(pair, gre(labelled(RED) + bytes(number)))
    pair.send(*[gre(write_stack([Entry(Label(RED), 0, 64)]) + packet(number) + b"more") for number in range(8)])
    pair.pass_on()
    assert pair.right.landed("red") == [packet()] * 3 + [packet(number) for number in range(8)]


def test_neighbours_under_other_labels_are_not_joined() -> None:
    """Rows of one receive: alike in all but the VRF that the label says."""
    pair = Pes()
    pair.connect()
    flow = [
        bytes(IP(src="10.0.0.5", dst="10.0.1.5", flags="DF", ttl=60) / TCP(sport=5, dport=6, seq=1000 + 500 * n, flags="A") / Raw(bytes(500)))
        for n in range(12)
    ]
    labels = [RED, RED, RED, BLUE, BLUE, RED, BLUE, RED, RED, RED, RED, BLUE]
    pair.send(*[gre(write_stack([Entry(Label(label), 0, 64)]) + item) for label, item in zip(labels, flow, strict=True)])
    pair.pass_on()
    for name, label in (("red", RED), ("blue", BLUE)):
        assert pair.right.landed(name) == [item for its, item in zip(labels, flow, strict=True) if its == label]


def test_nor_is_the_last_short_one_of_a_flow() -> None:
    """It comes with the datagrams before it, and would end their super-packet."""
    pair = Pes()
    pair.connect()
    header = IP(src="10.0.0.5", dst="10.0.1.5", flags="DF", ttl=60)
    flow = [bytes(header / TCP(sport=5, dport=6, seq=1000 + 500 * number, flags="A") / Raw(bytes(500 if number < 39 else 200))) for number in range(40)]
    pair.send(*[gre(write_stack([Entry(Label(RED if number < 39 else BLUE), 0, 64)]) + item) for number, item in enumerate(flow)])
    assert len(pair.left.sink.esp) == 1
    pair.pass_on()
    assert (pair.right.landed("red"), pair.right.landed("blue")) == (flow[:39], flow[39:])


def test_each_router_alert_is_counted() -> None:
    pair = Pes()
    pair.connect()
    for _ in range(3):
        seal(pair, gre(labelled(1, RED)))
    assert pair.right.count("router_alerts") == 3
    assert pair.right.landed("red") == [packet()] * 3


def test_ip_without_a_label_left_goes_only_where_it_is_protected() -> None:
    pair = Pes()
    pair.connect()
    pair.right.engine.put_label_entry(LabelBinding(Label(RED), (Nhlfe(ToPeer("left")),)), pair.now)
    seal(pair, gre(labelled(RED)))
    everywhere = AddressRange.of(ip_network("0.0.0.0/0"))
    pair.right.engine.add_policy(Policy(Selector(everywhere, everywhere), Direction.OUT, Action.BYPASS, 900), pair.now)
    seal(pair, gre(labelled(RED)))
    assert pair.right.sink.clear == pair.right.sent() == []
    assert pair.right.count("drop_policy_absent") == 2


def test_what_is_on_the_customers_own_side_does_not_come_back() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(left=False))  # to HERE
    assert pair.left.count("drop_mpls_no_route") == 1
    assert pair.left.count("icmp_errors") == 1
    assert packet(left=False) not in pair.left.landed("red")


def test_a_managed_network_does_not_undo_a_policy() -> None:
    pair = Pair(mode=Mode.TRANSPORT, policies=False)
    engine = pair.left.engine
    local, remote = (ip_address(address) for address in OUTER[4])
    engine.put_label_entry(VrfRoute("red", ip_network(THERE), (Nhlfe(ToPeer("right"), (Label(RED),)),)), pair.now)
    engine.put_label_entry(Tunnel("right", local, remote, Encapsulation.GRE, managed=True), pair.now)
    engine.add_policy(Policy(Selector(AddressRange.host(local), AddressRange.host(remote)), Direction.OUT, Action.DISCARD, 10), pair.now)
    frame = virtio.NO_OFFLOAD + packet()
    engine.outbound_buffer[: len(frame)] = frame
    engine.from_vrf("red", len(frame), pair.now)
    assert pair.left.sink.clear == []
    assert pair.left.count("drop_policy_discard") == 1


@pytest.mark.parametrize("encapsulation", Encapsulation)
def test_labels_in_clear_come_from_managed_peers_alone(encapsulation: Encapsulation) -> None:
    pair = Pair(mode=Mode.TRANSPORT, policies=False)
    engine = pair.right.engine
    local, remote = (ip_address(address) for address in OUTER[4][::-1])
    ports = (UDP_PORT, 50000) if encapsulation is Encapsulation.UDP else (0, 0)
    header = b"" if encapsulation is Encapsulation.UDP else encapsulation.header(0)

    def arrive(payload: bytes, source: IPAddress = remote, how: Encapsulation = encapsulation) -> None:
        engine.labels_in_clear(Endpoint(local, ports[0]), Endpoint(source, ports[1]), how, memoryview(payload), pair.now)

    engine.put_label_entry(Peer("left", allowed(RED)), pair.now)
    for label in (RED, BLUE):
        engine.put_label_entry(LabelBinding(Label(label), (Nhlfe(ToInterface("red"), ttl=TtlModel.PIPE),)), pair.now)
    engine.put_label_entry(Tunnel("left", local, remote, encapsulation), pair.now)
    arrive(header + labelled(RED))
    engine.put_label_entry(Tunnel("left", local, remote, encapsulation, managed=True), pair.now)
    arrive(header + labelled(RED), ip_address("192.0.2.9"))
    arrive(header + labelled(RED), how=next(it for it in Encapsulation if it is not encapsulation))
    assert pair.right.count("drop_mpls_peer_unknown") == 3
    assert pair.right.landed("red") == []
    arrive(header + labelled(RED))
    assert pair.right.landed("red") == [packet()]
    arrive(header + labelled(BLUE))
    arrive(header + labelled(RED)[:3])
    assert (pair.right.count("drop_mpls_label_forbidden"), pair.right.count("drop_mpls_no_bottom")) == (1, 1)
    if encapsulation is Encapsulation.GRE:
        arrive(bytes.fromhex("00000800") + labelled(RED))
        assert pair.right.count("drop_mpls_encapsulation") == 1
    for policy in policy_pair("192.0.2.2/32", "192.0.2.1/32", "192.0.2.2", "192.0.2.1", Mode.TRANSPORT):
        engine.add_policy(policy, pair.now)
    arrive(header + labelled(RED))
    assert pair.right.landed("red") == []
    assert pair.right.count("drop_clear_where_protected") == 1


payloads_of_tunnels = st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda data: labelled(RED) + data))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Encapsulation)), st.lists(payloads_of_tunnels, max_size=8))
def test_any_octets_in_a_tunnel_end_somewhere(encapsulation: Encapsulation, payloads: list[bytes]) -> None:
    """Out of an SA and in clear: each is landed, handed to the host or counted, and nothing is raised."""
    pair = Pes(encapsulation)
    pair.connect()
    engine = pair.right.engine
    for payload in payloads:
        pair.send(bytes(IP(src=OUTER[4][0], dst=OUTER[4][1], proto=int(encapsulation)) / Raw(payload)))
    pair.pass_on()
    arrived = sum(len(pair.right.landed(name)) for name in ("red", "blue")) + len(pair.right.received())
    assert arrived + sum(count for name, count in engine.statistics().items() if name.startswith("drop_")) >= engine.statistics()["in_packets"]
    local, remote = (ip_address(address) for address in OUTER[4][::-1])
    engine.put_label_entry(Tunnel("left", local, remote, encapsulation, managed=True), pair.now)
    engine.flush_policies()
    for payload in payloads:
        engine.labels_in_clear(Endpoint(local, 0), Endpoint(remote, 0), encapsulation, memoryview(payload), pair.now)

"""Two engines as PE routers: packets of a VRF come out in that VRF and nowhere else, the first one too."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from dataplane_pair import OUTER, Pair, packets_of
from label_pair import BLUE, OTHERS, RED, THERE, Pes, allowed, packet
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import GRE
from scapy.packet import Raw

from kernel_shim.model import AddressRange, Direction, Migration, Mode, Move, PolicyIndex, ReqId
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from kernel_shim.mpls.labels import Entry, Label, write_stack
from kernel_shim.mpls.lfib import Key, Nhlfe, Peer, ToInterface, ToPeer, TtlModel
from kernel_shim.mpls.node import Classes, LabelBinding, Tunnel, Vrf, VrfRoute
from kernel_shim.packet import virtio
from kernel_shim.packet.virtio import VnetHeader

MODES = [(encapsulation, mode) for encapsulation in Encapsulation for mode in Mode]


@pytest.mark.parametrize(("encapsulation", "mode"), MODES)
@pytest.mark.parametrize("version", [4, 6])
def test_each_vrf_gets_its_own_packets(encapsulation: Encapsulation, mode: Mode, version: int) -> None:
    pair = Pes(encapsulation, mode)
    pair.connect()
    red, blue, back = packet(1, version=version), packet(2, version=version), packet(3, left=False, version=version)
    pair.put("red", red)
    pair.put("blue", blue)
    pair.put("blue", back, left=False)
    pair.pass_on()
    assert pair.right.landed("red") == [red]
    assert pair.right.landed("blue") == [blue]
    assert pair.left.landed("blue") == [back]
    assert pair.left.landed("red") == pair.right.received() == pair.left.received() == []


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize(("encapsulation", "mode"), MODES)
def test_super_packets_stay_super(encapsulation: Encapsulation, mode: Mode, outer: int) -> None:
    pair = Pes(encapsulation, mode, outer)
    pair.connect()
    payload = random.Random(5).randbytes(50_123)
    whole = bytes(IP(src="10.0.0.5", dst="10.0.1.5", flags="DF", ttl=60) / TCP(sport=5, dport=6, seq=1000, flags="PA") / Raw(payload))
    frame = VnetHeader(virtio.NEEDS_CHECKSUM, virtio.GSO_TCPV4, 0, 1300, 20, 16).pack() + whole
    pair.put("red", frame, raw=True)
    assert len(pair.left.sink.esp) <= 2
    pair.pass_on()
    pair.right.engine.flush(pair.now)
    frames = pair.right.sink.vrfs["red"]
    assert len(frames) == 1
    assert packets_of(frames[0]) == packets_of(frame)


def test_the_wire_holds_what_rfc_4023_says() -> None:
    pair = Pes(ttl=TtlModel.UNIFORM)
    pair.connect()
    pair.put("red", packet(7, ttl=33, dscp=46))
    (plain,) = pair.plaintext(pair.left)
    gre = GRE(plain)
    assert (gre.proto, gre.version) == (0x8847, 0)
    top = MPLS(plain[4:])
    assert (top.label, top.cos, top.s, top.ttl) == (RED, 5, 1, 33)
    assert plain[8:] == packet(7, ttl=33, dscp=46)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("encapsulation", Encapsulation)
def test_each_packet_of_a_flow_has_its_own_ttl_and_class(encapsulation: Encapsulation, version: int) -> None:
    pair = Pes(encapsulation, ttl=TtlModel.UNIFORM)
    pair.connect()
    wanted = [(33, 46), (12, 46), (33, 0), (33, 46), (255, 8), (1, 63)] + [(ttl, 10) for ttl in range(2, 100)]
    pair.put("red", *[packet(7, version=version, ttl=ttl, dscp=dscp) for ttl, dscp in wanted])
    tops = [MPLS(plain[encapsulation.overhead :]) for plain in pair.plaintext(pair.left)]
    assert [(top.ttl, top.cos) for top in tops] == [(ttl, dscp >> 3) for ttl, dscp in wanted]


def test_udp_ports_tell_flows_apart() -> None:
    pair = Pes(Encapsulation.UDP)
    pair.connect()
    flows = [bytes(IP(src="10.0.0.5", dst="10.0.1.5", flags="DF") / UDP(sport=port, dport=9) / Raw(b"x")) for port in range(1000, 1040)]
    pair.put("red", *flows)
    headers = [UDP(plain) for plain in pair.plaintext(pair.left)]
    assert {header.dport for header in headers} == {UDP_PORT}
    assert len({header.sport for header in headers}) > 30


def test_the_first_packets_wait_and_go_in_order() -> None:
    pair = Pes()
    packets = [packet(number) for number in range(20)]
    pair.put("red", *packets)
    assert pair.left.sent() == []
    (acquire,) = pair.left.acquires()
    assert acquire.flow is not None
    assert (str(acquire.flow.source), str(acquire.flow.destination), acquire.flow.protocol) == (*OUTER[4], 47)
    pair.connect()
    pair.settle()
    assert pair.right.landed("red") == packets
    assert pair.left.count("pending_packets") == 0


def test_a_refused_tunnel_is_told_to_the_customer_alone() -> None:
    pair = Pes()
    pair.put("red", packet())
    (acquire,) = pair.left.acquires()
    pair.left.engine.acquire_failed(acquire.sequence, 111, pair.now)
    (error,) = pair.left.landed("red")
    assert IP(error)[ICMP].type == 3
    assert pair.left.received() == []


def test_a_flow_of_a_vrf_costs_one_probe_once_it_is_known() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(0))
    before = pair.left.engine.statistics()
    pair.put("red", *[packet(number) for number in range(50)])
    after = pair.left.engine.statistics()
    assert after["bundle_hits"] - before["bundle_hits"] == 50
    assert after["spd_lookups"] == before["spd_lookups"]


def test_new_routes_count_for_the_next_packet() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(1))
    pair.left.engine.put_label_entry(VrfRoute("red", ip_network(THERE), (Nhlfe(ToPeer("right"), (Label(BLUE),)),)), pair.now)
    pair.put("red", packet(2))
    pair.pass_on()
    assert pair.right.landed("red") == [packet(1)]
    assert len(pair.right.landed("blue")) == 1


@pytest.mark.parametrize(("df", "version"), [(True, 4), (True, 6)])
def test_too_big_is_told_to_the_customer(df: bool, version: int) -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(1, size=1460, version=version))
    assert pair.left.sent() == []
    (error,) = pair.left.landed("red")
    assert pair.left.count("drop_too_big") == 1
    mtu = IP(error)[ICMP].nexthopmtu if version == 4 else int.from_bytes(error[44:48], "big")
    fitting = packet(1, size=mtu - (32 if version == 4 else 52), version=version)
    assert len(fitting) == mtu
    pair.put("red", fitting)
    pair.pass_on()
    assert pair.right.landed("red") == [fitting]


def test_what_may_be_fragmented_arrives_in_fragments() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(1, size=3000, df=False))
    pair.pass_on()
    pieces = pair.right.landed("red")
    assert len(pieces) == 3
    assert b"".join(bytes(IP(piece).payload) for piece in pieces) == packet(1, size=3000)[20:]


def test_no_route_is_told_to_the_customer() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", bytes(IP(src="10.0.0.5", dst="172.16.0.1") / UDP() / Raw(b"x")))
    (error,) = pair.left.landed("red")
    assert (IP(error)[ICMP].type, IP(error)[ICMP].code) == (3, 1)
    assert pair.left.count("drop_mpls_no_route") == 1


# ---------------------------------------------------------------- what may not come in


def forge(pair: Pes, payload: bytes) -> None:
    """The left peer, with its keys, sends this GRE payload."""
    frame = bytes(IP(src=OUTER[4][0], dst=OUTER[4][1], proto=47) / Raw(bytes.fromhex("00008847") + payload))
    pair.send(frame)
    pair.pass_on()


def labelled(*labels: int, ttl: int = 64) -> bytes:
    return write_stack([Entry(Label(label), 0, ttl) for label in labels]) + packet()


def test_a_forged_label_goes_nowhere() -> None:
    pair = Pes()
    pair.connect()
    pair.right.engine.put_label_entry(Vrf("green", "vpn-green"), pair.now)
    pair.right.engine.put_label_entry(LabelBinding(Label(OTHERS), (Nhlfe(ToInterface("green")),)), pair.now)
    forge(pair, labelled(OTHERS))
    forge(pair, labelled(RED, OTHERS))
    forge(pair, labelled(500))
    for name in ("red", "blue", "green"):
        assert pair.right.landed(name) == []
    assert pair.right.count("drop_mpls_label_forbidden") == 2
    assert pair.right.count("drop_mpls_not_bottom") == 1
    forge(pair, labelled(RED))
    assert pair.right.landed("red") == [packet()]


def test_broken_stacks_are_counted() -> None:
    pair = Pes()
    pair.connect()
    for payload in (b"", labelled(RED)[:3], bytes.fromhex("00064040") * 40, bytes.fromhex("00064040") * 3):
        forge(pair, payload)
    forge(pair, labelled(RED) + b"")
    assert pair.right.count("drop_mpls_no_bottom") == 3
    assert pair.right.count("drop_mpls_too_deep") == 1
    pair.send(bytes(IP(src=OUTER[4][0], dst=OUTER[4][1], proto=47) / Raw(bytes.fromhex("00000800") + packet())))
    pair.pass_on()
    assert pair.right.count("drop_mpls_encapsulation") == 1
    assert pair.right.received() == []


def test_a_peer_that_is_dismissed_sends_no_more() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet())
    pair.pass_on()
    assert pair.right.landed("red")
    pair.right.engine.remove_label_entry(Peer("left", allowed()).key, pair.now)
    pair.put("red", packet())
    pair.pass_on()
    assert pair.right.landed("red") == []
    assert pair.right.count("drop_mpls_peer_unknown") == 1


def test_labels_never_leave_without_protection() -> None:
    pair = Pair(mode=Mode.TRANSPORT, policies=False)
    engine = pair.left.engine
    local, remote = (ip_address(address) for address in OUTER[4])
    engine.put_label_entry(VrfRoute("red", ip_network(THERE), (Nhlfe(ToPeer("right"), (Label(RED),)),)), pair.now)
    for managed in (False, True):
        engine.put_label_entry(Tunnel("right", local, remote, Encapsulation.GRE, managed), pair.now)
        frame = virtio.NO_OFFLOAD + packet()
        engine.outbound_buffer[: len(frame)] = frame
        engine.from_vrf("red", len(frame), pair.now)
        engine.flush(pair.now)
        if not managed:
            assert pair.left.sink.clear == []
            assert pair.left.count("drop_policy_discard") == 1
    (clear,) = pair.left.sink.clear
    outer = IP(clear[virtio.LENGTH :])
    assert (outer.src, outer.dst, outer.proto) == (*OUTER[4], 47)
    assert bytes(outer.payload)[8:] == packet()
    assert outer.chksum == IP(bytes(outer)).chksum


# ---------------------------------------------------------------- through a node


def test_a_label_is_swapped_on_its_way_back() -> None:
    """The right one is a P router for this label: out by the tunnel that it came from."""
    pair = Pes()
    pair.connect()
    pair.right.engine.put_label_entry(LabelBinding(Label(RED), (Nhlfe(ToPeer("left"), (Label(BLUE),)),)), pair.now)
    pair.left.engine.put_label_entry(LabelBinding(Label(BLUE), (Nhlfe(ToInterface("blue"), ttl=TtlModel.PIPE),)), pair.now)
    pair.put("red", packet(2))
    pair.pass_on()
    pair.pass_on()
    assert pair.left.landed("blue") == [packet(2)]


def test_a_hub_sends_whole_batches_on() -> None:
    pair = Pes()
    pair.connect()
    pair.right.engine.put_label_entry(VrfRoute("red", ip_network(THERE), (Nhlfe(ToPeer("left"), (Label(BLUE),), TtlModel.PIPE),)), pair.now)
    pair.left.engine.put_label_entry(LabelBinding(Label(BLUE), (Nhlfe(ToInterface("blue"), ttl=TtlModel.PIPE),)), pair.now)
    pair.put("red", *[packet(number, ttl=60) for number in range(30)])
    pair.pass_on()
    pair.pass_on()
    assert pair.left.landed("blue") == [packet(number, ttl=59) for number in range(30)]
    assert pair.right.count("hairpinned") > 0


@pytest.mark.parametrize("many", [False, True])
def test_uniform_ttl_and_class_reach_the_customer(many: bool) -> None:
    pair = Pes(ttl=TtlModel.UNIFORM)
    pair.connect()
    pair.put("red", *[packet(number, ttl=20, dscp=46) for number in range(12 if many else 1)])
    pair.pass_on()
    out = [IP(piece) for piece in pair.right.landed("red")]
    assert {(it.ttl, it.tos >> 2) for it in out} == {(20, 46)}
    assert len(out) == (12 if many else 1)


def test_the_cache_shows_vrf_and_labels() -> None:
    pair = Pes()
    pair.connect()
    pair.put("red", packet(1))
    pair.put("blue", packet(2))
    pair.pass_on()
    shown = {bundle.vrf: bundle for bundle in pair.left.engine.cached_bundles()}
    assert {vrf: (it.peer, it.labels, str(it.destination)) for vrf, it in shown.items()} == {
        "red": ("right", (RED,), "10.0.1.5"),
        "blue": ("right", (BLUE,), "10.0.1.5"),
    }
    assert all(bundle.sa is not None and bundle.limit for bundle in shown.values())


def test_what_is_passed_on_is_shown_by_its_peer() -> None:
    pair = Pes()
    pair.connect()
    pair.right.engine.put_label_entry(LabelBinding(Label(RED), (Nhlfe(ToPeer("left"), (Label(BLUE),)),)), pair.now)
    pair.put("red", packet(2))
    pair.pass_on()
    assert [(bundle.vrf, bundle.peer, bundle.labels) for bundle in pair.right.engine.cached_bundles()] == [("", "left", ())]


def test_the_nodes_own_classes_count() -> None:
    pair = Pes(ttl=TtlModel.UNIFORM)
    pair.left.engine.put_label_entry(Classes(ClassMap.class_selectors().but({46: 1}, {})), pair.now)
    pair.connect()
    pair.put("red", packet(7, ttl=33, dscp=46))
    (plain,) = pair.plaintext(pair.left)
    assert MPLS(plain[4:]).cos == 1
    pair.left.engine.remove_label_entry(Key("classes", ()), pair.now)
    pair.put("red", packet(7, ttl=33, dscp=46))
    assert MPLS(pair.plaintext(pair.left)[1][4:]).cos == 5


def test_an_sa_that_moved_carries_the_labels_of_the_tunnel_between_its_new_ends() -> None:
    pair = Pes()
    pair.connect()
    left, right = (ip_address(address) for address in OUTER[4])
    roamed, engine = ip_address("198.51.100.7"), pair.right.engine
    (policy,) = (policy for policy in engine.policies() if policy.direction is Direction.IN)
    engine.put_label_entry(Tunnel("left", right, roamed), pair.now)
    engine.migrate(Migration(Direction.IN, policy.selector, (Move(Mode.TRANSPORT, ReqId(0), left, right, roamed, right),)), pair.now)
    (policy,) = (policy for policy in engine.policies() if policy.direction is Direction.IN)
    engine.add_policy(replace(policy, selector=replace(policy.selector, source=AddressRange.host(roamed)), index=PolicyIndex(0)), pair.now)
    pair.put("red", packet(1))
    pair.right.take([replace(sent, local=sent.local._replace(address=roamed)) for sent in pair.left.sent()], pair.now)
    assert pair.right.landed("red") == [packet(1)]

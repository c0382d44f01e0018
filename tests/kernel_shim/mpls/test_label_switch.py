"""Packets through one node, as RFC 3032, 3443, 3270, 4950 and 6790 have them; packets are made and read by scapy."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network

import pytest
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet, Raw

from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import ENTROPY_INDICATOR, MAX_DEPTH, Entry, Label, LabelRange, LabelSet, read_stack, write_stack
from kernel_shim.mpls.lfib import PLATFORM, Lfib, Nhlfe, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.mpls.switch import AsIp, LabelSwitch, Outcome
from kernel_shim.reasons import DropReason

UNIFORM, PIPE, SHORT = TtlModel.UNIFORM, TtlModel.PIPE, TtlModel.SHORT_PIPE
P1 = "p1"  # the peer that sends


def ip4(ttl: int = 64, dscp: int = 0, size: int = 100, df: bool = True, src: str = "10.0.0.1", dst: str = "10.0.1.1") -> bytes:
    return bytes(IP(src=src, dst=dst, ttl=ttl, tos=dscp << 2 | 1, flags="DF" if df else 0, id=7) / UDP(sport=1000, dport=2000) / Raw(bytes(size)))


def ip6(ttl: int = 64, dscp: int = 0, size: int = 100) -> bytes:
    return bytes(IPv6(src="2001:db8::1", dst="2001:db8:1::1", hlim=ttl, tc=dscp << 2 | 1) / UDP(sport=1000, dport=2000) / Raw(bytes(size)))


def stack(*entries: tuple[int, int, int]) -> bytes:
    """Label, class, TTL."""
    return write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in entries])


class Node:
    def __init__(self, limit: int = 1400, address: Callable[[str, int], bytes] = lambda _vrf, _version: b"") -> None:
        self.lfib = Lfib()
        self.lfib.admit(Peer(P1, LabelSet([LabelRange(Label(16), Label(999))])))
        self.switch = LabelSwitch(Forwarder(self.lfib), lambda _peer: limit, address=address)

    def bind(self, label: int, path: Nhlfe, *more: Nhlfe, space: str = PLATFORM) -> None:
        self.lfib.bind(Label(label), (path, *more), space)

    def route(self, prefix: str, path: Nhlfe, vrf: str = "red") -> None:
        self.lfib.route(vrf, ip_network(prefix), (path,))

    def receive(self, packet: bytes, peer: str = P1) -> Outcome:
        return self.switch.from_peer(peer, packet, 0.0)

    def one(self, packet: bytes) -> tuple[object, bytes]:
        outcome = self.receive(packet)
        assert outcome.reason is None
        (sent,) = outcome.sent
        return sent

    def refused(self, packet: bytes) -> DropReason:
        outcome = self.receive(packet)
        assert outcome.reason is not None
        return outcome.reason


@pytest.fixture
def node() -> Node:
    return Node()


def labelled(packet: bytes) -> tuple[list[tuple[int, int, int]], Packet]:
    entries = read_stack(packet)
    return [tuple(entry) for entry in entries], IP(packet[4 * len(entries) :])  # type: ignore[misc]


def path(peer: str, *labels: int, ttl: TtlModel = UNIFORM, tc: int | None = None, entropy: bool = False) -> Nhlfe:
    return Nhlfe(ToPeer(peer), tuple(map(Label, labels)), ttl, tc, entropy)


# ---------------------------------------------------------------- operations


def test_swap(node: Node) -> None:
    node.bind(100, path("p2", 200))
    hop, packet = node.one(stack((100, 5, 64), (300, 1, 33)) + ip4())
    assert hop == ToPeer("p2")
    assert packet == stack((200, 5, 63), (300, 1, 33)) + ip4()


def test_swap_and_push(node: Node) -> None:
    node.bind(100, path("p2", 400, 200))
    _, packet = node.one(stack((100, 5, 64)) + ip4())
    assert packet == stack((400, 5, 63), (200, 5, 63)) + ip4()


def test_penultimate_hop_popping_leaves_the_label_beneath(node: Node) -> None:
    node.bind(100, path("p2", 3))
    _, packet = node.one(stack((100, 5, 31), (300, 1, 33)) + ip4())
    assert packet == stack((300, 5, 30)) + ip4()


def test_penultimate_hop_popping_down_to_ip(node: Node) -> None:
    node.bind(100, path("p2"))
    hop, packet = node.one(stack((100, 6, 50)) + ip4(ttl=60, dscp=10))
    seen = IP(packet)
    assert (hop, seen.ttl, seen.tos >> 2, seen.tos & 3) == (AsIp("p2"), 49, 48, 1)
    checksum = seen.chksum
    del seen.chksum
    assert IP(bytes(seen)).chksum == checksum


def test_per_prefix_label_leads_to_the_interface(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red"), ttl=PIPE))
    assert node.one(stack((100, 0, 64)) + ip4()) == (ToInterface("red"), ip4())
    assert node.one(stack((100, 0, 64)) + ip6()) == (ToInterface("red"), ip6())


def test_per_vrf_label_leads_to_a_lookup(node: Node) -> None:
    node.bind(100, Nhlfe(ToVrf("red"), ttl=PIPE))
    node.route("10.0.1.0/24", Nhlfe(ToInterface("red")))
    assert node.one(stack((100, 0, 64)) + ip4()) == (ToInterface("red"), ip4())
    node.lfib.unroute("red", ip_network("10.0.1.0/24"))
    assert node.refused(stack((100, 0, 64)) + ip4()) is DropReason.MPLS_NO_ROUTE


def test_a_hub_sends_on_from_spoke_to_spoke(node: Node) -> None:
    node.bind(100, Nhlfe(ToVrf("red"), ttl=PIPE))
    node.route("10.0.0.0/16", path("p2", 777, ttl=PIPE))
    hop, packet = node.one(stack((100, 0, 64)) + ip4(ttl=9))
    entries, inner = labelled(packet)
    assert hop == ToPeer("p2")
    assert entries == [(777, 0, 255)]
    assert inner.ttl == 8


def test_a_label_may_mean_the_label_beneath(node: Node) -> None:
    node.bind(100, Nhlfe(ToStack()))
    node.bind(200, path("p2", 300))
    _, packet = node.one(stack((100, 0, 64), (200, 0, 99)) + ip4())
    assert packet == stack((300, 0, 63)) + ip4()


def test_ip_of_a_vrf_departs_with_labels(node: Node) -> None:
    node.route("10.0.1.0/24", path("p2", 50, 60))
    (sent,) = node.switch.from_vrf("red", ip4(ttl=42, dscp=46), 0.0).sent
    assert sent == (ToPeer("p2"), stack((50, 5, 42), (60, 5, 42)) + ip4(ttl=42, dscp=46))
    outcome = node.switch.from_vrf("blue", ip4(), 0.0)
    assert outcome.reason is DropReason.MPLS_NO_ROUTE
    ((hop, error),) = outcome.sent
    assert hop == ToInterface("blue")
    assert (IP(error)[ICMP].type, IP(error)[ICMP].code, IP(error).dst) == (3, 1, "10.0.0.1")


# ---------------------------------------------------------------- special labels


def test_explicit_null_is_taken_off_before_ip(node: Node) -> None:
    node.route("10.0.1.0/24", Nhlfe(ToInterface(PLATFORM)), PLATFORM)
    node.route("2001:db8:1::/64", Nhlfe(ToInterface(PLATFORM)), PLATFORM)
    assert node.one(stack((0, 0, 64)) + ip4()) == (ToInterface(PLATFORM), ip4())
    assert node.one(stack((2, 0, 64)) + ip6()) == (ToInterface(PLATFORM), ip6())
    assert node.refused(stack((0, 0, 64)) + ip6()) is DropReason.MPLS_PAYLOAD
    assert node.refused(stack((2, 0, 64)) + ip4()) is DropReason.MPLS_PAYLOAD


def test_explicit_null_above_another_label(node: Node) -> None:
    """RFC 4182."""
    node.bind(100, path("p2", 200))
    _, packet = node.one(stack((0, 6, 40), (100, 1, 64)) + ip4())
    assert packet == stack((200, 6, 39)) + ip4()


def test_explicit_null_is_pushed(node: Node) -> None:
    node.bind(100, path("p2", 0))
    _, packet = node.one(stack((100, 5, 64)) + ip4())
    assert packet == stack((0, 5, 63)) + ip4()


def test_router_alert_is_seen_and_stays_on_top(node: Node) -> None:
    """RFC 3032 section 2.1."""
    node.bind(100, path("p2", 200))
    outcome = node.receive(stack((1, 0, 9), (100, 0, 9)) + ip4())
    assert outcome.alert
    assert outcome.sent[0].packet == stack((1, 0, 8), (200, 0, 8)) + ip4()


@pytest.mark.parametrize("label", [3, 4, 5, 6, 8, 12, 13, 14, 15])
def test_other_special_labels_end_a_packet(node: Node, label: int) -> None:
    assert node.refused(stack((label, 0, 64)) + ip4()) is DropReason.MPLS_SPECIAL_LABEL
    node.bind(100, Nhlfe(ToStack()))
    assert node.refused(stack((100, 0, 64), (label, 0, 64)) + ip4()) is DropReason.MPLS_SPECIAL_LABEL


@pytest.mark.parametrize("label", [1, ENTROPY_INDICATOR])
def test_router_alert_and_entropy_indicator_are_no_bottom(node: Node, label: int) -> None:
    assert node.refused(stack((label, 0, 64)) + ip4()) is DropReason.MPLS_SPECIAL_LABEL


def test_entropy_labels_go_on_and_come_off(node: Node) -> None:
    node.route("10.0.1.0/24", path("p2", 50, entropy=True))
    (sent,) = node.switch.from_vrf("red", ip4(dscp=46), 0.0).sent
    entries, _ = labelled(sent.packet)
    assert entries[:2] == [(50, 5, 64), (7, 5, 64)]
    assert entries[2][0] >= 16
    assert entries[2][2] == 0
    node.bind(50, Nhlfe(ToInterface("red"), ttl=PIPE))
    assert node.one(sent.packet) == (ToInterface("red"), ip4(dscp=46))
    # One flow, one entropy; another flow, most likely another.
    again = node.switch.from_vrf("red", ip4(dscp=46, size=900), 0.0).sent[0]
    assert labelled(again.packet)[0] == entries
    others = {labelled(node.switch.from_vrf("red", ip4(src=f"10.0.0.{host}"), 0.0).sent[0].packet)[0][2][0] for host in range(1, 30)}
    assert len(others) > 20


# ---------------------------------------------------------------- TTL and class


@pytest.mark.parametrize(
    ("model", "pushed", "arrives", "inner_after"),
    [(UNIFORM, 40, 35, 35), (PIPE, 255, 250, 40), (SHORT, 255, 250, 40)],
)
def test_ttl_from_one_end_of_an_lsp_to_the_other(model: TtlModel, pushed: int, arrives: int, inner_after: int) -> None:
    """RFC 3443 section 3: five nodes lie between."""
    ingress, egress = Node(), Node()
    ingress.route("10.0.1.0/24", path("p2", 100, ttl=model))
    egress.bind(100, Nhlfe(ToInterface("red"), ttl=model))
    packet = ingress.switch.from_vrf("red", ip4(ttl=40), 0.0).sent[0].packet
    assert labelled(packet)[0] == [(100, 0, pushed)]
    _, out = egress.one(stack((100, 0, arrives)) + packet[4:])
    assert IP(out).ttl == inner_after


def test_a_ttl_is_never_raised(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red")))
    _, out = node.one(stack((100, 0, 200)) + ip4(ttl=3))
    assert IP(out).ttl == 3


def test_nor_that_of_a_label_beneath(node: Node) -> None:
    """The label above was pushed by another model than the one by which it comes off: a loop would never end."""
    node.bind(100, path("p2", 3))
    node.bind(101, Nhlfe(ToStack()))
    node.bind(200, path("p2", 300))
    assert node.one(stack((100, 0, 254), (200, 0, 9)) + ip4())[1] == stack((200, 0, 9)) + ip4()
    assert node.one(stack((101, 0, 254), (200, 0, 9)) + ip4())[1] == stack((300, 0, 8)) + ip4()
    assert node.one(stack((0, 0, 254), (200, 0, 9)) + ip4())[1] == stack((300, 0, 8)) + ip4()


def test_an_entropy_label_has_no_part_in_ttl_and_class(node: Node) -> None:
    """RFC 6790 section 4.2: below the label of a tunnel that ends here; above it only when the node before has taken that one off."""
    node.bind(100, Nhlfe(ToStack(), ttl=PIPE))
    node.bind(200, path("p2", 300))
    expected = stack((300, 3, 8)) + ip4()
    assert node.one(stack((100, 0, 254), (7, 0, 1), (7000, 0, 0), (200, 3, 9)) + ip4())[1] == expected
    assert node.one(stack((100, 0, 254), (7, 0, 0), (7000, 0, 0), (200, 3, 9)) + ip4())[1] == expected
    assert node.one(stack((7, 3, 9), (7000, 0, 0), (200, 1, 60)) + ip4())[1] == expected
    node.bind(101, Nhlfe(ToStack()))
    assert node.one(stack((101, 3, 9), (7, 0, 1), (7000, 0, 0), (200, 1, 60)) + ip4())[1] == expected


def test_pipe_keeps_the_class_beneath(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red"), ttl=SHORT))
    _, out = node.one(stack((100, 7, 64)) + ip4(dscp=10))
    assert IP(out).tos >> 2 == 10


def test_uniform_keeps_a_dscp_that_already_stands_for_the_class(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red")))
    _, out = node.one(stack((100, 5, 64)) + ip4(dscp=46))
    assert IP(out).tos >> 2 == 46
    _, out6 = node.one(stack((100, 3, 64)) + ip6(dscp=46))
    assert (IPv6(out6).tc >> 2, IPv6(out6).tc & 3) == (24, 1)


def test_a_path_may_say_its_class(node: Node) -> None:
    node.route("10.0.1.0/24", path("p2", 100, tc=3))
    (sent,) = node.switch.from_vrf("red", ip4(dscp=46), 0.0).sent
    assert labelled(sent.packet)[0] == [(100, 3, 64)]


@pytest.mark.parametrize("ttl", [0, 1])
def test_no_ttl_is_left_in_the_core(node: Node, ttl: int) -> None:
    """The error goes on along the LSP with the stack that it met (RFC 3032 section 2.3.2, RFC 4950)."""
    node.bind(100, path("p2", 200))
    outcome = node.receive(stack((100, 5, ttl), (300, 1, 33)) + ip4())
    assert outcome.reason is DropReason.MPLS_TTL_EXPIRED
    ((hop, packet),) = outcome.sent
    entries, error = labelled(packet)
    assert hop == ToPeer("p2")
    assert entries == [(200, 5, 254), (300, 1, 255)]
    assert (error.dst, error[ICMP].type, error[ICMP].code, error[ICMP].length) == ("10.0.0.1", 11, 0, 32)
    extension = bytes(error[ICMP])[8 + 128 :]
    assert extension[:1] == b"\x20"
    assert extension[4:8] == bytes((0, 12, 1, 1))
    assert extension[8:16] == stack((100, 5, ttl), (300, 1, 33))
    for layer in (IP, ICMP):
        checksum = error[layer].chksum
        again = IP(bytes(error))
        del again[layer].chksum
        assert IP(bytes(again))[layer].chksum == checksum


def test_no_ttl_is_left_at_the_end(node: Node) -> None:
    """The VRF's own routes lead the error back into the core."""
    node.bind(100, Nhlfe(ToVrf("red")))
    node.route("10.0.1.0/24", Nhlfe(ToInterface("red")))
    node.route("10.0.0.0/24", path("p9", 900))
    outcome = node.receive(stack((100, 0, 1)) + ip4())
    assert outcome.reason is DropReason.MPLS_TTL_EXPIRED
    ((hop, packet),) = outcome.sent
    entries, error = labelled(packet)
    assert hop == ToPeer("p9")
    assert entries[0][0] == 900
    assert error[ICMP].type == 11


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_comes_from_the_nodes_own_address(version: int) -> None:
    """If it leaves for another node: the host here would not believe it."""
    own = ip_address("10.0.1.254" if version == 4 else "2001:db8:1::fe")
    node = Node(address=lambda vrf, version: own.packed if (vrf, version) == ("red", own.version) else b"")
    node.bind(100, Nhlfe(ToVrf("red")))
    packet = ip4(ttl=9) if version == 4 else ip6(ttl=9)
    sender = ip_network("10.0.0.0/24" if version == 4 else "2001:db8::/64")
    for path_, expected in ((path("p9", 900), own), (Nhlfe(ToInterface("red")), ip_address(IP(packet).dst if version == 4 else IPv6(packet).dst))):
        node.lfib.route("red", sender, (path_,))
        ((_, sent),) = node.receive(stack((100, 0, 1)) + packet).sent
        error = (IP if version == 4 else IPv6)(sent[4 * isinstance(path_.next_hop, ToPeer) :])
        assert error.src == str(expected)
        checked = error.copy()
        layer = checked[ICMP] if version == 4 else checked[ICMPv6TimeExceeded]
        told = layer.chksum if version == 4 else layer.cksum
        delattr(layer, "chksum" if version == 4 else "cksum")
        again = type(error)(bytes(checked))
        assert told == (again[ICMP].chksum if version == 4 else again[ICMPv6TimeExceeded].cksum)


def test_ipv6_time_exceeded_has_the_stack_too(node: Node) -> None:
    node.bind(100, path("p2", 200))
    ((_, packet),) = node.receive(stack((100, 0, 1)) + ip6()).sent
    error = IPv6(packet[4:])
    assert error.haslayer(ICMPv6TimeExceeded)
    body = bytes(error[ICMPv6TimeExceeded])
    assert body[4] == 128 // 8 + 3  # the quote of 148 octets, padded to 152, in words of 64 bits
    assert body[8 + 152 + 8 :] == stack((100, 0, 1))


def test_errors_are_not_answered_with_errors(node: Node) -> None:
    node.bind(100, path("p2", 200))
    error = bytes(IP(src="10.0.0.1", dst="10.0.1.1") / ICMP(type=3, code=1) / Raw(ip4()[:28]))
    outcome = node.receive(stack((100, 0, 1)) + error)
    assert outcome == Outcome((), DropReason.MPLS_TTL_EXPIRED)


# ---------------------------------------------------------------- MTU


def test_what_may_be_fragmented_is(node: Node) -> None:
    node = Node(limit=576)
    node.route("10.0.1.0/24", path("p2", 50, 60))
    sent = node.switch.from_vrf("red", ip4(df=False, size=1400), 0.0).sent
    assert len(sent) == 3
    data = b""
    for piece in sent:
        entries, packet = labelled(piece.packet)
        assert len(piece.packet) <= 576
        assert [entry[0] for entry in entries] == [50, 60]
        assert packet.frag * 8 == len(data)
        data += bytes(packet.payload)
    assert data == ip4(df=False, size=1400)[20:]


def test_too_big_is_told_with_room_for_the_labels(node: Node) -> None:
    node = Node(limit=1300)
    node.route("10.0.1.0/24", path("p2", 50, 60))
    outcome = node.switch.from_vrf("red", ip4(size=1300), 0.0)
    assert outcome.reason is DropReason.MPLS_TOO_BIG
    ((hop, packet),) = outcome.sent
    error = IP(packet)
    assert hop == ToInterface("red")
    assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1292)


def test_too_big_in_the_core_goes_along_the_lsp(node: Node) -> None:
    node = Node(limit=1300)
    node.bind(100, path("p2", 50, 60))
    outcome = node.receive(stack((100, 0, 9)) + ip6(size=1300))
    assert outcome.reason is DropReason.MPLS_TOO_BIG
    ((hop, packet),) = outcome.sent
    assert hop == ToPeer("p2")
    error = IPv6(packet[8:])[ICMPv6PacketTooBig]
    assert error.mtu == 1292


# ---------------------------------------------------------------- who may send what


def test_a_label_of_another_customer_is_refused(node: Node) -> None:
    node.bind(1000, Nhlfe(ToInterface("blue")))
    assert node.refused(stack((1000, 0, 64)) + ip4()) is DropReason.MPLS_LABEL_FORBIDDEN


def test_nor_beneath_one_of_its_own(node: Node) -> None:
    node.bind(100, Nhlfe(ToStack()))
    node.bind(1000, Nhlfe(ToInterface("blue")))
    assert node.refused(stack((100, 0, 64), (1000, 0, 64)) + ip4()) is DropReason.MPLS_LABEL_FORBIDDEN


def test_who_was_not_admitted_sends_nothing(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red")))
    assert node.receive(stack((100, 0, 64)) + ip4(), "stranger").reason is DropReason.MPLS_PEER_UNKNOWN
    node.lfib.dismiss(P1)
    assert node.refused(stack((100, 0, 64)) + ip4()) is DropReason.MPLS_PEER_UNKNOWN


def test_a_peer_may_have_a_label_space_of_its_own(node: Node) -> None:
    node.lfib.admit(Peer("p5", LabelSet([LabelRange(Label(16), Label(99))]), "p5"))
    node.bind(20, Nhlfe(ToInterface("red"), ttl=PIPE))
    node.bind(20, Nhlfe(ToInterface("blue"), ttl=PIPE), space="p5")
    assert node.one(stack((20, 0, 64)) + ip4())[0] == ToInterface("red")
    assert node.receive(stack((20, 0, 64)) + ip4(), "p5").sent[0].next_hop == ToInterface("blue")


# ---------------------------------------------------------------- bad packets


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", DropReason.MPLS_NO_BOTTOM),
        (bytes.fromhex("000640"), DropReason.MPLS_NO_BOTTOM),
        (bytes.fromhex("00064040") * MAX_DEPTH, DropReason.MPLS_TOO_DEEP),
        (bytes.fromhex("00064040") * 3, DropReason.MPLS_NO_BOTTOM),
        (stack((500, 0, 64)) + ip4(), DropReason.MPLS_LABEL_UNKNOWN),
        (stack((100, 0, 64)) + b"\x90" + ip4()[1:], DropReason.MPLS_PAYLOAD),
        (stack((100, 0, 64)) + ip4()[:30], DropReason.MPLS_PAYLOAD),
        (stack((100, 0, 64)), DropReason.MPLS_PAYLOAD),
        (stack((100, 0, 64), (200, 0, 64)) + ip4(), DropReason.MPLS_NOT_BOTTOM),
        (stack((100, 0, 0)) + ip4(), DropReason.MPLS_TTL_EXPIRED),
    ],
)
def test_bad_packets_end_under_a_reason(node: Node, packet: bytes, reason: DropReason) -> None:
    node.bind(100, Nhlfe(ToInterface("red"), ttl=PIPE))
    assert node.refused(packet) is reason


def test_what_stands_behind_the_ip_packet_is_left_out(node: Node) -> None:
    node.bind(100, Nhlfe(ToInterface("red"), ttl=PIPE))
    assert node.one(stack((100, 0, 64)) + ip4() + b"more") == (ToInterface("red"), ip4())


@pytest.mark.parametrize("ttl", [5, 35])
def test_a_header_that_was_changed_has_its_checksum(node: Node, ttl: int) -> None:
    node.bind(100, Nhlfe(ToInterface("red")))
    _, out = node.one(stack((100, 7, ttl)) + ip4(ttl=20, dscp=3))
    seen = IP(out)
    assert (seen.ttl, seen.tos) == (min(20, ttl), 56 << 2 | 1)
    again = IP(out)
    del again.chksum
    assert IP(bytes(again)).chksum == seen.chksum


def test_scapy_reads_a_stack_of_ours(node: Node) -> None:
    node.bind(100, path("p2", 400, 200))
    _, packet = node.one(stack((100, 5, 64)) + ip4())
    top = MPLS(packet)
    assert (top.label, top.cos, top.s, top.ttl) == (400, 5, 0, 63)
    assert (top[MPLS:2].label, top[MPLS:2].s) == (200, 1)
    assert bytes(top[IP]) == ip4()

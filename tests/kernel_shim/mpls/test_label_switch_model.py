"""Random LFIBs and packets against a naive forwarder: lists searched from end to end, one rule after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from struct import pack

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import Entry, Label, LabelRange, LabelSet, read_stack, write_stack
from kernel_shim.mpls.lfib import PLATFORM, Lfib, NextHop, Nhlfe, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.mpls.switch import AsIp, LabelSwitch, read_dscp
from kernel_shim.packet.ip import refresh_header_checksum

LABELS = [0, 1, 2, 3, 7, 13, 16, 17, 18, 19, 20, 900]
ACCEPTED = LabelSet([LabelRange(Label(16), Label(20))])
VRFS = ["red", "blue", PLATFORM]


@dataclass(frozen=True)
class Inner:
    destination: IPv4Address
    ttl: int
    dscp: int

    def packet(self) -> bytes:
        header = bytearray(pack("!BBHHHBBH4s4s", 0x45, self.dscp << 2, 28, 0, 0x4000, self.ttl, 99, 0, bytes((192, 0, 2, 1)), self.destination.packed))
        refresh_header_checksum(header)
        return bytes(header) + b"12345678"


@dataclass(frozen=True)
class Out:
    hop: NextHop
    stack: tuple[tuple[int, int, int], ...]
    inner: Inner


class Naive:
    """`None` is a packet that goes nowhere."""

    def __init__(self, ilm: dict[int, Nhlfe], routes: dict[tuple[str, IPv4Network], Nhlfe]) -> None:
        self.ilm, self.routes = ilm, routes

    def receive(self, stack: list[tuple[int, int, int]], inner: Inner) -> Out | None:
        alert = False
        vrf = PLATFORM
        carried: tuple[int, int] | None = stack[0][2], stack[0][1]
        while stack:
            label, tc, ttl = stack[0]
            if carried is None:
                carried = ttl, tc
            if carried[0] == 0:
                return None
            beneath = stack[1:]
            if label == 7 and beneath:
                stack = beneath[1:]
                continue
            if label == 1 and beneath:
                alert, stack = True, beneath
                continue
            if label == 0:
                stack = beneath
                continue
            if label == 2 and beneath:
                stack = beneath
                continue
            if not 16 <= label <= 20 or label not in self.ilm:
                return None
            nhlfe = self.ilm[label]
            uniform = nhlfe.ttl is TtlModel.UNIFORM
            if isinstance(nhlfe.next_hop, ToPeer):
                return self.onward(nhlfe, carried, beneath, inner, uniform, alert)
            if isinstance(nhlfe.next_hop, ToStack):
                vrf, stack = nhlfe.next_hop.vrf, beneath
                if not uniform:
                    carried = None
                continue
            while beneath and beneath[0][0] == 7 and len(beneath) > 1:
                beneath = beneath[2:]
            if beneath:
                return None
            if isinstance(nhlfe.next_hop, ToInterface):
                return self.to_light(nhlfe.next_hop, carried if uniform else None, inner)
            return self.to_vrf(nhlfe.next_hop.vrf, carried if uniform else None, inner)
        return self.to_vrf(vrf, carried, inner)

    def onward(self, nhlfe: Nhlfe, carried: tuple[int, int], beneath: list[tuple[int, int, int]], inner: Inner, uniform: bool, alert: bool) -> Out | None:
        ttl, tc = carried
        if ttl <= 1:
            return None
        labels = [label for label in nhlfe.push if label != 3]
        if not labels and not beneath:
            if uniform:
                inner = self.uniform(inner, ttl - 1, tc)
            return Out(nhlfe.next_hop, (), inner)
        new = []
        for position, label in enumerate(labels):
            own = position == len(labels) - 1
            new.append((label, tc if nhlfe.traffic_class is None else nhlfe.traffic_class, ttl - 1 if uniform or own else 255))
        if not labels and uniform:
            beneath = [(beneath[0][0], tc, ttl - 1), *beneath[1:]]
        head = [(1, tc, ttl - 1)] if alert else []
        return Out(nhlfe.next_hop, (*head, *new, *beneath), inner)

    def to_light(self, hop: ToInterface, carried: tuple[int, int] | None, inner: Inner) -> Out | None:
        if carried and carried[0] < 2:
            return None
        return Out(hop, (), self.uniform(inner, *carried) if carried else inner)

    def to_vrf(self, vrf: str, carried: tuple[int, int] | None, inner: Inner) -> Out | None:
        if carried and carried[0] < 2:
            return None
        if carried:
            inner = self.uniform(inner, *carried)
        for _ in range(8):
            best = None
            for (owner, prefix), nhlfe in self.routes.items():
                if owner == vrf and inner.destination in prefix and (best is None or prefix.prefixlen > best[0].prefixlen):
                    best = prefix, nhlfe
            if best is None:
                return None
            nhlfe = best[1]
            if isinstance(nhlfe.next_hop, ToInterface):
                return Out(nhlfe.next_hop, (), inner)
            if isinstance(nhlfe.next_hop, ToPeer):
                if inner.ttl <= 1:
                    return None
                inner = replace(inner, ttl=inner.ttl - 1)
                tc = inner.dscp >> 3 if nhlfe.traffic_class is None else nhlfe.traffic_class
                pushed = tuple((label, tc, inner.ttl if nhlfe.ttl is TtlModel.UNIFORM else 255) for label in nhlfe.push if label != 3)
                return Out(nhlfe.next_hop, pushed, inner)
            assert isinstance(nhlfe.next_hop, ToVrf)
            vrf = nhlfe.next_hop.vrf
        return None

    @staticmethod
    def uniform(inner: Inner, ttl: int, tc: int) -> Inner:
        dscp = inner.dscp if inner.dscp >> 3 == tc else tc << 3
        return Inner(inner.destination, min(inner.ttl, ttl), dscp)


pushes = st.lists(st.sampled_from([0, 2, 3, 16, 77, 1048575]), max_size=3).map(lambda labels: tuple(map(Label, labels)))
models = st.sampled_from(TtlModel)
classes = st.one_of(st.none(), st.integers(0, 7))
peers = st.builds(Nhlfe, st.sampled_from(["p2", "p3"]).map(ToPeer), pushes, models, classes)
local = st.builds(Nhlfe, st.sampled_from(VRFS).flatmap(lambda vrf: st.sampled_from([ToInterface(vrf), ToVrf(vrf)])), st.just(()), models)
again = st.builds(Nhlfe, st.sampled_from(VRFS).map(ToStack), st.just(()), models)
ilms = st.dictionaries(st.integers(16, 20), st.one_of(peers, local, again), max_size=5)
networks = st.sampled_from([IPv4Network(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "0.0.0.0/0")])
route_tables = st.dictionaries(st.tuples(st.sampled_from(VRFS), networks), st.one_of(peers, local), max_size=8).map(
    lambda routes: {key: path for key, path in routes.items() if path.next_hop != ToVrf(key[0]) and (path.labels or not isinstance(path.next_hop, ToPeer))}
)
entries = st.tuples(st.sampled_from(LABELS), st.integers(0, 7), st.sampled_from([0, 1, 2, 3, 64, 255]))
inners = st.builds(
    Inner, st.sampled_from(["10.1.1.1", "10.1.1.2", "10.1.2.3", "10.2.3.4", "172.16.0.1"]).map(IPv4Address), st.integers(0, 255), st.integers(0, 63)
)


@settings(max_examples=400)
@given(ilms, route_tables, st.lists(entries, min_size=1, max_size=5), inners)
def test_the_switch_does_what_the_naive_forwarder_does(
    ilm: dict[int, Nhlfe], routes: dict[tuple[str, IPv4Network], Nhlfe], stack: list[tuple[int, int, int]], inner: Inner
) -> None:
    lfib = Lfib()
    lfib.admit(Peer("p1", ACCEPTED))
    for label, path in ilm.items():
        lfib.bind(Label(label), (path,))
    for (vrf, prefix), path in routes.items():
        lfib.route(vrf, prefix, (path,))
    switch = LabelSwitch(Forwarder(lfib), lambda _peer: 1400)
    outcome = switch.from_peer("p1", write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in stack]) + inner.packet(), 0.0)
    expected = Naive(ilm, routes).receive(stack, inner)
    if expected is None:
        assert outcome.reason is not None
        return
    assert outcome.reason is None
    ((hop, packet),) = outcome.sent
    assert hop == (AsIp(expected.hop.peer) if isinstance(expected.hop, ToPeer) and not expected.stack else expected.hop)
    at = 0
    if expected.stack:
        seen = read_stack(packet)
        assert tuple(map(tuple, seen)) == expected.stack
        at = 4 * len(seen)
    assert packet[at:] == expected.inner.packet()
    assert read_dscp(packet[at:]) == expected.inner.dscp

"""A naive forwarder of labels, and random LFIBs and packets for it: lists searched from end to end, one rule after the other.

It says all that may become of a packet: of several paths of equal cost any will do, but one flow takes one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from struct import pack

from hypothesis import strategies as st

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import PLATFORM, Lfib, NextHop, Nhlfe, Paths, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.packet.ip import refresh_header_checksum
from kernel_shim.reasons import DropReason

LIMIT = 1400
LABELS = [0, 1, 2, 3, 7, 13, 21, 900, *range(16, 21), *range(16, 21), *range(16, 21)]
ACCEPTED = LabelSet([LabelRange(Label(16), Label(20))])
VRFS = ["red", "blue", PLATFORM]
SENDER = IPv4Address("192.0.2.1")
ENTROPY = -1  # stands for any entropy label

Stack = tuple[tuple[int, int, int], ...]
Carry = tuple[int, int]  # TTL and class


def in_ipv6(address: IPv4Address) -> IPAddress:
    return ip_address(0x20010DB8 << 96 | int(address))


@dataclass(frozen=True)
class Inner:
    destination: IPv4Address
    ttl: int
    dscp: int
    version: int = 4  # 0: no IP
    size: int = 8
    df: bool = True

    def packet(self) -> bytes:
        data = bytes(number % 251 for number in range(self.size))
        if self.version == 6:
            addresses = in_ipv6(SENDER).packed + in_ipv6(self.destination).packed
            return pack("!IHBB", 6 << 28 | self.dscp << 22, self.size, 99, self.ttl) + addresses + data
        fragment = 0x4000 if self.df else 0
        first = 0x45 if self.version else 0x95
        header = bytearray(pack("!BBHHHBBH", first, self.dscp << 2, 20 + self.size, 9, fragment, self.ttl, 99, 0) + SENDER.packed + self.destination.packed)
        refresh_header_checksum(header)
        return bytes(header) + data


@dataclass(frozen=True)
class Out:
    hop: NextHop
    stack: Stack
    inner: Inner


@dataclass(frozen=True)
class Dead:
    """`told` says how the sender may hear of it: by which next hop and under which labels; None: it may not."""

    reason: DropReason
    mtu: int = 0
    told: tuple[tuple[NextHop, Stack] | None, ...] = ()


@dataclass(frozen=True)
class Land:
    """IP comes to light. `direct`: to the interface of the VRF, whatever its routes say."""

    vrf: str
    handed: Carry | None
    direct: bool = False


class Naive:
    def __init__(self, ilm: Mapping[int, Paths], routes: Mapping[tuple[str, IPv4Network], Paths]) -> None:
        self.ilm, self.routes = ilm, routes

    def receive(self, stack: Stack, inner: Inner) -> Iterator[Out | Dead]:
        for step in self._walk(stack, inner, PLATFORM, None):
            found = [self.fitted(step)] if isinstance(step, Out) else [step] if isinstance(step, Dead) else self._land(step, inner)
            for end in found:
                tell = isinstance(end, Dead) and end.reason in (DropReason.MPLS_TTL_EXPIRED, DropReason.MPLS_TOO_BIG) and not end.told and inner.version
                yield replace(end, told=tuple(self._along(stack, inner))) if tell else end

    # Labels

    def _walk(self, stack: Stack, inner: Inner, vrf: str, handed: Carry | None, *, alert: bool = False, below: bool = False) -> Iterator[Out | Dead | Land]:
        """`handed` by what was above; `below`: something was."""
        if not stack:
            yield Land(vrf, handed)
            return
        (label, tc, ttl), rest = stack[0], stack[1:]
        if label == 7 and rest and below:
            yield from self._walk(rest[1:], inner, vrf, handed, alert=alert, below=True)
            return
        carry = (min(handed[0], ttl), handed[1]) if handed else (ttl, tc)
        if carry[0] == 0:
            yield Dead(DropReason.MPLS_TTL_EXPIRED)
        elif label == 7 and rest:
            yield from self._walk(rest[1:], inner, vrf, carry, alert=alert, below=True)
        elif label == 1 and rest:
            yield from self._walk(rest, inner, vrf, carry, alert=True, below=True)
        elif label in (0, 2):
            if not rest and inner.version != {0: 4, 2: 6}[label]:
                yield Dead(DropReason.MPLS_PAYLOAD)
            else:
                yield from self._walk(rest, inner, vrf, carry, alert=alert, below=True)
        elif label < 16:
            yield Dead(DropReason.MPLS_SPECIAL_LABEL)
        elif label > 20:
            yield Dead(DropReason.MPLS_LABEL_FORBIDDEN)
        elif label not in self.ilm:
            yield Dead(DropReason.MPLS_LABEL_UNKNOWN)
        else:
            for nhlfe in self.ilm[label]:
                yield from self._take_path(nhlfe, carry, rest, inner, alert=alert)

    def _take_path(self, nhlfe: Nhlfe, carry: Carry, rest: Stack, inner: Inner, *, alert: bool) -> Iterator[Out | Dead | Land]:
        handed = carry if nhlfe.ttl is TtlModel.UNIFORM else None
        hop = nhlfe.next_hop
        if isinstance(hop, ToPeer):
            yield self._onward(nhlfe, carry, rest, inner, handed, alert=alert)
            return
        if isinstance(hop, ToStack):
            yield from self._walk(rest, inner, hop.vrf, handed, alert=alert, below=True)
            return
        while len(rest) > 1 and rest[0][0] == 7:
            rest = rest[2:]
        yield Dead(DropReason.MPLS_NOT_BOTTOM) if rest else Land(hop.vrf, handed, isinstance(hop, ToInterface))

    def _onward(self, nhlfe: Nhlfe, carry: Carry, rest: Stack, inner: Inner, handed: Carry | None, *, alert: bool) -> Out | Dead:
        ttl, tc = carry
        if ttl <= 1:
            return Dead(DropReason.MPLS_TTL_EXPIRED)
        new = self.pushed(nhlfe, tc, ttl - 1 if handed else 255, ttl - 1, entropy=not rest)
        if not new and not rest:
            lit = self.lit(inner, (ttl - 1, tc) if handed else None)
            return Out(nhlfe.next_hop, (), lit) if inner.version else Dead(DropReason.MPLS_PAYLOAD)
        if not new and handed:
            rest = ((rest[0][0], tc, min(ttl - 1, rest[0][2])), *rest[1:])
        head = ((1, tc, ttl - 1),) if alert else ()
        return Out(nhlfe.next_hop, (*head, *new, *rest), inner)

    # IP

    def _land(self, at: Land, inner: Inner) -> Iterator[Out | Dead]:
        if not inner.version:
            yield Dead(DropReason.MPLS_PAYLOAD)
        elif at.handed and at.handed[0] < 2:
            yield Dead(DropReason.MPLS_TTL_EXPIRED)
        elif at.direct:
            yield Out(ToInterface(at.vrf), (), self.lit(inner, at.handed))
        else:
            inner = self.lit(inner, at.handed)
            for found in self._by_ip(at.vrf, inner, hop_costs=True):
                yield replace(found, told=tuple(self._in_vrf(at.vrf, inner))) if isinstance(found, Dead) else found

    def _by_ip(self, vrf: str, inner: Inner, *, hop_costs: bool, left: int = 8) -> Iterator[Out | Dead]:
        matching = [(prefix.prefixlen, paths) for (owner, prefix), paths in self.routes.items() if owner == vrf and inner.destination in prefix]
        if not matching or not left:
            yield Dead(DropReason.MPLS_NO_ROUTE)
            return
        for nhlfe in max(matching, key=lambda match: match[0])[1]:
            hop = nhlfe.next_hop
            if isinstance(hop, ToInterface):
                yield Out(hop, (), inner)
            elif isinstance(hop, ToVrf):
                yield from self._by_ip(hop.vrf, inner, hop_costs=hop_costs, left=left - 1)
            elif hop_costs and inner.ttl <= 1:
                yield Dead(DropReason.MPLS_TTL_EXPIRED)
            else:
                leaving = replace(inner, ttl=inner.ttl - hop_costs)
                ttl = leaving.ttl if nhlfe.ttl is TtlModel.UNIFORM else 255
                yield self.fitted(Out(hop, self.pushed(nhlfe, inner.dscp >> 3, ttl, ttl, entropy=True), leaving))

    # How the sender hears of it

    def _along(self, stack: Stack, inner: Inner) -> Iterator[tuple[NextHop, Stack] | None]:
        """The error goes where the packet was to go: that end knows the customer."""
        for step in self._walk(tuple((label, tc, 255) for label, tc, _ in stack), inner, PLATFORM, None):
            if isinstance(step, Out):
                yield step.hop, step.stack
            elif isinstance(step, Land):
                yield from self._answered(step.vrf, inner.version)
            else:
                yield None

    def _in_vrf(self, vrf: str, inner: Inner) -> Iterator[tuple[NextHop, Stack] | None]:
        if any(owner == vrf and SENDER in prefix for owner, prefix in self.routes):
            yield from self._answered(vrf, inner.version)
        else:
            yield ToInterface(vrf), ()

    def _answered(self, vrf: str, version: int) -> Iterator[tuple[NextHop, Stack] | None]:
        for found in self._by_ip(vrf, Inner(SENDER, 64, 0, version), hop_costs=False):
            yield (found.hop, found.stack) if isinstance(found, Out) else None

    # Rules

    @staticmethod
    def pushed(nhlfe: Nhlfe, tc: int, ttl: int, own: int, *, entropy: bool) -> Stack:
        labels = [label for label in nhlfe.push if label != 3]
        tc = tc if nhlfe.traffic_class is None else nhlfe.traffic_class
        new = [(label, tc, own if number == len(labels) - 1 else ttl) for number, label in enumerate(labels)]
        if nhlfe.entropy and entropy:
            new += [(7, tc, own), (ENTROPY, 0, 0)]
        return tuple(new)

    @staticmethod
    def lit(inner: Inner, handed: Carry | None) -> Inner:
        if handed is None:
            return inner
        ttl, tc = handed
        return replace(inner, ttl=min(inner.ttl, ttl), dscp=inner.dscp if inner.dscp >> 3 == tc else tc << 3)

    @staticmethod
    def fitted(out: Out) -> Out | Dead:
        room = LIMIT - 4 * len(out.stack)
        if len(out.inner.packet()) <= room or (out.inner.version == 4 and not out.inner.df):
            return out
        return Dead(DropReason.MPLS_TOO_BIG, max(room, 1280) if out.inner.version == 6 else room)


# Against the switch


pushes = st.lists(st.sampled_from([Label(label) for label in (0, 2, 3, 16, 77, 1048575)]), max_size=3).map(tuple)
models = st.sampled_from(TtlModel)
classes = st.one_of(st.none(), st.integers(0, 7))
peers = st.builds(
    lambda peer, push, model, tc, entropy: Nhlfe(ToPeer(peer), push, model, tc, entropy and any(label != 3 for label in push)),
    st.sampled_from(["p2", "p3"]),
    pushes,
    models,
    classes,
    st.booleans(),
)
local = st.builds(Nhlfe, st.sampled_from(VRFS).flatmap(lambda vrf: st.sampled_from([ToInterface(vrf), ToVrf(vrf)])), st.just(()), models)
again = st.builds(Nhlfe, st.sampled_from(VRFS).map(ToStack), st.just(()), models)
ilms = st.dictionaries(st.integers(16, 20), st.lists(st.one_of(peers, local, again), min_size=1, max_size=2).map(tuple), min_size=3, max_size=5)
networks = st.sampled_from([IPv4Network(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "192.0.2.0/24", "0.0.0.0/0")])
routing = st.dictionaries(
    st.tuples(st.sampled_from(VRFS), networks), st.lists(st.one_of(peers, local), min_size=1, max_size=2).map(tuple), min_size=2, max_size=8
).map(lambda routes: {key: paths for key, paths in routes.items() if all(allowed(path, key[0]) for path in paths)})
stack_entries = st.tuples(st.sampled_from(LABELS), st.integers(0, 7), st.sampled_from([0, 1, 2, 3, 9, 33, 33, 64, 64, 64, 255, 255]))
label_stacks = st.one_of(stack_entries.map(lambda entry: (entry,)), st.lists(stack_entries, min_size=1, max_size=4).map(tuple))
inners = st.builds(
    Inner,
    st.sampled_from(["10.1.1.1", "10.1.1.2", "10.1.2.3", "10.2.3.4", "172.16.0.1"]).map(IPv4Address),
    st.integers(0, 255),
    st.integers(0, 63),
    st.sampled_from([4, 4, 6, 0]),
    st.sampled_from([8, 8, 1340, 1372, 1380, 2800]),
    st.booleans(),
)


def allowed(path: Nhlfe, vrf: str) -> bool:
    return path.next_hop != ToVrf(vrf) and (bool(path.labels) or not isinstance(path.next_hop, ToPeer))


def lfib_of(ilm: Mapping[int, Paths], routes: Mapping[tuple[str, IPv4Network], Paths]) -> Lfib:
    lfib = Lfib()
    lfib.admit(Peer("p1", ACCEPTED))
    for label, paths in ilm.items():
        lfib.bind(Label(label), paths)
    for (vrf, prefix), paths in routes.items():
        both: tuple[IPNetwork, ...] = (prefix, IPv6Network((int(in_ipv6(prefix.network_address)), 96 + prefix.prefixlen)))
        for network in both:
            lfib.route(vrf, network, paths)
    return lfib

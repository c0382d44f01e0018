"""What becomes of a packet by its labels: pure decisions on an `Lfib`, no packet is touched.

1. `depart`   IP from a VRF: longest match, and the stack that goes on
2. `arrive`   a labelled packet from a peer: label by label until one says where it goes
3. `choose`   one of several paths, by flow

TTL follows RFC 3443: a node takes one off, from the header by which it forwards. With the uniform model the TTL of what is taken
off is that of what comes to light; with pipe and short-pipe what comes to light keeps its own. The traffic class goes the same ways (RFC 3270 section 2.6).
No TTL is ever raised: where a label was pushed by another model than the one by which it comes off, a loop still ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple
from zlib import crc32

from kernel_shim.model import IPAddress
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.labels import (
    ENTROPY_INDICATOR,
    ENTRY,
    FIRST_LABEL,
    IPV4_EXPLICIT_NULL,
    IPV6_EXPLICIT_NULL,
    LARGEST_TTL,
    LAST_LABEL,
    MAX_DEPTH,
    ROUTER_ALERT,
    Entry,
    Label,
    write_stack,
)
from kernel_shim.mpls.lfib import PLATFORM, Lfib, Nhlfe, Paths, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.reasons import DropReason

FlowHash = Callable[[], int]


class Way(NamedTuple):
    """Where an arriving packet goes. `taken` octets of its stack come off and `stack` goes on, which is empty when IP comes to light.

    `ttl` is what the TTL of that IP header becomes when it is less, and `traffic_class` what its DSCP has to stand for; None leaves it.
    To a VRF and its interface the one hop of this node is still to be taken off: the host that forwards it does so.
    `alert` says that a router alert label was on it (RFC 3032 section 2.1).
    """

    next_hop: ToPeer | ToInterface | ToVrf
    taken: int
    stack: bytes = b""
    ttl: int | None = None
    traffic_class: int | None = None
    alert: bool = False


class Departure(NamedTuple):
    """The path of an IP packet out of a VRF."""

    next_hop: ToPeer | ToInterface | ToVrf
    path: Nhlfe


def choose(paths: Paths, flow: FlowHash) -> Nhlfe:
    """One path for all packets of a flow. Paths keep most of their flows when another comes or goes: the highest score of flow and path wins."""
    if len(paths) == 1:
        return paths[0]
    number = flow()
    # Rendezvous hashing; the path is named by what it does, so that all nodes and restarts agree.
    return max(paths, key=lambda path: crc32(repr((number, path.next_hop, path.push)).encode()))


def entropy_label(number: int) -> Label:
    """A label of a flow's hash that is no special-purpose one (RFC 6790 section 4.2)."""
    return Label(FIRST_LABEL + number % (LAST_LABEL - FIRST_LABEL + 1))


class Forwarder:
    def __init__(self, lfib: Lfib, classes: ClassMap | None = None) -> None:
        self.lfib: Final = lfib
        self.classes = classes if classes is not None else ClassMap.class_selectors()

    # 1. Departure

    def depart(self, vrf: str, destination: IPAddress, flow: FlowHash) -> Departure | DropReason:
        """The path of a packet that came to `vrf` as IP."""
        paths = self.lfib.outgoing(vrf, destination)
        if paths is None:
            return DropReason.MPLS_NO_ROUTE
        path = choose(paths, flow)
        hop = path.next_hop
        assert not isinstance(hop, ToStack)
        return Departure(hop, path)

    def imposed(self, path: Nhlfe, ttl: int, dscp: int, flow: FlowHash) -> bytes:
        """The stack that goes on an IP packet of this TTL, which is already what it leaves with, and this DSCP."""
        labels = path.labels
        if path.ttl is not TtlModel.UNIFORM:
            ttl = LARGEST_TTL
        tc = self.classes.traffic_class(dscp) if path.traffic_class is None else path.traffic_class
        entries = [Entry(label, tc, ttl) for label in labels]
        return write_stack(entries + _entropy(path, entries[-1:], flow))

    # 2. Arrival

    def arrive(self, peer: Peer, stack: tuple[Entry, ...], version: int, flow: FlowHash) -> Way | DropReason:
        """The way of a packet that `peer` sent with `stack` above an IP packet of `version`, which is 0 when it is none."""
        at, last, alert = 0, len(stack) - 1, False
        ttl, tc = stack[0].ttl, stack[0].tc
        uniform = True  # what was above hands its TTL down
        vrf = PLATFORM
        while at <= last:
            label = stack[at].label
            if at and label == ENTROPY_INDICATOR and at < last:
                at += 2  # it belongs to the label above: what that one hands down goes past it
                continue
            if at and not uniform:
                ttl, tc = stack[at].ttl, stack[at].tc
            ttl = min(ttl, stack[at].ttl)
            if not ttl:
                return DropReason.MPLS_TTL_EXPIRED
            if label < FIRST_LABEL:
                if label == ENTROPY_INDICATOR and at < last:
                    # RFC 6790 section 4.3: the label above was taken off by the node before, and left its TTL and class here.
                    at += 2
                    continue
                if label == ROUTER_ALERT and at < last:
                    alert = True
                elif label in (IPV4_EXPLICIT_NULL, IPV6_EXPLICIT_NULL):
                    # RFC 4182: not only at the bottom.
                    if at == last and version != (4 if label == IPV4_EXPLICIT_NULL else 6):
                        return DropReason.MPLS_PAYLOAD
                else:
                    return DropReason.MPLS_SPECIAL_LABEL
                at, uniform = at + 1, True
                continue
            if label not in peer.accepts:
                return DropReason.MPLS_LABEL_FORBIDDEN
            paths = self.lfib.incoming(label, peer.space)
            if paths is None:
                return DropReason.MPLS_LABEL_UNKNOWN
            path = choose(paths, flow)
            hop = path.next_hop
            at, uniform = at + 1, path.ttl is TtlModel.UNIFORM
            if isinstance(hop, ToPeer):
                return self._onward(hop, path, stack, at, ttl, tc, version, flow, alert=alert)
            if isinstance(hop, ToStack):
                vrf = hop.vrf
                continue
            while at < last and stack[at].label == ENTROPY_INDICATOR:
                at += 2
            if at <= last:
                return DropReason.MPLS_NOT_BOTTOM
            return self._to_light(hop, at, ttl, tc, version, uniform=uniform, alert=alert)
        return self._to_light(ToVrf(vrf), at, ttl, tc, version, uniform=uniform, alert=alert)

    def _to_light(self, hop: ToInterface | ToVrf, at: int, ttl: int, tc: int, version: int, *, uniform: bool, alert: bool) -> Way | DropReason:
        if not version:
            return DropReason.MPLS_PAYLOAD
        if uniform and ttl <= 1:
            return DropReason.MPLS_TTL_EXPIRED
        return Way(hop, at * ENTRY, b"", ttl if uniform else None, tc if uniform else None, alert)

    def _onward(
        self, hop: ToPeer, path: Nhlfe, stack: tuple[Entry, ...], at: int, ttl: int, tc: int, version: int, flow: FlowHash, *, alert: bool
    ) -> Way | DropReason:
        """Swapped, pushed upon or popped, to a peer; `at` is the first entry that stays."""
        if ttl <= 1:
            return DropReason.MPLS_TTL_EXPIRED
        labels, rest = path.labels, list(stack[at:])
        uniform = path.ttl is TtlModel.UNIFORM
        if not labels:
            if not rest:
                if not version:
                    return DropReason.MPLS_PAYLOAD
                return Way(hop, at * ENTRY, b"", ttl - 1 if uniform else None, tc if uniform else None, alert)
            if uniform:
                rest[0] = Entry(rest[0].label, tc, min(ttl - 1, rest[0].ttl))
            new: list[Entry] = []
        else:
            above = ttl - 1 if uniform else LARGEST_TTL
            tc_above = tc if path.traffic_class is None else path.traffic_class
            new = [Entry(label, tc_above, above) for label in labels[:-1]]
            # The innermost takes the place of the label that came: same LSP, same TTL.
            new.append(Entry(labels[-1], tc_above, ttl - 1))
            if not rest:
                new += _entropy(path, new[-1:], flow)
        if alert:
            new.insert(0, Entry(ROUTER_ALERT, tc, ttl - 1))
        if len(new) + len(rest) > MAX_DEPTH:
            return DropReason.MPLS_TOO_DEEP
        return Way(hop, len(stack) * ENTRY, write_stack(new + rest), alert=alert)


def _entropy(path: Nhlfe, above: list[Entry], flow: FlowHash) -> list[Entry]:
    """Beneath the label `above`."""
    # RFC 6790 section 4.2: the indicator has TTL and class of the label above, for penultimate-hop popping; the entropy label's TTL is 0.
    return [above[0]._replace(label=ENTROPY_INDICATOR), Entry(entropy_label(flow()), 0, 0)] if path.entropy else []

"""What tunnels of ours and of strongSwan copy between inner and outer IP headers, read on the wire and behind the tunnel."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from lab.capture import WirePacket
from lab.namespaces import Namespace
from lab.pairing import OURS, DaemonFactory, Pair
from lab.process import PATIENCE
from lab.topology import WAN
from lab.traffic import IP_MTU_DISCOVER
from lab.tunnel import CHILD, Side, Tunnel
from realkernel.kernel_gateways import KernelPair, kernel_pair, strongswan, xfrm

from kernel_shim.model import HeaderCopies
from kernel_shim.packet.traffic_class import CE, DSCP, ECN, ECT_0, NOT_ECT

pytestmark = pytest.mark.realkernel

EXPEDITED, CLASS_1 = 46 << 2, 8 << 2  # EF (RFC 3246) is sent; the network makes it CS1 (RFC 2474)
IPV6_RECVTCLASS = 66  # linux/in6.h
PMTUDISC_DONT, PMTUDISC_DO = 0, 2

CHILDREN = {  # UDP port -> what both sides are told, and what that means
    7000: ({}, HeaderCopies()),
    7001: ({"copy_dscp": "in"}, HeaderCopies(dscp_out=False, dscp_in=True)),
    7002: ({"copy_dscp": "yes"}, HeaderCopies(dscp_in=True)),
    7003: ({"copy_dscp": "no", "copy_ecn": "no", "copy_df": "no"}, HeaderCopies(dscp_out=False, ecn=False, df=False)),
}
IPV6_PORT = 7006


def _name(port: int) -> str:
    return CHILD if port == 7000 else f"net-{port}"


def _tunnel() -> Tunnel:
    """A child a port, each with options of its own, and one for IPv6 inside."""
    more = {_name(port): (f"10.1.0.0/16[udp/{port}]", f"10.2.0.0/16[udp/{port}]") for port in CHILDREN if port != 7000}
    return Tunnel(
        ts_a="10.1.0.0/16[udp/7000]",
        ts_b="10.2.0.0/16[udp/7000]",
        more_children={**more, _name(IPV6_PORT): (f"fd00:1::/64[udp/{IPV6_PORT}]", f"fd00:2::/64[udp/{IPV6_PORT}]")},
        more_options={_name(port): options for port, (options, _) in CHILDREN.items()} | {_name(IPV6_PORT): {"copy_dscp": "yes"}},
        connection_options={"encap": "yes"},
    )


def _network_marks(gateway: Namespace, ecn: str) -> None:
    """From now on what reaches `gateway` in the tunnel is of class CS1, and of that ECN codepoint."""
    rule = f"iifname {WAN} udp dport 4500 ip dscp set cs1 ip ecn set {ecn}"
    gateway.run(
        ["nft", f"add table ip wire; flush table ip wire; add chain ip wire in {{ type filter hook prerouting priority raw; }}; add rule ip wire in {rule}"]
    )


def _received_class(link: Pair, side: Side, port: int, traffic_class: int, *, dont_fragment: bool = False, timeout: float = PATIENCE) -> int | None:
    """The traffic class with which a datagram of `traffic_class` from the host at `side` reaches the other; None when it does not."""
    near, far = (link.sites.a, link.sites.b) if side is Side.A else (link.sites.b, link.sites.a)
    target: IPv4Address | IPv6Address
    if port == IPV6_PORT:
        family, level, sent_class, received_class, target = socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, IPV6_RECVTCLASS, far.host6
    else:
        family, level, sent_class, received_class, target = socket.AF_INET, socket.IPPROTO_IP, socket.IP_TOS, socket.IP_RECVTOS, far.host4
    with near.host.socket(family, socket.SOCK_DGRAM) as sender, far.host.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(level, received_class, 1)
        receiver.bind(("", port))
        receiver.settimeout(timeout)
        sender.bind(("", port))
        sender.setsockopt(level, sent_class, traffic_class)
        if family == socket.AF_INET:
            sender.setsockopt(level, IP_MTU_DISCOVER, PMTUDISC_DO if dont_fragment else PMTUDISC_DONT)
        sender.sendto(b"headers", (str(target), port))
        try:
            _, ancillary, _, _ = receiver.recvmsg(64, 64)
        except TimeoutError:
            return None
    return ancillary[0][2][0]


def _outer(both: KernelPair, side: Side) -> WirePacket:
    """The latest packet of the tunnel that the gateway at `side` sent."""
    return (both.sent_a if side is Side.A else both.sent_b).esp()[-1]


@pytest.mark.parametrize("ours", [pytest.param(OURS, id="userspace"), pytest.param(xfrm, id="xfrm")])
def test_traffic_class_ecn_and_df_with_strongswan(ours: DaemonFactory) -> None:
    with kernel_pair(ours, strongswan, _tunnel()) as both:
        link = both.link
        for port in (*CHILDREN, IPV6_PORT):
            link.a.initiate(_name(port))
        for site in (link.sites.a, link.sites.b):
            _network_marks(site.gateway, "ce")
        for side in Side:
            for port, (_, copies) in CHILDREN.items():
                inside = _received_class(link, side, port, EXPEDITED | ECT_0)
                outside = _outer(both, side).traffic_class
                assert (side, port, outside) == (side, port, (EXPEDITED if copies.dscp_out else 0) | (ECT_0 if copies.ecn else NOT_ECT))
                assert (side, port, inside) == (side, port, (CLASS_1 if copies.dscp_in else EXPEDITED) | (CE if copies.ecn else ECT_0))
            assert _received_class(link, side, IPV6_PORT, EXPEDITED | ECT_0) == CLASS_1 | CE
            assert _outer(both, side).traffic_class == EXPEDITED | ECT_0
        # RFC 6040 section 4.2: congestion on the way of a packet that knows no ECN. Linux lets it pass as it was.
        assert _received_class(link, Side.A, 7000, EXPEDITED | NOT_ECT) == EXPEDITED
        patience = 3.0 if ours is OURS else PATIENCE
        assert _received_class(link, Side.B, 7000, EXPEDITED | NOT_ECT, timeout=patience) == (None if ours is OURS else EXPEDITED)
        # A CE mark of the inner packet is seen outside by RFC 6040 section 4.1; Linux says ECT(0) there (RFC 3168). Inside it stays.
        for site in (link.sites.a, link.sites.b):
            _network_marks(site.gateway, "ect0")
        for side in Side:
            assert _received_class(link, side, 7000, EXPEDITED | CE) == EXPEDITED | CE
            assert _outer(both, side).traffic_class & DSCP == EXPEDITED
            assert _outer(both, side).traffic_class & ECN == (CE if side is Side.A and ours is OURS else ECT_0)
            # Our own kernel sets DF on all or none, and tells senders of the path's MTU itself.
            always = side is Side.A and ours is OURS
            for port, inner_df, outer_df in ((7000, True, True), (7000, False, always), (7003, True, False), (7003, False, False)):
                assert _received_class(link, side, port, NOT_ECT, dont_fragment=inner_df) is not None
                assert (side, port, inner_df, _outer(both, side).dont_fragment) == (side, port, inner_df, outer_df)
        assert both.leaks() == []

"""What a policy protects never leaves in clear, whatever dies; looked at on the wire, where a route in clear stands ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lab.capture import WirePacket
from lab.gateway import Gateway
from lab.pairing import OURS, STRONGSWAN, WINDOW, DaemonFactory, Pair, pair
from lab.traffic import UdpSink, UdpStream, ping, tcp_bulk, tcp_connect, tcp_server, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = pytest.mark.timeout(180)

PEERS = [
    pytest.param(OURS, id="ours", marks=pytest.mark.pair),
    pytest.param(STRONGSWAN, id="strongswan", marks=pytest.mark.interop),
]

RATE = 400.0


@contextmanager
def traffic(link: Pair, *, count: int, window: int = 0) -> Iterator[UdpSink]:
    """Numbered datagrams both ways while the block runs; `count` each, no more than `window` (0: any number) under way. The sink is B's."""
    near, far, target = link.ends(Side.A)
    _, _, back = link.ends(Side.B)
    kept = {"acknowledge": window // 4, "whole": count}
    with udp_sink(far, target, **kept) as sink, udp_sink(near, back, **kept) as back_sink:
        streams = [
            UdpStream(near, [(target, sink.port)], count=count, rate=RATE, window=window),
            UdpStream(far, [(back, back_sink.port)], count=count, rate=RATE, window=window),
        ]
        try:
            sink.expect(20)
            yield sink
            for stream in streams:
                stream.wait()
        finally:
            for stream in streams:
                stream.abandon()


def trapped(peer: DaemonFactory, **more: str) -> Tunnel:
    """Policies that stand while no SA does: at A, and at B where B can."""
    return Tunnel(start_a="trap", start_b="trap" if peer is OURS else "none", **more)  # type: ignore[arg-type]


def leaks(link: Pair) -> list[str]:
    """A peer that cannot trap has no policies while it has no CHILD_SA: what it then lets out in clear is not ours to keep in."""
    return link.leaks(of=None if isinstance(link.b, Gateway) else Side.A)


def gateway(link: Pair) -> Gateway:
    assert isinstance(link.a, Gateway)
    return link.a


@pytest.mark.parametrize("peer", PEERS)
def test_shim_killed(peer: DaemonFactory) -> None:
    with pair(OURS, peer, trapped(peer)) as link:
        assert link.ping().lost == 0
        with traffic(link, count=1500):
            gateway(link).kill_shim()
            assert link.ping(count=2, timeout=0.5).received == 0
            gateway(link).start_shim()
        link.carries_again()
        assert link.bulk(size=1 << 20).intact
        assert leaks(link) == []


@pytest.mark.parametrize("peer", PEERS)
def test_vpnd_killed(peer: DaemonFactory) -> None:
    """The tunnel goes on while its key manager is away."""
    with pair(OURS, peer, trapped(peer)) as link:
        assert link.ping().lost == 0
        with traffic(link, count=1000, window=WINDOW) as sink:
            gateway(link).kill_vpnd()
            assert link.ping(count=5).lost == 0
            assert sink.expect(1000).received == 1000
            gateway(link).start_vpnd()
        link.carries_again()
        assert link.bulk(size=1 << 20).intact
        assert leaks(link) == []


@pytest.mark.parametrize("peer", PEERS)
def test_both_killed(peer: DaemonFactory) -> None:
    with pair(OURS, peer, trapped(peer)) as link:
        assert link.ping().lost == 0
        with traffic(link, count=1500):
            gateway(link).kill()
            assert link.ping(count=2, timeout=0.5).received == 0
            gateway(link).start()
        link.carries_again()
        assert link.bulk(size=1 << 20).intact
        assert leaks(link) == []


@pytest.mark.pair
def test_a_peer_without_a_trap_keeps_closed_while_we_come_back() -> None:
    """Its policies outlive the IKE SA that the new one replaces."""
    with pair(OURS, OURS, Tunnel(start_a="trap")) as link:
        assert link.ping().lost == 0
        with traffic(link, count=1000):
            gateway(link).kill()
            gateway(link).start()
        link.carries_again()
        assert link.leaks() == []


@pytest.mark.pair
def test_shim_that_vpnd_started_is_started_again() -> None:
    def together(*arguments: object) -> Gateway:
        return Gateway(*arguments, shim_from_vpnd=True)  # type: ignore[arg-type]

    with pair(together, OURS, trapped(OURS)) as link:
        assert link.ping().lost == 0
        with traffic(link, count=800):
            gateway(link).kill_shim()
        link.carries_again()
        assert link.leaks() == []


@pytest.mark.pair
def test_responder_killed() -> None:
    with pair(OURS, OURS, trapped(OURS)) as link:
        assert link.ping().lost == 0
        with traffic(link, count=1500):
            link.b.kill()
            assert link.ping(count=2, timeout=0.5).received == 0
            link.b.start()
        link.carries_again(Side.B)
        assert link.leaks() == []


@pytest.mark.parametrize("peer", PEERS)
def test_everything_goes_into_the_tunnel(peer: DaemonFactory) -> None:
    """remote_ts 0.0.0.0/0: the gateway's own packets to its peer must not loop into the tunnel that they carry."""
    with pair(OURS, peer, trapped(peer, ts_b="0.0.0.0/0")) as link:
        assert link.ping().lost == 0
        for side in Side:
            assert link.bulk(side, size=4 << 20).intact
        # An address beyond B's network, reached through the same tunnel.
        assert ping(link.sites.a.host, link.sites.b.wan4).lost == 0
        gateway(link).kill()
        assert link.ping(count=2, timeout=0.5).received == 0
        assert ping(link.sites.a.host, link.sites.b.wan4, count=1, timeout=0.5).received == 0
        gateway(link).start()
        link.carries_again()
        assert leaks(link) == []


@pytest.mark.parametrize("peer", PEERS)
def test_selector_with_a_port(peer: DaemonFactory) -> None:
    """TCP to one port is protected; its neighbours in the same prefix are bypassed and still arrive."""
    protected, other = 7000, 7001
    with pair(OURS, peer, trapped(peer, ts_a="10.1.0.0/16[tcp]", ts_b=f"10.2.0.0/16[tcp/{protected}]")) as link:
        near, far, target = link.ends(Side.A)

        def leaks() -> list[str]:
            def is_protected(packet: WirePacket) -> bool:
                return packet.protocol == 6 and protected in (packet.source_port, packet.destination_port)

            return [str(packet) for packet in link.capture.clear_packets(link.sites.inner_networks) if is_protected(packet)]

        with tcp_server(far, target, protected), tcp_server(far, target, other):
            _, lost = link.connect(protected)
            assert lost == 0
            assert tcp_bulk(near, target, protected, size=4 << 20).intact
            assert link.a.child().packets_out > 0
            # strongSwan's userspace ESP routes the whole prefix into its TUN and drops there what no SA covers.
            if peer is OURS:
                assert ping(near, target).lost == 0  # behind the last segments
                counted = link.a.child().packets_out
                assert tcp_bulk(near, target, other, size=1 << 20).intact
                assert ping(near, target).lost == 0
                assert link.a.child().packets_out == counted
                assert any(packet.destination_port == other for packet in link.capture.clear_packets(link.sites.inner_networks))
            gateway(link).kill()
            with pytest.raises(OSError, match=r"."):
                tcp_connect(near, target, protected, timeout=1.0)
            assert leaks() == []
            gateway(link).start()
            assert tcp_bulk(near, target, protected, size=1 << 20).intact
        assert leaks() == []


@pytest.mark.pair
def test_host_to_host_transport() -> None:
    """Both ends of the traffic are the gateways themselves, on the very addresses that IKE and ESP use."""
    with pair(OURS, OURS, trapped(OURS, mode="transport")) as link:
        assert link.ping().lost == 0
        for side in Side:
            assert link.bulk(side, size=4 << 20).intact
        assert link.children()[0].mode == "TRANSPORT"
        gateway(link).kill()
        assert link.ping(count=2, timeout=0.5).received == 0
        gateway(link).start()
        link.carries_again()
        assert leaks(link) == []


@pytest.mark.parametrize("peer", PEERS)
def test_clear_packets_from_outside_are_dropped(peer: DaemonFactory) -> None:
    """The far gateway is gone and its router forwards in clear: what a policy protects must not come in that way."""
    with pair(OURS, peer, trapped(peer)) as link:
        assert link.ping().lost == 0
        link.b.stop()
        link.a.wait_gone()
        near, far, back = link.ends(Side.B)
        with udp_sink(far, back) as sink:
            UdpStream(near, [(back, sink.port)], count=10, rate=1000).wait()
            link.capture.wait_for(lambda packet: packet.destination == back and packet.destination_port == sink.port, "a clear packet on the wire")
            assert sink.expect(1, timeout=0.5).received == 0

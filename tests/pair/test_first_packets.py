"""The first packets into a trapped policy are the ones that users of other gateways lose."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, pair
from lab.relay import RelaySettings
from lab.traffic import UdpStream, tcp_server, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = pytest.mark.pair

DELAYS = [pytest.param(None, id="0ms"), pytest.param(RelaySettings(delay=0.05), id="50ms")]


@pytest.mark.parametrize("relay", DELAYS)
@pytest.mark.parametrize("inner", [4, 6])
def test_no_packet_of_a_stream_is_lost(relay: RelaySettings | None, inner: int) -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", inner_version=inner), relay=relay) as link:
        near, far, target = link.ends(Side.A)
        assert [policy["child"] for policy in link.a.policies()] == ["net"]
        with udp_sink(far, target) as sink:
            sent = UdpStream(near, [(target, sink.port)] * 3, count=100, rate=300).wait()
            got = sink.expect(sent.sent)
        assert (got.received, got.duplicates, got.reordered) == (300, 0, 0)
        assert len(link.a.children()) == 1
        assert link.leaks() == []


@pytest.mark.parametrize("relay", DELAYS)
def test_connect_needs_no_second_syn(relay: RelaySettings | None) -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap"), relay=relay) as link:
        _, far, target = link.ends(Side.A)
        with tcp_server(far, target) as port:
            _, lost = link.connect(port)
        assert lost == 0
        assert link.leaks() == []


def test_both_sides_at_once() -> None:
    """Simultaneous first packets may make two tunnels, but lose nothing."""
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap"), relay=RelaySettings(delay=0.01)) as link:
        received = link.datagrams(count=200, rate=400, window=0)
        assert {side: account.received for side, account in received.items()} == dict.fromkeys(Side, 200)
        assert link.leaks() == []


def test_after_a_delete_the_trap_stands() -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap")) as link:
        for _ in range(3):
            assert link.ping().lost == 0
            link.a.terminate()
            link.b.wait_gone()
        assert link.leaks() == []

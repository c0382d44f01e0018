"""Shunts beside a tunnel: what passes in clear, what goes nowhere, and what is protected, between the very same networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.daemon import Daemon
from lab.namespaces import Namespace
from lab.pairing import OURS, pair
from lab.traffic import UdpStream, ping, tcp_bulk, tcp_server, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(120)]

ICMP, UDP = 1, 17
CLOSED_PORT = 9999
NET_A, NET_B = "10.1.0.0/16", "10.2.0.0/16"
MODES = {"open": "pass", "closed": "drop"}


def shunting(namespace: Namespace, config: Path) -> Daemon:
    text = config.read_text()
    for name, mode in MODES.items():
        before, section = text.split(f"      {name} {{\n")
        text = before + f"      {name} {{\n" + section.replace("mode = tunnel", f"mode = {mode}", 1).replace("esp_proposals = aes128gcm16\n", "", 1)
    config.write_text(text)
    return OURS(namespace, config)


def test_each_packet_by_the_narrowest_policy() -> None:
    shunts = {"open": (f"{NET_A}[icmp]", f"{NET_B}[icmp]"), "closed": (f"{NET_A}[udp]", f"{NET_B}[udp/{CLOSED_PORT}]")}
    with pair(shunting, shunting, Tunnel(ts_a=NET_A, ts_b=NET_B, more_children=shunts, start_a="trap", start_b="trap")) as link:
        near, far, target = link.ends(Side.A)
        # what passes in clear brings no tunnel up
        assert ping(near, target).lost == 0
        assert link.a.ike_sas() == []
        assert {packet.protocol for packet in link.capture.clear_packets(link.sites.inner_networks)} == {ICMP}
        # TCP is for the tunnel
        with tcp_server(far, target) as port:
            assert tcp_bulk(near, target, port, size=1 << 20).intact
        assert ping(near, target).lost == 0  # behind the last segments
        protected = link.a.child().packets_out
        assert protected > 0
        # what goes nowhere goes neither in clear nor through the tunnel
        UdpStream(near, [(target, CLOSED_PORT)], count=20, rate=200.0).wait()
        assert link.a.child().packets_out == protected
        with udp_sink(far, target) as sink:
            sent = UdpStream(near, [(target, sink.port)], count=20, rate=200.0).wait()
            assert sink.expect(sent.sent).received == 20
        assert link.a.child().packets_out >= protected + 20
        assert {packet.protocol for packet in link.capture.clear_packets(link.sites.inner_networks)} == {ICMP}
        assert sorted(policy["mode"] for policy in link.a.policies()) == ["DROP", "PASS", "TUNNEL"]

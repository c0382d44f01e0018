"""Two of our gateways as PE routers, configured by file: three customers in the same 10.0.0.0/24, each in its own VRF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.gateway import Gateway
from lab.process import wait_until
from lab.providers import CUSTOMERS, Provider, Providers, providers
from lab.topology import WAN
from lab.traffic import UdpStream, ping, tcp_bulk, tcp_server, udp_sink

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]

CONFIGURATION = """
connections {{
  pe {{
    local_addrs = {near}
    remote_addrs = {far}
    proposals = aes128gcm16-prfsha256-x25519
    local {{ auth = psk }}
    remote {{ auth = psk }}
    children {{
      labels {{
        mode = transport
        local_ts = {near}[gre]
        remote_ts = {far}[gre]
        esp_proposals = aes128gcm16
        start_action = trap
      }}
    }}
  }}
}}
secrets {{ ike-pe {{ secret = "three customers and a wire" }} }}
mpls {{
  vrfs {{ {vrfs} }}
  peers {{
    pe {{
      local = {near}
      remote = {far}
      vrfs {{ {remote_vrfs} }}
    }}
  }}
}}
"""


def configuration(near: Provider, far: Provider, customers: Sequence[str] = CUSTOMERS, remote: Mapping[str, int] | None = None) -> str:
    """`remote`: the labels under which this node sends into the peer's VRFs."""
    vrfs, remote_vrfs = "", ""
    labels = {name: 100 + number for number, name in enumerate(CUSTOMERS)} if remote is None else remote
    for number, name in enumerate(CUSTOMERS):
        mine, theirs = near.customers[name], far.customers[name]
        if name in customers:
            vrfs += f"{name} {{\n members = {mine.member}\n table = {101 + number}\n label = {100 + number}\n prefixes = {mine.net4}, {mine.net6}\n }}\n"
        if name in customers and name in labels:
            remote_vrfs += f"{name} {{\n label = {labels[name]}\n prefixes = {theirs.net4}, {theirs.net6}\n }}\n"
    return CONFIGURATION.format(near=near.wan4, far=far.wan4, vrfs=vrfs, remote_vrfs=remote_vrfs)


@dataclass
class Edges:
    lab: Providers
    a: Gateway
    b: Gateway
    wire: Capture

    def write(self, customers: Sequence[str] = CUSTOMERS) -> None:
        for gateway, near, far in ((self.a, self.lab.a, self.lab.b), (self.b, self.lab.b, self.lab.a)):
            gateway.config.write_text(configuration(near, far, customers))

    def lost(self, name: str, count: int = 2, timeout: float = 5.0) -> int:
        near, far = self.lab.a.customers[name], self.lab.b.customers[name]
        return sum(ping(near.host, target, count=count, timeout=timeout).lost for target in (far.host4, far.host6))

    def leaks(self) -> list[str]:
        networks = [net for customer in (self.lab.a.customers["red"], self.lab.b.customers["red"]) for net in (customer.net4, customer.net6)]
        return [str(packet) for packet in self.wire.clear_packets(tuple(networks))]


@pytest.fixture
def edges(tmp_path: Path) -> Iterator[Edges]:
    with providers() as lab, contextlib.ExitStack() as stack:
        wire = stack.enter_context(Capture(lab.a.gateway, WAN))
        for letter in "ab":
            (tmp_path / letter).mkdir()
        a, b = (Gateway(pe.gateway, tmp_path / letter / "gateway.conf") for letter, pe in (("a", lab.a), ("b", lab.b)))
        found = Edges(lab, a, b, wire)
        found.write()
        for gateway in (a, b):
            stack.callback(gateway.kill)
            gateway.start()
        yield found


def test_the_first_labelled_packet_is_kept_and_customers_stay_apart(edges: Edges) -> None:
    assert edges.lost("red", count=1) == 0  # nothing was negotiated before it
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    far = edges.lab.b.customers
    with tcp_server(far["green"].host, far["green"].host4, 7000) as port:
        for name in CUSTOMERS:
            near = edges.lab.a.customers[name]
            if name == "green":
                assert tcp_bulk(near.host, far[name].host4, port, size=4 << 20).intact
            else:  # its own host of that address refuses; green's would not
                done = near.host.run(["bash", "-c", f"exec 3<>/dev/tcp/{far[name].host4}/{port}"], check=False)
                assert "refused" in done.stderr
    assert edges.leaks() == []


def reaches(edges: Edges, name: str) -> None:
    """Until a packet of this customer passes: an SA may have to be made first."""
    near, far = edges.lab.a.customers[name], edges.lab.b.customers[name]
    wait_until(lambda: ping(near.host, far.host4, count=1, timeout=1.0).received, f"{name} reaches its other site", 30.0, 0.2)


def test_a_label_that_a_peer_may_not_use_reaches_nobody(edges: Edges) -> None:
    """The one PE sends red's packets under green's label, in its own SA. The other one never told it that label."""
    edges.a.config.write_text(configuration(edges.lab.a, edges.lab.b, remote={"red": 102, "blue": 101}))
    edges.b.config.write_text(configuration(edges.lab.b, edges.lab.a, remote={"red": 100, "blue": 101}))
    for gateway in (edges.b, edges.a):
        gateway.vpnctl("reload")
    with Capture(edges.lab.b.customers["green"].host, "lan") as green:
        near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
        assert ping(near.host, far.host4, count=5, timeout=1.0).received == 0
        reaches(edges, "blue")
        assert [str(packet) for packet in green.packets() if near.host4 in (packet.source, packet.destination)] == []
    assert edges.b.counters()["drop_mpls_label_forbidden"] >= 5


def test_a_dead_key_manager_and_a_dead_kernel_come_back(edges: Edges) -> None:
    assert edges.lost("red") == 0
    edges.b.kill_vpnd()
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    edges.b.start_vpnd()
    edges.b.wait_child("labels")
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    assert "kernel_labels_put" not in edges.b.vpnctl("--json", "status")  # all of it was right, so nothing was touched
    edges.a.kill_shim()
    assert edges.lost("red", timeout=0.5) == 4
    edges.a.start_shim()
    for name in CUSTOMERS:
        reaches(edges, name)
    assert edges.leaks() == []


def test_a_vrf_comes_and_goes_while_others_carry(edges: Edges) -> None:
    edges.write(("red", "blue"))
    for gateway in (edges.a, edges.b):
        gateway.vpnctl("reload")
    assert edges.lost("red") == edges.lost("blue") == 0
    assert edges.lost("green", timeout=0.5) == 4
    near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
    with udp_sink(far.host, far.host4, acknowledge=32) as sink:
        stream = UdpStream(near.host, [(far.host4, sink.port)], count=1500, rate=300, size=256, window=128)
        edges.write()
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        assert edges.lost("green") == 0
        edges.write(("red", "blue"))
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        assert edges.lost("green", timeout=0.5) == 4
        sent = stream.wait()
        received = sink.expect(sent.sent - sent.refused, timeout=5.0)
    assert (received.received, received.duplicates) == (sent.sent - sent.refused, 0)

"""Two of our gateways as PE routers, configured by file: three customers in the same 10.0.0.0/24, each in its own VRF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.gateway import Gateway
from lab.providers import CUSTOMERS, Provider, Providers, providers
from lab.topology import WAN
from lab.traffic import ping, tcp_bulk, tcp_server

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


def configuration(near: Provider, far: Provider, customers: Sequence[str] = CUSTOMERS) -> str:
    vrfs, remote_vrfs = "", ""
    for number, name in enumerate(CUSTOMERS):
        if name in customers:
            mine, theirs = near.customers[name], far.customers[name]
            vrfs += f"{name} {{\n members = {mine.member}\n table = {101 + number}\n label = {100 + number}\n prefixes = {mine.net4}, {mine.net6}\n }}\n"
            remote_vrfs += f"{name} {{\n label = {100 + number}\n prefixes = {theirs.net4}, {theirs.net6}\n }}\n"
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

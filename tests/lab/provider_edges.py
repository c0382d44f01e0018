"""Our two gateways as PE routers of `lab.providers`, configured by file: an SA for the label tunnel on demand, three customers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.capture import Capture
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, wait_until
from lab.providers import CUSTOMERS, Provider, Providers, label_connection, providers
from lab.topology import WAN
from lab.traffic import ping

MakeGateway = Callable[[Namespace, Path], Gateway]

CONFIGURATION = """
connections {{ {connection} }}
secrets {{ ike-pe {{ secret = "three customers and a wire" }} }}
mpls {{
  ttl = {ttl}
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


def configuration(
    near: Provider, far: Provider, customers: Sequence[str] = CUSTOMERS, remote: Mapping[str, int] | None = None, ttl: str = "pipe", outer: int = 4
) -> str:
    """`remote`: the labels under which this node sends into the peer's VRFs; `outer`: the tunnel's IP version."""
    vrfs, remote_vrfs = "", ""
    labels = {name: 100 + number for number, name in enumerate(CUSTOMERS)} if remote is None else remote
    for number, name in enumerate(CUSTOMERS):
        mine, theirs = near.customers[name], far.customers[name]
        if name in customers:
            vrfs += f"{name} {{\n members = {mine.member}\n table = {101 + number}\n label = {100 + number}\n prefixes = {mine.net4}, {mine.net6}\n }}\n"
        if name in customers and name in labels:
            remote_vrfs += f"{name} {{\n label = {labels[name]}\n prefixes = {theirs.net4}, {theirs.net6}\n }}\n"
    ends = (near.wan4, far.wan4) if outer == 4 else (near.wan6, far.wan6)
    connection = label_connection("pe", *ends)
    return CONFIGURATION.format(connection=connection, near=ends[0], far=ends[1], ttl=ttl, vrfs=vrfs, remote_vrfs=remote_vrfs)


@dataclass
class Edges:
    lab: Providers
    a: Gateway
    b: Gateway
    wire: Capture | None
    ttl: str = "pipe"
    outer: int = 4

    def write(self, customers: Sequence[str] = CUSTOMERS) -> None:
        for gateway, near, far in ((self.a, self.lab.a, self.lab.b), (self.b, self.lab.b, self.lab.a)):
            gateway.config.write_text(configuration(near, far, customers, ttl=self.ttl, outer=self.outer))

    def lost(self, name: str, count: int = 2, timeout: float = PATIENCE / 3) -> int:
        near, far = self.lab.a.customers[name], self.lab.b.customers[name]
        return sum(ping(near.host, target, count=count, timeout=timeout).lost for target in (far.host4, far.host6))

    def leaks(self) -> list[str]:
        if self.wire is None:
            raise LabError("these edges have no capture")
        networks = [net for customer in (self.lab.a.customers["red"], self.lab.b.customers["red"]) for net in (customer.net4, customer.net6)]
        return [str(packet) for packet in self.wire.clear_packets(tuple(networks))]

    def reaches(self, name: str) -> None:
        """Until a packet of this customer passes: an SA may have to be made first."""
        near, far = self.lab.a.customers[name], self.lab.b.customers[name]
        wait_until(lambda: ping(near.host, far.host4, count=1, timeout=1.0).received, f"{name} reaches its other site", interval=0.2)


@contextlib.contextmanager
def provider_edges(
    directory: Path, *, capture: bool = True, make_a: MakeGateway = Gateway, make_b: MakeGateway = Gateway, narrow: int = 0, ttl: str = "pipe", outer: int = 4
) -> Iterator[Edges]:
    """Both run, and nothing is negotiated yet; with a capture on the wire since before they started.

    `narrow`: as in `providers`; `ttl`: of the section; `outer`: the tunnel's IP version.
    """
    with providers(narrow=narrow) as lab, contextlib.ExitStack() as stack:
        wire = stack.enter_context(Capture(lab.a.gateway, WAN)) if capture else None
        for letter in "ab":
            (directory / letter).mkdir()
        a, b = (make(pe.gateway, directory / letter / "gateway.conf") for letter, pe, make in (("a", lab.a, make_a), ("b", lab.b, make_b)))
        found = Edges(lab, a, b, wire, ttl, outer)
        found.write()
        for gateway in (a, b):
            stack.callback(gateway.kill)
            gateway.start()
        yield found

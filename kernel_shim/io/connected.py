"""Which directly connected subnets lie on this side of the tunnels.

A subnet is *inside* when a policy's own local selector covers it, no policy's remote selector lies in it, and no tunnel
ends in it (the outer addresses of templates). Traffic within such a subnet stays on its link, as longest-prefix routing has it: a gateway of 10.1.0.0/24 whose
remote side is 0.0.0.0/0 still reaches its own hosts. A local selector of everything says nothing about sides and exempts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from typing import NamedTuple

from kernel_shim.model import IPAddress, IPNetwork


class HostAddress(NamedTuple):
    """An address of this host with its on-link prefix."""

    interface: str
    address: IPAddress
    network: IPNetwork


@dataclass(frozen=True, slots=True)
class Sides:
    """A policy as seen from this host: prefixes of its own side and of the other one, and where its tunnels end."""

    local: tuple[IPNetwork, ...]
    remote: tuple[IPNetwork, ...]
    outer: frozenset[IPAddress] = frozenset()


def supernets(network: IPNetwork, shortest: int = 0) -> Iterator[IPNetwork]:
    """The network itself and all that contain it, down to a prefix length of `shortest`."""
    for length in range(network.prefixlen, shortest - 1, -1):
        yield network.supernet(new_prefix=length)


class Connected:
    """Keeps the answer while policies and addresses change; a policy costs a bounded number of probes."""

    def __init__(self) -> None:
        self._locals: Counter[IPNetwork] = Counter()
        self._remotes: Counter[IPNetwork] = Counter()
        self._outer: Counter[IPAddress] = Counter()
        self._subnets: dict[IPNetwork, set[str]] = {}
        self._blocked: Counter[IPNetwork] = Counter()  # remote prefixes that lie in a subnet
        self._ended: Counter[IPNetwork] = Counter()  # outer addresses that lie in a subnet
        self.generation = 0  # grows when an answer may be another

    def set_host(self, addresses: Iterable[HostAddress]) -> None:
        self.generation += 1
        self._subnets = {}
        for host in addresses:
            if host.network.prefixlen < host.network.max_prefixlen:
                self._subnets.setdefault(host.network, set()).add(host.interface)
        self._blocked, self._ended = Counter(), Counter()
        for remote in self._remotes:
            self._count(self._blocked, remote, 1)
        for address in self._outer:
            self._count(self._ended, ip_network(address), 1)

    def add(self, policy: Sides) -> None:
        for network in policy.local:
            self._locals[network] += 1
            self.generation += self._locals[network] == 1
        for network in policy.remote:
            self._remotes[network] += 1
            if self._remotes[network] == 1:
                self._count(self._blocked, network, 1)
        for address in policy.outer:
            self._outer[address] += 1
            if self._outer[address] == 1:
                self._count(self._ended, ip_network(address), 1)

    def remove(self, policy: Sides) -> None:
        """Of a policy that `add` took."""
        for network in policy.local:
            self._locals[network] -= 1
            if not self._locals[network]:
                del self._locals[network]
                self.generation += 1
        for network in policy.remote:
            self._remotes[network] -= 1
            if not self._remotes[network]:
                del self._remotes[network]
                self._count(self._blocked, network, -1)
        for address in policy.outer:
            self._outer[address] -= 1
            if not self._outer[address]:
                del self._outer[address]
                self._count(self._ended, ip_network(address), -1)

    def _count(self, counter: Counter[IPNetwork], network: IPNetwork, amount: int) -> None:
        """Of each connected subnet that contains the network."""
        for wider in supernets(network):
            if wider in self._subnets:
                counter[wider] += amount
                self.generation += 1

    def routable(self, version: int) -> frozenset[IPNetwork]:
        """Connected subnets in which no remote selector lies: more specific than any route of ours."""
        return frozenset(subnet for subnet in self._subnets if subnet.version == version and self._blocked[subnet] <= 0)

    def inside(self) -> dict[IPNetwork, frozenset[str]]:
        """The subnets on this side, with their interfaces."""
        return {
            subnet: frozenset(interfaces)
            for subnet, interfaces in self._subnets.items()
            if self._blocked[subnet] <= 0 and self._ended[subnet] <= 0 and any(wider in self._locals for wider in supernets(subnet, 1))
        }

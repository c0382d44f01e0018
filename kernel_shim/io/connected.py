"""Which directly connected subnets lie on this side of the tunnels.

A subnet is *inside* when a policy's own local selector covers it, no policy's remote selector lies in it, and no tunnel
ends in it. Traffic within such a subnet stays on its link, as longest-prefix routing has it: a gateway of 10.1.0.0/24 whose
remote side is 0.0.0.0/0 still reaches its own hosts. A local selector of everything says nothing about sides and exempts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kernel_shim.model import IPAddress, IPNetwork


class HostAddress(NamedTuple):
    """An address of this host with its on-link prefix."""

    interface: str
    address: IPAddress
    network: IPNetwork


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host looks like from outside: its addresses, and those that tunnels end in."""

    addresses: tuple[HostAddress, ...] = ()
    bound: frozenset[IPAddress] = frozenset()


def supernets(network: IPNetwork, shortest: int = 0) -> Iterator[IPNetwork]:
    """The network itself and all that contain it, down to a prefix length of `shortest`."""
    for length in range(network.prefixlen, shortest - 1, -1):
        yield network.supernet(new_prefix=length)


class Connected:
    """Keeps the answer while policies and addresses change; a policy costs a bounded number of probes."""

    def __init__(self) -> None:
        self._locals: Counter[IPNetwork] = Counter()
        self._remotes: Counter[IPNetwork] = Counter()
        self._subnets: dict[IPNetwork, set[str]] = {}
        self._taken: frozenset[IPNetwork] = frozenset()  # a tunnel ends in them
        self._blocked: Counter[IPNetwork] = Counter()  # remote prefixes that lie in them
        self.generation = 0  # grows when an answer may be another

    def set_host(self, facts: HostFacts) -> None:
        self.generation += 1
        self._subnets = {}
        for host in facts.addresses:
            if host.network.prefixlen < host.network.max_prefixlen:
                self._subnets.setdefault(host.network, set()).add(host.interface)
        self._taken = frozenset(subnet for subnet in self._subnets if any(address.version == subnet.version and address in subnet for address in facts.bound))
        self._blocked = Counter()
        for remote in self._remotes:
            self._block(remote, 1)

    def add(self, local: Iterable[IPNetwork], remote: Iterable[IPNetwork]) -> None:
        for network in local:
            self._locals[network] += 1
            self.generation += self._locals[network] == 1
        for network in remote:
            self._remotes[network] += 1
            if self._remotes[network] == 1:
                self._block(network, 1)

    def remove(self, local: Iterable[IPNetwork], remote: Iterable[IPNetwork]) -> None:
        for network in local:
            self._locals[network] -= 1
            if not self._locals[network]:
                del self._locals[network]
                self.generation += 1
        for network in remote:
            self._remotes[network] -= 1
            if not self._remotes[network]:
                del self._remotes[network]
                self._block(network, -1)

    def _block(self, remote: IPNetwork, amount: int) -> None:
        for wider in supernets(remote):
            if wider in self._subnets:
                self._blocked[wider] += amount
                self.generation += 1

    def routable(self, version: int) -> frozenset[IPNetwork]:
        """Connected subnets in which no remote selector lies: more specific than any route of ours."""
        return frozenset(subnet for subnet in self._subnets if subnet.version == version and self._blocked[subnet] <= 0)

    def inside(self) -> dict[IPNetwork, frozenset[str]]:
        """The subnets on this side, with their interfaces."""
        return {
            subnet: frozenset(interfaces)
            for subnet, interfaces in self._subnets.items()
            if self._blocked[subnet] <= 0 and subnet not in self._taken and any(wider in self._locals for wider in supernets(subnet, 1))
        }

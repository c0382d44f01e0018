"""The inbound guard: nftables text that drops and counts clear packets which a policy protects. A pure plan.

Policies of one version, priority, action, prefix lengths, protocol and ports make one *shape*: a set of prefix pairs
and one rule. A new policy of a known shape is one set element; a new shape rewrites the chain of rules, in order of priority.
The table outlives its process: a dead shim lets nothing in clear either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kernel_shim.io.pair_sets import PairSets
from kernel_shim.model import ANY_PROTOCOL, PROTOCOL_ICMP, PROTOCOL_ICMPV6, Action, Direction, IPAddress, IPNetwork, Policy, PortRange
from kernel_shim.nft import FAMILY, NEIGHBOUR_DISCOVERY, interface_set

MAX_SHAPES: Final = 1024
COUNTER: Final = "clear_dropped"
VRF_INTERFACES: Final = "vrf_interfaces"
VRF_MEMBERS: Final = "vrf_members"
VRF_MARKS: Final = "vrf_marks"
VRF_WAYS: Final = "vrf_ways"


class _Shape(NamedTuple):
    version: int
    priority: int
    action: Action
    source_length: int
    destination_length: int
    protocol: int
    source_ports: PortRange
    destination_ports: PortRange


class GuardPlan:
    """Feed it the inbound and forward policies; run the commands that it gives, in order, as one transaction."""

    def __init__(self, table: str, *, interfaces: Iterable[str], mark: int) -> None:
        self.table: Final = table
        self._interfaces: Final = tuple(interfaces)
        self._mark: Final = mark
        self._sets: Final = PairSets(table, "shape", _shape, MAX_SHAPES, self._rules)

    @staticmethod
    def guards(policy: Policy) -> bool:
        return policy.direction is not Direction.OUT

    def create(self) -> str:
        """The table, its chains, and what is let through before any policy is asked."""
        table, mark = f"inet {self.table}", f"{self._mark:#010x}"
        names = interface_set(("lo", *self._interfaces))
        rules = [
            f"iifname {{ {names} }} accept",
            # A VRF's packets are routed by its own table: the host's policies say nothing of them. What the host answers bears their mark (fwmark_reflect).
            f"meta mark set iifname map @{VRF_MARKS}",
            f"iifname @{VRF_INTERFACES} accept",
            # The VRF device of a routing daemon: its packets came here by their port before.
            'meta iifkind "vrf" accept',
            # IKE and ESP to our own sockets. Marked, for a strict reverse path check would else be told of the TUN (src_valid_mark).
            f"ip daddr @local4 udp dport {{ 500, 4500 }} meta mark set {mark} accept",
            f"ip6 daddr @local6 udp dport {{ 500, 4500 }} meta mark set {mark} accept",
            # Their fragments have no ports; without a first one, which has, no datagram comes of them.
            f"ip daddr @local4 ip protocol udp ip frag-off & 0x1fff != 0 meta mark set {mark} accept",
            f"ip6 daddr @local6 frag nexthdr udp frag frag-off != 0 meta mark set {mark} accept",
            "ip daddr @local4 ip protocol esp accept",
            "ip6 daddr @local6 ip6 nexthdr esp accept",
            # Path MTU discovery of the tunnels themselves (RFC 4301 section 8.2.1).
            "ip daddr @local4 icmp type destination-unreachable icmp code frag-needed accept",
            "ip6 daddr @local6 icmpv6 type packet-too-big accept",
            # What never leaves a link: neighbour discovery, link-local addresses.
            f"{NEIGHBOUR_DISCOVERY} accept",
            "ip6 saddr fe80::/10 accept",
            "ip6 daddr ff02::/16 accept",
            "ip daddr 224.0.0.0/24 accept",
            "jump inside",
            "jump protected",
        ]
        lines = [
            f"add table {table}",
            f"add counter {table} {COUNTER}",
            f"add set {table} local4 {{ type ipv4_addr; }}",
            f"add set {table} local6 {{ type ipv6_addr; }}",
            f"add set {table} {VRF_INTERFACES} {{ type ifname; }}",
            f"add set {table} {VRF_MEMBERS} {{ type ifname; }}",
            f"add map {table} {VRF_MARKS} {{ type ifname : mark; }}",
            f"add set {table} {VRF_WAYS} {{ type ifname . mark; }}",
            f"add chain {table} inside",
            f"add chain {table} protected",
            f"add chain {table} prerouting {{ type filter hook prerouting priority raw; policy accept; }}",
            *(f"add rule {table} prerouting {rule}" for rule in rules),
        ]
        return "\n".join(lines) + "\n"

    def bind(self, address: IPAddress) -> str:
        return f"add element inet {self.table} local{address.version} {{ {_plain(address)} }}\n"

    def unbind(self, address: IPAddress) -> str:
        return f"delete element inet {self.table} local{address.version} {{ {_plain(address)} }}\n"

    def set_vrfs(self, interfaces: Iterable[str], marks: Mapping[str, int]) -> str:
        """`interfaces`: all that are routed by a VRF's table; `marks`: of those that the host knows as no VRF of its own, the mark of what comes from them."""
        sets = [(VRF_INTERFACES, interface_set(interfaces)), (VRF_MEMBERS, interface_set(marks))]
        for name, joint in ((VRF_MARKS, ":"), (VRF_WAYS, ".")):
            sets.append((name, ", ".join(f"{quoted} {joint} {mark:#010x}" for it, mark in sorted(marks.items()) if (quoted := interface_set((it,))))))
        lines = []
        for name, elements in sets:
            lines.append(f"flush {'map' if name == VRF_MARKS else 'set'} inet {self.table} {name}")
            if elements:
                lines.append(f"add element inet {self.table} {name} {{ {elements} }}")
        return "\n".join(lines) + "\n"

    def set_inside(self, inside: Mapping[IPNetwork, frozenset[str]]) -> str:
        """Subnets on this side of the tunnels: what stays within one, on its own interface, is no policy's."""
        lines = [f"flush chain inet {self.table} inside"]
        for subnet in sorted(inside, key=str):
            family = FAMILY[subnet.version]
            if names := interface_set(inside[subnet]):
                lines.append(f"add rule inet {self.table} inside iifname {{ {names} }} {family} saddr {subnet} {family} daddr {subnet} accept")
        return "\n".join(lines) + "\n"

    def add(self, policy: Policy) -> str:
        """KernelError(ENOSPC) when the bounds are reached; nothing has changed then."""
        return self._sets.add(policy)

    def remove(self, policy: Policy) -> str:
        """Of a policy that `add` took."""
        return self._sets.remove(policy)

    def restore(self) -> str:
        """The table anew with all that `add` gave, whatever is left of it; addresses, inside subnets and VRFs are the caller's."""
        return f"add table inet {self.table}\ndelete table inet {self.table}\n" + self.create() + self._sets.restore()

    def _rules(self) -> str:
        """The chain anew. Of equal priorities the older wins, as in the SPD."""
        lines = [f"flush chain inet {self.table} protected"]
        for shape, match in sorted(self._sets, key=lambda item: item[0].priority):
            lines.append(f"add rule inet {self.table} protected {match} {_ports(shape)}{_verdict(shape.action)}")
        return "\n".join(lines) + "\n"


def _shape(policy: Policy, source: IPNetwork, destination: IPNetwork) -> _Shape:
    selector = policy.selector
    return _Shape(
        source.version,
        policy.priority,
        policy.action,
        source.prefixlen,
        destination.prefixlen,
        selector.protocol,
        selector.source_ports,
        selector.destination_ports,
    )


def _ports(shape: _Shape) -> str:
    if shape.protocol == ANY_PROTOCOL:
        return ""
    text = f"meta l4proto {shape.protocol} "
    if shape.protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
        # type << 8 | code, one number in the header as in the selector; the destination side repeats the source side.
        ports = shape.source_ports if not shape.source_ports.any else shape.destination_ports
        return text if ports.any else f"{text}@th,0,16 {ports.low}-{ports.high} "
    for side, ports in (("sport", shape.source_ports), ("dport", shape.destination_ports)):
        if not ports.any:
            text += f"th {side} {ports.low}-{ports.high} " if ports.low != ports.high else f"th {side} {ports.low} "
    return text


def _verdict(action: Action) -> str:
    return "accept" if action is Action.BYPASS else f"counter name {COUNTER} drop"


def _plain(address: IPAddress) -> str:
    return str(address).partition("%")[0]

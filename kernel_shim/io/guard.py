"""The inbound guard: nftables text that drops and counts clear packets which a policy protects. A pure plan.

Policies of one version, priority, action, prefix lengths, protocol and ports make one *shape*: a set of masked addresses
and one rule. A new policy of a known shape is one set element; a new shape rewrites the chain of rules, in order of priority.
The table outlives its process: a dead shim lets nothing in clear either.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Final, NamedTuple

from kernel_shim.io.capture_plan import sides
from kernel_shim.io.nft import ADDRESS_TYPE, FAMILY, NEIGHBOUR_DISCOVERY, interface_set, prefix_mask
from kernel_shim.model import ANY_PROTOCOL, PROTOCOL_ICMP, PROTOCOL_ICMPV6, Action, Direction, IPAddress, IPNetwork, KernelError, Policy, PortRange

MAX_SHAPES: Final = 1024
COUNTER: Final = "clear_dropped"
VRF_INTERFACES: Final = "vrf_interfaces"
VRF_MEMBERS: Final = "vrf_members"


class _Shape(NamedTuple):
    version: int
    priority: int
    action: Action
    source_length: int
    destination_length: int
    protocol: int
    source_ports: PortRange
    destination_ports: PortRange


@dataclass(slots=True)
class _Members:
    number: int
    pairs: Counter[tuple[IPNetwork, IPNetwork]] = field(default_factory=Counter)


class GuardPlan:
    """Feed it the inbound and forward policies; run the commands that it gives, in order, as one transaction."""

    def __init__(self, table: str, *, interfaces: Iterable[str], mark: int) -> None:
        self.table: Final = table
        self._interfaces: Final = tuple(interfaces)
        self._mark: Final = mark
        self._shapes: dict[_Shape, _Members] = {}
        self._numbers = 0

    @staticmethod
    def guards(policy: Policy) -> bool:
        return policy.direction is not Direction.OUT

    def create(self) -> str:
        """The table, its chains, and what is let through before any policy is asked."""
        table, mark = f"inet {self.table}", f"{self._mark:#010x}"
        names = interface_set(("lo", *self._interfaces))
        rules = [
            f"iifname {{ {names} }} accept",
            # A VRF's packets are routed by its own table: the host's policies say nothing of them.
            f"iifname @{VRF_INTERFACES} accept",
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

    def set_vrfs(self, interfaces: Iterable[str], members: Iterable[str]) -> str:
        """`interfaces`: all that are routed by a VRF's table; `members`: those towards customers that the host knows as no VRF of its own."""
        lines = []
        for name, elements in ((VRF_INTERFACES, interfaces), (VRF_MEMBERS, members)):
            lines.append(f"flush set inet {self.table} {name}")
            if names := interface_set(elements):
                lines.append(f"add element inet {self.table} {name} {{ {names} }}")
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
        pairs = list(product(*sides(policy)))
        shapes = {_shape(policy, *pair) for pair in pairs}
        if len(self._shapes.keys() | shapes) > MAX_SHAPES:
            raise KernelError(errno.ENOSPC, f"inbound policies have more than {MAX_SHAPES} shapes")
        lines: list[str] = []
        new_shape = False
        for pair in pairs:
            shape = _shape(policy, *pair)
            members = self._shapes.get(shape)
            if members is None:
                self._numbers += 1
                members = self._shapes[shape] = _Members(self._numbers)
                kind = ADDRESS_TYPE[shape.version]
                lines.append(f"add set inet {self.table} shape{members.number} {{ type {kind} . {kind}; }}")
                new_shape = True
            members.pairs[pair] += 1
            if members.pairs[pair] == 1:
                lines.append(self._element("add", members, pair))
        return "\n".join(lines) + "\n" + (self._rules() if new_shape else "")

    def remove(self, policy: Policy) -> str:
        """Of a policy that `add` took."""
        lines: list[str] = []
        gone: list[int] = []
        for pair in product(*sides(policy)):
            shape = _shape(policy, *pair)
            members = self._shapes[shape]
            members.pairs[pair] -= 1
            if members.pairs[pair]:
                continue
            del members.pairs[pair]
            lines.append(self._element("delete", members, pair))
            if not members.pairs:
                del self._shapes[shape]
                gone.append(members.number)
        text = "\n".join(lines) + "\n"
        if gone:
            text += self._rules() + "".join(f"delete set inet {self.table} shape{number}\n" for number in gone)
        return text

    def restore(self) -> str:
        """The table anew with all that `add` gave, whatever is left of it; addresses, inside subnets and VRFs are the caller's."""
        lines = [f"add table inet {self.table}", f"delete table inet {self.table}", self.create().rstrip("\n")]
        for shape, members in self._shapes.items():
            kind = ADDRESS_TYPE[shape.version]
            lines.append(f"add set inet {self.table} shape{members.number} {{ type {kind} . {kind}; }}")
            lines += [self._element("add", members, pair) for pair in members.pairs]
        return "\n".join(lines) + "\n" + self._rules()

    def _element(self, verb: str, members: _Members, pair: tuple[IPNetwork, IPNetwork]) -> str:
        source, destination = pair
        return f"{verb} element inet {self.table} shape{members.number} {{ {source.network_address} . {destination.network_address} }}"

    def _rules(self) -> str:
        """The chain anew. Of equal priorities the older wins, as in the SPD."""
        lines = [f"flush chain inet {self.table} protected"]
        for shape, members in sorted(self._shapes.items(), key=lambda item: (item[0].priority, item[1].number)):
            lines.append(f"add rule inet {self.table} protected {_match(shape)} @shape{members.number} {_ports(shape)}{_verdict(shape.action)}")
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


def _match(shape: _Shape) -> str:
    family = FAMILY[shape.version]
    return f"{family} saddr & {prefix_mask(shape.version, shape.source_length)} . {family} daddr & {prefix_mask(shape.version, shape.destination_length)}"


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

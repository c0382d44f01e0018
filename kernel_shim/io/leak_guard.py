"""The outbound guard: nftables text that drops and counts what should have gone into the TUN and leaves elsewhere. A pure plan.

The capture's rules and routes bring protected packets into the TUN; should somebody take them away, this holds until they are back, and outlives its
process like the rest. It knows prefixes only, as the capture does: what is captured and yet bypassed leaves by the clear TUN, and passes here for that.
Prefix pairs of one pair of lengths are one set with one rule, so a packet costs as many lookups as there are pairs of lengths, of which there are few.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Final, NamedTuple

from kernel_shim.io.capture_plan import LINK_SCOPE, CapturePlan, sides
from kernel_shim.io.guard import VRF_INTERFACES, VRF_MEMBERS
from kernel_shim.io.nft import ADDRESS_TYPE, FAMILY, NEIGHBOUR_DISCOVERY, interface_set, prefix_mask
from kernel_shim.model import IPNetwork, KernelError, Policy

COUNTER: Final = "leak_dropped"
VRF_COUNTER: Final = "vrf_errors_dropped"
MAX_LENGTH_PAIRS: Final = 1024  # of 33 * 33 + 129 * 129 that there can be
PRIORITY: Final = 10  # after address translation (-100) and the firewall's own filters (0)
_ERRORS: Final = (
    "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
    "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
)


class _Lengths(NamedTuple):
    version: int
    source: int
    destination: int


@dataclass(slots=True)
class _Members:
    number: int
    pairs: Counter[tuple[IPNetwork, IPNetwork]] = field(default_factory=Counter)


class LeakGuardPlan:
    """Feed it the policies that the capture takes; run the commands that it gives, in order. It lives in the inbound guard's table and reads its sets."""

    def __init__(self, table: str, *, tun: str, clear_tun: str, mark: int) -> None:
        self._table: Final = table
        self._tun: Final = tun
        self._clear_tun: Final = clear_tun
        self._mark: Final = mark
        self._members: dict[_Lengths, _Members] = {}
        self._numbers = 0

    guards = staticmethod(CapturePlan.captures)

    def create(self) -> str:
        """The chains, and what passes before any policy is asked. The table is there."""
        table = f"inet {self._table}"
        chains: dict[str, list[str]] = {
            "leaving_inside": [],
            "captured": [],
            "leaving": [
                f'oifname {{ "lo", "{self._tun}" }} accept',
                f"ip daddr {{ {', '.join(map(str, LINK_SCOPE[4]))}, 255.255.255.255 }} accept",
                f"ip6 daddr {{ {', '.join(map(str, LINK_SCOPE[6]))} }} accept",
                "jump leaving_inside",
                "jump captured",
            ],
            "forward": [f"iifname @{VRF_INTERFACES} accept", f'iifname "{self._clear_tun}" accept', "jump leaving"],
            "output": [
                # The host sends its errors by its main table, where a customer's address may be that of another customer.
                *(f"oifname @{VRF_MEMBERS} {errors} counter name {VRF_COUNTER} drop" for errors in _ERRORS),
                f"meta mark {self._mark:#010x} accept",
                f"{NEIGHBOUR_DISCOVERY} accept",
                "jump leaving",
            ],
        }
        lines = [f"add counter {table} {COUNTER}", f"add counter {table} {VRF_COUNTER}"]
        for name, rules in chains.items():
            base = f" {{ type filter hook {name} priority {PRIORITY}; policy accept; }}" if name in ("forward", "output") else ""
            lines.append(f"add chain {table} {name}{base}")
            lines += [f"add rule {table} {name} {rule}" for rule in rules]
        return "\n".join(lines) + "\n"

    def set_inside(self, inside: Mapping[IPNetwork, frozenset[str]]) -> str:
        """Subnets on this side of the tunnels: the capture leaves them alone."""
        lines = [f"flush chain inet {self._table} leaving_inside"]
        for subnet in sorted(inside, key=str):
            if names := interface_set(inside[subnet]):
                lines.append(f"add rule inet {self._table} leaving_inside oifname {{ {names} }} {FAMILY[subnet.version]} daddr {subnet} accept")
        return "\n".join(lines) + "\n"

    def add(self, policy: Policy) -> str:
        """KernelError(ENOSPC) when the bounds are reached; nothing has changed then."""
        pairs = list(product(*sides(policy)))
        if len(self._members.keys() | {_lengths(*pair) for pair in pairs}) > MAX_LENGTH_PAIRS:
            raise KernelError(errno.ENOSPC, f"outbound policies have more than {MAX_LENGTH_PAIRS} pairs of prefix lengths")
        lines: list[str] = []
        for pair in pairs:
            lengths = _lengths(*pair)
            members = self._members.get(lengths)
            if members is None:
                self._numbers += 1
                members = self._members[lengths] = _Members(self._numbers)
                lines += self._put(lengths, members)
            members.pairs[pair] += 1
            if members.pairs[pair] == 1:
                lines.append(self._element("add", members, pair))
        return _joined(lines)

    def remove(self, policy: Policy) -> str:
        """Of a policy that `add` took."""
        lines: list[str] = []
        gone: list[int] = []
        for pair in product(*sides(policy)):
            lengths = _lengths(*pair)
            members = self._members[lengths]
            members.pairs[pair] -= 1
            if members.pairs[pair]:
                continue
            del members.pairs[pair]
            lines.append(self._element("delete", members, pair))
            if not members.pairs:
                del self._members[lengths]
                gone.append(members.number)
        if gone:
            lines.append(f"flush chain inet {self._table} captured")
            lines += [self._rule(lengths, members) for lengths, members in self._members.items()]
            lines += [f"delete set inet {self._table} captured{number}" for number in gone]
        return _joined(lines)

    def restore(self) -> str:
        """Chains and sets anew, in a table that was made anew; inside subnets are the caller's."""
        return self.create() + _joined(self._everything())

    def _everything(self) -> Iterator[str]:
        for lengths, members in self._members.items():
            yield from self._put(lengths, members)
            yield from (self._element("add", members, pair) for pair in members.pairs)

    def _put(self, lengths: _Lengths, members: _Members) -> list[str]:
        kind = ADDRESS_TYPE[lengths.version]
        return [f"add set inet {self._table} captured{members.number} {{ type {kind} . {kind}; }}", self._rule(lengths, members)]

    def _rule(self, lengths: _Lengths, members: _Members) -> str:
        family = FAMILY[lengths.version]
        source, destination = prefix_mask(lengths.version, lengths.source), prefix_mask(lengths.version, lengths.destination)
        match = f"{family} saddr & {source} . {family} daddr & {destination} @captured{members.number}"
        return f"add rule inet {self._table} captured {match} counter name {COUNTER} drop"

    def _element(self, verb: str, members: _Members, pair: tuple[IPNetwork, IPNetwork]) -> str:
        source, destination = pair
        return f"{verb} element inet {self._table} captured{members.number} {{ {source.network_address} . {destination.network_address} }}"


def _lengths(source: IPNetwork, destination: IPNetwork) -> _Lengths:
    return _Lengths(source.version, source.prefixlen, destination.prefixlen)


def _joined(lines: list[str] | Iterator[str]) -> str:
    text = "\n".join(lines)
    return text + "\n" if text else ""

"""The outbound guard: nftables text that drops and counts what should have gone into the TUN and leaves elsewhere. A pure plan.

The capture's rules and routes bring protected packets into the TUN; should somebody take them away, this holds until they are back, and outlives its
process like the rest. It knows prefixes only, as the capture does: what is captured and yet bypassed leaves by the clear TUN, and passes here for that.
A packet costs as many lookups as there are pairs of prefix lengths, of which there are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from kernel_shim.io.capture_plan import LINK_SCOPE, CapturePlan
from kernel_shim.io.guard import VRF_INTERFACES, VRF_MEMBERS, VRF_WAYS
from kernel_shim.io.pair_sets import PairSets
from kernel_shim.model import IPNetwork, Policy
from kernel_shim.nft import FAMILY, NEIGHBOUR_DISCOVERY, interface_set

COUNTER: Final = "leak_dropped"
VRF_COUNTER: Final = "vrf_errors_dropped"
MAX_LENGTH_PAIRS: Final = 1024  # of 33 * 33 + 129 * 129 that there can be
PRIORITY: Final = 10  # after address translation (-100) and the firewall's own filters (0)
_ANSWERS: Final = (
    "icmp type { echo-reply, destination-unreachable, time-exceeded, parameter-problem, timestamp-reply }",
    "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-reply }",
)


class _Lengths(NamedTuple):
    version: int
    source_length: int
    destination_length: int


class LeakGuardPlan:
    """Feed it the policies that the capture takes; run the commands that it gives, in order. It lives in the inbound guard's table and reads its sets."""

    def __init__(self, table: str, *, tun: str, clear_tun: str, mark: int) -> None:
        self._table: Final = table
        self._tun: Final = tun
        self._clear_tun: Final = clear_tun
        self._mark: Final = mark
        self._sets: Final = PairSets(table, "captured", _lengths, MAX_LENGTH_PAIRS, self._rules)

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
            "forward": [f"iifname @{VRF_INTERFACES} accept", f"meta sdifname @{VRF_INTERFACES} accept", f'iifname "{self._clear_tun}" accept', "jump leaving"],
            "output": [
                # An answer to a customer goes back within its VRF, by the mark of what it answers. One without it took the main table, where a customer's
                # address may be that of another customer.
                f"oifname . meta mark @{VRF_WAYS} accept",
                *(f"oifname @{VRF_MEMBERS} {answers} counter name {VRF_COUNTER} drop" for answers in _ANSWERS),
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
        return self._sets.add(policy)

    def remove(self, policy: Policy) -> str:
        """Of a policy that `add` took."""
        return self._sets.remove(policy)

    def restore(self) -> str:
        """Chains and sets anew, in a table that was made anew; inside subnets are the caller's."""
        return self.create() + self._sets.restore()

    def _rules(self) -> str:
        lines = [f"flush chain inet {self._table} captured"]
        lines += [f"add rule inet {self._table} captured {match} counter name {COUNTER} drop" for _, match in self._sets]
        return "\n".join(lines) + "\n"


def _lengths(_: Policy, source: IPNetwork, destination: IPNetwork) -> _Lengths:
    return _Lengths(source.version, source.prefixlen, destination.prefixlen)

"""The capture plan against a naive one: whatever happened before, the host ends as if only the remaining policies had been added."""

from __future__ import annotations

import errno
from collections import Counter
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.io.capture_plan import (
    HOST_TABLE,
    LINK_SCOPE,
    MAX_PREFIXES,
    SHARED_TABLE,
    SOURCE_TABLES,
    CapturePlan,
    Change,
    Kind,
    Route,
    Rule,
)
from kernel_shim.io.connected import Connected, HostAddress, Sides
from kernel_shim.model import Action, AddressRange, Direction, IPNetwork, KernelError, Policy, Selector

LAN = HostAddress("lan", ip_address("10.1.0.1"), IPv4Network("10.1.0.0/16"))
WAN = HostAddress("wan", ip_address("192.0.2.1"), IPv4Network("192.0.2.0/24"))
LAN6 = HostAddress("lan", ip_address("fd00:1::1"), IPv6Network("fd00:1::/64"))


def policy(source: str, destination: str, action: Action = Action.PROTECT, direction: Direction = Direction.OUT) -> Policy:
    return Policy(Selector(AddressRange.of(ip_network(source)), AddressRange.of(ip_network(destination))), direction, action)


class Host:
    """What the changes make of a host, with the source of each table instead of its number."""

    def __init__(self, *addresses: HostAddress, outer: str = "192.0.2.1") -> None:
        self.connected = Connected()
        self.plan = CapturePlan(self.connected)
        self.rules: set[Rule] = set()
        self.routes: dict[tuple[int, IPNetwork, Kind], Route] = {}
        self._outer = frozenset({ip_address(outer)})
        self.connected.set_host(addresses)
        self.apply(self.plan.set_host(addresses))

    def apply(self, changes: list[Change]) -> None:
        for put, item in changes:
            if isinstance(item, Rule):
                (self.rules.add if put else self.rules.remove)(item)
            elif put:
                self.routes[item.table, item.destination, item.kind] = item
            else:
                del self.routes[item.table, item.destination, item.kind]

    def add(self, added: Policy) -> None:
        self.connected.add(self._sides(added))
        self.apply(self.plan.add(added))

    def remove(self, removed: Policy) -> None:
        self.connected.remove(self._sides(removed))
        self.apply(self.plan.remove(removed))

    def _sides(self, policy: Policy) -> Sides:
        return Sides(tuple(policy.selector.source.prefixes()), tuple(policy.selector.destination.prefixes()), self._outer)

    def view(self) -> set[tuple[object, ...]]:
        """Each route with the source whose table it is in."""
        sources = {(rule.version, rule.table): str(rule.source) for rule in self.rules}
        assert {(route.destination.version, route.table) for route in self.routes.values()} <= set(sources), "a table without a rule"
        return {(sources[route.destination.version, route.table], *route[:1], route.destination, route.preferred) for route in self.routes.values()}

    def lookup(self, source: str | None, destination: str) -> Route | None:
        """The capture route that a packet takes, as `fib_rules` and the longest prefix have it."""
        target = ip_address(destination)
        for rule in sorted(self.rules, key=lambda rule: rule.table == HOST_TABLE):
            if rule.version != target.version:
                continue
            applies = source is None if rule.source is None else source is not None and ip_address(source) in rule.source
            if not applies and not (rule.source is not None and rule.source.prefixlen == 0):
                continue
            found = [
                route for (table, network, _), route in self.routes.items() if table == rule.table and network.version == target.version and target in network
            ]
            if found:
                best = max(found, key=lambda route: (route.destination.prefixlen, route.kind is Kind.CAPTURE))
                if best.kind is Kind.CAPTURE:
                    return best
        return None


def test_a_source_gets_a_table_and_its_destinations_are_captured_only_from_it() -> None:
    host = Host(WAN, LAN)
    host.add(policy("10.1.0.0/16", "10.2.0.0/16"))
    assert host.lookup("10.1.0.5", "10.2.0.9") is not None
    assert host.lookup("192.0.2.1", "10.2.0.9") is None
    assert host.lookup("10.1.0.5", "10.3.0.9") is None


def test_a_packet_of_the_host_without_a_source_gets_one_that_the_policy_covers() -> None:
    host = Host(WAN, LAN)
    host.add(policy("10.1.0.0/16", "10.2.0.0/16"))
    route = host.lookup(None, "10.2.0.9")
    assert route is not None
    assert route.preferred == LAN.address
    host.apply(host.plan.set_host((WAN,)))
    assert host.lookup(None, "10.2.0.9") is None


def test_the_inside_subnet_stays_on_its_link_when_everything_else_is_captured() -> None:
    host = Host(WAN, LAN)
    host.add(policy("10.1.0.0/16", "0.0.0.0/0"))
    assert host.lookup("10.1.0.1", "10.1.0.7") is None
    assert host.lookup("10.1.0.1", "198.51.100.1") is not None
    assert host.lookup("10.1.0.1", "192.0.2.2") is not None, "the outer subnet is no inside"


def test_a_subnet_that_a_tunnel_ends_in_is_never_inside() -> None:
    outer = HostAddress("wan", ip_address("10.9.0.1"), IPv4Network("10.9.0.0/24"))
    host = Host(LAN, outer, outer="10.9.0.1")
    host.add(policy("10.0.0.0/8", "10.0.0.0/8"))
    assert host.lookup("10.9.0.1", "10.9.0.2") is not None
    assert host.lookup("10.1.0.1", "10.1.0.2") is None


def test_a_source_of_everything_exempts_nothing_but_the_link_scope() -> None:
    host = Host(WAN, LAN)
    host.add(policy("0.0.0.0/0", "0.0.0.0/0"))
    assert host.lookup("10.1.0.1", "10.1.0.7") is not None
    assert host.lookup("192.0.2.1", "192.0.2.2") is not None
    assert host.lookup("192.0.2.1", "224.0.0.5") is None


def test_a_remote_selector_within_a_connected_subnet_is_captured() -> None:
    host = Host(WAN, LAN)
    host.add(policy("10.1.0.0/16", "0.0.0.0/0"))
    host.add(policy("10.1.0.0/16", "10.1.128.0/17"))
    assert host.lookup("10.1.0.1", "10.1.200.1") is not None
    host.remove(policy("10.1.0.0/16", "10.1.128.0/17"))
    assert host.lookup("10.1.0.1", "10.1.200.1") is None


def test_bypass_and_inbound_policies_capture_nothing() -> None:
    assert not CapturePlan.captures(policy("10.1.0.0/16", "10.2.0.0/16", Action.BYPASS))
    assert not CapturePlan.captures(policy("10.1.0.0/16", "10.2.0.0/16", direction=Direction.IN))
    assert CapturePlan.captures(policy("10.1.0.0/16", "10.2.0.0/16", Action.DISCARD))


def test_sources_beyond_the_tables_share_one_and_are_still_captured() -> None:
    host = Host(WAN)
    policies = [policy(f"10.{number}.0.0/24", "172.16.0.0/12") for number in range(SOURCE_TABLES + 3)]
    for added in policies:
        host.add(added)
    assert len(host.rules) == SOURCE_TABLES + 1
    assert all(host.lookup(f"10.{number}.0.7", "172.16.5.5") is not None for number in range(SOURCE_TABLES + 3))
    for added in policies:
        host.remove(added)
    assert not host.rules
    assert not host.routes


def test_too_many_prefixes_are_refused() -> None:
    wide = AddressRange(ip_address("::1"), ip_address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"))
    assert len(list(wide.prefixes())) <= MAX_PREFIXES
    with pytest.raises(KernelError) as refused:
        Host().plan.add(Policy(Selector(wide, wide), Direction.OUT, Action.PROTECT))
    assert refused.value.errno == errno.ENOSPC


def test_an_adopted_table_goes_back_to_its_source() -> None:
    host = Host(WAN)
    host.plan.adopt(IPv4Network("10.7.0.0/16"), 33)
    host.add(policy("10.6.0.0/16", "10.2.0.0/16"))
    host.add(policy("10.7.0.0/16", "10.2.0.0/16"))
    assert Rule(4, 33, IPv4Network("10.7.0.0/16")) in host.rules


NETWORKS = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.7.0/24", "10.2.0.0/16", "192.0.2.0/24", "192.0.2.1/32", "224.0.0.0/24"]
NETWORKS6 = ["::/0", "fd00:1::/64", "fd00:2::/64", "fe80::/10"]
PAIRS = st.tuples(st.sampled_from(NETWORKS), st.sampled_from(NETWORKS)) | st.tuples(st.sampled_from(NETWORKS6), st.sampled_from(NETWORKS6))
HOSTS = st.lists(st.sampled_from([LAN, WAN, LAN6]), unique=True).map(tuple)


@pytest.mark.property
@given(st.lists(st.tuples(PAIRS, st.booleans()), max_size=30), HOSTS)
def test_additions_and_removals_leave_what_the_rest_would_have_made(steps: list[tuple[tuple[str, str], bool]], addresses: tuple[HostAddress, ...]) -> None:
    host = Host(*addresses)
    standing: Counter[tuple[str, str]] = Counter()
    for pair, add in steps:
        if add or not standing[pair]:
            host.add(policy(*pair))
            standing[pair] += 1
        else:
            host.remove(policy(*pair))
            standing[pair] -= 1
    fresh = Host(*addresses)
    for pair in standing.elements():
        fresh.add(policy(*pair))
    assert host.view() == fresh.view()
    assert {rule.source for rule in host.rules} == {rule.source for rule in fresh.rules}
    assert SHARED_TABLE not in {rule.table for rule in host.rules}
    link_scope = {network for networks in LINK_SCOPE.values() for network in networks}
    assert all(route.kind is Kind.CAPTURE or route.destination in link_scope or addresses for route in host.routes.values())

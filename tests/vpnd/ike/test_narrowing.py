"""Narrowing as sets of packets: checked against single packets."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, ip_address

import pytest
from lab.ike_pair import selectors

from kernel_shim.model import AddressRange, Flow, PortRange, TrafficSelector
from vpnd.config.addresses import parse_traffic_selector
from vpnd.ike.narrowing import MAX_SELECTORS, MAX_SPLINTERS, Selectors, narrow, of_flow, paired, resolve, substituted, within


def test_dynamic_is_the_endpoint() -> None:
    templates = [parse_traffic_selector("dynamic[tcp/80]"), parse_traffic_selector("10.0.0.0/8")]
    assert resolve(templates, ip_address("192.0.2.1")) == selectors("192.0.2.1/32[tcp/80],10.0.0.0/8")


def covers(chosen: Selectors, address: IPv4Address, protocol: int, port: int) -> bool:
    return any(address in ts.addresses and ts.protocol in (0, protocol) and port in ts.ports for ts in chosen)


@pytest.mark.parametrize("seed", range(30))
def test_narrowing_keeps_exactly_the_packets_that_both_allow(seed: int) -> None:
    rng = random.Random(seed)

    def some() -> Selectors:
        result = []
        for _ in range(rng.randint(1, 4)):
            first = rng.randrange(40)
            low = rng.choice([0, 0, 5])
            result.append(
                TrafficSelector(
                    AddressRange(IPv4Address(first), IPv4Address(first + rng.randrange(20))), rng.choice([0, 0, 6, 17]), PortRange(low, rng.choice([9, 65535]))
                )
            )
        return tuple(result)

    one, other = some(), some()
    both = narrow(one, other)
    assert not both or (within(both, one) and within(both, other))
    for address in map(IPv4Address, range(64)):
        for protocol in (1, 6, 17):
            for port in (0, 5, 9, 10):
                expected = covers(one, address, protocol, port) and covers(other, address, protocol, port)
                assert covers(both, address, protocol, port) is expected


def test_the_number_of_selectors_is_bounded() -> None:
    many = tuple(TrafficSelector(AddressRange.host(IPv4Address(2 * number))) for number in range(300))
    assert len(narrow(many, selectors("0.0.0.0/0"))) == MAX_SPLINTERS, "a peer makes no more of fewer configured ones"
    assert len(narrow(many, many)) == MAX_SELECTORS
    assert not within(many, selectors("0.0.0.0/0"))


def test_selectors_without_a_partner_are_left_out() -> None:
    assert paired(selectors("10.0.0.0/8,2001:db8::/32"), selectors("10.1.0.0/16")) == (selectors("10.0.0.0/8"), selectors("10.1.0.0/16"))
    assert paired(selectors("10.0.0.0/8[tcp]"), selectors("10.1.0.0/16[udp]")) is None
    assert paired((), selectors("10.1.0.0/16")) is None


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (Flow(ip_address("10.1.0.1"), ip_address("10.2.0.1"), 6, 4000, 80), ("10.1.0.1/32[tcp/4000]", "10.2.0.1/32[tcp/80]")),
        (Flow(ip_address("10.1.0.1"), ip_address("10.2.0.1"), 1, 0x0800, 0x0800), ("10.1.0.1/32[icmp/2048]", "10.2.0.1/32[icmp/2048]")),
        (Flow(ip_address("10.9.0.1"), ip_address("10.2.0.1"), 6, 4000, 80), None),
    ],
)
def test_the_packet_as_selectors(flow: Flow, expected: tuple[str, str] | None) -> None:
    result = of_flow(flow, selectors("10.1.0.0/16"), selectors("10.2.0.0/16"))
    if expected is None:
        assert result is None
    else:
        assert result is not None
        assert [(ts.addresses, ts.protocol, ts.ports.low, ts.ports.high) for ts in result] == [
            (AddressRange.host(flow.source), flow.protocol, flow.source_port, flow.source_port),
            (AddressRange.host(flow.destination), flow.protocol, flow.destination_port, flow.destination_port),
        ]


def test_substitution_changes_hosts_only() -> None:
    new = ip_address("198.51.100.1")
    assert substituted(selectors("10.0.0.1/32[tcp/80],10.0.0.0/24"), new) == selectors("198.51.100.1/32[tcp/80],10.0.0.0/24")
    assert substituted(selectors("2001:db8::1/128"), new) == selectors("2001:db8::1/128")

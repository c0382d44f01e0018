"""The guard's verdict on real packets, against the policies in order of priority."""

from __future__ import annotations

import errno
import re
import select
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.namespaces import Lab, Namespace
from lab.process import wait_until
from lab.traffic import ping

from kernel_shim.io.guard import MAX_SHAPES, GuardPlan
from kernel_shim.model import ANY_PORT, Action, AddressRange, Direction, KernelError, Policy, PortRange, Selector
from kernel_shim.nft import Nft

NEAR, FAR = "10.1.0.1", "10.2.0.1"
MARK = 0x49500000


class Guarded:
    """A namespace that the guard protects, and one that sends to it in clear."""

    def __init__(self, lab: Lab) -> None:
        self.near, self.far = lab.namespace("near"), lab.namespace("far")
        lab.veth(self.near, "wan", self.far, "wan")
        self.near.ip(f"addr add {NEAR}/32 dev wan", f"route add {FAR} dev wan", "addr add fd00:1::1/64 dev wan nodad", "route add fd00:2::/64 dev wan")
        self.far.ip(f"addr add {FAR}/32 dev wan", f"route add {NEAR} dev wan", "addr add fd00:2::1/64 dev wan nodad", "route add fd00:1::/64 dev wan")
        self.nft = self.near.call(Nft)
        self.plan = GuardPlan("kernel_shim_test_1", interfaces=("vpn0",), mark=MARK)
        self.nft.run(self.plan.create())
        self._standing: list[Policy] = []

    def add(self, *policies: Policy) -> None:
        for policy in policies:
            self.nft.run(self.plan.add(policy))
            self._standing.append(policy)

    def clear(self) -> None:
        for policy in self._standing:
            self.nft.run(self.plan.remove(policy))
        self._standing.clear()

    def passes(self, port: int, source_port: int = 0, *, version: int = 4) -> bool:
        """Whether a UDP datagram in clear arrives."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        near, far = (NEAR, FAR) if version == 4 else ("fd00:1::1", "fd00:2::1")
        with self.near.socket(family, socket.SOCK_DGRAM) as receiver, self.far.socket(family, socket.SOCK_DGRAM) as sender:
            receiver.bind((near, port))
            sender.bind((far, source_port))
            sender.connect((near, port))
            before = self.dropped()
            sender.send(b"in clear")
            # Mostly it has arrived when send() returns; not when the kernel had other work to do.
            return wait_until(lambda: _arrived(receiver, 0.001) or ("no" if self.dropped() > before else ""), "a datagram's fate") == "yes"

    def dropped(self) -> int:
        """Packets that the guard kept out."""
        found = re.search(r"packets (\d+) ", self.nft.run("list counter inet kernel_shim_test_1 clear_dropped\n"))
        assert found is not None
        return int(found[1])


def _arrived(receiver: socket.socket, patience: float) -> str:
    return "yes" if select.select([receiver], [], [], patience)[0] else ""


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with Lab() as lab:
        one = Guarded(lab)
        _wait_for_carrier(one.far)
        yield one
        one.nft.close()


def _wait_for_carrier(namespace: Namespace) -> None:
    for address in (NEAR, "fd00:1::1"):
        ping(namespace, ip_address(address), count=1, timeout=5.0)  # neighbours are known then, too


def protect(
    source: str = "10.2.0.0/16",
    destination: str = "10.1.0.0/16",
    action: Action = Action.PROTECT,
    priority: int = 100,
    *,
    protocol: int = 0,
    ports: PortRange = ANY_PORT,
    source_ports: PortRange = ANY_PORT,
) -> Policy:
    selector = Selector(AddressRange.of(ip_network(source)), AddressRange.of(ip_network(destination)), protocol, source_ports, ports)
    return Policy(selector, Direction.IN, action, priority)


pytestmark = pytest.mark.root


def test_what_a_policy_protects_is_dropped_and_counted(guarded: Guarded) -> None:
    assert guarded.passes(9)
    guarded.add(protect())
    try:
        assert not guarded.passes(9)
        assert guarded.passes(9, version=6)
        assert guarded.dropped() == 1
    finally:
        guarded.clear()
    assert guarded.passes(9)
    assert "shape" not in guarded.nft.run("list table inet kernel_shim_test_1\n")


def test_ipv6_likewise(guarded: Guarded) -> None:
    guarded.add(protect("fd00:2::/64", "::/0"))
    try:
        assert not guarded.passes(9, version=6)
        assert guarded.passes(9)
    finally:
        guarded.clear()


def test_tunnels_to_our_own_sockets_pass_even_where_everything_is_protected(guarded: Guarded) -> None:
    address = ip_address(NEAR)
    guarded.add(protect("0.0.0.0/0", "0.0.0.0/0"))
    try:
        assert not guarded.passes(4500)
        guarded.nft.run(guarded.plan.bind(address))
        assert guarded.passes(4500)
        assert guarded.passes(500)
        assert not guarded.passes(501)
        guarded.nft.run(guarded.plan.unbind(address))
        assert not guarded.passes(4500)
    finally:
        guarded.clear()


def test_an_inside_subnet_passes_on_its_own_interface_only(guarded: Guarded) -> None:
    guarded.add(protect("0.0.0.0/0", "10.0.0.0/8"))
    try:
        guarded.nft.run(guarded.plan.set_inside({ip_network("10.0.0.0/8"): frozenset({"lan"})}))
        assert not guarded.passes(9)
        guarded.nft.run(guarded.plan.set_inside({ip_network("10.0.0.0/8"): frozenset({"wan"})}))
        assert guarded.passes(9)
    finally:
        guarded.nft.run(guarded.plan.set_inside({}))
        guarded.clear()


def test_an_icmp_selector_is_type_and_code(guarded: Guarded) -> None:
    def answered(timeout: float) -> bool:
        return ping(guarded.far, ip_address(NEAR), count=1, timeout=timeout).lost == 0

    echo = PortRange(0x0800, 0x08FF)
    guarded.add(protect("0.0.0.0/0", "0.0.0.0/0", protocol=1))
    try:
        assert not answered(0.3)
        guarded.add(protect("0.0.0.0/0", "0.0.0.0/0", Action.BYPASS, 50, protocol=1, ports=echo, source_ports=echo))
        assert answered(5.0)
    finally:
        guarded.clear()


def test_shapes_are_bounded() -> None:
    plan = GuardPlan("t_1", interfaces=(), mark=1)
    for number in range(MAX_SHAPES):
        plan.add(protect(priority=number))
    with pytest.raises(KernelError) as refused:
        plan.add(protect(priority=MAX_SHAPES))
    assert refused.value.errno == errno.ENOSPC
    assert "add set" not in plan.add(protect("10.3.0.0/16", priority=5))


NETWORKS = st.sampled_from(["0.0.0.0/0", "10.0.0.0/8", "10.2.0.0/16", "10.1.0.0/16", "10.2.0.1/32", "10.1.0.1/32", "192.0.2.0/24"])
PORTS = st.sampled_from([ANY_PORT, PortRange(7, 7), PortRange(1, 8), PortRange(8, 65535)])
POLICIES = st.builds(
    protect,
    NETWORKS,
    NETWORKS,
    st.sampled_from(list(Action)),
    st.integers(1, 3),
    protocol=st.sampled_from([0, 6, 17]),
    ports=PORTS,
    source_ports=PORTS,
)


def expected(policies: list[Policy], source_port: int, port: int) -> bool:
    """An ordered list, as RFC 4301 has it."""
    for policy in sorted(policies, key=lambda policy: policy.priority):
        selector = policy.selector
        if IPv4Address(FAR) not in selector.source or IPv4Address(NEAR) not in selector.destination or selector.protocol not in (0, 17):
            continue
        if selector.protocol and (source_port not in selector.source_ports or port not in selector.destination_ports):
            continue
        return policy.action is Action.BYPASS
    return True


@pytest.mark.property
@settings(max_examples=60)
@given(st.lists(POLICIES, max_size=6, unique_by=lambda policy: policy.priority), st.sampled_from([7, 9]), st.sampled_from([7, 40_000]))
def test_the_verdict_is_that_of_an_ordered_list(guarded: Guarded, policies: list[Policy], port: int, source_port: int) -> None:
    guarded.add(*policies)
    try:
        assert guarded.passes(port, source_port) == expected(policies, source_port, port)
    finally:
        guarded.clear()

"""What lost events told is read from the kernel's tables, once."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from vpnd_fakes import ALGORITHM

from kernel_shim.model import (
    Acquire,
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    Expire,
    Flow,
    Lifetime,
    Mode,
    Policy,
    PolicyIndex,
    PortRange,
    ReqId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
    TrafficSelector,
)
from vpnd.daemon.lost_events import LostEvents

A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")
POLICY = Policy(
    Selector(AddressRange.of(ip_network("10.1.0.0/16")), AddressRange.of(ip_network("10.2.0.0/16"))),
    Direction.OUT,
    Action.PROTECT,
    templates=(Template(Mode.TUNNEL, ReqId(7), A, B),),
    index=PolicyIndex(9),
)


def larval(sequence: int, host: str = "10.2.0.5") -> SaStatus:
    def side(address: str, port: int) -> tuple[TrafficSelector, ...]:
        return (TrafficSelector(AddressRange.host(ip_address(address)), 17, PortRange(port, port)),)

    sa = SecurityAssociation(
        *(Spi(0), A, B, Direction.OUT, Mode.TUNNEL, ReqId(7), ALGORITHM),
        source_selectors=side("10.1.0.1", 4000),
        destination_selectors=side(host, 53),
        acquire=AcquireSequence(sequence),
    )
    return SaStatus(sa, SaState.LARVAL)


def test_an_acquire_is_found_with_its_flow_and_told_once() -> None:
    events = LostEvents()
    expected = Acquire(
        AcquireSequence(3), PolicyIndex(9), ReqId(7), Mode.TUNNEL, A, B, POLICY.selector, Flow(ip_address("10.1.0.1"), ip_address("10.2.0.5"), 17, 4000, 53)
    )
    assert events.found([larval(3)], {}, [POLICY], 0.0) == [expected]
    assert events.found([larval(3)], {}, [POLICY], 0.0) == []


def test_two_of_one_destination_are_two_and_what_was_heard_is_not_told() -> None:
    events = LostEvents()
    (heard,) = LostEvents().found([larval(3)], {}, [POLICY], 0.0)
    events.heard(heard)
    assert [event.sequence for event in events.found([larval(3), larval(4), larval(5)], {}, [POLICY], 0.0) if isinstance(event, Acquire)] == [4, 5]


def test_what_has_no_number_could_not_be_refused_and_is_not_told() -> None:
    assert LostEvents().found([larval(0)], {}, [POLICY], 0.0) == []


@pytest.mark.parametrize(
    ("soft", "worn"), [(Lifetime(100), True), (Lifetime(200), False), (Lifetime(octets=50), True), (Lifetime(packets=6), False), (Lifetime(), False)]
)
def test_a_soft_lifetime_that_is_over_is_told_once(soft: Lifetime, worn: bool) -> None:
    sa = replace(SecurityAssociation(Spi(0x1000), A, B, Direction.OUT, Mode.TUNNEL, ReqId(7), ALGORITHM), soft=soft)
    status = SaStatus(replace(sa, soft=Lifetime()), SaState.MATURE, octets=60, packets=5, added=1000.0)
    events = LostEvents()
    assert events.found([status], {sa.id: sa}, [], 1150.0) == ([Expire(sa.id, ReqId(7), hard=False)] if worn else [])
    assert events.found([status], {sa.id: sa}, [], 1150.0) == []
    assert LostEvents().found([status], {}, [], 1150.0) == [], "others' SAs"

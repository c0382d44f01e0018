"""The SPD: what a lookup costs, wide ranges, more shapes than the bound, and what may come in."""

from __future__ import annotations

import errno
import random
from ipaddress import IPv4Address, IPv4Network, ip_address
from itertools import product

import pytest

from kernel_shim.model import (
    PROTOCOL_ICMP,
    PROTOCOL_TCP,
    Action,
    AddressRange,
    Direction,
    Flow,
    KernelError,
    Mode,
    Policy,
    PortRange,
    ReqId,
    Selector,
    Template,
)
from kernel_shim.policy.bundle import Generations
from kernel_shim.policy.flowkey import key_of_flow
from kernel_shim.policy.shape_table import MAX_SHAPES
from kernel_shim.policy.shapes import MAX_PREFIXES, place
from kernel_shim.policy.spd import SecurityPolicyDatabase, direction_of
from kernel_shim.reasons import DropReason

ANY = AddressRange.everything(4)
IN, OUT, FORWARD = Direction.IN, Direction.OUT, Direction.FORWARD


def net(text: str) -> AddressRange:
    return AddressRange.of(IPv4Network(text))


def span(first: int, last: int) -> AddressRange:
    return AddressRange(IPv4Address(first), IPv4Address(last))


def policy(selector: Selector, priority: int = 0, direction: Direction = OUT, action: Action = Action.BYPASS) -> Policy:
    return Policy(selector, direction, action, priority)


def flow(destination: str, source: str = "10.0.0.1", protocol: int = PROTOCOL_TCP, sport: int = 1234, dport: int = 80) -> Flow:
    return Flow(ip_address(source), ip_address(destination), protocol, sport, dport)


def naive(policies: list[Policy], wanted: Flow) -> Policy | None:
    def matches(s: Selector) -> bool:
        ports = wanted.source_port in s.source_ports and wanted.destination_port in s.destination_ports
        return wanted.source in s.source and wanted.destination in s.destination and s.protocol in (0, wanted.protocol) and ports

    return min((p for p in policies if matches(p.selector)), key=lambda p: (p.priority, p.index), default=None)


def test_probes_depend_on_shapes_and_not_on_policies() -> None:
    counts = []
    for size in (4, 400, 4000):
        spd = SecurityPolicyDatabase()
        for number in range(size):
            lengths = 32 - number % 4
            first = (number * 2654435761 & 0xFFFFFFFF) >> 4 << 4
            spd.add(policy(Selector(ANY, span(first, first + (1 << 32 - lengths) - 1))))
        assert spd.shapes(OUT) == 4
        before = spd.probes
        for _ in range(50):
            spd.lookup(OUT, flow("198.51.100.1"))
        counts.append(spd.probes - before)
    assert counts == [200, 200, 200]


def test_a_lookup_stops_when_no_shape_can_be_better() -> None:
    spd = SecurityPolicyDatabase()
    for length in range(8, 33):
        spd.add(policy(Selector(ANY, net(f"10.0.0.0/{length}")), priority=100 - length))
    best = spd.add(policy(Selector(ANY, ANY, PROTOCOL_ICMP), priority=1))
    before = spd.probes
    assert spd.lookup(OUT, flow("10.0.0.0", protocol=PROTOCOL_ICMP)) == best
    assert spd.probes - before == 1
    # When the best of a shape goes, the shape moves back.
    spd.delete_index(OUT, best.index)
    found = spd.lookup(OUT, flow("10.0.0.0", protocol=PROTOCOL_ICMP))
    assert found is not None
    assert found.priority == 68


def test_equal_priorities_are_won_by_the_older_across_shapes() -> None:
    spd = SecurityPolicyDatabase()
    older = spd.add(policy(Selector(ANY, net("10.0.0.0/8")), 5))
    younger = spd.add(policy(Selector(ANY, net("10.1.0.0/16")), 5))
    assert spd.lookup(OUT, flow("10.1.0.1")) == older
    # Replaced, it keeps index and age.
    replaced = spd.update(policy(older.selector, 5, action=Action.DISCARD))
    assert replaced.index == older.index
    assert spd.lookup(OUT, flow("10.1.0.1")) == replaced
    spd.update(policy(older.selector, 6))
    assert spd.lookup(OUT, flow("10.1.0.1")) == younger


def test_a_shape_that_gets_a_better_policy_is_asked_sooner() -> None:
    spd = SecurityPolicyDatabase()
    wide = spd.add(policy(Selector(ANY, net("10.0.0.0/8")), 5))
    narrow = spd.add(policy(Selector(ANY, net("10.1.0.0/16")), 10))
    other = spd.add(policy(Selector(ANY, net("10.2.0.0/16")), 10))
    assert spd.lookup(OUT, flow("10.1.0.1")) == wide
    better = spd.update(policy(narrow.selector, 1))
    assert spd.lookup(OUT, flow("10.1.0.1")) == better
    assert spd.lookup(OUT, flow("10.2.0.1")) == wide
    worse = spd.update(policy(wide.selector, 20))
    assert spd.lookup(OUT, flow("10.2.0.1")) == other
    assert spd.lookup(OUT, flow("10.3.0.1")) == worse


def test_index_is_generator_and_direction_in_steps_of_eight() -> None:
    spd = SecurityPolicyDatabase()
    indices = [spd.add(policy(Selector(ANY, net("10.0.0.0/8")), direction=direction)).index for direction in (IN, OUT, FORWARD, IN)[:3]]
    assert indices == [8, 17, 26]
    assert [direction_of(index) for index in indices] == [IN, OUT, FORWARD]
    spd.delete_index(OUT, indices[1])
    assert spd.add(policy(Selector(ANY, net("10.0.0.0/8")))).index == 33


def test_errors_change_nothing() -> None:
    generations = Generations()
    spd = SecurityPolicyDatabase(generations)
    added = spd.add(policy(Selector(ANY, ANY)))
    stamp = generations.stamp
    with pytest.raises(KernelError) as refused:
        spd.add(policy(Selector(ANY, ANY), priority=9))
    assert refused.value.errno == errno.EEXIST
    for attempt in (
        lambda: spd.delete(IN, added.selector),
        lambda: spd.delete_index(IN, added.index),
        lambda: spd.get(IN, added.index),
        lambda: spd.find(OUT, Selector(ANY, net("10.0.0.0/8"))),
    ):
        with pytest.raises(KernelError) as refused:
            attempt()
        assert refused.value.errno == errno.ENOENT
    assert generations.stamp == stamp
    assert spd.snapshot() == [added]


def test_flush() -> None:
    spd = SecurityPolicyDatabase()
    for direction in Direction:
        spd.add(policy(Selector(ANY, ANY), direction=direction))
    snapshot = spd.snapshot()
    assert spd.flush() == 3
    assert spd.flush() == 0
    assert spd.lookup(OUT, flow("10.0.0.1")) is None
    assert len(snapshot) == 3


@pytest.mark.property
@pytest.mark.parametrize("seed", range(4))
def test_ranges_too_wide_to_split(seed: int) -> None:
    draw = random.Random(seed)
    spd, held = SecurityPolicyDatabase(), list[Policy]()
    for _ in range(250):
        bounds = [sorted(draw.randrange(0x0A000000, 0x0A000800) for _ in range(2)) for _ in range(2)]
        ports = [sorted(draw.randrange(1, 65535) for _ in range(2)) for _ in range(2)]
        selector = Selector(span(*bounds[0]), span(*bounds[1]), draw.choice((0, 6)), PortRange(*ports[0]), draw.choice((PortRange(), PortRange(*ports[1]))))
        assert len(place(selector).keys) <= MAX_PREFIXES
        held.append(spd.add(policy(selector, draw.randrange(4))))
    for turn in range(300):
        if turn % 3 == 0:
            victim = held.pop(draw.randrange(len(held)))
            spd.delete(OUT, victim.selector)
        wanted = Flow(
            IPv4Address(draw.randrange(0x0A000000, 0x0A000800)),
            IPv4Address(draw.randrange(0x0A000000, 0x0A000800)),
            draw.choice((6, 17)),
            draw.randrange(65536),
            draw.randrange(65536),
        )
        assert spd.lookup(OUT, wanted) == naive(held, wanted)
    for gone in held:
        spd.delete_index(OUT, gone.index)
    assert spd.shapes(OUT) == 0


@pytest.mark.property
def test_more_shapes_than_the_bound() -> None:
    draw = random.Random(7)
    spd, held = SecurityPolicyDatabase(), list[Policy]()
    lengths = list(product(range(8, 33), range(8, 33)))
    draw.shuffle(lengths)
    for source, destination in lengths[: 2 * MAX_SHAPES]:
        held.append(spd.add(policy(Selector(net(f"10.0.0.0/{source}"), net(f"10.0.0.0/{destination}")), draw.randrange(1000))))
    # The ones that found no room share the shape of the interval, by source or by destination.
    assert spd.shapes(OUT) <= MAX_SHAPES + 4
    for _ in range(150):
        wanted = Flow(
            IPv4Address(0x0A000000 + draw.randrange(1 << draw.randrange(24))), IPv4Address(0x0A000000 + draw.randrange(1 << draw.randrange(24))), 6, 1, 2
        )
        assert spd.lookup(OUT, wanted) == naive(held, wanted)
        if len(held) > 100:
            spd.delete(OUT, held.pop(draw.randrange(len(held))).selector)
    assert spd.snapshot() == held


def test_icmp_type_and_code_ranges() -> None:
    spd = SecurityPolicyDatabase()
    echo = spd.add(policy(Selector(ANY, ANY, PROTOCOL_ICMP, PortRange(0x0800, 0x08FF), PortRange(0x0800, 0x08FF))))
    assert spd.lookup(OUT, Flow(ip_address("10.0.0.1"), ip_address("10.0.0.2"), PROTOCOL_ICMP, 0x0805, 0x0805)) == echo
    assert spd.lookup(OUT, Flow(ip_address("10.0.0.1"), ip_address("10.0.0.2"), PROTOCOL_ICMP, 0x0300, 0x0300)) is None


def test_families_are_apart() -> None:
    spd = SecurityPolicyDatabase()
    spd.add(policy(Selector(ANY, ANY)))
    assert spd.lookup(OUT, Flow(ip_address("::1"), ip_address("::2"), 6, 1, 2)) is None
    six = AddressRange.everything(6)
    added = spd.add(policy(Selector(six, six)))
    assert spd.lookup(OUT, Flow(ip_address("::1"), ip_address("::2"), 6, 1, 2)) == added


def test_what_may_come_in() -> None:
    spd = SecurityPolicyDatabase()

    def add(network: str, action: Action, *reqids: int) -> None:
        templates = tuple(Template(Mode.TUNNEL, ReqId(reqid)) for reqid in reqids)
        spd.add(Policy(Selector(net(network), ANY), IN, action, 0, templates))

    add("10.1.0.0/16", Action.PROTECT, 1)
    add("10.2.0.0/16", Action.BYPASS)
    add("10.3.0.0/16", Action.DISCARD)
    add("10.4.0.0/16", Action.PROTECT, 0)

    def check(source: str, reqid: int | None) -> DropReason | None:
        return spd.check_inbound(key_of_flow(flow("192.0.2.1", source)), None if reqid is None else ReqId(reqid))

    assert check("10.1.0.1", 1) is None
    assert check("10.1.0.1", 2) is DropReason.POLICY_MISMATCH
    assert check("10.1.0.1", None) is DropReason.CLEAR_WHERE_PROTECTED
    assert check("10.2.0.1", None) is None
    assert check("10.2.0.1", 1) is DropReason.POLICY_MISMATCH
    assert check("10.3.0.1", 1) is DropReason.POLICY_DISCARD
    assert check("10.3.0.1", None) is DropReason.POLICY_DISCARD
    assert check("10.4.0.1", 77) is None
    assert check("10.5.0.1", None) is None
    assert check("10.5.0.1", 1) is DropReason.POLICY_ABSENT

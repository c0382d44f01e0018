"""The SPD against a list that is searched from end to end."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernel_shim.model import Action, AddressRange, Direction, Flow, KernelError, Mark, Mode, Policy, PolicyIndex, PortRange, ReqId, Selector, Template
from kernel_shim.policy.flowkey import FieldMask, fields_of_policy
from kernel_shim.policy.spd import SecurityPolicyDatabase, direction_of

pytestmark = pytest.mark.property

# Few values, close together, so that ranges overlap, nest and collide.
BASES = {4: int(ip_address("10.0.0.0")), 6: int(ip_address("2001:db8::"))}
MAKE = {4: lambda n: ip_address("0.0.0.0") + n, 6: lambda n: ip_address("::") + n}
PORTS = (0, 1, 22, 80, 443, 1000, 1023, 1024, 5000, 65534, 65535)
PROTOCOLS = (0, 1, 6, 17)


@st.composite
def address_ranges(draw: st.DrawFn, version: int) -> AddressRange:
    kind = draw(st.sampled_from(("any", "host", "prefix", "range")))
    if kind == "any":
        return AddressRange.everything(version)
    low = draw(st.integers(0, 130))
    if kind == "host":
        return AddressRange.host(MAKE[version](BASES[version] + low))
    if kind == "prefix":
        bits = draw(st.integers(0, 7))
        first = low >> bits << bits
        return AddressRange(MAKE[version](BASES[version] + first), MAKE[version](BASES[version] + first + (1 << bits) - 1))
    return AddressRange(MAKE[version](BASES[version] + low), MAKE[version](BASES[version] + draw(st.integers(low, low + 200))))


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    if draw(st.booleans()):
        return PortRange()
    low, high = sorted((draw(st.sampled_from(PORTS)), draw(st.sampled_from(PORTS))))
    return PortRange(low, high)


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    version = draw(st.sampled_from((4, 4, 6)))
    return Selector(
        draw(address_ranges(version)),
        draw(address_ranges(version)),
        draw(st.sampled_from(PROTOCOLS)),
        draw(port_ranges()),
        draw(port_ranges()),
        draw(st.sampled_from((0, 0, 0, 7))),
        draw(st.sampled_from((Mark(), Mark(), Mark(2, 3), Mark(8, 3)))),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    templates = (Template(Mode.TUNNEL, ReqId(draw(st.integers(1, 3)))),) if draw(st.booleans()) else ()
    return Policy(draw(selectors()), draw(st.sampled_from(Direction)), draw(st.sampled_from(Action)), draw(st.integers(0, 3)), templates)


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    version = draw(st.sampled_from((4, 4, 6)))
    ports = st.one_of(st.sampled_from(PORTS), st.integers(0, 65535))
    return Flow(
        MAKE[version](BASES[version] + draw(st.integers(0, 330))),
        MAKE[version](BASES[version] + draw(st.integers(0, 330))),
        draw(st.sampled_from((1, 6, 17, 50))),
        draw(ports),
        draw(ports),
    )


def matches(selector: Selector, flow: Flow, if_id: int, mark: int) -> bool:
    return (
        flow.source in selector.source
        and flow.destination in selector.destination
        and selector.protocol in (0, flow.protocol)
        and flow.source_port in selector.source_ports
        and flow.destination_port in selector.destination_ports
        and selector.if_id == if_id
        and mark & selector.mark.mask == selector.mark.value
    )


class AgainstList(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.spd = SecurityPolicyDatabase()
        self.naive: list[Policy] = []  # oldest first
        self.generation = self.spd.generation

    def naive_find(self, policy: Policy) -> int | None:
        return next((i for i, other in enumerate(self.naive) if (other.direction, other.selector) == (policy.direction, policy.selector)), None)

    def changed(self, *, expected: bool) -> None:
        assert (self.spd.generation != self.generation) == expected
        self.generation = self.spd.generation

    @rule(batch=st.lists(policies(), min_size=1, max_size=6))
    def add(self, batch: list[Policy]) -> None:
        for policy in batch:
            if self.naive_find(policy) is not None:
                with pytest.raises(KernelError) as refusal:
                    self.spd.add(policy)
                assert refusal.value.errno == errno.EEXIST
                self.changed(expected=False)
                continue
            added = self.spd.add(policy)
            assert added == replace(policy, index=added.index)
            assert added.index % 8 == policy.direction - 1
            assert direction_of(added.index) == policy.direction
            assert added.index not in {other.index for other in self.naive}
            self.naive.append(added)
            self.changed(expected=True)

    @rule(policy=policies(), data=st.data(), priority=st.integers(0, 3))
    def update(self, policy: Policy, data: st.DataObject, priority: int) -> None:
        if self.naive and data.draw(st.booleans()):
            known = data.draw(st.sampled_from(self.naive))
            policy = replace(policy, selector=known.selector, direction=known.direction, priority=priority)
        updated = self.spd.update(policy)
        position = self.naive_find(policy)
        if position is None:
            self.naive.append(updated)
        else:
            assert updated.index == self.naive[position].index
            self.naive[position] = updated
        self.changed(expected=True)

    @rule(data=st.data(), by_index=st.booleans())
    def delete(self, data: st.DataObject, by_index: bool) -> None:
        if not self.naive:
            return
        victim = data.draw(st.sampled_from(self.naive))
        gone = self.spd.delete_index(victim.direction, victim.index) if by_index else self.spd.delete(victim.direction, victim.selector)
        assert gone == victim
        self.naive.remove(victim)
        self.changed(expected=True)

    @rule(policy=policies())
    def delete_absent(self, policy: Policy) -> None:
        if self.naive_find(policy) is None:
            for attempt in (lambda: self.spd.delete(policy.direction, policy.selector), lambda: self.spd.get(policy.direction, PolicyIndex(5))):
                with pytest.raises(KernelError) as refusal:
                    attempt()
                assert refusal.value.errno == errno.ENOENT
            self.changed(expected=False)

    @rule(sure=st.integers(0, 9))
    def flush(self, sure: int) -> None:
        if sure == 0:
            assert self.spd.flush() == len(self.naive)
            self.changed(expected=bool(self.naive))
            self.naive.clear()

    @rule(batch=st.lists(flows(), min_size=5, max_size=25), if_id=st.sampled_from((0, 0, 7)), mark=st.sampled_from((0, 2, 6, 9)))
    def lookup(self, batch: list[Flow], if_id: int, mark: int) -> None:
        for flow in batch:
            self.compare(flow, if_id, mark)

    @rule(high=st.booleans(), beside=st.sampled_from((0, 0, 0, 1)))
    def lookup_at_the_edges(self, high: bool, beside: int) -> None:
        """Flows at the ends of the ranges that are there, and just beyond."""
        step = beside if high else -beside
        for policy in self.naive:
            selector = policy.selector
            addresses = [int(side.last if high else side.first) for side in (selector.source, selector.destination)]
            ports = [side.high if high else side.low for side in (selector.source_ports, selector.destination_ports)]
            limit = (1 << (32 if selector.version == 4 else 128)) - 1
            wanted = Flow(
                MAKE[selector.version](min(max(addresses[0] + step, 0), limit)),
                MAKE[selector.version](addresses[1]),
                selector.protocol or 6,
                ports[0],
                min(max(ports[1] + step, 0), 65535),
            )
            self.compare(wanted, selector.if_id, selector.mark.value)

    def compare(self, flow: Flow, if_id: int, mark: int) -> None:
        for direction in Direction:
            candidates = [p for p in self.naive if p.direction == direction and matches(p.selector, flow, if_id, mark)]
            # min() keeps the first of equal ones: the oldest.
            assert self.spd.lookup(direction, flow, if_id, mark) == min(candidates, key=lambda p: p.priority, default=None)

    @invariant()
    def same_content(self) -> None:
        if not hasattr(self, "spd"):
            return
        assert self.spd.snapshot() == self.naive
        assert len(self.spd) == len(self.naive)
        for direction in Direction:
            union = FieldMask.NONE
            for policy in self.naive:
                if policy.direction == direction:
                    union |= fields_of_policy(policy)
            assert self.spd.fields_read(direction) == union
        for policy in self.naive:
            assert self.spd.get(policy.direction, policy.index) == policy
            assert self.spd.find(policy.direction, policy.selector) == policy


AgainstList.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestAgainstList = AgainstList.TestCase

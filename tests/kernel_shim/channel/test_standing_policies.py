"""The memory of standing policies against a list of what was put and dropped."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import ANY_PORT, Action, AddressRange, Direction, Flow, Mode, Policy, PortRange, ReqId, Selector, Template
from kernel_shim.xfrm.selectors import standing_key

pytestmark = pytest.mark.property

NEAR = AddressRange.of(IPv4Network("10.1.0.0/16"))
FAR = [AddressRange.of(IPv4Network(text)) for text in ("10.2.0.0/16", "10.2.1.0/24", "10.3.0.0/16")]
ECHO = PortRange(0x0800, 0x08FF)
SELECTORS = [
    *(Selector(NEAR, far) for far in FAR),
    Selector(NEAR, FAR[0], 6, ANY_PORT, PortRange(80, 80)),
    # to the kernel these are one
    Selector(NEAR, FAR[0], 1, ECHO, ECHO),
    Selector(NEAR, FAR[0], 1, ANY_PORT, ECHO),
]
SAME = {SELECTORS[5]: SELECTORS[4]}


def policy(direction: Direction, selector: Selector, reqids: tuple[int, ...]) -> Policy:
    templates = tuple(Template(Mode.TUNNEL, ReqId(reqid)) for reqid in reqids)
    return Policy(selector, direction, Action.PROTECT if templates else Action.BYPASS, 0, templates)


keys = st.tuples(st.sampled_from((Direction.IN, Direction.OUT)), st.sampled_from(SELECTORS))
steps = st.one_of(
    st.tuples(st.just("put"), keys, st.lists(st.integers(1, 3), max_size=2).map(tuple)),
    st.tuples(st.just("drop"), keys, st.just(())),
)


@given(st.lists(steps, max_size=40), st.sampled_from([IPv4Address("10.2.1.9"), IPv4Address("10.2.7.9"), IPv4Address("10.3.0.1"), IPv4Address("10.9.0.1")]))
def test_against_a_plain_table(given_steps: list[tuple[str, tuple[Direction, Selector], tuple[int, ...]]], destination: IPv4Address) -> None:
    standing = StandingPolicies(standing_key)
    plain: dict[tuple[Direction, Selector], Policy] = {}
    for what, (direction, selector), reqids in given_steps:
        key = (direction, SAME.get(selector, selector))
        plain.pop(key, None)
        if what == "put":
            plain[key] = policy(direction, selector, reqids)
            standing.put(plain[key])
        else:
            standing.drop(direction, selector)
    for direction in (Direction.IN, Direction.OUT):
        for selector in SELECTORS:
            assert standing.get(direction, selector) == plain.get((direction, SAME.get(selector, selector)))
    flow = Flow(IPv4Address("10.1.0.1"), destination, 17, 1, 2)
    for reqid in (1, 2, 3):
        of_reqid = [each for each in plain.values() if each.direction is Direction.OUT and any(template.reqid == reqid for template in each.templates)]
        assert sorted(map(str, standing.outbound(ReqId(reqid)))) == sorted(map(str, of_reqid))
        possible = [each for each in of_reqid if not each.selector.protocol and destination in each.selector.destination]
        found = standing.asking(ReqId(reqid), flow)
        assert found in possible if possible else found is None

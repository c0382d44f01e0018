from ipaddress import ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.model import Action, AddressRange, Direction, Mode, Policy, PortRange, ReqId, TrafficSelector
from vpnd.policies import PolicySpec, PolicyTable, policies_for, priority_of


def ts(network: str, protocol: int = 0, port: int | None = None) -> TrafficSelector:
    return TrafficSelector(AddressRange.of(ip_network(network)), protocol, PortRange() if port is None else PortRange(port, port))


SPEC = PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(7), ip_address("192.0.2.1"), ip_address("192.0.2.2"))


def test_a_tunnel_has_policies_out_in_and_forward() -> None:
    policies = list(policies_for(SPEC, [ts("10.1.0.0/16")], [ts("10.2.0.0/16")]))
    assert [policy.direction for policy in policies] == [Direction.OUT, Direction.IN, Direction.FORWARD]
    out, inbound, _ = policies
    assert out.selector == inbound.selector.reversed()
    assert (out.templates[0].source, out.templates[0].destination) == (ip_address("192.0.2.1"), ip_address("192.0.2.2"))
    assert (inbound.templates[0].source, inbound.templates[0].destination) == (ip_address("192.0.2.2"), ip_address("192.0.2.1"))


def test_selectors_that_share_no_packet_make_no_policy() -> None:
    assert not list(policies_for(SPEC, [ts("10.1.0.0/16")], [ts("2001:db8::/32")]))
    assert not list(policies_for(SPEC, [ts("10.1.0.0/16", 6)], [ts("10.2.0.0/16", 17)]))


def test_the_narrower_policy_and_the_shunt_win() -> None:
    wide = next(iter(policies_for(SPEC, [ts("10.1.0.0/16")], [ts("0.0.0.0/0")])))
    narrow = next(iter(policies_for(SPEC, [ts("10.1.0.0/16")], [ts("10.2.0.0/24")])))
    port = next(iter(policies_for(SPEC, [ts("10.1.0.0/16")], [ts("10.2.0.0/24", 6, 80)])))
    assert port.priority < narrow.priority < wide.priority
    assert priority_of(wide.selector, Action.BYPASS) < port.priority


POOL = [
    policy
    for reqid in (1, 2)
    for network in ("10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/24")
    for policy in policies_for(PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(reqid)), [ts("10.1.0.0/16")], [ts(network)])
]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.lists(st.sampled_from(POOL), max_size=4)), max_size=40))
def test_the_kernel_that_follows_the_changes_holds_what_owners_need(steps: list[tuple[bool, int, list[Policy]]]) -> None:
    table = PolicyTable()
    claimed: dict[int, dict[tuple[Direction, object], Policy]] = {}
    kernel: dict[tuple[Direction, object], Policy] = {}
    for claim, owner, policies in steps:
        if claim:
            changes = table.claim(owner, policies)
            for policy in policies:
                claimed.setdefault(owner, {})[policy.direction, policy.selector] = policy
        else:
            changes = table.release(owner, policies)
            for policy in policies:
                claimed.get(owner, {}).pop((policy.direction, policy.selector), None)
        for change in changes:
            key = (change.policy.direction, change.policy.selector)
            if change.remove:
                del kernel[key]
            else:
                kernel[key] = change.policy
        needed = {key for owned in claimed.values() for key in owned}
        assert set(kernel) == needed
        for key, policy in kernel.items():
            assert any(owned.get(key) == policy for owned in claimed.values())
        assert sorted(map(str, table.desired())) == sorted(map(str, kernel.values()))

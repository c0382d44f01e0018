"""Pass and drop policies beside protected ones: what becomes of each packet, against a list that is searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from dataplane_pair import OUTER, Pair, addresses
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP

from kernel_shim.model import Action, Direction, KernelError, Mode, Policy, PortRange, ReqId, Selector, Template

pytestmark = pytest.mark.property

NETWORKS = ("10.1.0.0/16", "10.1.0.0/24", "10.1.0.8/30", "0.0.0.0/0")
FAR = ("10.2.0.0/16", "10.2.0.8/30", "0.0.0.0/0")
PORTS = (PortRange(), PortRange(53, 53), PortRange(1, 1023), PortRange(2000, 2010))


@dataclass(frozen=True)
class Packet:
    source: str
    destination: str
    protocol: int
    source_port: int
    destination_port: int

    def octets(self) -> bytes:
        upper = (TCP if self.protocol == 6 else UDP)(sport=self.source_port, dport=self.destination_port)
        return bytes(IP(src=self.source, dst=self.destination, flags="DF") / upper)


selectors = st.builds(
    lambda source, destination, protocol, near, far: Selector(addresses(source), addresses(destination), protocol, near, far),
    st.sampled_from(NETWORKS),
    st.sampled_from(FAR),
    st.sampled_from((0, 6, 17)),
    st.sampled_from(PORTS),
    st.sampled_from(PORTS),
)
shunts = st.builds(lambda selector, action, priority: Policy(selector, Direction.OUT, action, priority), selectors, st.sampled_from(Action), st.integers(0, 3))
packets = st.builds(
    Packet,
    st.sampled_from(("10.1.0.9", "10.1.0.200", "10.1.9.9", "192.168.7.7")),
    st.sampled_from(("10.2.0.9", "10.2.0.200", "172.16.1.1")),
    st.sampled_from((6, 17)),
    st.sampled_from((53, 80, 2005, 5000)),
    st.sampled_from((53, 80, 2005, 5000)),
)


def naive(policies: list[Policy], packet: Packet) -> Action:
    """The first that fits, by priority and then by age; what none names passes."""
    for policy in sorted(policies, key=lambda policy: policy.priority):
        it = policy.selector
        if (
            ip_address(packet.source) in it.source
            and ip_address(packet.destination) in it.destination
            and it.protocol in (0, packet.protocol)
            and packet.source_port in it.source_ports
            and packet.destination_port in it.destination_ports
        ):
            return policy.action
    return Action.BYPASS


@settings(max_examples=80, deadline=None)
@given(st.lists(shunts, max_size=8), st.lists(packets, min_size=1, max_size=12), st.data())
def test_each_packet_meets_the_first_policy_that_fits(wanted: list[Policy], sent: list[Packet], data: st.DataObject) -> None:
    pair = Pair(policies=False)
    engine = pair.left.engine
    pair.connect()
    template = Template(Mode.TUNNEL, ReqId(7), *map(ip_address, OUTER[4]))
    standing: list[Policy] = []
    for policy in wanted:
        full = Policy(policy.selector, policy.direction, policy.action, policy.priority, (template,) if policy.action is Action.PROTECT else ())
        try:
            standing.append(engine.add_policy(full, pair.now))
        except KernelError:
            continue  # the same selector stands already
    for packet in sent:
        if standing and data.draw(st.integers(0, 5)) == 0:
            gone = standing.pop(data.draw(st.integers(0, len(standing) - 1)))
            engine.delete_policy(Direction.OUT, gone.selector)
        before = (len(pair.left.sink.esp), pair.left.count("drop_policy_discard"), len(pair.left.sink.clear))
        pair.send(packet.octets())
        after = (len(pair.left.sink.esp), pair.left.count("drop_policy_discard"), len(pair.left.sink.clear))
        did = [action for action, new, old in zip((Action.PROTECT, Action.DISCARD, Action.BYPASS), after, before, strict=True) if new > old]
        assert did == [naive(standing, packet)]

"""The engine, which remembers flows and joins packets, does with random LFIBs and packets what `LabelSwitch` does with each packet alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from dataplane_pair import OUTER
from hypothesis import given, settings
from hypothesis import strategies as st
from label_pair import Pes, allowed
from naive_labels import VRFS, Stack, ilms, label_stacks, lfib_of, routing
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from kernel_shim.model import Mode
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import Entry, Label, write_stack
from kernel_shim.mpls.lfib import Paths, Peer, ToPeer
from kernel_shim.mpls.node import LabelBinding, VrfRoute
from kernel_shim.mpls.switch import AsIp, LabelSwitch
from kernel_shim.reasons import DropReason

ACCEPTED = allowed(16, 17, 18, 19, 20)
PEER = "left"

inners = st.builds(
    lambda to, ttl, dscp, version, port: (to, ttl, dscp, version, port),
    st.sampled_from(["10.1.1.1", "10.1.1.2", "10.1.2.3", "10.2.3.4", "172.16.0.1"]).map(IPv4Address),
    st.sampled_from([0, 1, 2, 3, 64, 255]),
    st.sampled_from([0, 10, 46]),
    st.sampled_from([4, 4, 6]),
    st.integers(1000, 1002),
)


Packets = Sequence[tuple[Stack, tuple[IPv4Address, int, int, int, int], int]]


def inner(to: IPv4Address, ttl: int, dscp: int, version: int, port: int, number: int) -> bytes:
    upper = UDP(sport=port, dport=2000) / Raw(number.to_bytes(4, "big") * 8)
    if version == 6:
        return bytes(IPv6(src="2001:db8::c000:201", dst=f"2001:db8::{int(to) >> 16:x}:{int(to) & 0xFFFF:x}", hlim=ttl, tc=dscp << 2) / upper)
    return bytes(IP(src="192.0.2.1", dst=str(to), ttl=ttl, tos=dscp << 2, flags="DF") / upper)


def to_left(paths: Paths) -> Paths:
    """The only peer here."""
    return tuple(replace(path, next_hop=ToPeer(PEER)) if isinstance(path.next_hop, ToPeer) else path for path in paths)


def carried(pair: Pes, encapsulation: Encapsulation) -> list[bytes]:
    """Stack and payload of what the right one sent on."""
    begin = encapsulation.overhead + (20 if pair.mode is Mode.TUNNEL else 0)
    return [plain[begin:] for plain in pair.plaintext(pair.right)]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("encapsulation", Encapsulation)
@settings(max_examples=20, deadline=None)
@given(ilms, routing, st.lists(st.tuples(label_stacks, inners, st.integers(1, 4)), min_size=1, max_size=8))
def test_the_engine_does_what_the_switch_does(
    mode: Mode,
    encapsulation: Encapsulation,
    ilm: Mapping[int, Paths],
    routes: Mapping[tuple[str, IPv4Network], Paths],
    packets: Packets,
) -> None:
    pair = Pes(encapsulation, mode)
    pair.connect()
    engine = pair.right.engine
    for entry in list(engine.label_entries()):
        if isinstance(entry, LabelBinding | VrfRoute):
            engine.remove_label_entry(entry.key, pair.now)
    lfib = lfib_of({label: to_left(paths) for label, paths in ilm.items()}, {key: to_left(paths) for key, paths in routes.items()})
    lfib.admit(Peer(PEER, ACCEPTED))
    engine.put_label_entry(Peer(PEER, ACCEPTED), pair.now)
    for space, label, paths in lfib.labels():
        engine.put_label_entry(LabelBinding(label, paths, space), pair.now)
    for vrf in VRFS:
        for prefix, paths in lfib.routes(vrf):
            engine.put_label_entry(VrfRoute(vrf, prefix, paths), pair.now)
    switch = LabelSwitch(Forwarder(lfib), lambda _peer: 1400)
    landed: dict[str, list[bytes]] = {vrf: [] for vrf in VRFS}
    onward: list[bytes] = []
    reasons: Counter[DropReason] = Counter()
    number = 0
    for stack, what, times in packets:
        for _ in range(times):
            number += 1
            labelled = write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in stack]) + inner(*what, number)
            header = encapsulation.header(len(labelled), number)
            source, destination = OUTER[4]
            pair.send(bytes(IP(src=source, dst=destination, proto=int(encapsulation)) / Raw(header + labelled)))
            outcome = switch.from_peer(PEER, labelled, pair.now)
            if outcome.reason is not None:
                reasons[outcome.reason] += 1
            for hop, packet in outcome.sent:
                if isinstance(hop, ToPeer):
                    onward.append(packet)
                elif isinstance(hop, AsIp):
                    reasons[DropReason.POLICY_ABSENT] += 1
                else:
                    landed[hop.vrf].append(packet)
    pair.right.take(pair.left.sent(), pair.now)
    assert {vrf: sorted(pair.right.landed(vrf)) for vrf in VRFS} == {vrf: sorted(found) for vrf, found in landed.items()}
    assert sorted(carried(pair, encapsulation)) == sorted(onward)
    dropped = {name: count for name, count in engine.statistics().items() if name.startswith("drop_") and count}
    assert dropped == {f"drop_{reason.value}": count for reason, count in reasons.items()}
    assert pair.right.received() == []

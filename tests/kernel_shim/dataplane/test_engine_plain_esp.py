"""ESP without UDP in the data plane: endpoints of port 0, more room on the path, and peers that mix both."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from dataplane_pair import OUTER, Pair, Sent

from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.model import Direction, Endpoint, KernelError, Mode, NewMapping, UdpEncapsulation

PLAIN = EngineConfig(plain_esp=True, udp_segmentation=True)
SHAPES = [(4, 4, Mode.TUNNEL), (4, 6, Mode.TUNNEL), (6, 4, Mode.TUNNEL), (6, 6, Mode.TRANSPORT)]


@pytest.mark.parametrize(("inner", "outer", "mode"), SHAPES)
def test_packets_pass_both_ways(inner: int, outer: int, mode: Mode) -> None:
    pair = Pair(inner, outer, mode, config=PLAIN)
    pair.connect(encapsulation=None)
    there, back = pair.packet(1, 900), pair.packet(2, 50, left=False)
    pair.send(there)
    pair.send(back, left=False)
    (sent,) = pair.left.sink.esp
    assert (sent.local, sent.remote) == tuple(Endpoint(ip_address(address), 0) for address in OUTER[outer])
    pair.pass_on()
    assert (pair.right.received(), pair.left.received()) == ([there], [back])


def test_the_udp_header_is_room_for_payload() -> None:
    longest = {}
    for encapsulation in (None, UdpEncapsulation()):
        pair = Pair(config=PLAIN)
        pair.connect(encapsulation=encapsulation)
        pair.send(pair.packet(1))
        (bundle,) = pair.left.engine.cached_bundles()
        longest[encapsulation] = bundle.limit
    assert longest[None] == longest[UdpEncapsulation()] + 8


def test_a_kernel_without_raw_sockets_refuses_such_an_sa() -> None:
    pair = Pair()
    assert pair.left.engine.capabilities().encapsulation_required
    with pytest.raises(KernelError) as refused:
        pair.left.engine.add_sa(pair.sa(True, Direction.OUT, encapsulation=None), pair.now)
    assert refused.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize("encapsulation", [None, UdpEncapsulation()])
def test_the_other_form_is_taken_too_and_moves_nobody(encapsulation: UdpEncapsulation | None) -> None:
    """RFC 7296 section 2.23: with and without UDP is received at any time."""
    pair = Pair(config=PLAIN)
    pair.connect(encapsulation=encapsulation)
    packet = pair.packet(1)
    pair.send(packet)
    (sent,) = pair.left.sent()
    port = 4500 if encapsulation is None else 0
    other = Sent(sent.local._replace(port=port), sent.remote._replace(port=port), sent.data, sent.segment)
    pair.right.take([other], pair.now)
    assert pair.right.received() == [packet]
    assert not [event for event in pair.right.events if isinstance(event, NewMapping)]


def test_an_sa_moves_between_both_forms() -> None:
    pair = Pair(config=PLAIN)
    pair.connect()
    old = pair.sa(True, Direction.OUT)
    pair.left.engine.update_sa(replace(old, encapsulation=None), pair.now)
    pair.send(pair.packet(1))
    assert pair.left.sink.esp[-1].remote.port == 0

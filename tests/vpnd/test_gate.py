"""Who may open an IKE SA, seen from the responder's bounds."""

from __future__ import annotations

import random
from collections import Counter
from ipaddress import ip_address

import pytest
from lab.ike_pair import psk_pair

from kernel_shim.model import Endpoint
from vpnd.gate import Admitted, Gate, GateSettings, Refused, Reply, origin_of
from vpnd.ike.transport import MAX_REPEATS_OF_STRANGERS


def first_request() -> bytes:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    return pair.take().data


@pytest.mark.parametrize(
    ("template", "admitted"),
    [("192.0.2.{}", 9), ("2001:db8:{:x}::1", 9), ("2001:db8::{:x}", 2)],
    ids=["addresses", "networks", "one network"],
)
def test_who_has_a_network_has_one_share(template: str, admitted: int) -> None:
    """An attacker with an IPv6 network has any number of addresses, and can return the cookie at each."""
    gate, data = Gate(GateSettings(cookie_threshold=0, cookie_threshold_ip=0, block_threshold=2), random.Random(1).randbytes), first_request()
    half_open: Counter[bytes] = Counter()
    for number in range(1, 10):
        remote = Endpoint(ip_address(template.format(number)), 500)
        verdict = gate.judge(data, remote, half_open.total(), half_open[origin_of(remote.address)], 1.0)
        assert isinstance(verdict, Admitted | Refused)
        half_open[origin_of(remote.address)] += isinstance(verdict, Admitted)
    assert half_open.total() == admitted


def test_a_cookie_is_asked_for_of_a_network_that_has_its_share() -> None:
    gate, remote = Gate(GateSettings(), random.Random(1).randbytes), Endpoint(ip_address("2001:db8::77"), 500)
    assert isinstance(gate.judge(first_request(), remote, 3, 3, 1.0), Reply)


def test_a_stranger_does_not_make_us_answer_for_ever() -> None:
    """A request that is played again from the victim's address would be answered to it each time."""
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    request = pair.take()
    for _ in range(3 * MAX_REPEATS_OF_STRANGERS):
        pair.deliver(request)
    assert len(pair.flight) == 1 + MAX_REPEATS_OF_STRANGERS
    pair.settle()
    assert pair.b.established()

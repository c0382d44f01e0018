"""Who may open an IKE SA, seen from the responder's bounds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest
from lab.ike_pair import psk_pair

from kernel_shim.model import Endpoint
from vpnd.config.tree import Section
from vpnd.config.validate import validate_connection
from vpnd.gate import MAX_OPENING, Admitted, Gate, GateSettings, Refused, Reply, origin_of
from vpnd.ike.exchanges import ike_sa_init
from vpnd.ike.iana import NotifyType, ProtocolId
from vpnd.ike.iana import Payload as PayloadType
from vpnd.ike.proposal import parse_proposals
from vpnd.ike.transport import MAX_REPEATS_OF_STRANGERS
from vpnd.ike.wire.header import CRITICAL, FLAG_INITIATOR, FLAG_RESPONSE
from vpnd.ike.wire.message import decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload


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


def test_what_is_too_long_is_not_read() -> None:
    gate, remote, data = Gate(GateSettings(), random.Random(1).randbytes), Endpoint(ip_address("192.0.2.9"), 500), first_request()

    def longer(octets: int) -> bytes:
        """With a Vendor ID before all others that makes it as long."""
        vendor = bytes((data[16], 0)) + (octets - len(data)).to_bytes(2, "big") + bytes(octets - len(data) - 4)
        return data[:16] + bytes((PayloadType.VENDOR_ID,)) + data[17:24] + octets.to_bytes(4, "big") + vendor + data[28:]

    assert isinstance(gate.judge(longer(MAX_OPENING), remote, 0, 0, 1.0), Admitted)
    assert gate.judge(longer(MAX_OPENING + 1), remote, 0, 0, 1.0) == Refused("ike_opening_too_long")


@pytest.mark.parametrize("fits", [False, True])
def test_an_offer_is_compared_with_equal_proposals_once(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections there are, an offer of a stranger costs little."""
    pair = psk_pair()
    many = [validate_connection(Section.of({f"c{number}": {"local": {"auth": "psk"}, "remote": {"auth": "psk"}}})) for number in range(100)]
    pair.b.connections[:] = many
    compared = []
    choose = ike_sa_init.select
    monkeypatch.setattr(ike_sa_init, "select", lambda *offer, **how: compared.append(offer) or choose(*offer, **how))
    pair.a.connections[0] = replace(pair.a.connections[0], proposals=many[0].proposals if fits else parse_proposals(ProtocolId.IKE, "aes128-sha1-modp2048"))
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    assert len(compared) == 1
    assert len(pair.b.sas) == fits
    if fits:
        assert len(pair.b.sa.candidates) == len(many)


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


def test_an_unknown_critical_payload_is_named_and_costs_nothing() -> None:
    """RFC 7296 section 2.5."""
    gate, remote, data = Gate(GateSettings(cookie_threshold=1), random.Random(1).randbytes), Endpoint(ip_address("192.0.2.9"), 500), first_request()

    def preceded(critical: int, flags: int = FLAG_INITIATOR) -> bytes:
        """The request with a payload of type 200 before all others."""
        unknown = bytes((data[16], critical, 0, 8)) + b"what"
        length = (len(data) + len(unknown)).to_bytes(4, "big")
        return data[:16] + bytes((200,)) + data[17:19] + bytes((flags,)) + data[20:24] + length + unknown + data[28:]

    # HDR, ?*, SAi1, KEi, Ni -->  <-- HDR, N(UNSUPPORTED_CRITICAL_PAYLOAD)
    verdict = gate.judge(preceded(CRITICAL), remote, 5, 5, 1.0)
    assert isinstance(verdict, Reply)
    answer = decode_message(verdict.answer)
    assert answer.header.response
    assert [(notify.type, notify.data) for notify in answer.all(NotifyPayload)] == [(NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes((200,)))]
    assert len(verdict.answer) < len(data)
    # nobody answers an answer, and what is not critical is skipped
    assert gate.judge(preceded(CRITICAL, FLAG_INITIATOR | FLAG_RESPONSE), remote, 5, 5, 1.0) == Refused("ike_malformed")
    assert gate.judge(preceded(CRITICAL, 0), remote, 5, 5, 1.0) == Refused("ike_malformed")
    assert isinstance(gate.judge(preceded(0), remote, 0, 0, 1.0), Admitted)


def returned(data: bytes, cookie: bytes) -> bytes:
    """The request again, with the cookie before everything else (RFC 7296 section 2.6)."""
    message = decode_message(data)
    return encode_message(replace(message, payloads=(NotifyPayload(NotifyType.COOKIE, cookie), *message.payloads)))


def test_only_the_cookie_of_this_very_initiator_lets_it_in() -> None:
    gate, data = Gate(GateSettings(cookie_threshold=10), random.Random(1).randbytes), first_request()
    remote, other = Endpoint(ip_address("192.0.2.9"), 500), Endpoint(ip_address("192.0.2.10"), 500)
    asked = gate.judge(data, remote, 10, 0, 1.0)
    assert isinstance(asked, Reply)
    notify = decode_message(asked.answer).notify(NotifyType.COOKIE)
    assert notify is not None
    cookie = notify.data
    # HDR, N(COOKIE), SAi1, KEi, Ni -->
    assert isinstance(gate.judge(returned(data, cookie), remote, 10, 0, 2.0), Admitted)
    # from elsewhere, with another one, by another initiator, much later
    for wrong, who, now in (
        (returned(data, cookie), other, 2.0),
        (returned(data, cookie[:-1] + bytes((cookie[-1] ^ 1,))), remote, 2.0),
        (returned(data, b"made up"), remote, 2.0),
        (b"otherspi" + returned(data, cookie)[8:], remote, 2.0),
        (returned(data, cookie), remote, 1000.0),
    ):
        verdict = gate.judge(wrong, who, 10, 0, now)
        assert isinstance(verdict, Reply)
        assert verdict.counter == "ike_cookies_sent"
    # below the threshold nobody is asked
    assert isinstance(gate.judge(data, other, 9, 0, 2.0), Admitted)


def test_beyond_the_limit_nobody_gets_in() -> None:
    gate, remote, data = Gate(GateSettings(cookie_threshold=0, limit=10), random.Random(1).randbytes), Endpoint(ip_address("192.0.2.9"), 500), first_request()
    assert isinstance(gate.judge(data, remote, 9, 0, 1.0), Admitted)
    assert gate.judge(data, remote, 10, 0, 1.0) == Refused("ike_half_open_limit")

"""Cookies: stateless, bound to who asks, and renewed."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest
from lab.ike_pair import psk_pair

from vpnd.ike.cookie import COOKIE_MAXIMUM, SECRET_LIFETIME, CookieJar, cookie_reply, invalid_major_version, parse_init_request, stateless_reply
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.wire.message import decode_message

NONCE, ADDRESS, SPI = bytes(range(32)), ip_address("192.0.2.1"), b"12345678"


def jar(seed: int = 1) -> CookieJar:
    return CookieJar(random.Random(seed).randbytes)


def test_a_cookie_is_for_one_initiator() -> None:
    cookies = jar()
    cookie = cookies.make(NONCE, ADDRESS, SPI, 10.0)
    assert 1 < len(cookie) <= COOKIE_MAXIMUM
    assert cookies.check(cookie, NONCE, ADDRESS, SPI, 10.0)
    assert not cookies.check(cookie, NONCE[::-1], ADDRESS, SPI, 10.0)
    assert not cookies.check(cookie, NONCE, ip_address("192.0.2.2"), SPI, 10.0)
    assert not cookies.check(cookie, NONCE, ADDRESS, SPI[::-1], 10.0)
    assert not jar(2).check(cookie, NONCE, ADDRESS, SPI, 10.0)


def test_octets_do_not_move_between_the_fields() -> None:
    cookies = jar()
    four, six = ip_address("1.2.3.4"), ip_address("1:2:3:4:5:6:7:8")
    assert cookies.make(NONCE, four, SPI, 0.0) != cookies.make(NONCE + four.packed[:2], ip_address(four.packed), SPI, 0.0)
    assert cookies.make(NONCE, six, SPI, 0.0) != cookies.make(NONCE + six.packed[:12], ip_address(six.packed[12:]), SPI, 0.0)


@pytest.mark.parametrize("cookie", [b"", b"\x00", bytes(33), bytes(100), b"\x01" + bytes(32), b"\xff" + bytes(32)])
def test_what_is_no_cookie(cookie: bytes) -> None:
    assert not jar().check(cookie, NONCE, ADDRESS, SPI, 0.0)


@pytest.mark.parametrize(("age", "stands"), [(0.0, True), (0.9, True), (1.1, True), (1.9, True), (2.1, False), (300.0, False)])
def test_a_cookie_stands_for_one_to_two_lifetimes(age: float, stands: bool) -> None:
    cookies = jar()
    cookie = cookies.make(NONCE, ADDRESS, SPI, 5.0)
    if age > 1:
        cookies.make(NONCE, ADDRESS, SPI, 5.0 + SECRET_LIFETIME)
    assert cookies.check(cookie, NONCE, ADDRESS, SPI, 5.0 + age * SECRET_LIFETIME) is stands


def request() -> bytes:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    return pair.take().data


def test_what_a_gate_reads_of_a_request() -> None:
    data = request()
    parsed = parse_init_request(data)
    assert parsed is not None
    assert parsed.spi == int.from_bytes(data[:8], "big")
    assert parsed.cookie is None
    for at, value in ((18, Exchange.IKE_AUTH), (19, 0), (19, 0x28), (8, 1), (23, 1)):
        assert parse_init_request(data[:at] + bytes([value]) + data[at + 1 :]) is None
    assert parse_init_request(data[:60]) is None


def test_stateless_replies() -> None:
    parsed = parse_init_request(request())
    assert parsed is not None
    reply = decode_message(cookie_reply(parsed, b"a cookie"))
    assert reply.header.response
    assert not reply.header.initiator
    assert reply.header.initiator_spi == parsed.header.initiator_spi
    cookie = reply.notify(NotifyType.COOKIE)
    assert cookie is not None
    assert cookie.data == b"a cookie"
    refusal = decode_message(stateless_reply(parsed.header, NotifyType.NO_PROPOSAL_CHOSEN))
    assert refusal.notify(NotifyType.NO_PROPOSAL_CHOSEN) is not None


def test_a_higher_major_version_is_answered_once() -> None:
    data = request()
    newer = data[:17] + b"\x30" + data[18:]
    answer = invalid_major_version(newer)
    assert answer is not None
    reply = decode_message(answer)
    assert reply.notify(NotifyType.INVALID_MAJOR_VERSION) is not None
    assert reply.header.response
    assert invalid_major_version(answer) is None
    assert invalid_major_version(data) is None
    assert invalid_major_version(newer[:19] + b"\x28" + newer[20:]) is None  # never an answer to an answer
    assert invalid_major_version(newer[:20]) is None

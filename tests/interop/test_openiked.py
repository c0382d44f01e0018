"""OpenIKED, whose kernel is a kernel-shim here; `tests/realkernel` meets it on Linux's own AF_KEY."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import pytest
from lab.certs import KeyKind
from lab.daemon import NegotiationFailed
from lab.gateway import Gateway
from lab.openiked import OpenIked, OpenIkedOnShim
from lab.pairing import GIVES_UP_SOON, DaemonFactory, Pair, carries_a_little, facing
from lab.process import wait_until
from lab.tunnel import CHILD, CONNECTION, Credentials, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.openiked, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
BYTES = 8 << 20  # of a CHILD_SA of its
DEFAULTS = Tunnel(proposals="default", esp_proposals="default", connection_options={"encap": "no"})  # out of UDP its kernel here takes nothing


def openiked(policy: str = "", lifetimes: str = "", *settings: str) -> DaemonFactory:
    return lambda namespace, config: OpenIkedOnShim(namespace, config, policy=policy, lifetimes=lifetimes, settings=settings)


def set_to(**settings: str) -> DaemonFactory:
    return lambda namespace, config: Gateway(namespace, config, settings=settings)


def ours_and_theirs(link: Pair) -> tuple[Gateway, OpenIked]:
    ours, theirs = (link.a, link.b) if isinstance(link.a, Gateway) else (link.b, link.a)
    assert isinstance(ours, Gateway)
    assert isinstance(theirs, OpenIked)
    return ours, theirs


def up(link: Pair) -> None:
    link.a.initiate()
    link.b.wait_child()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_all_defaults_and_either_side_ends_it(ours: Side) -> None:
    with facing(ours, DEFAULTS, theirs=openiked()) as link:
        for ending in ours_and_theirs(link):
            up(link)
            carries_a_little(link)
            ending.terminate()
            for daemon in (link.a, link.b):
                daemon.wait_gone()


@pytest.mark.parametrize("kind", [KeyKind.RSA, KeyKind.ECDSA])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_certificates(ours: Side, kind: KeyKind) -> None:
    with facing(ours, replace(DEFAULTS, credentials=Credentials.make(kind)), theirs=openiked()) as link:
        up(link)
        carries_a_little(link)
        assert len(re.findall(r"ikev2_pld_auth: method SIG ", link.a.log() + link.b.log())) == 2  # RFC 7427, both ways


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_fragments_both_ways(ours: Side) -> None:
    tunnel = replace(DEFAULTS, credentials=Credentials.make(KeyKind.RSA))
    with facing(ours, tunnel, mine=set_to(fragment_size="600"), theirs=openiked("", "", "fragmentation")) as link:
        up(link)
        carries_a_little(link)
        log = ours_and_theirs(link)[1].log()
        assert "Received fragment: 2 of" in log
        assert "ikev2_send_encrypted_fragments: Fragment 2 of" in log


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_rekeyed_by_us(ours: Side) -> None:
    tunnel = replace(DEFAULTS, esp_proposals="aes256-sha512-x25519")
    with facing(ours, tunnel, theirs=openiked("childsa enc aes-256 auth hmac-sha2-512 group curve25519")) as link:
        up(link)
        mine, _ = ours_and_theirs(link)
        for _ in range(2):
            done = link.rekeyed()
            mine.rekey(child=CHILD)
            done()
            carries_a_little(link)
        assert mine.child().key_exchanges == ("CURVE_25519",)
        if ours is Side.A:  # else the next test
            done = link.rekeyed(children=False)
            mine.rekey(ike=CONNECTION)
            done()
            carries_a_little(link)


def test_an_ike_sa_of_theirs_that_we_rekey_goes_without_an_answer() -> None:
    """Behind its own rekeying OpenIKED 7.2 takes a delete from the original initiator only (`ikev2_msg_valid_ike_sa`), and is silent to others."""
    with facing(Side.B, DEFAULTS, mine=set_to(**GIVES_UP_SOON), theirs=openiked()) as link:
        up(link)
        mine, _ = ours_and_theirs(link)
        done = link.rekeyed(children=False)
        mine.rekey(ike=CONNECTION)
        done()
        carries_a_little(link)
        done = link.rekeyed()
        mine.rekey(child=CHILD)
        done()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_its_lifetimes_rekey(ours: Side) -> None:
    with facing(ours, DEFAULTS, theirs=openiked("", f"ikelifetime 4 lifetime 3h bytes {BYTES}")) as link:
        up(link)
        link.rekeyed(children=False)()
        link.rekeyed(children=False)()
        done = link.rekeyed()
        # More than the soft limit, which it draws between 85 and 95 % of the hard one, and less than that, however late it comes to rekey.
        link.datagrams(count=int(0.975 * BYTES / (1200 + 28)), rate=2000.0, size=1200)
        done()
        for side in Side:
            assert link.ping(side).lost == 0


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_the_child_sa_ends_alone_and_comes_again_over_ipv6(ours: Side) -> None:
    with facing(ours, replace(DEFAULTS, inner_version=6, outer_version=6), theirs=openiked()) as link:
        up(link)
        mine, theirs = ours_and_theirs(link)
        carries_a_little(link)
        mine.terminate(child=CHILD)
        for daemon in (link.a, link.b):
            daemon.wait_child_gone()
            assert len(daemon.ike_sas()) == 1
        mine.initiate()
        theirs.wait_child()
        carries_a_little(link)


def test_it_narrows_to_its_own_selectors_only() -> None:
    with facing(Side.A, replace(DEFAULTS, ts_b_at_b="10.2.0.0/24"), theirs=openiked()) as link:
        up(link)
        carries_a_little(link)
        assert link.a.child().remote_ts == ("10.2.0.0/24",)


def test_where_it_should_narrow_to_ours_it_is_refused() -> None:
    """As responder OpenIKED 7.2 answers with the selectors that it is configured with, whatever it was asked for; RFC 7296 section 2.9 wants a part of that."""
    with facing(Side.A, replace(DEFAULTS, ts_b_at_b="0.0.0.0/0"), theirs=openiked()) as link, pytest.raises(NegotiationFailed, match="not within ours"):
        link.a.initiate()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_a_wrong_secret(ours: Side) -> None:
    with facing(ours, replace(DEFAULTS, secret_b="another"), theirs=openiked()) as link:
        mine, theirs = ours_and_theirs(link)
        if ours is Side.A:
            with pytest.raises(NegotiationFailed, match="AUTHENTICATION_FAILED"):
                mine.initiate()
        else:
            theirs.begin()
            wait_until(lambda: "the shared key does not match" in mine.log(), "it is refused")
        for daemon in (link.a, link.b):
            daemon.wait_gone()


def test_we_crash() -> None:
    """It passes INITIAL_CONTACT over; its `enforcesingleikesa` does the same."""
    with facing(Side.A, DEFAULTS, theirs=openiked("", "", "enforcesingleikesa")) as link:
        up(link)
        mine, theirs = ours_and_theirs(link)
        carries_a_little(link)
        mine.kill()
        mine.start()
        mine.initiate()
        wait_until(lambda: [sa.initiator_spi for sa in theirs.ike_sas()] == [sa.initiator_spi for sa in mine.ike_sas()], "only the new one is left")
        carries_a_little(link)


def test_it_dies() -> None:
    with facing(Side.A, replace(DEFAULTS, dpd_a="1s"), mine=set_to(**GIVES_UP_SOON), theirs=openiked()) as link:
        up(link)
        mine, theirs = ours_and_theirs(link)
        theirs.signal(signal.SIGSTOP)
        mine.wait_gone()
        theirs.signal(signal.SIGCONT)
        up(link)
        link.carries_again()

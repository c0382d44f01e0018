"""How tunnels with strongSwan end: deletes and dead peers, from both sides; and how they do not begin."""

from __future__ import annotations

from functools import partial

import pytest
from lab.certs import KeyKind
from lab.daemon import NegotiationFailed
from lab.gateway import Gateway
from lab.pairing import GIVES_UP_SOON, facing
from lab.process import wait_until
from lab.strongswan import StrongSwan
from lab.tunnel import CHILD, CONNECTION, NAME_A, NAME_B, SECRET, Credentials, Side, Tunnel

pytestmark = pytest.mark.interop

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
DPD = Tunnel(dpd_a="1s", dpd_b="1s")
QUICK_OURS = partial(Gateway, settings=GIVES_UP_SOON)
QUICK_STRONGSWAN = partial(StrongSwan, settings="\n  ".join(f"{name} = {value}" for name, value in GIVES_UP_SOON.items()))
IKE_INFORMATIONAL = 37


@pytest.mark.parametrize("deleter", list(Side), ids=["by-initiator", "by-responder"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_delete_of_the_ike_sa(ours: Side, deleter: Side) -> None:
    with facing(ours, Tunnel()) as link:
        link.a.initiate()
        assert link.ping().lost == 0
        link.daemon(deleter).terminate(ike=CONNECTION)
        link.a.wait_gone()
        link.b.wait_gone()


@pytest.mark.parametrize("deleter", list(Side), ids=["by-initiator", "by-responder"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_delete_of_the_child_sa(ours: Side, deleter: Side) -> None:
    with facing(ours, Tunnel()) as link:
        link.a.initiate()
        link.daemon(deleter).terminate(child=CHILD)
        link.a.wait_child_gone()
        link.b.wait_child_gone()
        assert [ike.state for ike in link.a.ike_sas()] == ["ESTABLISHED"]
        assert [ike.state for ike in link.b.ike_sas()] == ["ESTABLISHED"]
        # A further CHILD_SA on the IKE SA that stands: CREATE_CHILD_SA.
        link.a.initiate()
        assert len(link.a.ike_sas()) == 1
        assert link.ping().lost == 0


@pytest.mark.parametrize("prober", list(Side), ids=["probed-by-initiator", "probed-by-responder"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_idle_peers_are_probed_and_stay(ours: Side, prober: Side) -> None:
    tunnel = Tunnel(dpd_a="1s") if prober is Side.A else Tunnel(dpd_b="1s")
    with facing(ours, tunnel) as link:
        link.a.initiate()
        source, answerer = (link.sites.a.wan4, link.sites.b.wan4) if prober is Side.A else (link.sites.b.wan4, link.sites.a.wan4)
        for sender, is_answer in ((source, False), (answerer, True)):
            link.capture.wait_for(lambda packet: packet.source == sender and packet.ike_exchange == (IKE_INFORMATIONAL, is_answer), f"DPD from {sender}")  # noqa: B023
        assert link.ping().lost == 0
        assert [len(daemon.ike_sas()) for daemon in (link.a, link.b)] == [1, 1]


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_we_notice_a_dead_strongswan(ours: Side) -> None:
    with facing(ours, DPD, mine=QUICK_OURS) as link:
        link.a.initiate()
        mine, theirs = (link.a, link.b) if ours is Side.A else (link.b, link.a)
        theirs.kill()
        mine.wait_gone()
        theirs.start()
        theirs.initiate()
        assert link.ping(ours).lost == 0


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_strongswan_notices_our_death(ours: Side) -> None:
    with facing(ours, DPD, theirs=QUICK_STRONGSWAN) as link:
        link.a.initiate()
        mine, theirs = (link.a, link.b) if ours is Side.A else (link.b, link.a)
        mine.kill()
        theirs.wait_gone()
        mine.start()
        mine.initiate()
        assert link.ping(ours).lost == 0
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_wrong_secret_is_told_and_logged_without_the_secret(ours: Side) -> None:
    wrong = "quite another secret"
    with facing(ours, Tunnel(secret_b=wrong)) as link:
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        mine = link.daemon(ours)
        wait_until(lambda: CONNECTION in mine.log(), "a log line that names the connection")
        log = mine.log()
        peer, identity = (link.sites.b.wan4, NAME_B) if ours is Side.A else (link.sites.a.wan4, NAME_A)
        assert "AUTHENTICATION_FAILED" in log
        assert str(peer) in log
        assert identity in log
        assert SECRET not in log
        assert wrong not in log
        if ours is Side.B:
            assert "received AUTHENTICATION_FAILED notify error" in link.a.log()
        link.a.wait_gone()
        link.b.wait_gone()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_certificate_of_a_stranger_is_refused(ours: Side) -> None:
    known, stranger = Credentials.make(KeyKind.ECDSA), Credentials.make(KeyKind.ECDSA)
    with facing(ours, Tunnel(credentials=known, credentials_b=stranger)) as link:
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        assert "AUTHENTICATION_FAILED" in link.daemon(ours).log()
        link.a.wait_gone()
        link.b.wait_gone()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_no_common_proposal(ours: Side) -> None:
    with (
        facing(
            ours,
            Tunnel(proposals="aes128gcm16-prfsha256-x25519", proposals_b="aes256-sha384-ecp384"),
        ) as link,
        pytest.raises(NegotiationFailed, match=r"(?i)proposal|NO_PROPOSAL_CHOSEN"),
    ):
        link.a.initiate()

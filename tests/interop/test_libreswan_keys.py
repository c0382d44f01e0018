"""Libreswan of a newer Debian, as far as IKE SAs go: a CHILD_SA of its needs a kernel with ESP (`tests/realkernel`), which this machine need not have."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import pytest
from lab.certs import KeyKind
from lab.daemon import NegotiationFailed
from lab.gateway import Gateway
from lab.libreswan import Libreswan
from lab.namespaces import Namespace
from lab.pairing import GIVES_UP_SOON, DaemonFactory, Pair, facing
from lab.process import wait_until
from lab.tunnel import CONNECTION, PPK_NAME, Credentials, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.newer, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
OTHER = "192.0.2.82"  # B's second address
DEFAULTS = {"proposals": "default", "esp_proposals": "default"}


def libreswan(**options: str) -> DaemonFactory:
    words = {name.replace("_", "-"): value for name, value in options.items()}
    return lambda namespace, config: Libreswan(namespace, config, words)


def begin(link: Pair) -> None:
    with suppress(NegotiationFailed):  # the CHILD_SA
        link.a.initiate()


def ours_and_theirs(link: Pair) -> tuple[Gateway, Libreswan]:
    ours, theirs = (link.a, link.b) if isinstance(link.a, Gateway) else (link.b, link.a)
    assert isinstance(ours, Gateway)
    assert isinstance(theirs, Libreswan)
    return ours, theirs


def stands(link: Pair) -> None:
    """Until it does: pluto shows what it has while it is busy with nothing else."""
    wait_until(lambda: all([sa.state for sa in daemon.ike_sas()] == ["ESTABLISHED"] for daemon in (link.a, link.b)), "an IKE SA on either side", interval=0.1)


@pytest.mark.parametrize(
    ("ours", "kind", "authby"),
    [pytest.param(Side.A, KeyKind.RSA, "rsasig", id="initiator, RSA"), pytest.param(Side.B, KeyKind.ECDSA, "ecdsa", id="responder, ECDSA")],
)
def test_certificates(ours: Side, kind: KeyKind, authby: str) -> None:
    with facing(ours, Tunnel(**DEFAULTS, credentials=Credentials.make(kind)), theirs=libreswan(authby=authby)) as link:
        begin(link)
        stands(link)


# Post-quantum pre-shared keys (RFC 8784)

PPK = "a post-quantum pre-shared key of the laboratory"
REQUIRED = {"ppk_id": PPK_NAME, "ppk_required": "yes"}


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk(ours: Side) -> None:
    tunnel = Tunnel(**DEFAULTS, ppk_a=PPK, ppk_b=PPK, connection_options=REQUIRED)
    with facing(ours, tunnel, theirs=libreswan(ppk="insist", ppk_ids=f'"{PPK_NAME}"')) as link:
        begin(link)
        stands(link)
        assert ours_and_theirs(link)[0].request("list-sas")[0][CONNECTION]["ppk"] == "yes"


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_a_wrong_ppk(ours: Side) -> None:
    tunnel = Tunnel(**DEFAULTS, ppk_a=PPK, ppk_b="another", connection_options=REQUIRED)
    with facing(ours, tunnel, theirs=libreswan(ppk="insist", ppk_ids=f'"{PPK_NAME}"')) as link:
        if ours is Side.A:
            begin(link)
        else:
            link.a.whack("--initiate", "--asynchronous", "--name", CONNECTION)  # it tries for ever
            wait_until(lambda: "the shared key does not match" in link.b.log(), "it is refused")
        assert not [sa for daemon in (link.a, link.b) for sa in daemon.ike_sas() if sa.state == "ESTABLISHED"]


# Session resumption (RFC 5723): libreswan 5.2 computes the AUTH of a resumed IKE SA from the first message alone


def test_our_resumption_ends_in_a_full_exchange() -> None:
    def mine(namespace: Namespace, config: Path) -> Gateway:
        return Gateway(namespace, config, settings=GIVES_UP_SOON)

    tunnel = Tunnel(**DEFAULTS, connection_a={"resumption": "yes"}, dpd_a="1s")
    with facing(Side.A, tunnel, mine=mine, theirs=libreswan(session_resumption="yes")) as link:
        ours, theirs = ours_and_theirs(link)
        begin(link)
        theirs.signal(signal.SIGSTOP)
        ours.wait_gone()
        theirs.signal(signal.SIGCONT)
        begin(link)
        assert "processing IKE_SESSION_RESUME request" in theirs.log()
        assert len(ours.ike_sas()) == 1


def test_what_it_suspends_is_made_anew_in_full() -> None:
    """It deletes the IKE SA, which voids the ticket (RFC 5723 section 6.2)."""
    with facing(Side.B, Tunnel(**DEFAULTS, connection_b={"resumption": "yes"}), theirs=libreswan(session_resumption="yes")) as link:
        ours, theirs = ours_and_theirs(link)
        begin(link)
        # This machine's kernel refuses its CHILD_SAs. While it asks for another it would say the deletion beside that request, beyond our window.
        wait_until(lambda: "revival attempt 2" in theirs.log(), "it rests for some seconds")
        theirs.whack("--suspend", "--name", CONNECTION)
        ours.wait_gone()
        theirs.whack("--initiate", "--asynchronous", "--name", CONNECTION)
        wait_until(lambda: "received TICKET_NACK" in theirs.log(), "its ticket is not taken")
        wait_until(lambda: ours.ike_sas(), "it comes without", interval=0.1)


# Redirection (RFC 5685)


def prepared(link: Pair) -> None:
    link.sites.b.gateway.ip(f"addr add {OTHER}/24 dev wan")


def test_we_send_it_away_during_its_session() -> None:
    options = {"local_addrs": "%any"}
    with facing(Side.B, Tunnel(**DEFAULTS, connection_b=options), theirs=libreswan(accept_redirect="yes")) as link:
        ours, _ = ours_and_theirs(link)
        prepared(link)
        begin(link)
        wait_until(lambda: OTHER in ours.log(), "the new address has sockets")
        assert "1 redirected" in ours.vpnctl("redirect", OTHER, "--ike", CONNECTION)
        arrived = f"established between {OTHER}[b.example]...{link.sites.a.wan4}[a.example]"
        wait_until(lambda: arrived in ours.log(), "it comes to the other address")


def test_we_send_it_round_and_round() -> None:
    """At once; it follows some times, and gives up."""
    options = {"local_addrs": "%any", "redirect": OTHER, "redirect_in": "init"}
    with facing(Side.B, Tunnel(**DEFAULTS, connection_b=options), theirs=libreswan(accept_redirect="yes")) as link:
        prepared(link)
        wait_until(lambda: OTHER in link.b.log(), "the new address has sockets")
        link.a.whack("--initiate", "--asynchronous", "--name", CONNECTION)
        wait_until(lambda: "redirect exceeds limit" in link.a.log(), "it has had enough")
        assert link.b.ike_sas() == []


@pytest.mark.parametrize("when", ["in IKE_SA_INIT", "in IKE_AUTH", "during the session"])
def test_it_sends_us_away(when: str) -> None:
    options = {"send_redirect": "yes", "redirect_to": OTHER} if when == "in IKE_AUTH" else {}
    with facing(Side.A, Tunnel(**DEFAULTS, connection_a={"local_addrs": "%any"}), theirs=libreswan(**options)) as link:
        ours, theirs = ours_and_theirs(link)
        prepared(link)
        theirs.whack("--listen")
        if when == "in IKE_SA_INIT":
            theirs.whack("--global-redirect", "yes", "--global-redirect-to", OTHER)
        begin(link)
        followed = f"initiating IKE_SA {CONNECTION}[2] to {OTHER}"
        if when == "during the session":
            theirs.whack("--redirect-to", OTHER, "--name", CONNECTION)
            followed = f"is redirected to {OTHER}"  # without a CHILD_SA there is nothing to go there for
        wait_until(lambda: followed in ours.log(), "we follow")

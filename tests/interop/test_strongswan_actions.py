"""What we do when strongSwan deletes a CHILD_SA or is dead, and what it sees when we find one idle."""

from __future__ import annotations

from functools import partial

import pytest
from lab.gateway import Gateway
from lab.pairing import GIVES_UP_SOON, STRONGSWAN, Pair, facing, pair
from lab.process import wait_until
from lab.relay import RelaySettings
from lab.tunnel import CHILD, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


QUICK = partial(Gateway, settings=GIVES_UP_SOON)


def _options(ours: Side, **options: str) -> dict[str, dict[str, str]]:
    return {"options_a" if ours is Side.A else "options_b": options}


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_what_it_deletes_we_make_again(ours: Side) -> None:
    with facing(ours, Tunnel(**_options(ours, close_action="start"))) as link:  # type: ignore[arg-type]
        link.a.initiate()
        theirs = link.daemon(Side.B if ours is Side.A else Side.A)
        first = theirs.child().spi_in
        theirs.request("terminate", child=CHILD)
        wait_until(lambda: any(child.spi_in != first and child.state == "INSTALLED" for child in theirs.children()), "made again", interval=0.05)
        link.carries_again()
        assert link.leaks(of=ours) == []


def _theirs(ours: Side) -> Side:
    return Side.B if ours is Side.A else Side.A


def _trapped(link: Pair, ours: Side) -> bool:
    mine = link.daemon(ours)
    return not mine.children() and [policy["child"] for policy in mine.policies()] == [CHILD]


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_what_it_deletes_waits_for_the_next_packet(ours: Side) -> None:
    with facing(ours, Tunnel(**_options(ours, close_action="trap"))) as link:  # type: ignore[arg-type]
        link.a.initiate()
        link.daemon(_theirs(ours)).terminate(child=CHILD)
        wait_until(lambda: _trapped(link, ours), "trapped")
        assert link.ping(ours).lost == 0
        assert link.leaks(of=ours) == []


@pytest.mark.parametrize(("ours", "action"), [(Side.A, "restart"), (Side.B, "trap"), (Side.B, "clear")])
def test_when_it_is_dead(ours: Side, action: str) -> None:
    """It comes back with nothing in its memory: `dpd_action` says what becomes of our CHILD_SA once we noticed."""
    # whom it asks in vain is asked again; one that has not read its configuration yet would refuse, so it is out of reach until then
    keep_trying = {"connection_a" if ours is Side.A else "connection_b": {"keyingtries": "0"}}
    tunnel = Tunnel(**{"dpd_a" if ours is Side.A else "dpd_b": "1s"}, **keep_trying, **_options(ours, dpd_action=action))  # type: ignore[arg-type]
    makers = (QUICK, STRONGSWAN) if ours is Side.A else (STRONGSWAN, QUICK)
    with pair(*makers, tunnel, relay=RelaySettings()) as link:
        link.a.initiate()
        mine, theirs, relay = link.daemon(ours), link.daemon(_theirs(ours)), link.sites.relay
        assert relay is not None
        first = mine.child().spi_in
        relay.change(RelaySettings(cut=True))
        theirs.kill()
        theirs.start()
        relay.change(RelaySettings())
        wait_until(lambda: all(child.spi_in != first for child in mine.children()), "noticed", interval=0.05)
        if action == "clear":
            mine.wait_gone()
            assert mine.policies() == []
            return
        if action == "restart":
            mine.wait_child()
        else:
            wait_until(lambda: _trapped(link, ours), "trapped")
        assert link.ping(ours).lost == 0
        assert link.leaks(of=ours) == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_what_nobody_uses_we_delete(ours: Side) -> None:
    with facing(ours, Tunnel(**_options(ours, inactivity="3s"))) as link:  # type: ignore[arg-type]
        link.a.initiate()
        assert link.ping(count=5).lost == 0
        for daemon in (link.a, link.b):
            daemon.wait_child_gone()
        assert [len(daemon.ike_sas()) for daemon in (link.a, link.b)] == [1, 1]

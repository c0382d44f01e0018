"""Reauthentication with strongSwan, begun by either side."""

from __future__ import annotations

import functools

import pytest
from lab.gateway import Gateway
from lab.pairing import Pair, facing
from lab.process import wait_until
from lab.strongswan import StrongSwan
from lab.tunnel import CONNECTION, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
BREAK_BEFORE_MAKE = functools.partial(Gateway, settings={"make_before_break": "no"})
THEIRS = functools.partial(StrongSwan, settings="make_before_break = yes")


def reauthenticate(link: Pair, side: Side) -> None:
    done = link.rekeyed()
    link.daemon(side).request("rekey", ike=CONNECTION, reauth="yes")
    done()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_make_before_break_loses_nothing(ours: Side) -> None:
    with facing(ours, Tunnel(), theirs=THEIRS) as link:
        link.a.initiate()
        with link.datagrams_all_the_while():
            for side in Side:
                reauthenticate(link, side)
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_break_before_make_comes_back(ours: Side) -> None:
    with facing(ours, Tunnel(), mine=BREAK_BEFORE_MAKE) as link:
        link.a.initiate()
        for side in Side:
            reauthenticate(link, side)
            link.carries_again()
        assert link.leaks(of=ours) == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_it_comes_of_itself(ours: Side) -> None:
    options = {"reauth_time": "3s", "rand_time": "1s", "over_time": "60s"}
    with facing(ours, Tunnel(connection_options=options), theirs=THEIRS) as link:
        link.a.initiate()
        first = {ike.initiator_spi for ike in link.a.ike_sas()}
        with link.datagrams_all_the_while():
            wait_until(lambda: (now := {ike.initiator_spi for ike in link.a.ike_sas()}) and not now & first, "reauthenticated", 30.0, 0.1)

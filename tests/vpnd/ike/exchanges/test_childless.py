"""IKE SAs without a CHILD_SA (RFC 6023), by the four values of `childless` on both sides."""

from __future__ import annotations

import pytest
from lab.ike_pair import Pair, agree, child, connection, mirrored, psk

from vpnd.config.model import Childless
from vpnd.ike.effects import Reason
from vpnd.ike.sa import IkeSa

ALLOW, PREFER, FORCE, NEVER = Childless.ALLOW, Childless.PREFER, Childless.FORCE, Childless.NEVER


def pair_of(ours: Childless, theirs: Childless, *, children: bool = True) -> Pair:
    config = child(esp="aes128gcm16-x25519-ke1_mlkem768")
    return Pair(
        connection("to-b", psk("a"), psk("b"), [config] if children else [], childless=ours),
        connection("to-a", psk("b"), psk("a"), [mirrored(config)], childless=theirs),
    )


@pytest.mark.parametrize(("ours", "theirs"), [(PREFER, ALLOW), (PREFER, PREFER), (PREFER, FORCE), (FORCE, ALLOW), (FORCE, FORCE)])
def test_the_child_comes_in_an_exchange_of_its_own(ours: Childless, theirs: Childless) -> None:
    pair = pair_of(ours, theirs)
    # <-- IKE_SA_INIT { ..., N(CHILDLESS_IKEV2_SUPPORTED) }   IKE_AUTH { IDi, AUTH } -->   <-- IKE_AUTH { IDr, AUTH }
    # CREATE_CHILD_SA { SA, Ni, KEi, TSi, TSr } -->   <-- CREATE_CHILD_SA { SA, Nr, KEr, TSi, TSr, ... }
    pair.connect()
    agree(pair, 1)
    assert "a: CREATE_CHILD_SA request 2" in pair.log
    # with a key exchange, unlike one of IKE_AUTH
    (one,) = pair.a.sa.children.values()
    assert one.proposal.groups


@pytest.mark.parametrize(("ours", "theirs"), [(ALLOW, ALLOW), (ALLOW, PREFER), (ALLOW, NEVER), (NEVER, ALLOW), (PREFER, NEVER)])
def test_the_child_comes_with_ike_auth(ours: Childless, theirs: Childless) -> None:
    pair = pair_of(ours, theirs)
    pair.connect()
    agree(pair, 1)
    assert not any("CREATE_CHILD_SA" in line for line in pair.log)


def test_force_and_never_do_not_meet() -> None:
    pair = pair_of(FORCE, NEVER)
    pair.connect()
    assert pair.a.closed is Reason.CHILDLESS_REFUSED
    assert pair.a.failed == [Reason.CHILDLESS_REFUSED]
    agree(pair, 0)


@pytest.mark.parametrize("ours", [ALLOW, NEVER])
def test_a_responder_that_forces_it_refuses_another_ike_auth(ours: Childless) -> None:
    pair = pair_of(ours, FORCE)
    pair.connect()
    # <-- IKE_AUTH { N(INVALID_SYNTAX) }
    assert pair.b.closed is Reason.CHILDLESS_REFUSED
    assert pair.a.closed is Reason.INVALID_SYNTAX
    agree(pair, 0)


def test_a_connection_without_children_needs_a_peer_that_takes_it() -> None:
    pair = pair_of(ALLOW, ALLOW, children=False)
    pair.connect()
    assert pair.a.established()
    assert pair.b.established()
    agree(pair, 0)
    pair = pair_of(ALLOW, NEVER, children=False)
    pair.connect()
    assert pair.a.closed is Reason.CHILDLESS_REFUSED


@pytest.mark.parametrize("theirs", [ALLOW, NEVER])
def test_none_is_wanted(theirs: Childless) -> None:
    """Who wants the IKE SA alone gets it from a peer that knows RFC 6023, and else nothing."""
    pair = pair_of(ALLOW, theirs)
    sa = IkeSa.initiator_of(pair.a, pair.a.connections[0], pair.a.endpoint, pair.b.endpoint, pair.now)
    pair.a.sas[sa.spi_local] = sa
    pair.a.run(sa, sa.initiate(pair.now, childless=True), pair.now)
    pair.settle()
    agree(pair, 0)
    if theirs is NEVER:
        assert pair.a.closed is Reason.CHILDLESS_REFUSED
    else:
        assert pair.a.established()
        pair.a.run(sa, sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
        pair.settle()
        agree(pair, 1)


def test_what_was_not_announced_is_refused() -> None:
    pair = pair_of(PREFER, ALLOW)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    # the responder's policy changed since its announcement
    object.__setattr__(pair.b.connections[0], "childless", NEVER)
    pair.settle()
    assert pair.b.closed is Reason.CHILDLESS_REFUSED
    agree(pair, 0)

"""Rekeying with strongSwan, from both sides, while datagrams run both ways: none is lost, and nothing is left behind."""

from __future__ import annotations

import pytest
from lab.pairing import facing, rekey_at_once, rekey_in_turn
from lab.tunnel import CHILD, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


@pytest.mark.parametrize("esp", ["aes128gcm16", "aes128gcm16-x25519"], ids=["without-pfs", "with-pfs"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_rekeying_under_traffic(ours: Side, esp: str) -> None:
    with facing(ours, Tunnel(esp_proposals=esp)) as link:
        link.a.initiate()
        with link.datagrams_all_the_while():
            rekey_in_turn(link, rounds=2)
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_defaults(ours: Side) -> None:
    """Its own name no key exchange for a CHILD_SA, ours one that may be left out."""
    with facing(ours, Tunnel(proposals="default", esp_proposals="default")) as link:
        link.a.initiate()
        rekey_in_turn(link)
        assert link.ping().lost == 0


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_both_sides_rekey_at_once(ours: Side) -> None:
    with facing(ours, Tunnel(esp_proposals="aes128gcm16-x25519")) as link:
        link.a.initiate()
        with link.datagrams_all_the_while():
            rekey_at_once(link, rounds=3)
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_another_group_than_the_first_is_wanted(ours: Side) -> None:
    """INVALID_KE_PAYLOAD in CREATE_CHILD_SA (RFC 7296 section 1.3)."""
    tunnel = Tunnel(esp_proposals="aes128gcm16-x25519-ecp256", esp_proposals_b="aes128gcm16-ecp256")  # of no effect in IKE_AUTH
    with facing(ours, tunnel) as link:
        link.a.initiate()
        done = link.rekeyed()
        link.a.rekey(child=CHILD)
        done()
        assert link.ping().lost == 0

"""What a CHILD_SA's configuration says of packet headers reaches both kernels; TFC padding only where the peer takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.ike_pair import agree, child, psk_pair

from kernel_shim.model import Direction, HeaderCopies


@pytest.mark.parametrize(("a_takes", "b_takes"), [(True, True), (True, False), (False, True)])
def test_padding_follows_what_the_peer_says(a_takes: bool, b_takes: bool) -> None:
    pair = psk_pair(child(tfc_padding=1000))
    for peer, takes in ((pair.a, a_takes), (pair.b, b_takes)):
        peer.capabilities = replace(peer.capabilities, tfc_padding=takes)
    pair.connect()
    agree(pair, 1)
    for peer, other_takes in ((pair.a, b_takes), (pair.b, a_takes)):
        padding = {sa.direction: sa.tfc_padding for sa in peer.sad.values()}
        assert padding == {Direction.IN: 0, Direction.OUT: 1000 if other_takes else 0}


def test_a_rekeyed_child_is_handled_alike() -> None:
    copies = HeaderCopies(dscp_in=True, ecn=False)
    pair = psk_pair(child(tfc_padding=1000, copies=copies))
    for peer in pair.peers:
        peer.capabilities = replace(peer.capabilities, tfc_padding=True)
    pair.connect()
    before = set(pair.a.sad)
    # CREATE_CHILD_SA { N(REKEY_SA), SA, Ni, TSi, TSr } -->  <-- { SA, Nr, TSi, TSr }
    (entry,) = pair.a.sa.children.values()
    pair.a.run(pair.a.sa, pair.a.sa.rekey_child(entry.sa.id, pair.now), pair.now)
    pair.settle()
    pair.wait(10.0)
    agree(pair, 1)
    assert not before & set(pair.a.sad)
    for peer in pair.peers:
        assert {(sa.copies, sa.tfc_padding) for sa in peer.sad.values() if sa.direction is Direction.OUT} == {(copies, 1000)}

"""Whose IKE SAs INITIAL_CONTACT ends (RFC 7296 section 2.4)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.ike_pair import child, connection, psk, psk_pair

from vpnd.config.model import AuthMethod, ConnectionConfig
from vpnd.daemon import uniqueness
from vpnd.daemon.entry import Entry
from vpnd.daemon.registry import Registry
from vpnd.ike.sa import IkeSa

STRONG = connection("strong", psk("b"), replace(psk("a"), auth=AuthMethod.PUBKEY), [child()])
PINNED = connection("pinned", psk("b"), replace(psk("a"), auth=AuthMethod.PUBKEY, cacerts=(b"authority",)), [child()])
SHARED = connection("shared", psk("b"), psk(None), [child()])
RENAMED = replace(SHARED, name="renamed")


def standing(registry: Registry, config: ConnectionConfig) -> Entry:
    peer = psk_pair().b
    peer.seed += len(registry)
    peer.__post_init__()
    sa = IkeSa.initiator_of(peer, config, peer.endpoint, peer.endpoint, 0.0)
    sa.local_id, sa.remote_id = psk("b").id, psk("a").id
    entry = registry.enter(sa)
    registry.established(entry)
    return entry


@pytest.mark.parametrize(
    ("newcomer", "other", "ends"),
    [(SHARED, SHARED, True), (SHARED, RENAMED, True), (SHARED, STRONG, False), (STRONG, PINNED, False), (STRONG, STRONG, True), (PINNED, SHARED, False)],
)
async def test_only_those_that_were_proven_alike(newcomer: ConnectionConfig, other: ConnectionConfig, ends: bool) -> None:
    """The same identity by a weaker proof is not the same peer."""
    registry = Registry()
    old, new = standing(registry, other), standing(registry, newcomer)
    assert uniqueness.after_initial_contact(registry, new, (new.sa.local_id, new.sa.remote_id)) == ([old] if ends else [])

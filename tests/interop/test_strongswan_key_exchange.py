"""Key exchanges with a strongSwan that knows no additional ones (RFC 9370), and what else changes how keys come about."""

from __future__ import annotations

import pytest
from lab.pairing import carries_a_little, facing
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_default_proposals(ours: Side) -> None:
    """Ours begin with ML-KEM; a peer that does not know of it takes the next."""
    with facing(ours, Tunnel(proposals="default", esp_proposals="default")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ike", ["aes128gcm16-prfsha256-x448", "aes256-sha512-ecp521", "aes192gcm8-prfsha512-modp6144", "aes256ccm12-prfsha384-modp8192"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_further_algorithms(ours: Side, ike: str) -> None:
    with facing(ours, Tunnel(proposals=ike)) as link:
        link.a.initiate()
        carries_a_little(link)

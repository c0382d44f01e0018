"""Two of our gateways with key exchanges that no other peer of the laboratory knows."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, carries_a_little, pair
from lab.tunnel import PPK_NAME, Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


@pytest.mark.parametrize("ike", ["aes256gcm16-sha384-x25519-ke1_mlkem768", "aes128-sha256-ecp256-ke1_mlkem1024-ke2_x448", "default"])
def test_post_quantum_key_exchange(ike: str) -> None:
    with pair(OURS, OURS, Tunnel(proposals=ike)) as link:
        link.a.initiate()
        carries_a_little(link)


def test_nothing_without_ml_kem() -> None:
    """As deploy/examples/site-to-site-post-quantum.conf has it: IKE SA, first CHILD_SA and a pre-shared key beside."""
    options = {"childless": "force", "ppk_id": PPK_NAME, "ppk_required": "yes"}
    ppk = "a post-quantum pre-shared key of the laboratory"
    tunnel = Tunnel(
        proposals="aes256gcm16-prfsha384-x25519-ke1_mlkem768",
        esp_proposals="aes256gcm16-x25519-ke1_mlkem768",
        connection_options=options,
        ppk_a=ppk,
        ppk_b=ppk,
    )
    with pair(OURS, OURS, tunnel) as link:
        link.a.initiate()
        carries_a_little(link)

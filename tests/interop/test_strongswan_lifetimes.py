"""CHILD_SAs that we rekey because of what went through them, in packets and in bytes, with strongSwan under traffic."""

from __future__ import annotations

import pytest
from lab.pairing import facing
from lab.process import wait_until
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

PACKETS = {"rekey_packets": "300", "rand_packets": "100", "life_packets": "100000"}
BYTES = {"rekey_bytes": "100K", "rand_bytes": "30K", "life_bytes": "50M"}
SUCCESSORS = 2


@pytest.mark.parametrize(
    ("ours", "options"),
    [pytest.param(Side.A, PACKETS, id="initiator-by-packets"), pytest.param(Side.B, BYTES, id="responder-by-bytes")],
)
def test_what_is_worn_out_is_replaced_and_nothing_is_lost(ours: Side, options: dict[str, str]) -> None:
    with facing(ours, Tunnel(**{"options_a" if ours is Side.A else "options_b": options})) as link:  # type: ignore[arg-type]
        link.a.initiate()
        seen = {link.daemon(ours).child().spi_in}

        def replaced() -> bool:
            seen.update(child.spi_in for child in link.daemon(ours).children())
            return len(seen) > SUCCESSORS

        with link.datagrams_all_the_while():
            wait_until(replaced, f"{SUCCESSORS} successors", 40.0, 0.05)
        assert link.leaks() == []
        wait_until(lambda: [len(daemon.children()) for daemon in (link.a, link.b)] == [1, 1], "one CHILD_SA on either side", interval=0.1)

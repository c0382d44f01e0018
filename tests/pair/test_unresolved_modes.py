"""How a flow meets a policy without an SA: the four settings of `unresolved`, as a host behind the gateway sees them."""

from __future__ import annotations

import pytest
from lab.gateway import Gateway
from lab.pairing import OURS, pair
from lab.tunnel import Side, Tunnel

pytestmark = pytest.mark.pair


@pytest.mark.parametrize("mode", ["queue", "block"])
def test_the_first_packet_waits(mode: str) -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", options_a={"unresolved": mode})) as link:
        assert link.ping(count=1).received == 1
        assert link.leaks() == []


@pytest.mark.parametrize("mode", ["eagain", "drop"])
def test_the_first_packet_goes_but_starts_the_tunnel(mode: str) -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", options_a={"unresolved": mode})) as link:
        assert isinstance(link.a, Gateway)
        assert link.ping(count=1, timeout=0.5).received == 0
        link.carries_again()
        assert link.a.counters()[f"drop_unresolved_{mode}"] >= 1
        assert link.leaks() == []


def test_the_sender_is_told_only_where_it_should_try_again() -> None:
    """eagain answers with ICMP unreachable at once; drop says nothing."""
    told = {}
    for mode, patience in (("eagain", "20"), ("drop", "1")):
        with pair(OURS, OURS, Tunnel(start_a="trap", options_a={"unresolved": mode})) as link:
            near, _, target = link.ends(Side.A)
            told[mode] = near.run(["ping", "-n", "-c", "1", "-W", patience, str(target)], check=False).stdout
    assert "Unreachable" in told["eagain"] or "filtered" in told["eagain"]
    assert "Unreachable" not in told["drop"]
    assert "filtered" not in told["drop"]

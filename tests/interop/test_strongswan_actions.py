"""What we do when strongSwan deletes a CHILD_SA, and what it sees when we find one idle."""

from __future__ import annotations

import pytest
from lab.pairing import facing
from lab.process import wait_until
from lab.tunnel import CHILD, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


def _options(ours: Side, **options: str) -> dict[str, dict[str, str]]:
    return {"options_a" if ours is Side.A else "options_b": options}


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_what_it_deletes_we_make_again(ours: Side) -> None:
    with facing(ours, Tunnel(**_options(ours, close_action="start"))) as link:  # type: ignore[arg-type]
        link.a.initiate()
        theirs = link.daemon(Side.B if ours is Side.A else Side.A)
        first = theirs.child().spi_in
        theirs.request("terminate", child=CHILD)
        wait_until(lambda: any(child.spi_in != first and child.state == "INSTALLED" for child in theirs.children()), "made again", 15.0, 0.05)
        link.carries_again()
        assert link.leaks(of=ours) == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_what_nobody_uses_we_delete(ours: Side) -> None:
    with facing(ours, Tunnel(**_options(ours, inactivity="3s"))) as link:  # type: ignore[arg-type]
        link.a.initiate()
        assert link.ping(count=5).lost == 0
        for daemon in (link.a, link.b):
            daemon.wait_child_gone()
        assert [len(daemon.ike_sas()) for daemon in (link.a, link.b)] == [1, 1]

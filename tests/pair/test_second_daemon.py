"""A second daemon touches nothing of the first; one that ends under traffic leaves nothing at its peer."""

from __future__ import annotations

import os

import pytest
from lab.gateway import REPOSITORY, VPND, Gateway
from lab.pairing import OURS, pair
from lab.tunnel import Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(120)]


def test_a_second_daemon_ends_with_a_clear_error_and_touches_nothing() -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap")) as link:
        assert link.ping().received
        assert isinstance(link.a, Gateway)
        before = link.a.child()
        second = link.a.namespace.run([*VPND, "run", "--config", str(link.a.main_config)], check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        assert second.returncode == 1
        assert "serves the control socket" in second.stderr
        assert link.ping().lost == 0
        after = link.a.child()
        assert (after.spi_in, after.spi_out) == (before.spi_in, before.spi_out)


def test_a_daemon_that_ends_under_traffic_leaves_no_sa_at_its_peer() -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap")) as link:
        assert link.ping().received
        assert isinstance(link.b, Gateway)
        assert link.b.vpnd is not None
        flood = link.sites.a.host.start(["ping", "-q", "-i", "0.005", str(link.sites.b.host4)], "flood")
        try:
            assert link.b.vpnd.stop() == 0
            assert link.a.children() == []
        finally:
            flood.kill()

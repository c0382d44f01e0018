"""`vpnctl reload`, SIGHUP and the two signals that end a daemon, on real processes."""

from __future__ import annotations

import os
import signal

import pytest
from lab.gateway import Gateway
from lab.pairing import OURS, Pair, pair
from lab.process import wait_until
from lab.tunnel import Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(120)]


def gateway(link: Pair) -> Gateway:
    assert isinstance(link.a, Gateway)
    return link.a


def signalled(daemon: Gateway, number: signal.Signals) -> None:
    assert daemon.vpnd is not None
    os.kill(daemon.vpnd.pid, number)


def test_a_reload_touches_only_what_changed() -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap")) as link:
        assert link.ping().received
        a = gateway(link)
        before, text = a.child(), a.config.read_text()
        a.config.write_text(
            text.replace("    children {", "    children {\n      spare {\n        remote_ts = 10.99.0.0/16\n        start_action = trap\n      }", 1)
        )
        assert a.vpnctl("reload").splitlines() == ["changed site", "0 connections unchanged"]
        assert {policy["name"] for policy in a.policies()} == {"site/net", "site/spare"}
        assert a.child().spi_in == before.spi_in

        a.config.write_text(text.replace("start_action = trap", "start_action = trip", 1))
        said = a.vpnctl("reload", check=False)
        line = 1 + text[: text.index("start_action")].count("\n")
        assert f"{a.config}:{line}:" in said
        assert "'trip' is not one of" in said
        assert len(a.policies()) == 2

        a.config.write_text(text)
        signalled(a, signal.SIGHUP)
        wait_until(lambda: len(a.policies()) == 1, "the spare child is gone", interval=0.05)
        assert link.ping().lost == 0
        assert a.child().spi_in == before.spi_in
        assert link.leaks() == []


def test_a_second_signal_ends_at_once() -> None:
    with pair(lambda namespace, config: Gateway(namespace, config, settings={"shutdown_timeout": "60"}), OURS, Tunnel()) as link:
        link.a.initiate()
        link.b.kill()
        a = gateway(link)
        assert a.vpnd is not None
        signalled(a, signal.SIGTERM)
        wait_until(lambda: "stopping" in a.log(), "it stops", interval=0.05)
        signalled(a, signal.SIGTERM)
        wait_until(lambda: a.vpnd is not None and not a.vpnd.running, "vpnd has ended without waiting for the peer", interval=0.05)
        assert a.vpnd.status == 0

"""Debian's swanctl drives our daemon; so does the PyPI client, in every other test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.gateway import Gateway
from lab.pairing import STRONGSWAN, Pair, pair
from lab.strongswan import StrongSwan
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel

pytestmark = pytest.mark.interop


@pytest.fixture
def link() -> Iterator[Pair]:
    """Ours at A without any configuration of connections, strongSwan at B."""

    def bare(namespace: object, config: object) -> Gateway:
        return Gateway(namespace, config, load_swanctl_conf=False)  # type: ignore[arg-type]

    with pair(bare, STRONGSWAN, Tunnel(start_a="trap")) as made:
        yield made


@pytest.fixture
def swanctl(link: Pair) -> StrongSwan:
    tool = StrongSwan(link.sites.a.gateway, link.tunnel.write(link.sites, Side.A, link.sites.lab.directory / "swanctl"))
    tool.prepare()
    return tool


def test_load_initiate_list_terminate(link: Pair, swanctl: StrongSwan) -> None:
    uri = link.a.vici_path
    assert "no connections" not in swanctl.load(uri).lower()
    assert CONNECTION in swanctl.swanctl("--list-conns", uri=uri)
    assert CHILD in swanctl.swanctl("--list-pols", uri=uri)
    assert "initiate completed successfully" in swanctl.swanctl("--initiate", "--child", CHILD, uri=uri)
    assert link.ping().lost == 0

    raw = swanctl.swanctl("--list-sas", "--raw", uri=uri)
    for word in ("list-sa event", "state=ESTABLISHED", "state=INSTALLED", "encap=yes", "local-id=a.example", "remote-id=b.example", "encr-alg=AES_GCM_16"):
        assert word in raw
    shown = swanctl.swanctl("--list-sas", uri=uri)
    assert "ESTABLISHED, IKEv2" in shown
    assert "10.1.0.0/16" in shown

    for what in (("--child", CHILD), ("--ike", CONNECTION)):
        done = link.rekeyed(children=what[0] == "--child")
        assert "rekey completed successfully" in swanctl.swanctl("--rekey", *what, uri=uri)
        done()
    assert link.ping().lost == 0

    assert "terminate completed successfully" in swanctl.swanctl("--terminate", "--ike", CONNECTION, uri=uri)
    link.b.wait_gone()
    assert "ESTABLISHED" not in swanctl.swanctl("--list-sas", uri=uri)


def test_load_all_twice_keeps_the_tunnel(link: Pair, swanctl: StrongSwan) -> None:
    uri = link.a.vici_path
    swanctl.load(uri)
    swanctl.swanctl("--initiate", "--child", CHILD, uri=uri)
    before = link.a.child()
    swanctl.load(uri)
    assert link.a.child().spi_in == before.spi_in
    assert link.ping().lost == 0


def test_raw_output_has_the_keys_of_strongswan(link: Pair, swanctl: StrongSwan) -> None:
    """Scripts and exporters match on keys, and on their order."""
    swanctl.load(link.a.vici_path)
    swanctl.swanctl("--initiate", "--child", CHILD, uri=link.a.vici_path)
    assert link.ping().lost == 0
    ours, theirs = (list(daemon.request("list-sas")[0][CONNECTION]) for daemon in (link.a, link.b))
    child_ours, child_theirs = (list(next(iter(daemon.request("list-sas")[0][CONNECTION]["child-sas"].values()))) for daemon in (link.a, link.b))
    # strongSwan leaves out what does not apply to a side; the order of what both have is the same.
    for mine, other in ((ours, theirs), (child_ours, child_theirs)):
        assert [key for key in mine if key in other] == [key for key in other if key in mine]
        assert set(mine) <= set(other) | {"initiator", "nat-local", "nat-remote", "nat-fake", "nat-any", "tasks-active", "tasks-queued", "tasks-passive"}


def test_version_and_statistics(link: Pair, swanctl: StrongSwan) -> None:
    assert "vpnd" in swanctl.swanctl("--version", "--daemon", uri=link.a.vici_path)
    assert "uptime" in swanctl.swanctl("--stats", uri=link.a.vici_path)

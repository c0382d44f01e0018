"""Debian's swanctl drives our daemon; so does the PyPI client, in every other test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.certs import KeyKind
from lab.gateway import Gateway
from lab.pairing import OURS, STRONGSWAN, Pair, pair
from lab.process import LabError
from lab.strongswan import StrongSwan
from lab.tunnel import CHILD, CONNECTION, Credentials, Side, Tunnel

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


def test_an_ike_sa_without_a_child(link: Pair, swanctl: StrongSwan) -> None:
    uri = link.a.vici_path
    swanctl.load(uri)
    for _ in range(2):  # one that stands is not made again
        assert "initiate completed successfully" in swanctl.swanctl("--initiate", "--ike", CONNECTION, uri=uri)
    for daemon in (link.a, link.b):
        (ike,) = daemon.ike_sas()
        assert (ike.state, ike.children) == ("ESTABLISHED", ())
    assert "initiate completed successfully" in swanctl.swanctl("--initiate", "--child", CHILD, uri=uri)
    assert len(link.a.ike_sas()) == 1
    assert link.ping().lost == 0
    with pytest.raises(LabError, match="IKE_SA config 'nobody' not found"):
        swanctl.swanctl("--initiate", "--ike", "nobody", uri=uri)


def test_counters_and_algorithms(link: Pair, swanctl: StrongSwan) -> None:
    uri = link.a.vici_path
    swanctl.load(uri)
    swanctl.swanctl("--initiate", "--child", CHILD, uri=uri)
    rekeyed = link.rekeyed()
    swanctl.swanctl("--rekey", "--child", CHILD, uri=uri)
    rekeyed()
    for arguments, title in (((), "global:"), (("--name", CONNECTION), f"{CONNECTION}:"), (("--all",), f"{CONNECTION}:")):
        shown = swanctl.swanctl("--counters", *arguments, uri=uri)
        assert title in shown
        counted = {name: int(value) for name, _, value in (line.partition(":") for line in shown.splitlines()) for name in (name.strip(),) if value.strip()}
        assert {name: counted[name] for name in ("ike-init-out-req", "ike-init-in-resp", "ike-auth-out-req", "ike-auth-in-resp", "create-child-out-req")} == {
            "ike-init-out-req": 1,
            "ike-init-in-resp": 1,
            "ike-auth-out-req": 1,
            "ike-auth-in-resp": 1,
            "create-child-out-req": 1,
        }
        assert (counted["child-rekey"], counted["ike-init-in-req"]) == (1, 0)
    assert "completed successfully" in swanctl.swanctl("--counters", "--reset", "--name", CONNECTION, uri=uri)
    assert "ike-init-out-req      : 0" in swanctl.swanctl("--counters", "--name", CONNECTION, uri=uri)
    assert "AES_GCM_16[cryptography]" in swanctl.swanctl("--list-algs", uri=uri)
    ours, theirs = (set(swanctl.swanctl("--list-algs", uri=daemon.vici_path).split()) for daemon in (link.a, link.b))
    assert {word.partition("[")[0] for word in ours} <= {word.partition("[")[0] for word in theirs} | {"ML_KEM_768", "ML_KEM_1024"}


def test_certificates_are_listed() -> None:
    with pair(OURS, STRONGSWAN, Tunnel(credentials=Credentials.make(KeyKind.ECDSA))) as link:
        tool = link.b
        assert isinstance(tool, StrongSwan)
        shown = tool.swanctl("--list-certs", uri=link.a.vici_path)
        assert "List of X.509 End Entity Certificates" in shown
        assert "has private key" in shown
        assert "List of X.509 CA Certificates" in shown
        ours, theirs = (tool.swanctl("--list-certs", "--type", "x509ca", "--pem", uri=daemon.vici_path) for daemon in (link.a, link.b))
        assert ours == theirs
        for type_, count in (("x509", 2), ("x509ca", 1), ("x509_crl", 0)):
            assert tool.swanctl("--list-certs", "--type", type_, "--raw", uri=link.a.vici_path).count("list-cert event") == count, type_
        assert "a.example" in tool.swanctl("--list-certs", "--subject", "a.example", uri=link.a.vici_path)


@pytest.mark.parametrize(
    "command", ["--list-authorities", "--list-pools", "--flush-certs", "--load-creds", "--load-conns", "--load-pools", "--load-authorities"]
)
def test_commands_that_have_little_to_do(link: Pair, swanctl: StrongSwan, command: str) -> None:
    file = ("--file", str(swanctl.config)) if command.startswith("--load") else ()
    swanctl.swanctl(command, *file, *(("--noprompt",) if command == "--load-creds" else ()), uri=link.a.vici_path)


def test_what_is_refused_says_why(link: Pair, swanctl: StrongSwan) -> None:
    with pytest.raises(LabError, match="count after a restart"):
        swanctl.swanctl("--reload-settings", uri=link.a.vici_path)
    pools = swanctl.config.with_name("pools.conf")
    pools.write_text("pools { p { addrs = 10.9.0.0/24 } }\nauthorities { a { cacert = /nonexistent } }\n")
    with pytest.raises(LabError, match="not implemented yet"):
        swanctl.swanctl("--load-pools", "--file", str(pools), uri=link.a.vici_path)


def test_version_and_statistics(link: Pair, swanctl: StrongSwan) -> None:
    assert "vpnd" in swanctl.swanctl("--version", "--daemon", uri=link.a.vici_path)
    assert "uptime" in swanctl.swanctl("--stats", uri=link.a.vici_path)

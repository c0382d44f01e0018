"""Two of our gateways as PE routers, configured by file: three customers in the same 10.0.0.0/24, each in its own VRF."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.provider_edges import Edges, configuration, provider_edges
from lab.providers import CUSTOMERS
from lab.traffic import UdpStream, ping, tcp_bulk, tcp_server, trace_route, udp_sink

from kernel_shim.mpls.labels import Entry, Label, write_stack

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


@pytest.fixture
def edges(tmp_path: Path) -> Iterator[Edges]:
    with provider_edges(tmp_path) as found:
        yield found


def test_the_first_labelled_packet_is_kept_and_customers_stay_apart(edges: Edges) -> None:
    assert edges.lost("red", count=1) == 0  # nothing was negotiated before it
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    far = edges.lab.b.customers
    with tcp_server(far["green"].host, far["green"].host4, 7000) as port:
        for name in CUSTOMERS:
            near = edges.lab.a.customers[name]
            if name == "green":
                assert tcp_bulk(near.host, far[name].host4, port, size=4 << 20).intact
            else:  # its own host of that address refuses; green's would not
                done = near.host.run(["bash", "-c", f"exec 3<>/dev/tcp/{far[name].host4}/{port}"], check=False)
                assert "refused" in done.stderr
    assert edges.leaks() == []


def test_a_label_that_a_peer_may_not_use_reaches_nobody(edges: Edges) -> None:
    """The one PE sends red's packets under green's label, in its own SA. The other one never told it that label."""
    edges.a.config.write_text(configuration(edges.lab.a, edges.lab.b, remote={"red": 102, "blue": 101}))
    edges.b.config.write_text(configuration(edges.lab.b, edges.lab.a, remote={"red": 100, "blue": 101}))
    for gateway in (edges.b, edges.a):
        gateway.vpnctl("reload")
    with Capture(edges.lab.b.customers["green"].host, "lan") as green:
        near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
        assert ping(near.host, far.host4, count=5, timeout=1.0).received == 0
        edges.reaches("blue")
        assert [str(packet) for packet in green.packets() if near.host4 in (packet.source, packet.destination)] == []
    assert edges.b.counters()["drop_mpls_label_forbidden"] >= 5


def test_a_dead_key_manager_and_a_dead_kernel_come_back(edges: Edges) -> None:
    assert edges.lost("red") == 0
    edges.b.kill_vpnd()
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    edges.b.start_vpnd()
    edges.b.wait_child("labels")
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    assert "kernel_labels_put" not in edges.b.vpnctl("--json", "status")  # all of it was right, so nothing was touched
    edges.a.kill_shim()
    assert edges.lost("red", timeout=0.5) == 4
    edges.a.start_shim()
    for name in CUSTOMERS:
        edges.reaches(name)
    assert edges.leaks() == []


def test_a_vrf_comes_and_goes_while_others_carry(edges: Edges) -> None:
    edges.write(("red", "blue"))
    for gateway in (edges.a, edges.b):
        gateway.vpnctl("reload")
    assert edges.lost("red") == edges.lost("blue") == 0
    assert edges.lost("green", timeout=0.5) == 4
    near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
    with udp_sink(far.host, far.host4, acknowledge=32, whole=1500) as sink:
        stream = UdpStream(near.host, [(far.host4, sink.port)], count=1500, rate=300, size=256, window=128)
        edges.write()
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        assert edges.lost("green") == 0
        edges.write(("red", "blue"))
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        assert edges.lost("green", timeout=0.5) == 4
        sent = stream.wait()
        received = sink.expect(sent.sent - sent.refused)
    assert (received.received, received.duplicates) == (sent.sent - sent.refused, 0)


def test_a_bulk_transfer_finds_its_way_over_a_narrow_path(tmp_path: Path) -> None:
    """The router that cannot pass an ESP packet on tells the PE, which tells the customer how much room the labels leave."""
    with provider_edges(tmp_path, capture=False, narrow=1280) as edges:
        edges.reaches("red")
        near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
        for source, target, address in ((near, far, far.host4), (near, far, far.host6), (far, near, near.host4)):
            with tcp_server(target.host, address, 7000) as port:
                assert tcp_bulk(source.host, address, port, size=4 << 20).intact
        learnt = near.host.run(["ip", "route", "get", str(far.host4)]).stdout
        mtu = int(learnt.split(" mtu ")[1].split()[0])
        assert 1180 < mtu < 1280 - 4 - 4  # GRE and one label, in ESP
        room = mtu - 28
        assert ping(near.host, far.host4, size=room, dont_fragment=True).lost == 0
        assert ping(near.host, far.host4, size=4000).lost == 0


def test_a_trace_says_what_becomes_of_a_packet(edges: Edges) -> None:
    def trace(*arguments: str) -> list[tuple[str, str]]:
        steps = json.loads(edges.a.vpnctl("--json", "mpls", "trace", *arguments))
        return [(step["at"], step["found"]) for step in steps]

    far = edges.lab.b.customers["red"]
    assert trace("red", str(far.host4))[-1] == ("result", f"waits: no SA to {edges.lab.b.wan4} yet, one is asked for")
    assert edges.lost("red") == 0
    steps = trace("red", str(far.host4))
    assert steps[-1] == ("result", "sent to pe")
    assert ("stack", "100 (TC 0, TTL 255)") in steps
    assert trace("red", "172.16.0.1")[-1] == ("result", "dropped: mpls no route")
    mine = edges.lab.a.customers["red"]
    assert trace("--peer", "pe", "--label", "100", "--to", str(mine.host4))[-1] == ("result", "goes out of VRF red")
    assert trace("--peer", "pe", "--label", "103")[-1] == ("result", "dropped: mpls label forbidden")
    rows = json.loads(edges.a.vpnctl("--json", "mpls", "lfib", "red"))
    assert {row["state"] for row in rows} == {"ok"}
    assert {row.get("label") or row["prefix"] for row in rows} == {"100", *map(str, (far.net4, far.net6, mine.net4, mine.net6))}
    assert [row["table"] for row in json.loads(edges.a.vpnctl("--json", "mpls", "vrfs"))] == ["101", "102", "103"]


@pytest.mark.parametrize("ttl", ["pipe", "uniform"])
def test_a_customer_traces_its_route(tmp_path: Path, ttl: str) -> None:
    """Each PE answers from its address at the customer's own link, which all customers' links share here."""
    with provider_edges(tmp_path, capture=False, ttl=ttl) as edges:
        for name in ("blue", "red"):
            edges.reaches(name)
            near, far = edges.lab.a.customers[name], edges.lab.b.customers[name]
            (first, _), (second, shown), (third, _) = trace_route(near.host, far.host4)
            assert (first, second, third) == (near.net4[1], far.net4[1], far.host4)
            # With the uniform model it is the label's TTL that ends, and its stack is shown (RFC 4950).
            label = 100 + CUSTOMERS.index(name)
            assert shown[8:] == (write_stack([Entry(Label(label), 0, 1)]) if ttl == "uniform" else b"")

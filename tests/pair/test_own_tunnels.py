"""Two of our gateways on real packets."""

from __future__ import annotations

import os
import signal

import pytest
from lab.certs import KeyKind
from lab.gateway import Gateway
from lab.pairing import OURS, carries_a_little, carries_everything, pair
from lab.process import wait_until
from lab.relay import RelaySettings
from lab.traffic import UdpStream, ping, udp_sink
from lab.tunnel import CONNECTION, Credentials, Side, Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


def test_all_traffic_with_psk() -> None:
    with pair(OURS, OURS, Tunnel()) as link:
        link.a.initiate()
        carries_everything(link)
        link.b.terminate(ike=CONNECTION)
        link.a.wait_gone()


def test_all_traffic_with_offloads_off() -> None:
    with pair(OURS, OURS, Tunnel(esp_proposals="aes256gcm16"), offloads=False) as link:
        link.a.initiate()
        carries_everything(link)


@pytest.mark.parametrize("kind", list(KeyKind), ids=lambda kind: kind.value)
def test_certificates(kind: KeyKind) -> None:
    with pair(OURS, OURS, Tunnel(credentials=Credentials.make(kind))) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize(("inner", "outer"), [(4, 6), (6, 4), (6, 6)])
def test_address_families(inner: int, outer: int) -> None:
    with pair(OURS, OURS, Tunnel(inner_version=inner, outer_version=outer, esp_proposals="chacha20poly1305")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("esp", ["aes256gcm16-esn", "aes128-sha256", "aes256-sha512-esn"])
def test_esp_algorithms(esp: str) -> None:
    with pair(OURS, OURS, Tunnel(esp_proposals=esp)) as link:
        link.a.initiate()
        carries_a_little(link)


def test_lossy_path() -> None:
    """IKE and TCP get through a path that loses, doubles and reorders."""
    path = RelaySettings(delay=0.002, jitter=0.003, loss=0.02, duplicate=0.02)
    with pair(OURS, OURS, Tunnel(start_a="trap"), relay=path) as link:
        link.carries_again()
        assert link.bulk(size=512 << 10).intact
        assert link.leaks() == []


def test_packets_that_do_not_fit() -> None:
    """Fragments of a large packet pass; one that must not be fragmented gets its sender an ICMP message."""
    with pair(OURS, OURS, Tunnel()) as link:
        link.a.initiate()
        near, _, target = link.ends(Side.A)
        assert ping(near, target, size=4000).lost == 0
        assert ping(near, target, size=1472, count=2, dont_fragment=True).received == 0
        assert "mtu" in near.run(["ip", "route", "get", str(target)]).stdout
        assert ping(near, target, size=1372, dont_fragment=True).lost == 0


@pytest.mark.parametrize("offloads", [True, False])
def test_what_comes_while_the_shim_has_no_processor_is_delivered(offloads: bool) -> None:
    """More datagrams than a kernel takes in one write have come when it goes on."""
    count = 500
    with pair(OURS, OURS, Tunnel(), offloads=offloads) as link:
        link.a.initiate()
        assert link.ping().lost == 0
        near, far, target = link.ends(Side.A)
        assert isinstance(link.b, Gateway)
        (shim,) = link.b.shim_pids()
        before = link.a.child().packets_out
        with udp_sink(far, target) as sink:
            os.kill(shim, signal.SIGSTOP)
            try:
                UdpStream(near, [(target, sink.port)], count=count, rate=2000.0).wait()
                wait_until(lambda: link.a.child().packets_out - before == count, "all of them are on the wire")
            finally:
                os.kill(shim, signal.SIGCONT)
            received = sink.expect(count)
            assert (received.received, received.duplicates, received.reordered) == (count, 0, 0)


def test_nothing_is_left_behind() -> None:
    with pair(OURS, OURS, Tunnel(start_a="trap")) as link:
        assert isinstance(link.a, Gateway)
        assert isinstance(link.b, Gateway)
        assert link.ping().lost == 0
        assert link.a.traces() != []
        link.a.stop()
        link.b.wait_gone()
        link.b.stop()
        assert link.a.traces() == []
        assert link.b.traces() == []
        assert link.a.namespace.pids() == []


def test_vpnd_starts_and_ends_its_own_shim() -> None:
    def together(*arguments: object) -> Gateway:
        return Gateway(*arguments, shim_from_vpnd=True)  # type: ignore[arg-type]

    with pair(together, together, Tunnel(start_a="trap")) as link:
        assert link.ping().lost == 0
        link.a.stop()
        assert link.a.namespace.pids() == []

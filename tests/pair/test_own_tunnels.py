"""Two of our gateways on real packets."""

from __future__ import annotations

import pytest
from lab.certs import KeyKind
from lab.gateway import Gateway
from lab.pairing import OURS, carries_a_little, carries_everything, pair
from lab.relay import RelaySettings
from lab.traffic import ping
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

"""What a routing daemon's tables and interfaces are to the VRFs of the configuration, as the host's devices say."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, ip_network
from struct import pack

import pytest

from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Key, Nhlfe, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, VrfRoute
from vpnd.daemon import fpm
from vpnd.daemon.fpm import RoutingFeed
from vpnd.io.fpm import Link
from vpnd.mpls.model import FpmConfig, MplsConfig, PeerConfig, VrfConfig
from vpnd.telemetry.counters import Counters

NEAR, FAR, LOOPBACK = (IPv4Address(f"192.0.2.{number}") for number in (1, 2, 3))
NET = IPv4Network("10.0.0.128/25")
RED, MEMBER, OTHER = 11, 6, 9  # interfaces
VPN, OWN = 1001, 101  # tables


@dataclass
class Labels:
    """In the place of the synchroniser."""

    adopt: Callable[[Iterable[NodeEntry]], bool] = lambda _: False
    entries: dict[Key, NodeEntry] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, _owner: str, entries: Iterable[NodeEntry]) -> None:
        self.entries |= {entry.key: entry for entry in entries}
        self.changed.set()

    def withdraw(self, _owner: str, keys: Iterable[Key]) -> None:
        for key in keys:
            del self.entries[key]
        self.changed.set()

    async def until(self, *wanted: NodeEntry) -> None:
        async with asyncio.timeout(60):
            while set(self.entries.values()) != set(wanted):
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
    return number


@pytest.fixture
def config(port: int) -> MplsConfig:
    return MplsConfig(
        vrfs={"red": VrfConfig("red", "vpn-red", OWN, ("ce-red",))},
        peers={"pe": PeerConfig("pe", NEAR, FAR, next_hops=(LOOPBACK,))},
        fpm=FpmConfig(port=port),
    )


def attribute(kind: int, value: bytes) -> bytes:
    return pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def frame(family: int, length: int, attributes: bytes) -> bytes:
    body = pack("=BBBBBBBBI", family, length, 0, 0, 0, 186, 0, 1, 0) + attributes
    message = pack("=IHHII", 16 + len(body), 24, 0, 0, 0) + body
    return pack("!BBH", 1, 1, 4 + len(message)) + message


def route(table: int, net: IPv4Network, out: int, gateway: IPv4Address = LOOPBACK) -> bytes:
    encap = attribute(21, pack("=H", 1)) + attribute(22, attribute(1, (out << 12 | 0x100).to_bytes(4, "big")))
    return frame(2, net.prefixlen, attribute(1, net.network_address.packed) + attribute(15, pack("=I", table)) + attribute(5, gateway.packed) + encap)


def popped(label: int, interface: int) -> bytes:
    return frame(28, 20, attribute(1, (label << 12 | 0x100).to_bytes(4, "big")) + attribute(4, pack("=I", interface)))


def to_pe(net: IPv4Network, out: int) -> VrfRoute:
    return VrfRoute("red", net, (Nhlfe(ToPeer("pe"), (Label(out),), TtlModel.PIPE),))


def comes_to_light(label: int, hop: ToInterface | ToVrf) -> LabelBinding:
    return LabelBinding(Label(label), (Nhlfe(hop, ttl=TtlModel.PIPE),))


@pytest.mark.parametrize(
    "links",
    [
        {RED: Link("red", VPN)},
        {RED: Link("customer", VPN), MEMBER: Link("ce-red", VPN)},
    ],
    ids=["by its name", "by a member"],
)
async def test_the_vrf_device_is_known(monkeypatch: pytest.MonkeyPatch, config: MplsConfig, links: dict[int, Link]) -> None:
    """And the VRF's own table is what the shim put there, read by zebra: no route of anybody's."""

    async def read() -> dict[int, Link]:
        return links | {OTHER: Link("eth9")}

    monkeypatch.setattr(fpm, "links", read)
    labels = Labels()
    feed = RoutingFeed(labels, Counters())  # type: ignore[arg-type]
    feed.configure(config)
    try:
        assert config.fpm is not None
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", config.fpm.port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0)
        aside = ip_network("10.9.0.0/16")
        assert isinstance(aside, IPv4Network)
        writer.write(route(VPN, NET, 1214) + route(OWN, aside, 1214) + route(77, aside, 1214) + popped(1004, RED) + popped(1005, OTHER))
        await labels.until(to_pe(NET, 1214), comes_to_light(1004, ToInterface("red")))
        # Own prefixes that the configuration names are entries: a lookup finds them.
        feed.configure(replace(config, vrfs={"red": replace(config.vrfs["red"], prefixes=(IPv4Network("10.0.0.0/25"),))}))
        await labels.until(to_pe(NET, 1214), comes_to_light(1004, ToVrf("red")))
        writer.close()
    finally:
        await feed.close()

"""Gateways of the lab whose packets a real kernel carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.capture import Capture
from lab.daemon import ChildSa
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.pairing import DaemonFactory, Pair, counted_alike, pair
from lab.strongswan import PLUGINS, StrongSwan
from lab.topology import WAN
from lab.tunnel import Side, Tunnel


class KernelGateway(Gateway):
    """vpnd on the host's own kernel, by the channel `choice`; no shim runs."""

    choice = "xfrm"
    kind = "vpnd on xfrm"

    def start(self) -> None:
        self._write_main_config()
        text = self.main_config.read_text()
        self.main_config.write_text(text.replace("kernel = userspace", f"kernel = {self.choice}"))
        self.start_vpnd()

    def kernel(self, *arguments: str) -> str:
        """`ip xfrm` of its namespace."""
        return self.namespace.run(["ip", "xfrm", *arguments]).stdout

    def traces(self) -> list[str]:
        """Also the policies and SAs that stand in the kernel, XFRM interfaces, and settings that are not as a new namespace has them."""
        found = super().traces() + (self.kernel("policy") + self.kernel("state")).splitlines()
        found += self.namespace.run(["ip", "-brief", "link", "show", "type", "xfrm"]).stdout.splitlines()
        return found + [f"{name} = {value}" for name, value, fresh in self._settings() if value != fresh]

    def _settings(self) -> list[tuple[str, str, str]]:
        fresh = {"xfrm_larval_drop": "1", "xfrm_acq_expires": "30"}
        return [(name, self.namespace.call(Path("/proc/sys/net/core", name).read_text).strip(), value) for name, value in fresh.items()]


class XfrmGateway(KernelGateway):
    """On NETLINK_XFRM."""


class PfKeyGateway(KernelGateway):
    """On AF_KEY."""

    choice = "pfkey"
    kind = "vpnd on AF_KEY"


class KernelStrongSwan(StrongSwan):
    """charon with kernel-netlink: ESP is the kernel's."""

    kind = "strongSwan on kernel-netlink"

    def _write_settings(self) -> Path:
        path = super()._write_settings()
        path.write_text(path.read_text().replace(PLUGINS, PLUGINS.replace("kernel-libipsec ", "")))
        return path


def xfrm(namespace: Namespace, config: Path) -> XfrmGateway:
    return XfrmGateway(namespace, config)


def pfkey(namespace: Namespace, config: Path) -> PfKeyGateway:
    return PfKeyGateway(namespace, config)


def strongswan(namespace: Namespace, config: Path) -> KernelStrongSwan:
    return KernelStrongSwan(namespace, config)


@dataclass(frozen=True, slots=True)
class KernelPair:
    """A pair of gateways, and what each of them sent to the other."""

    link: Pair
    sent_a: Capture
    sent_b: Capture

    def leaks(self) -> list[str]:
        """What was sent in clear though a policy protects it; a test wants none."""
        sites = self.link.sites
        if self.link.tunnel.mode == "transport":
            between = {sites.a.wan4, sites.a.wan6, sites.b.wan4, sites.b.wan6}
            packets = [packet for capture in (self.sent_a, self.sent_b) for packet in capture.packets() if {packet.source, packet.destination} <= between]
            return [str(packet) for packet in packets if not (packet.is_esp or packet.is_ike or packet.is_keepalive)]
        return [str(packet) for capture in (self.sent_a, self.sent_b) for packet in capture.clear_packets(sites.inner_networks)]

    def carries(self, *, datagrams: int = 100, rate: float = 200.0) -> None:
        """Ping, datagrams and TCP both ways, complete; the SAs of both sides counted them; nothing was sent in clear."""
        link = self.link
        before = link.children()
        for side in Side:
            assert link.ping(side).lost == 0
        received = link.datagrams(count=datagrams, rate=rate)
        assert {side: account.received for side, account in received.items()} == dict.fromkeys(Side, datagrams)
        counted = link.children()
        counted_alike(*counted)
        for old, new in zip(before, counted, strict=True):
            assert new.packets_out - old.packets_out >= datagrams
            assert new.packets_in - old.packets_in >= datagrams
        for side in Side:
            assert link.bulk(side, size=256 << 10).intact
        assert self.leaks() == []

    def children(self) -> tuple[ChildSa, ChildSa]:
        return self.link.children()


@contextmanager
def kernel_pair(make_a: DaemonFactory, make_b: DaemonFactory, tunnel: Tunnel) -> Iterator[KernelPair]:
    with pair(make_a, make_b, tunnel, capture=False) as link:
        a, b = link.sites.a.gateway, link.sites.b.gateway
        with Capture(a, WAN, outgoing=True) as sent_a, Capture(b, WAN, outgoing=True) as sent_b:
            yield KernelPair(link, sent_a, sent_b)

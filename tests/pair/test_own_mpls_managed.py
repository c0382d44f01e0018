"""Labels in clear through a network that is said to be managed: both ways, and from nowhere else."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.gateway import Gateway
from lab.process import wait_until
from lab.provider_edges import configuration
from lab.provider_mesh import MARKER, forged, in_tunnel
from lab.providers import CUSTOMERS, providers
from lab.topology import WAN
from lab.traffic import ping, tcp_bulk, tcp_server

from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


@pytest.mark.parametrize(("encapsulation", "version"), [*((it, 4) for it in Encapsulation), (Encapsulation.UDP, 6), (Encapsulation.GRE, 6)])
def test_customers_reach_their_own_sites_in_clear(tmp_path: Path, encapsulation: Encapsulation, version: int) -> None:
    with providers() as lab, contextlib.ExitStack() as stack:
        gateways = []
        for near, far in ((lab.a, lab.b), (lab.b, lab.a)):
            section = re.sub(r".*?(?=\nmpls )", "", configuration(near, far), flags=re.DOTALL)
            section = section.replace("    pe {", f"    pe {{\n encapsulation = {encapsulation.name.lower()}\n managed = yes\n")
            if version == 6:
                section = section.replace(str(near.wan4), str(near.wan6)).replace(str(far.wan4), str(far.wan6))
            (tmp_path / near.gateway.role).mkdir()
            gateway = Gateway(near.gateway, tmp_path / near.gateway.role / "gateway.conf")
            gateway.config.write_text(section)
            stack.callback(gateway.kill)
            gateway.start()
            gateways.append(gateway)
        wire = stack.enter_context(Capture(lab.a.gateway, WAN))
        for name in CUSTOMERS:
            near_site, far_site = lab.a.customers[name], lab.b.customers[name]
            wait_until(lambda: ping(near_site.host, far_site.host4, count=1, timeout=1.0).received, f"{name} reaches its other site")  # noqa: B023
            assert ping(near_site.host, far_site.host6, count=2).lost == 0
        red, blue = lab.a.customers["red"], lab.a.customers["blue"]
        far_red = lab.b.customers["red"]
        with tcp_server(far_red.host, far_red.host4, 7000) as port:
            assert tcp_bulk(red.host, far_red.host4, port, size=2 << 20).intact
        ends = {lab.a.wan4, lab.b.wan4} if version == 4 else {lab.a.wan6, lab.b.wan6}
        labelled = [packet for packet in wire.packets() if packet.protocol == encapsulation and {packet.source, packet.destination} == ends]
        assert len(labelled) > 10
        assert encapsulation is not Encapsulation.UDP or {packet.destination_port for packet in labelled} == {UDP_PORT}
        if version == 6:
            return
        # A customer that writes such packets itself, as if it were the other PE, to its own one.
        red.host.ip(f"route add {lab.a.wan4} via {red.net4[1]}")
        with Capture(blue.host, "lan") as seen, red.host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            for _ in range(3):
                sock.sendto(in_tunnel(lab.b.wan4, lab.a.wan4, encapsulation, forged(blue.host4, [101])), (str(lab.a.wan4), 0))
            wait_until(lambda: gateways[0].counters().get("io.labels.refused", 0) == 3, "they are refused")
            assert not [packet for packet in seen.packets() if MARKER in packet.payload]

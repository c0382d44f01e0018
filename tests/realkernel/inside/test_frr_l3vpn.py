"""Two FRRs exchange VPNv4 and VPNv6 routes through a tunnel of ours: one feeds our forwarding by FPM, the other programs Linux' MPLS.

One pair of PEs serves all tests of this file; each leaves it as it found it.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from lab.capture import Capture
from lab.frr import missing
from lab.l3vpn import CUSTOMERS, Edge, routed_edge
from lab.process import wait_until
from lab.providers import Providers, providers
from lab.topology import WAN
from lab.traffic import LongPing, ping
from realkernel.kernel_gateways import xfrm

from kernel_shim.model import IPAddress

pytestmark = [pytest.mark.realkernel, pytest.mark.timeout(900), pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")]

PATIENCE = 200.0  # s, under emulation on a busy machine
SESSIONS = ("10.255.0.0/24", "fd00:ff::/64")


@dataclass
class Pes:
    """`ours` is fed by FPM, `linux` programmed by zebra itself."""

    lab: Providers
    ours: Edge
    linux: Edge
    wire: Capture

    def targets(self, customer: str) -> tuple[IPAddress, IPAddress]:
        far = self.lab.b.customers[customer]
        return far.host4, far.host6

    def passes(self, customer: str, target: IPAddress, timeout: float = 2.0) -> bool:
        return ping(self.lab.a.customers[customer].host, target, count=1, timeout=timeout).lost == 0

    def until(self, customer: str, target: IPAddress) -> None:
        wait_until(lambda: self.passes(customer, target), f"{customer}: {target} reached", PATIENCE, 0.2)

    def until_learned(self, expected: set[tuple[str, str]], what: str) -> None:
        """For what goes, too: that an echo is not answered in time shows no more than that the machine is busy."""
        wait_until(lambda: self.learned() == expected, what, PATIENCE, 0.2)

    def until_all(self) -> None:
        for customer in CUSTOMERS:
            for target in self.targets(customer):
                self.until(customer, target)

    def start_ping(self, customer: str) -> list[LongPing]:
        return [LongPing(self.lab.a.customers[customer].host, target, 0.2) for target in self.targets(customer)]

    def lfib(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.ours.gateway.vpnctl("--json", "mpls", "lfib"))
        return rows

    def learned(self) -> set[tuple[str, str]]:
        """What FRR says to ours of labels, and of routes to the other PE."""
        rows = self.lfib()
        told = {(row.get("label") or f"{row['vrf']} {row['prefix']}", row["paths"][0], row["owner"], row["state"]) for row in rows}
        return {(name, path) for name, path, owner, state in told if (owner, state) == ("fpm", "ok") and (name.isdecimal() or " to pe" in path)}

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.ours.gateway.vpnctl("--json", "status"))["counters"]
        return found

    def until_counted(self, name: str, value: int) -> None:
        wait_until(lambda: self.counters().get(name, 0) >= value, f"{name} is {value}", PATIENCE, 0.2)

    def routes_in_linux(self, family: str, customer: str) -> str:
        return self.linux.gateway.namespace.run(["ip", family, "route", "show", "table", str(100 + CUSTOMERS[customer])]).stdout

    def labels_in_linux(self) -> set[str]:
        """Those of FRR."""
        return set(re.findall(r"^(\d+) .* proto bgp", self.linux.gateway.namespace.run(["ip", "-f", "mpls", "route"]).stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def pes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pes]:
    directory = tmp_path_factory.mktemp("l3vpn")
    with providers() as lab, contextlib.ExitStack() as stack:
        wire = stack.enter_context(Capture(lab.a.gateway, WAN))
        ours, linux = routed_edge(1, lab.a, lab.b, directory / "ours"), routed_edge(2, lab.b, lab.a, directory / "linux", xfrm)
        for edge in (ours, linux):
            stack.callback(edge.kill)
            edge.start()
        found = Pes(lab, ours, linux, wire)
        try:
            found.until_all()
        except Exception:
            print(ours.account(), "\n=== Linux\n", linux.account())
            raise
        yield found


def everything() -> set[tuple[str, str]]:
    found = set()
    for name, vpn in CUSTOMERS.items():
        for version, net in ((4, "10.0.0.128/25"), (6, "fd00:c:0:0:8000::/65")):
            found |= {(f"11{vpn}{version}", f"out of VRF {name} (pipe)"), (f"{name} {net}", f"12{vpn}{version} to pe (pipe)")}
    return found


def test_customers_of_the_same_addresses_reach_their_own_and_no_other(pes: Pes) -> None:
    pes.until_learned(everything(), "all is said")
    for name, other in (("red", "blue"), ("blue", "red")):
        near = pes.lab.a.customers[name]
        with Capture(pes.lab.b.customers[other].host, "lan") as elsewhere:
            for target in pes.targets(name):
                assert ping(near.host, target, count=3, timeout=10.0).lost == 0
            assert [str(packet) for packet in elsewhere.packets() if {packet.source, packet.destination} & {near.host4, near.host6}] == []
    for family in ("-4", "-6"):
        assert f"encap mpls  111{family[1]} " in pes.routes_in_linux(family, "red")
    near, far = pes.lab.a.customers["red"], pes.lab.b.customers["red"]
    assert pes.wire.clear_packets((near.net4, near.net6, far.net4, far.net6, *SESSIONS)) == []
    assert pes.wire.labelled() == 0
    assert len(pes.wire.esp()) > 20


def test_a_family_is_withdrawn_while_the_other_and_the_other_customer_stay(pes: Pes) -> None:
    """Each kernel follows a withdrawal of the other's FRR, within the session and the connection."""
    connections = pes.counters()["fpm_connections"]
    red4, red6 = pes.targets("red")
    pes.linux.tell_of("red", "ipv4", told=False)
    pes.until_learned(everything() - {("red 10.0.0.128/25", "1214 to pe (pipe)")}, "the route goes, and no other")
    assert not pes.passes("red", red4)
    running = [LongPing(pes.lab.a.customers["red"].host, red6, 0.2), *pes.start_ping("blue")]
    pes.linux.tell_of("red", "ipv4", told=True)
    pes.until("red", red4)
    assert [it.lost() for it in running] == [0, 0, 0]
    pes.ours.tell_of("red", "ipv6", told=False)
    wait_until(lambda: "encap mpls" not in pes.routes_in_linux("-6", "red"), "Linux drops the route", PATIENCE, 0.2)
    assert not pes.passes("red", red6)
    assert pes.passes("red", red4, PATIENCE)
    pes.ours.tell_of("red", "ipv6", told=True)
    pes.until("red", red6)
    pes.until_learned(everything(), "all is said again")
    assert pes.counters()["fpm_connections"] == connections
    assert pes.counters().get("fpm_swept", 0) == 0


def relabelled(pes: Pes, linux: int, ours: int) -> None:
    """Red's sites get other labels: of IPv4 that behind Linux, of IPv6 that behind ours."""
    pes.linux.relabel("red", "ipv4", linux)
    pes.ours.relabel("red", "ipv6", ours)
    expected = {(name.replace("1116", str(ours)), path.replace("1214", str(linux))) for name, path in everything()}
    pes.until_learned(expected, "the LFIB has the new labels and not the old")
    wait_until(lambda: f"encap mpls  {ours} " in pes.routes_in_linux("-6", "red"), "Linux sends the new label", PATIENCE, 0.2)
    for target in pes.targets("red"):
        pes.until("red", target)
    wait_until(
        lambda: {row["label"] for row in pes.lfib() if row.get("label") and row["owner"] == "fpm"} == {"1114", str(ours), "1124", "1126"},
        "the LFIB has no other label",
        PATIENCE,
        0.2,
    )
    wait_until(lambda: pes.labels_in_linux() == {str(linux), "1216", "1224", "1226"}, "Linux has the new label and not the old", PATIENCE, 0.2)


def test_a_label_that_changes_is_followed_at_either_end(pes: Pes) -> None:
    connections = pes.counters()["fpm_connections"]
    running = pes.start_ping("blue")
    relabelled(pes, linux=1298, ours=1198)
    relabelled(pes, linux=1214, ours=1116)
    assert [it.lost() for it in running] == [0, 0]
    assert pes.counters()["fpm_connections"] == connections


def test_a_killed_bgpd_takes_its_labels_along_and_brings_them_back(pes: Pes) -> None:
    """Zebra 8.4 removes labels at once, and with graceful restart keeps routes without them; such a route leads nowhere."""
    connections = pes.counters()["fpm_connections"]
    pes.ours.frr.kill_daemon("bgpd")
    pes.until_learned(set(), "zebra says that all is gone")
    assert not pes.passes("red", pes.targets("red")[0])
    pes.ours.frr.start_daemon("bgpd")
    pes.until_all()
    pes.until_learned(everything(), "all is said again")
    assert pes.counters()["fpm_connections"] == connections


def test_our_pe_is_killed_and_zebra_says_everything_again(pes: Pes) -> None:
    gateway = pes.ours.gateway
    running = pes.start_ping("red")
    gateway.kill_vpnd()
    gateway.start_vpnd()  # the shim carried on
    pes.until_counted("fpm_connections", 1)
    assert [it.lost() for it in running] == [0, 0]
    gateway.kill()
    gateway.start()
    pes.until_all()
    pes.until_learned(everything(), "all is said again")
    near, far = pes.lab.a.customers["red"], pes.lab.b.customers["red"]
    assert pes.wire.clear_packets((near.net4, near.net6, far.net4, far.net6, *SESSIONS)) == []
    assert pes.wire.labelled() == 0


def test_what_is_no_fpm_or_ends_amid_a_message_costs_no_packet(pes: Pes) -> None:
    def connect() -> socket.socket:
        return pes.ours.gateway.namespace.call(lambda: socket.create_connection(("127.0.0.1", 2620), 10.0))

    before = pes.counters()
    running = pes.start_ping("red")
    for octets, counter in ((b"GET / HTTP/1.1\r\n\r\n", "fpm_garbage"), (bytes.fromhex("01010044"), "fpm_cut_off")):
        with connect() as other:
            other.sendall(octets)
            pes.until_counted("fpm_connections", before["fpm_connections"] + 1)
        pes.until_counted(counter, before.get(counter, 0) + 1)
        pes.until_counted("fpm_connections", before["fpm_connections"] + 2)  # zebra's own was closed for it, and is back
        before = pes.counters()
    # It says everything, and then what changes.
    pes.linux.tell_of("blue", "ipv4", told=False)
    pes.until_learned(everything() - {("blue 10.0.0.128/25", "1224 to pe (pipe)")}, "the route goes, and no other")
    pes.linux.tell_of("blue", "ipv4", told=True)
    pes.until("blue", pes.targets("blue")[0])
    assert [it.lost() for it in running] == [0, 0]
    pes.until_learned(everything(), "all is said again")


def test_an_frr_that_crashes_and_comes_back_costs_no_packet(pes: Pes) -> None:
    """As watchfrr does, which starts all of it anew when zebra is gone. Both kernels go on meanwhile, and so does the other PE: graceful restart."""
    connections = pes.counters()["fpm_connections"]
    blue4, _ = pes.targets("blue")
    running = [*pes.start_ping("red"), LongPing(pes.lab.a.customers["blue"].host, blue4, 0.2)]
    missed = ("blue fd00:c:0:0:8000::/65", "1226 to pe (pipe)")
    pes.ours.frr.crash()
    pes.linux.tell_of("blue", "ipv6", told=False)
    assert pes.learned() == everything()
    for family in ("-4", "-6"):
        assert f"encap mpls  111{family[1]} " in pes.routes_in_linux(family, "red")
    pes.ours.frr.revive()
    pes.until_counted("fpm_connections", connections + 1)
    pes.until_learned(everything() - {missed}, "what is said, and no more")
    pes.linux.frr.crash()
    assert pes.learned() == everything() - {missed}
    assert pes.labels_in_linux() >= {"1214", "1216", "1224"}
    pes.linux.frr.revive()
    pes.until_all()
    assert [it.lost() for it in running] == [0, 0, 0]
    pes.until_learned(everything(), "all is said again")

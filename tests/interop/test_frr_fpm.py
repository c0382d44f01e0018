"""FRR feeds labels over FPM to our gateway in the middle: customers at the two edges reach each other by the labels that zebra says, and only by them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.frr import Frr, missing
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.process import wait_until
from lab.providers import Provider, Providers, label_connection, providers
from lab.traffic import LongPing, ping

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180), pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")]


def connection(name: str, near: str, far: str) -> str:
    return f"connections {{ {label_connection(name, near, far, child=name)} }}\n"


SECRETS = 'secrets { ike-all { secret = "labels are only numbers" } }\n'
EDGE = """
mpls {{
  vrfs {{ red {{ members = ce-red
 table = 101
 label = {label}
 prefixes = {own} }} }}
  peers {{ core {{ local = {near}
 remote = {far}
 vrfs {{ red {{ label = {theirs}
 prefixes = {others} }} }} }} }}
}}
"""
CORE = """
mpls {
  fpm = yes
  fpm_settle = 2
  fpm_grace = %d
  peers {
    a { local = 203.0.113.1
 remote = 203.0.113.2
 accept = 100 }
    b { local = 203.0.113.5
 remote = 203.0.113.6
 accept = 300 }
  }
}
"""
FORWARD, BACK = "mpls lsp 100 203.0.113.6 200", "mpls lsp 300 203.0.113.2 400"
ZEBRA = f"fpm address 127.0.0.1 port 2620\n{FORWARD}\n{BACK}\n"


@dataclass
class Core:
    lab: Providers
    node: Namespace
    gateway: Gateway
    frr: Frr

    def passes(self, timeout: float = 10.0) -> bool:
        near, far = self.lab.a.customers["red"], self.lab.b.customers["red"]
        return ping(near.host, far.host4, count=1, timeout=timeout).lost == 0

    def connect(self) -> socket.socket:
        return self.node.call(lambda: socket.create_connection(("127.0.0.1", 2620), 30.0))

    def say_anew(self, *lines: str) -> None:
        """Change zebra's configuration. What its kernel did not take it says on a new connection only: its own ends, for another came, and comes again."""
        self.frr.tell(*lines)
        with self.connect() as other, contextlib.suppress(ConnectionError):
            assert other.recv(1) == b""

    def lsps(self) -> dict[int, str]:
        """What was made of the labels that zebra says; one that nobody owns any more is on its way out, and stands beside them as such."""
        rows = json.loads(self.gateway.vpnctl("--json", "mpls", "lfib"))
        assert {row["owner"] for row in rows} <= {"fpm", ""}
        return {int(row["label"]): row["paths"][0] if (row["owner"], row["state"]) == ("fpm", "ok") else f"{row}" for row in rows}

    def until_connected(self, times: int) -> None:
        wait_until(lambda: self.gateway.log().count("a routing daemon is connected") == times, f"connection {times}")

    def unknown_labels(self) -> int:
        """Packets that met no entry."""
        return self.gateway.counters().get("drop_mpls_label_unknown", 0)

    def start_ping(self) -> LongPing:
        near, far = self.lab.a.customers["red"], self.lab.b.customers["red"]
        return LongPing(near.host, far.host4)

    def until(self, passing: bool) -> None:
        wait_until(lambda: self.passes(1.0) is passing, f"packets {'pass' if passing else 'stop'}", interval=0.1)


def _edge(pe: Provider, other: Provider, near: str, far: str, label: int, theirs: int) -> str:
    own, others = pe.customers["red"].net4, other.customers["red"].net4
    return connection("core", near, far) + SECRETS + EDGE.format(label=label, own=own, near=near, far=far, theirs=theirs, others=others)


@pytest.fixture
def core(tmp_path: Path, grace: int) -> Iterator[Core]:
    with providers() as lab, contextlib.ExitStack() as stack:
        node = lab.lab.namespace("core")
        for letter, pe, subnet in (("a", lab.a, 0), ("b", lab.b, 4)):
            lab.lab.veth(node, f"to-{letter}", pe.gateway, "core")
            node.ip(f"addr add 203.0.113.{subnet + 1}/30 dev to-{letter}")
            pe.gateway.ip(f"addr add 203.0.113.{subnet + 2}/30 dev core")
        configurations = {
            "a": (lab.a.gateway, _edge(lab.a, lab.b, "203.0.113.2", "203.0.113.1", 400, 100)),
            "b": (lab.b.gateway, _edge(lab.b, lab.a, "203.0.113.6", "203.0.113.5", 200, 300)),
            "core": (
                node,
                connection("a", "203.0.113.1", "203.0.113.2") + connection("b", "203.0.113.5", "203.0.113.6") + SECRETS + CORE % grace,
            ),
        }
        gateways = {}
        for name, (namespace, text) in configurations.items():
            (tmp_path / name).mkdir()
            gateway = gateways[name] = Gateway(namespace, tmp_path / name / "gateway.conf")
            gateway.config.write_text(text)
            stack.callback(gateway.kill)
            gateway.start()
        frr = Frr(node, tmp_path / "frr", {"zebra": ZEBRA})
        stack.callback(frr.kill)
        frr.start()
        found = Core(lab, node, gateways["core"], frr)
        found.until(passing=True)
        yield found


@pytest.mark.parametrize("grace", [120])
def test_packets_follow_what_zebra_says(core: Core) -> None:
    # Another label than the edge accepts: it drops what comes.
    core.say_anew("no " + FORWARD, "mpls lsp 100 203.0.113.6 201")
    core.until(passing=False)
    core.say_anew("no mpls lsp 100 203.0.113.6 201", FORWARD)
    core.until(passing=True)
    core.say_anew("no " + FORWARD)
    core.until(passing=False)
    core.say_anew(FORWARD)
    core.until(passing=True)


@pytest.mark.parametrize("grace", [120])
def test_no_packet_is_lost_while_zebra_is_killed_and_started_again(core: Core) -> None:
    running = core.start_ping()
    core.frr.kill_daemon("zebra")
    assert core.passes()
    core.frr.start_daemon("zebra")
    core.until_connected(2)
    # What it does not say again goes, and only that.
    core.frr.kill_daemon("zebra")
    core.frr.configurations["zebra"] = ZEBRA.replace(FORWARD, "mpls lsp 101 203.0.113.6 200")
    assert core.passes()
    assert running.lost() == 0
    core.frr.start_daemon("zebra")
    core.until(passing=False)  # or the machine is busy
    wait_until(lambda: "were not said again" in core.gateway.log(), "what it does not say again goes")


@pytest.mark.parametrize("grace", [4])
def test_what_nobody_says_again_goes_after_the_grace(core: Core) -> None:
    core.frr.kill_daemon("zebra")
    assert core.passes()
    core.until(passing=False)
    core.frr.start_daemon("zebra")
    core.until(passing=True)


@pytest.mark.parametrize("grace", [120])
def test_a_killed_key_manager_leaves_the_labels_to_its_successor(core: Core) -> None:
    core.frr.kill_daemon("zebra")
    unknown = core.unknown_labels()
    core.gateway.kill_vpnd()
    core.gateway.start_vpnd()
    core.until(passing=True)
    core.frr.start_daemon("zebra")
    core.until_connected(2)
    assert core.passes()
    assert core.unknown_labels() == unknown


@pytest.mark.parametrize("grace", [120])
def test_garbage_and_a_second_connection_cost_no_packet(core: Core) -> None:
    with core.connect() as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert garbage.recv(1) == b""
    assert core.passes()
    with core.connect() as idle:
        idle.sendall(bytes.fromhex("01010044"))
        assert core.passes()
    # zebra's own was closed for them, and it comes back.
    wait_until(lambda: "cannot be read" in core.gateway.log(), "garbage is told")
    core.say_anew(f"no {FORWARD}")
    core.until(passing=False)


@pytest.mark.parametrize("grace", [120])
def test_labels_that_change_while_zebra_connects_again(core: Core) -> None:
    """Before, amid and after the reading of its tables that each connection begins with; of the last one all is known. No packet of other labels is lost."""
    chosen, lsps = random.Random(8), dict[int, int]()

    def change(count: int) -> list[str]:
        lines = []
        for label in chosen.sample(range(1000, 1100), count):
            if label in lsps:
                lines.append(f"no mpls lsp {label} 203.0.113.6 {lsps.pop(label)}")
            if chosen.random() < 0.7:
                lsps[label] = chosen.randrange(2000, 3000)
                lines.append(f"mpls lsp {label} 203.0.113.6 {lsps[label]}")
        return lines

    def taken_over(sock: socket.socket) -> bool:
        try:
            return sock.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    running = core.start_ping()
    core.frr.tell(*change(60))
    for _ in range(3):
        with core.connect() as other:  # zebra's own ends
            other.settimeout(0.05)
            while not taken_over(other):
                core.frr.tell(*change(10))
        core.frr.tell(*change(10))
    core.say_anew(*change(10))
    told = {label: f"{out} to b (pipe)" for label, out in lsps.items()} | {100: "200 to b (pipe)", 300: "400 to a (pipe)"}
    wait_until(lambda: core.lsps() == told, "what zebra says, and no more", interval=0.2)
    assert running.lost() == 0

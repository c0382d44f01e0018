"""Three of our gateways as PE routers, each with an SA to both others for its labels, in a choice of encapsulations.

Red is any-to-any on all three, blue has sites at a and b alone, green is a hub at a with spokes at b and c.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Entry, Label, write_stack
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.process import wait_until
from lab.providers import CUSTOMERS, SUBNET4, SUBNET6, Provider, Providers, label_connection, providers
from lab.traffic import ping

RED, BLUE, GREEN = LABELS = (100, 101, 102)
SECRET: Final = "three edges and a bridge"
MARKER: Final = b"forged by hand"
FORGER: Final = IPv4Address("10.0.0.250")  # nobody's address

_PROTOCOLS: Final = {Encapsulation.GRE: "gre", Encapsulation.IP: "137", Encapsulation.UDP: "udp"}
_GREEN: Final = {True: "import = 65000:1\n export = 65000:2\n", False: "import = 65000:2\n export = 65000:1\n"}  # the hub's, a spoke's


def mesh_configuration(near: Provider, others: Sequence[Provider], encapsulation: Encapsulation, *, options: str = "", default: str = "") -> str:
    """`options` go into each peer of the `mpls` section. `default`: the PE by which red reaches everything else."""
    letter = near.gateway.role[-1]
    vrfs, peers, connections = "", "", ""
    for name, label in zip(CUSTOMERS, LABELS, strict=True):
        if name != "blue" or letter != "c":
            it = near.customers[name]
            vrfs += f"{name} {{\n members = {it.member}\n table = {label}\n label = {label}\n prefixes = {it.net4}, {it.net6}\n"
            vrfs += f"{_GREEN[letter == 'a'] if name == 'green' else ''} }}\n"
    for far in others:
        connections += label_connection(far.gateway.role, near.wan4, far.wan4, _PROTOCOLS[encapsulation])
        there = far.gateway.role[-1]
        remote = ""
        for name, label in zip(CUSTOMERS, LABELS, strict=True):
            if name == "blue" and "c" in letter + there:
                continue
            it = far.customers[name]
            nets = f"{SUBNET4}, {SUBNET6}" if name == "green" and there == "a" else f"{it.net4}, {it.net6}"
            if name == "red" and there == default:
                nets += ", 0.0.0.0/0"
            remote += f"{name} {{\n label = {label}\n prefixes = {nets}\n {_GREEN[there == 'a'] if name == 'green' else ''} }}\n"
        peers += f"{far.gateway.role} {{\n local = {near.wan4}\n remote = {far.wan4}\n encapsulation = {encapsulation.name.lower()}\n{options}\n"
        peers += f"vrfs {{ {remote} }}\n }}\n"
    secrets = f'ike-mesh {{ secret = "{SECRET}" }}'
    return f"connections {{ {connections} }}\nsecrets {{ {secrets} }}\nmpls {{\n vrfs {{ {vrfs} }}\n peers {{ {peers} }}\n}}\n"


@dataclass
class Mesh:
    lab: Providers
    gateways: tuple[Gateway, ...]
    encapsulation: Encapsulation

    def gateway(self, letter: str) -> Gateway:
        return self.gateways["abc".index(letter)]

    def write(self, letter: str, *, options: str = "", default: str = "") -> None:
        near = self.lab.edges["abc".index(letter)]
        others = [pe for pe in self.lab.edges if pe is not near]
        self.gateway(letter).config.write_text(mesh_configuration(near, others, self.encapsulation, options=options, default=default))

    def host(self, name: str, letter: str) -> Namespace:
        return self.lab.edges["abc".index(letter)].customers[name].host

    def received(self, name: str, source: str, target: str, *, count: int = 1, timeout: float = 1.0) -> int:
        """Echoes from one site of a customer to another that were answered."""
        far = self.lab.edges["abc".index(target)].customers[name]
        return sum(ping(self.host(name, source), address, count=count, timeout=timeout).received for address in (far.host4, far.host6))

    def reaches(self, name: str, source: str, target: str) -> None:
        wait_until(lambda: self.received(name, source, target) == 2, f"{name} from {source} to {target}", interval=0.2)


@contextlib.contextmanager
def provider_mesh(directory: Path, encapsulation: Encapsulation = Encapsulation.GRE) -> Iterator[Mesh]:
    with providers(3) as lab, contextlib.ExitStack() as stack:
        gateways = []
        for pe in lab.edges:
            (directory / pe.gateway.role).mkdir()
            gateways.append(Gateway(pe.gateway, directory / pe.gateway.role / "gateway.conf"))
        found = Mesh(lab, tuple(gateways), encapsulation)
        for letter, gateway in zip("abc", gateways, strict=True):
            found.write(letter)
            stack.callback(gateway.kill)
            gateway.start()
        yield found


# What is made by hand


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ip4(source: IPv4Address, destination: IPv4Address, protocol: int, payload: bytes, ttl: int = 64) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, ttl, protocol, 0, source.packed, destination.packed)
    return header[:10] + struct.pack("!H", _sum(header)) + header[12:] + payload


def forged(target: IPv4Address, labels: Sequence[int], tag: bytes = b"") -> bytes:
    """A marked datagram of a customer for `target`, under `labels`, outermost first."""
    marked = MARKER + tag
    inner = ip4(FORGER, target, 17, struct.pack("!HHHH", 4000, 4000, 8 + len(marked), 0) + marked)
    return write_stack([Entry(Label(label), 0, 64) for label in labels]) + inner


def in_tunnel(source: IPv4Address, destination: IPv4Address, encapsulation: Encapsulation, labelled: bytes) -> bytes:
    """The tunnel's own IP packet, as anybody can write it."""
    return ip4(source, destination, encapsulation, encapsulation.header(len(labelled)) + labelled)

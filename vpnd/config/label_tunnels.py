"""Whether a child would protect each label tunnel: labels never leave in clear, so a tunnel without one carries nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kernel_shim.model import Action, AddressRange, IPAddress, PortRange
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from vpnd.config.errors import ConfigError
from vpnd.config.model import ChildConfig, Configuration, ConnectionConfig, TsTemplate
from vpnd.config.tree import Section
from vpnd.mpls.model import PeerConfig
from vpnd.peers import host_names, match

_WORDS = {Encapsulation.GRE: ("gre", "gre"), Encapsulation.IP: ("137", "137"), Encapsulation.UDP: ("udp", f"udp/{UDP_PORT}")}


def unprotected(configuration: Configuration, tree: Section) -> Sequence[ConfigError]:
    """One complaint for each peer's tunnel that no child covers, unless its network is managed (RFC 7510 section 3.1)."""
    peers = (tree.section("mpls") or Section()).section("peers") or Section()
    return [
        ConfigError(_needed(peer), path=f"mpls.peers.{peer.name}", position=(peers.section(peer.name) or Section()).position)
        for peer in configuration.mpls.peers.values()
        if not peer.via and not peer.managed and not any(_covers(connection, peer) for connection in configuration.connections.values())
    ]


def _needed(peer: PeerConfig) -> str:
    local, remote = _WORDS[peer.encapsulation]
    child = f"mode = transport, local_ts = {peer.local}[{local}] and remote_ts = {peer.remote}[{remote}]"
    return f"no child would protect its tunnel, and labels never leave in clear: one with {child} does, or managed = yes"


def _covers(connection: ConnectionConfig, peer: PeerConfig) -> bool:
    assert peer.local is not None
    assert peer.remote is not None
    near, far = (_may_be(connection.local_addrs, peer.local), _may_be(connection.remote_addrs, peer.remote))
    return any(_child_covers(child, peer.encapsulation, peer.local, peer.remote, near, far) for child in connection.children.values())


def _child_covers(child: ChildConfig, encapsulation: Encapsulation, local: IPAddress, remote: IPAddress, near: bool, far: bool) -> bool:
    if child.action is not Action.PROTECT:
        return False
    source_ports, destination_ports = PortRange(), PortRange(UDP_PORT, UDP_PORT) if encapsulation is Encapsulation.UDP else PortRange()
    return _side(child.local_ts, encapsulation, local, source_ports, near) and _side(child.remote_ts, encapsulation, remote, destination_ports, far)


def _side(selectors: Iterable[TsTemplate], encapsulation: Encapsulation, address: IPAddress, ports: PortRange, dynamic: bool) -> bool:
    for ts in selectors:
        addresses = dynamic if ts.addresses is None else _contains(ts.addresses.addresses, address)
        if addresses and ts.protocol in (0, encapsulation) and ts.ports.contains(ports):
            return True
    return False


def _contains(addresses: AddressRange, address: IPAddress) -> bool:
    return addresses.version == address.version and addresses.contains(AddressRange(address, address))


def _may_be(patterns: Sequence[str], address: IPAddress) -> bool:
    """Whether an end of the IKE SA may be that address; what a name resolves to is not known here."""
    return bool(host_names(patterns)) or match(patterns, address, {}) > 0

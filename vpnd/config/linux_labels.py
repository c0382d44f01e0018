"""What of the `mpls` section Linux' own label forwarding cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import LAST_LABEL
from vpnd.mpls.model import LspConfig, MplsConfig, PeerConfig


def beyond_linux(config: MplsConfig) -> Iterator[tuple[str, str]]:
    """Option below `mpls`, and why."""
    for option in ("dscp_to_tc", "tc_to_dscp"):
        if getattr(config, option):
            yield option, "sets the traffic class of labels that it pushes to 0"
    if config.fpm is not None:
        yield "fpm", "is told its labels by the routing daemon itself"
    for vrf in config.vrfs.values():
        if not vrf.table:
            yield f"vrfs.{vrf.name}.table", "has no VRF without a table"
        if vrf.label == LAST_LABEL:
            yield f"vrfs.{vrf.name}.label", f"does without the label {LAST_LABEL}"
    for peer in config.peers.values():
        yield from ((f"peers.{peer.name}.{option}", what) for option, what in (*_tunnel(peer), *_pushing(peer)))
    for lsp in config.lsps.values():
        if lsp.label == LAST_LABEL:
            yield f"lsps.{lsp.name}.label", f"does without the label {LAST_LABEL}"
        yield from ((f"lsps.{lsp.name}.{option}", what) for option, what in _pushing(lsp))


def _tunnel(peer: PeerConfig) -> Iterator[tuple[str, str]]:
    if peer.encapsulation is Encapsulation.UDP:
        yield "encapsulation", "carries labels in GRE or IP, not in UDP"
    if peer.encapsulation is Encapsulation.IP and peer.local is not None and peer.local.version == 6:
        yield "encapsulation", "carries labels over IPv6 in GRE only"
    if peer.own_space:
        yield "space", "has one label space for all peers"


def _pushing(way: PeerConfig | LspConfig) -> Iterator[tuple[str, str]]:
    if way.entropy:
        yield "entropy", "has no entropy labels"
    if way.traffic_class is not None:
        yield "tc", "sets the traffic class of labels that it pushes to 0"

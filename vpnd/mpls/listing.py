"""What people look at: rows of VRFs, of the LFIB and of who has and may send which label. Values are text and lists of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from kernel_shim.mpls.lfib import PLATFORM, Key, Peer, ToInterface, ToVrf
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute
from vpnd.mpls.model import MplsConfig, RouteTarget, own_target
from vpnd.mpls.plan import Assignment

Row = dict[str, str | list[str]]
Origin = Callable[[Key], tuple[str, str]]
"""Whose an entry is, and how it stands: `ok`, `missing`, `differs`, `foreign`, or why the kernel refuses it."""


def lfib(entries: Iterable[NodeEntry], origin: Origin, vrf: str | None = None) -> Iterator[Row]:
    """The ILM (`label` and `space`), then the FTN (`vrf` and `prefix`); with `vrf` only what is that VRF's."""
    for entry in _ordered(entries):
        if isinstance(entry, LabelBinding):
            if vrf is None or any(isinstance(path.next_hop, ToInterface | ToVrf) and path.next_hop.vrf == vrf for path in entry.paths):
                yield _row(entry.key, origin, label=str(entry.label), space=entry.space or "platform", paths=[*map(str, entry.paths)])
        elif isinstance(entry, VrfRoute) and vrf in (None, entry.vrf):
            yield _row(entry.key, origin, vrf=entry.vrf or "platform", prefix=str(entry.prefix), paths=[*map(str, entry.paths)])


def vrfs(entries: Iterable[NodeEntry], origin: Origin, config: MplsConfig) -> Iterator[Row]:
    found = _ordered(entries)
    routes: dict[str, int] = {}
    for entry in found:
        if isinstance(entry, VrfRoute):
            routes[entry.vrf] = routes.get(entry.vrf, 0) + 1
    for entry in found:
        if isinstance(entry, Vrf):
            it = config.vrfs.get(entry.name)
            yield _row(
                entry.key,
                origin,
                name=entry.name,
                interface=entry.interface,
                table=str(entry.table or ""),
                members=list(entry.members),
                rd=it.rd if it else "",
                imports=_targets(it.imports if it else frozenset(), entry.name),
                exports=_targets(it.exports if it else frozenset(), entry.name),
                routes=str(routes.get(entry.name, 0)),
            )


def labels(entries: Iterable[NodeEntry], origin: Origin, given: Assignment) -> Iterator[Row]:
    """What each label of this node is for and who may send it, then the peers with their tunnels."""
    found = _ordered(entries)
    peers = [entry for entry in found if isinstance(entry, Peer)]
    tunnels: Final[Mapping[str, Tunnel]] = {entry.peer: entry for entry in found if isinstance(entry, Tunnel)}
    names = {label: name for name, label in given.items()}
    for entry in found:
        if isinstance(entry, LabelBinding):
            senders = [peer.name for peer in peers if peer.space == entry.space and entry.label in peer.accepts]
            what = names.get(entry.label, "") if entry.space == PLATFORM else ""
            yield _row(entry.key, origin, label=str(entry.label), space=entry.space or "platform", of=what, senders=senders)
    for peer in peers:
        tunnel = tunnels.get(peer.name)
        ends = f"{tunnel.local} to {tunnel.remote}, {tunnel.encapsulation.name.lower()}" if tunnel else ""
        yield _row(peer.key, origin, peer=peer.name, accepts=str(peer.accepts), space=peer.space or "platform", tunnel=ends)


def _ordered(entries: Iterable[NodeEntry]) -> list[NodeEntry]:
    """Kind by kind, as a person looks for them: by name, number and address. A kernel has no order of its own."""

    def place(entry: NodeEntry) -> tuple[int, str, int, int, int]:
        match entry:
            case Vrf():
                return 0, f"{entry.table or 0:10} {entry.name}", 0, 0, 0
            case LabelBinding():
                return 1, entry.space or "", entry.label, 0, 0
            case VrfRoute():
                return 2, entry.vrf or "", entry.prefix.version, int(entry.prefix.network_address), entry.prefix.prefixlen
            case Peer():
                return 3, entry.name, 0, 0, 0
        return 4, "", 0, 0, 0

    return sorted(entries, key=place)


def _row(key: Key, origin: Origin, **values: str | list[str]) -> Row:
    owner, state = origin(key)
    return {**values, "owner": owner, "state": state}


def _targets(targets: frozenset[RouteTarget], vrf: str) -> list[str]:
    """Those that were written."""
    return sorted(target for target in targets if target != own_target(vrf))

"""Tables of a kernel as plain values for JSON, each with what a person would look for. Keys are in none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kernel_shim.algorithms import EspAlgorithm, IntegrityId
from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import Direction, IPAddress, Lifetime, Mark, Policy, PolicyIndex, SaId, SaStatus, Template
from kernel_shim.mpls.lfib import Peer
from kernel_shim.mpls.node import Classes, NodeEntry, Tunnel, Vrf

Report = dict[str, Any]


def sa(status: SaStatus) -> Report:
    it = status.sa
    encapsulation = it.encapsulation
    return {
        "spi": f"{it.spi:08x}",
        "direction": it.direction.name.lower(),
        "state": status.state.name.lower(),
        "source": str(it.source),
        "destination": str(it.destination),
        "mode": it.mode.name.lower(),
        "reqid": it.reqid,
        "algorithm": algorithm(it.algorithm) if status.state else None,  # a larval one has none yet
        "esn": it.esn,
        "replay_window": it.replay_window,
        "encapsulation": {"source_port": encapsulation.source_port, "destination_port": encapsulation.destination_port} if encapsulation else None,
        "source_selectors": [str(selector) for selector in it.source_selectors],
        "destination_selectors": [str(selector) for selector in it.destination_selectors],
        "soft": _lifetime(it.soft),
        "hard": _lifetime(it.hard),
        "octets": status.octets,
        "packets": status.packets,
        "sequence": status.sequence,
        "added": when(status.added),
        "used": when(status.used),
    }


def algorithm(it: EspAlgorithm) -> str:
    """`aes-gcm-16-128`, `aes-cbc-256/hmac-sha2-256-128`."""
    name = f"{it.encryption.name.lower().replace('_', '-')}-{it.key_bits}"
    return name if it.integrity is IntegrityId.NONE else f"{name}/{it.integrity.name.lower().replace('_', '-')}"


def when(seconds: float | None) -> str | None:
    """Unix time as ISO 8601 in UTC; None for never."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else None


def _lifetime(it: Lifetime) -> Report:
    return {name: value for name, value in (("seconds", it.seconds), ("octets", it.octets), ("packets", it.packets)) if value}


def policy(it: Policy) -> Report:
    return {
        "index": it.index,
        "direction": it.direction.name.lower(),
        "action": it.action.name.lower(),
        "priority": it.priority,
        "selector": str(it.selector),
        "if_id": it.selector.if_id,
        "mark": f"{it.selector.mark.value:#x}/{it.selector.mark.mask:#x}" if it.selector.mark != Mark() else None,
        "unresolved": it.unresolved.value,
        "templates": [_template(template) for template in it.templates],
    }


def _template(it: Template) -> Report:
    return {
        "mode": it.mode.name.lower(),
        "source": _address(it.source),
        "destination": _address(it.destination),
        "reqid": it.reqid,
        "level": it.level.name.lower(),
    }


def _address(address: IPAddress | None) -> str | None:
    return str(address) if address is not None else None


Selectors = Mapping[PolicyIndex, str]


def outbound_selectors(policies: Sequence[Policy]) -> Selectors:
    """By policy, for the reports that name one."""
    return {policy.index: str(policy.selector) for policy in policies if policy.direction is Direction.OUT}


def pending(it: PendingQueue, selectors: Selectors) -> Report:
    return {
        "policy": it.policy,
        "selector": selectors.get(it.policy),
        "source": _address(it.source),
        "destination": _address(it.destination),
        "unresolved": it.mode.value,
        "acquire": it.acquire or None,
        "flows": it.flows,
        "packets": it.packets,
        "segments": it.segments,
        "octets": it.octets,
    }


def bundle(it: CachedBundle, selectors: Selectors) -> Report:
    return {
        "version": it.version,
        "source": _address(it.source),
        "destination": _address(it.destination),
        "protocol": it.protocol,
        "source_port": it.source_port,
        "destination_port": it.destination_port,
        "action": it.action.name.lower(),
        "policy": it.policy or None,
        "selector": selectors.get(it.policy),
        "sa": sa_id(it.sa) if it.sa is not None else None,
        "limit": it.limit or None,
        "vrf": it.vrf or None,
        "peer": it.peer or None,
        "labels": list(it.labels),
    }


def sa_id(it: SaId) -> Report:
    return {"spi": f"{it.spi:08x}", "destination": str(it.destination)}


def label_entry(it: NodeEntry) -> Report:
    """Of the label node: what it is, its name, and what it says in a few words."""
    kind, name = it.key
    return {"kind": kind, "name": " ".join(str(part) for part in name if part != ""), "what": _what(it)}


def _what(it: NodeEntry) -> str:
    if isinstance(it, Vrf):
        table = f", table {it.table}" if it.table else ""
        return f"interface {it.interface}{table}" + (f", members {' '.join(it.members)}" if it.members else "")
    if isinstance(it, Tunnel):
        return f"{it.local} to {it.remote}, {it.encapsulation.name.lower()}{', managed' if it.managed else ''}"
    if isinstance(it, Peer):
        return f"may send {it.accepts}" + (f", in space {it.space}" if it.space else "")
    if isinstance(it, Classes):
        return "traffic classes and code points"
    return " or ".join(map(str, it.paths))

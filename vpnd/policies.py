"""From traffic selectors to policies, and who needs each of them.

Pure: nothing here speaks to a kernel. `PolicyTable` is the SPD that should exist; its owner carries the difference over.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

from kernel_shim.model import (
    Action,
    Direction,
    IPAddress,
    Mode,
    Policy,
    ReqId,
    Selector,
    Template,
    TrafficSelector,
    Unresolved,
)
from vpnd.config.model import ChildConfig
from vpnd.ike.marking import NO_MARKING, Marking

# A lower priority wins. Shunts stand before protection, as in strongSwan; within a class the narrower selector wins.
PRIORITY_SHUNT: Final = 100_000
PRIORITY_PROTECT: Final = 200_000

PolicyKey = tuple[Direction, Selector]


def _fixed_bits(selector: Selector) -> int:
    total = 0
    for side in (selector.source, selector.destination):
        size = int(side.last) - int(side.first)
        total += side.first.max_prefixlen - size.bit_length()
    return total


def priority_of(selector: Selector, action: Action) -> int:
    """By the selector's size: 4 a fixed address bit, 2 for a protocol, 1 for each restricted port range."""
    base = PRIORITY_PROTECT if action is Action.PROTECT else PRIORITY_SHUNT
    ports = (not selector.source_ports.any) + (not selector.destination_ports.any)
    return base - 4 * _fixed_bits(selector) - 2 * bool(selector.protocol) - ports


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a child's policies have in common. Endpoints are the IKE peers' addresses; None where the peer is not known yet."""

    action: Action
    mode: Mode
    reqid: ReqId
    local: IPAddress | None = None
    remote: IPAddress | None = None
    unresolved: Unresolved = Unresolved.QUEUE
    priority: int = 0
    marking: Marking = NO_MARKING

    @classmethod
    def of_child(cls, child: ChildConfig | None, mode: Mode, reqid: ReqId, local: IPAddress | None, remote: IPAddress | None, marking: Marking) -> Self:
        """`child` None: one whose configuration is gone meanwhile."""
        if child is None:
            return cls(Action.PROTECT, mode, reqid, local, remote, marking=marking)
        return cls(child.action, mode, reqid, local, remote, child.unresolved, child.priority, marking)


def policies_for(spec: PolicySpec, local_ts: Sequence[TrafficSelector], remote_ts: Sequence[TrafficSelector]) -> Iterator[Policy]:
    """The policies of each pair of selectors that can meet: out, in, and forward where packets may pass through this host."""
    for local in local_ts:
        for remote in remote_ts:
            if local.addresses.version != remote.addresses.version:
                continue
            if local.protocol != remote.protocol and 0 not in (local.protocol, remote.protocol):
                continue
            outbound = replace(Selector.between(local, remote), mark=spec.marking.mark_out, if_id=spec.marking.if_id_out)
            inbound = replace(outbound.reversed(), mark=spec.marking.mark_in, if_id=spec.marking.if_id_in)
            priority = spec.priority or priority_of(outbound, spec.action)
            out_templates: tuple[Template, ...] = ()
            in_templates: tuple[Template, ...] = ()
            if spec.action is Action.PROTECT:
                out_templates = (Template(spec.mode, spec.reqid, spec.local, spec.remote),)
                in_templates = (Template(spec.mode, spec.reqid, spec.remote, spec.local),)
            yield Policy(outbound, Direction.OUT, spec.action, priority, out_templates, spec.unresolved)
            yield Policy(inbound, Direction.IN, spec.action, priority, in_templates)
            if spec.mode is Mode.TUNNEL:
                yield Policy(inbound, Direction.FORWARD, spec.action, priority, in_templates)


@dataclass(slots=True)
class _Entry:
    policy: Policy
    owners: dict[Hashable, Policy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """One step towards the desired SPD: `policy` is to be set (added or replaced) or, with `remove`, deleted."""

    policy: Policy
    remove: bool = False


class PolicyTable:
    """The desired SPD. A policy stands while it has an owner; several owners of one selector share it, and the last to claim it shapes it."""

    def __init__(self) -> None:
        self._entries: dict[PolicyKey, _Entry] = {}

    def claim(self, owner: Hashable, policies: Sequence[Policy]) -> list[PolicyChange]:
        changes = []
        for policy in policies:
            key = (policy.direction, policy.selector)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(policy)
                changes.append(PolicyChange(policy))
            elif entry.policy != policy and not (entry.owners and owner not in entry.owners and self._serves(entry.policy, policy)):
                entry.policy = policy
                changes.append(PolicyChange(policy))
            entry.owners[owner] = policy
        return changes

    @staticmethod
    def _serves(standing: Policy, wanted: Policy) -> bool:
        """Whether the standing policy finds the wanted one's SAs as well: same request id, and endpoints no narrower."""
        if standing.action != wanted.action or len(standing.templates) != len(wanted.templates):
            return False
        for has, wants in zip(standing.templates, wanted.templates, strict=True):
            if (has.reqid, has.mode) != (wants.reqid, wants.mode):
                return False
            if has.source not in (None, wants.source) or has.destination not in (None, wants.destination):
                return False
        return True

    def release(self, owner: Hashable, policies: Sequence[Policy]) -> list[PolicyChange]:
        changes = []
        for policy in policies:
            key = (policy.direction, policy.selector)
            entry = self._entries.get(key)
            if entry is None or entry.owners.pop(owner, None) is None:
                continue
            if not entry.owners:
                del self._entries[key]
                changes.append(PolicyChange(entry.policy, remove=True))
            elif entry.policy not in entry.owners.values():
                entry.policy = next(reversed(entry.owners.values()))
                changes.append(PolicyChange(entry.policy))
        return changes

    def desired(self) -> list[Policy]:
        return [entry.policy for entry in self._entries.values()]

    def get(self, key: PolicyKey) -> Policy | None:
        entry = self._entries.get(key)
        return entry.policy if entry else None

    def __contains__(self, key: PolicyKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

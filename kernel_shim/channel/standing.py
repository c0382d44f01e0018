"""The policies of ours that stand in a kernel, as they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from kernel_shim.model import ANY_PROTOCOL, Direction, Flow, Policy, PolicyIndex, ReqId, Selector

Key = Callable[[Direction, Selector], Hashable]


class StandingPolicies:
    """Found by `key`, what the kernel knows of direction and selector, in which two selectors of ours may be one; outbound ones by reqid and index, too."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._policies: dict[Hashable, Policy] = {}
        self._outbound: dict[ReqId, dict[Hashable, Policy]] = {}
        self._by_index: dict[PolicyIndex, Policy] = {}

    def put(self, policy: Policy) -> None:
        self.drop(policy.direction, policy.selector)
        key = self._key(policy.direction, policy.selector)
        self._policies[key] = policy
        if policy.direction is Direction.OUT:
            self._by_index[policy.index] = policy
            for template in policy.templates:
                self._outbound.setdefault(template.reqid, {})[key] = policy

    def drop(self, direction: Direction, selector: Selector) -> None:
        key = self._key(direction, selector)
        old = self._policies.pop(key, None)
        if old is None or direction is not Direction.OUT:
            return
        if self._by_index.get(old.index) is old:
            del self._by_index[old.index]
        for reqid in {template.reqid for template in old.templates}:
            of_reqid = self._outbound[reqid]
            del of_reqid[key]
            if not of_reqid:
                del self._outbound[reqid]

    def get(self, direction: Direction, selector: Selector) -> Policy | None:
        """KernelError(EINVAL) for a selector that Linux cannot express."""
        return self._policies.get(self._key(direction, selector))

    def of_index(self, index: PolicyIndex) -> Policy | None:
        """An outbound one."""
        return self._by_index.get(index)

    def outbound(self, reqid: ReqId) -> Sequence[Policy]:
        return list(self._outbound.get(reqid, {}).values())

    def asking(self, reqid: ReqId, flow: Flow | None) -> Policy | None:
        """The outbound policy that a packet of `flow` met; any of that reqid when the flow is not known."""
        return next((policy for policy in self.outbound(reqid) if flow is None or _covers(policy.selector, flow)), None)


def _covers(selector: Selector, flow: Flow) -> bool:
    if flow.source not in selector.source or flow.destination not in selector.destination or selector.protocol not in (ANY_PROTOCOL, flow.protocol):
        return False
    return flow.source_port in selector.source_ports and flow.destination_port in selector.destination_ports

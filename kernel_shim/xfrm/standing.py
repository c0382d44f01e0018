"""The policies of ours that stand in the kernel, as they were asked for."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_shim.model import ANY_PROTOCOL, Direction, Flow, Policy, ReqId, Selector
from kernel_shim.xfrm.selectors import selector_attributes, selector_struct

_Key = tuple[Direction, bytes]


class StandingPolicies:
    """Found by what the kernel knows of their selector, in which two selectors of ours may be one, and outbound ones by reqid."""

    def __init__(self) -> None:
        self._policies: dict[_Key, Policy] = {}
        self._outbound: dict[ReqId, dict[_Key, Policy]] = {}

    def put(self, policy: Policy) -> None:
        self.drop(policy.direction, policy.selector)
        key = _key(policy.direction, policy.selector)
        self._policies[key] = policy
        if policy.direction is Direction.OUT:
            for template in policy.templates:
                self._outbound.setdefault(template.reqid, {})[key] = policy

    def drop(self, direction: Direction, selector: Selector) -> None:
        key = _key(direction, selector)
        old = self._policies.pop(key, None)
        if old is None or direction is not Direction.OUT:
            return
        for reqid in {template.reqid for template in old.templates}:
            of_reqid = self._outbound[reqid]
            del of_reqid[key]
            if not of_reqid:
                del self._outbound[reqid]

    def get(self, direction: Direction, selector: Selector) -> Policy | None:
        """KernelError(EINVAL) for a selector that Linux cannot express."""
        return self._policies.get(_key(direction, selector))

    def outbound(self, reqid: ReqId) -> Sequence[Policy]:
        return list(self._outbound.get(reqid, {}).values())

    def asking(self, reqid: ReqId, flow: Flow | None) -> Policy | None:
        """The outbound policy that a packet of `flow` met; any of that reqid when the flow is not known."""
        return next((policy for policy in self.outbound(reqid) if flow is None or _covers(policy.selector, flow)), None)


def _key(direction: Direction, selector: Selector) -> _Key:
    attributes = selector_attributes(selector)
    return direction, selector_struct(selector).pack() + b"".join(bytes((kind,)) + value for kind, value in sorted(attributes.items()))


def _covers(selector: Selector, flow: Flow) -> bool:
    if flow.source not in selector.source or flow.destination not in selector.destination or selector.protocol not in (ANY_PROTOCOL, flow.protocol):
        return False
    return flow.source_port in selector.source_ports and flow.destination_port in selector.destination_ports

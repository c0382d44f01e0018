"""What packets wait together for: a policy and a peer."""

from __future__ import annotations

from typing import NamedTuple

from kernel_shim.model import Flow, IPAddress, Policy, PolicyIndex, Template


class PeerKey(NamedTuple):
    """`source` and `destination` are the outer addresses that the SA will have; None is any."""

    policy: PolicyIndex
    source: IPAddress | None
    destination: IPAddress | None


def peer_of(policy: Policy, template: Template, flow: Flow) -> PeerKey:
    """Who the SA of `template` is with. Without a fixed destination it is the flow's own host pair, so peers differ by flow."""
    if template.destination is None:
        return PeerKey(policy.index, template.source or flow.source, flow.destination)
    return PeerKey(policy.index, template.source, template.destination)

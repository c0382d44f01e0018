"""Traffic selectors: from configuration to the wire, and the narrowing of RFC 7296 section 2.9."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Final

from kernel_shim.model import ANY_PROTOCOL, PROTOCOL_ICMP, PROTOCOL_ICMPV6, AddressRange, Flow, IPAddress, PortRange, TrafficSelector
from vpnd.config.model import TsTemplate

Selectors = tuple[TrafficSelector, ...]

MAX_SELECTORS: Final = 64  # a side; a kernel walks an SA's selectors, so their number is a cost that the peer would set

MAX_SPLINTERS: Final = 16  # selectors a side that a peer may make of fewer configured ones: each pair of sides costs policies


def resolve(templates: Sequence[TsTemplate], endpoint: IPAddress) -> Selectors:
    """Configured selectors; `dynamic` ones become the IKE endpoint's own address."""
    selectors = []
    for template in templates:
        if template.addresses is None:
            selectors.append(TrafficSelector(AddressRange.host(endpoint), template.protocol, template.ports))
        else:
            selectors.append(template.addresses)
    return tuple(selectors)


def of_flow(flow: Flow, selectors_local: Selectors, selectors_remote: Selectors) -> tuple[TrafficSelector, TrafficSelector] | None:
    """RFC 7296 section 2.9: the packet that asked, as one selector a side (ours, the peer's); None when the configuration does not cover it."""
    # RFC 7296 section 3.13.1: ICMP type and code stand in the ports of both sides
    icmp = flow.protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6)
    source_port, destination_port = flow.source_port, flow.source_port if icmp else flow.destination_port
    local = TrafficSelector(AddressRange.host(flow.source), flow.protocol, PortRange(source_port, source_port))
    remote = TrafficSelector(AddressRange.host(flow.destination), flow.protocol, PortRange(destination_port, destination_port))
    covered = any(selector.contains(local) for selector in selectors_local) and any(selector.contains(remote) for selector in selectors_remote)
    return (local, remote) if covered else None


def narrow(offered: Selectors, configured: Selectors) -> Selectors:
    """What both allow, in the order of the offer; a selector within another one is left out. Once there are as many as may be, no more are looked for."""
    common: list[TrafficSelector] = []
    limit = min(MAX_SELECTORS, max(MAX_SPLINTERS, len(configured)))
    for theirs, ours in product(offered[:MAX_SELECTORS], configured[:MAX_SELECTORS]):
        both = theirs.intersection(ours)
        if both is None or any(known.contains(both) for known in common):
            continue
        common = [known for known in common if not both.contains(known)]
        common.append(both)
        if len(common) == limit:
            break
    return tuple(common)


def paired(local: Selectors, remote: Selectors) -> tuple[Selectors, Selectors] | None:
    """Both sides without the selectors that have no partner of their family and protocol; None when nothing is left."""
    kept_local = tuple(one for one in local if any(_fit(one, other) for other in remote))
    kept_remote = tuple(one for one in remote if any(_fit(one, other) for other in local))
    return (kept_local, kept_remote) if kept_local and kept_remote else None


def within(answer: Selectors, offered: Selectors) -> bool:
    """Whether an answer only narrows what was offered."""
    return bool(answer) and len(answer) <= MAX_SELECTORS and all(any(ours.contains(theirs) for ours in offered) for theirs in answer)


def substituted(selectors: Selectors, new: IPAddress) -> Selectors:
    """RFC 7296 section 2.23.1: in transport mode through a NAT a host's selectors carry the address as the other side of the NAT sees it.

    Those of any one host become those of `new`.
    """
    result = []
    for selector in selectors:
        host = selector.addresses.first == selector.addresses.last and selector.addresses.version == new.version
        if host:
            result.append(TrafficSelector(AddressRange.host(new), selector.protocol, selector.ports))
        else:
            result.append(selector)
    return tuple(result)


def _fit(one: TrafficSelector, other: TrafficSelector) -> bool:
    return one.addresses.version == other.addresses.version and (one.protocol == other.protocol or ANY_PROTOCOL in (one.protocol, other.protocol))

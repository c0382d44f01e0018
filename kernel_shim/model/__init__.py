"""The words that both packages use: selectors, policies, templates, security associations, and what a kernel reports.

All values are immutable. Addresses are `ipaddress` objects, ports and SPIs host integers, keys `Secret`,
times seconds. Terms are those of RFC 4301 and RFC 2367. This is the public face; the files are one a subject.
"""

from __future__ import annotations

from kernel_shim.model.addresses import AddressRange, Endpoint, IPAddress, IPNetwork
from kernel_shim.model.associations import (
    DEFAULT_COPIES,
    NO_LIFETIME,
    TFC_TO_MTU,
    AcquireSequence,
    HeaderCopies,
    Lifetime,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Spi,
    SpiRequest,
    UdpEncapsulation,
)
from kernel_shim.model.events import Acquire, Expire, KernelEvent, NewMapping, PolicyExpire
from kernel_shim.model.kernel import Capabilities, KernelError
from kernel_shim.model.numbers import (
    ANY_PROTOCOL,
    NO_PORT,
    PORT_IKE,
    PORT_NAT_T,
    PROTOCOL_ESP,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    ROUTE_PROTOCOL,
    SOCKET_MARK,
)
from kernel_shim.model.policies import Action, Direction, Level, Migration, Mode, Move, Policy, PolicyIndex, ReqId, Template, Unresolved
from kernel_shim.model.security_labels import NO_LABELS, Identity, Labels, SecurityContext, Sensitivity
from kernel_shim.model.selectors import ANY_PORT, NO_MARK, Flow, Mark, PortRange, Selector, TrafficSelector

__all__ = [
    "ANY_PORT",
    "ANY_PROTOCOL",
    "DEFAULT_COPIES",
    "NO_LABELS",
    "NO_LIFETIME",
    "NO_MARK",
    "NO_PORT",
    "PORT_IKE",
    "PORT_NAT_T",
    "PROTOCOL_ESP",
    "PROTOCOL_ICMP",
    "PROTOCOL_ICMPV6",
    "PROTOCOL_TCP",
    "PROTOCOL_UDP",
    "ROUTE_PROTOCOL",
    "SOCKET_MARK",
    "TFC_TO_MTU",
    "Acquire",
    "AcquireSequence",
    "Action",
    "AddressRange",
    "Capabilities",
    "Direction",
    "Endpoint",
    "Expire",
    "Flow",
    "HeaderCopies",
    "IPAddress",
    "IPNetwork",
    "Identity",
    "KernelError",
    "KernelEvent",
    "Labels",
    "Level",
    "Lifetime",
    "Mark",
    "Migration",
    "Mode",
    "Move",
    "NewMapping",
    "Policy",
    "PolicyExpire",
    "PolicyIndex",
    "PortRange",
    "ReqId",
    "SaId",
    "SaState",
    "SaStatus",
    "SecurityAssociation",
    "SecurityContext",
    "Selector",
    "Sensitivity",
    "Spi",
    "SpiRequest",
    "Template",
    "TrafficSelector",
    "UdpEncapsulation",
    "Unresolved",
]

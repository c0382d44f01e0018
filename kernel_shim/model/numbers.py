"""Numbers of protocols and ports, and those by which a host knows what is ours."""

from __future__ import annotations

from typing import Final

ANY_PROTOCOL: Final = 0
PROTOCOL_ICMP: Final = 1
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17
PROTOCOL_ESP: Final = 50
PROTOCOL_ICMPV6: Final = 58
PORT_IKE: Final = 500
PORT_NAT_T: Final = 4500
NO_PORT: Final = 0  # of an endpoint that sends ESP without UDP
SOCKET_MARK: Final = 0x49500000  # SO_MARK of IKE and ESP sockets: keeps their packets off the capture routes
ROUTE_PROTOCOL: Final = 178  # RTPROT_ of our routes and rules; unassigned in rtnetlink.h and /etc/iproute2/rt_protos

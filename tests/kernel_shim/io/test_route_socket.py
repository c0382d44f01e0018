"""The socket for batches of routes believes the kernel and nobody else."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import ip_network

from kernel_shim.io.rtnetlink import NLMSG_ERROR, RouteChange, RouteSocket, RouteType


def test_an_answer_of_another_process_is_none() -> None:
    """A process that may send netlink messages says that a route was put; the kernel says that there is no such interface."""
    route = RouteSocket(99)
    forger = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        forged = struct.pack("=IHHIIi", 36, NLMSG_ERROR, 0, 0, 0, 0) + bytes(16)
        forger.sendto(forged, (route.port, 0))
        change = RouteChange(put=True, kind=RouteType.UNICAST, table=4_000_000, destination=ip_network("203.0.113.0/24"), metric=1, interface=0x7FFFFFF0)
        (result,) = route.change([change])
        assert result == errno.ENODEV
    finally:
        forger.close()
        route.close()

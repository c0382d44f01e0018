"""Labels that come in clear, from peers whose network is managed (RFC 7510 section 3.1): raw sockets of GRE and of MPLS-in-IP, UDP port 6635.

What comes from a customer's interface, or out of a tunnel, is never from that network, whatever its addresses say.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import suppress
from ipaddress import ip_address
from typing import Final

from kernel_shim.io.counters import Counters
from kernel_shim.io.settings import RAW_READS
from kernel_shim.model import Endpoint, IPAddress, KernelError
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from kernel_shim.mpls.node import Tunnel
from kernel_shim.packet.ip import LARGEST_PACKET, Malformed, layout

# linux/in.h, linux/in6.h, linux/udp.h: what Python's socket module does not name
IP_PKTINFO: Final = 8
IP_FREEBIND: Final = 15
IPV6_FREEBIND: Final = 78
UDP_NO_CHECK6_RX: Final = 102  # RFC 7510 section 3.1: no checksum is one of its modes

SOCKET_BUFFER: Final = 4 << 20  # bytes
CMSG_BYTES: Final = 64
_INDEX_V4: Final = struct.Struct("=i8x")  # struct in_pktinfo
_INDEX_V6: Final = struct.Struct("=16xi")  # struct in6_pktinfo

Take = Callable[[Endpoint, Endpoint, Encapsulation, memoryview, float], None]  # local, remote, how, what stands behind the IP or UDP header, now


class ClearLabels:
    """One socket for each local address and encapsulation of a managed tunnel. `inside` names the interfaces that are not of such a network."""

    def __init__(
        self,
        take: Take,
        inside: Callable[[], Collection[str]],
        counters: Counters,
        opened: Callable[[int, Callable[[float], None]], None],
        closed: Callable[[int], None],
    ) -> None:
        self._take, self._inside, self._counters = take, inside, counters
        self._opened, self._closed = opened, closed
        self._tunnels: dict[str, Tunnel] = {}
        self._sockets: dict[tuple[Encapsulation, IPAddress], socket.socket] = {}

    def put(self, tunnel: Tunnel) -> None:
        """In place of one to the same peer. KernelError when there can be no socket for it."""
        if tunnel.managed:
            self._open(tunnel.encapsulation, tunnel.local)
        self._tunnels[tunnel.peer] = tunnel
        self._close_unused()

    def remove(self, peer: str) -> None:
        if self._tunnels.pop(peer, None) is not None:
            self._close_unused()

    def close(self) -> None:
        self._tunnels.clear()
        self._close_unused()

    def _open(self, encapsulation: Encapsulation, local: IPAddress) -> None:
        if (encapsulation, local) in self._sockets:
            return
        family, udp = (socket.AF_INET if local.version == 4 else socket.AF_INET6), encapsulation is Encapsulation.UDP
        try:
            sock = socket.socket(family, (socket.SOCK_DGRAM if udp else socket.SOCK_RAW) | socket.SOCK_NONBLOCK, int(encapsulation))
        except OSError as error:
            raise KernelError(error.errno or errno.EPERM, f"labels in clear: {error.strerror}") from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                if udp:
                    sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1)
            sock.bind((str(local), UDP_PORT if udp else 0))
        except OSError as error:
            sock.close()
            raise KernelError(error.errno or errno.EADDRNOTAVAIL, f"labels in clear at {local}: {error.strerror}") from error
        self._sockets[encapsulation, local] = sock
        self._opened(sock.fileno(), lambda now: self._read(sock, encapsulation, local, now))

    def _close_unused(self) -> None:
        used = {(it.encapsulation, it.local) for it in self._tunnels.values() if it.managed}
        for key in self._sockets.keys() - used:
            sock = self._sockets.pop(key)
            self._closed(sock.fileno())
            sock.close()

    def _read(self, sock: socket.socket, encapsulation: Encapsulation, local: IPAddress, now: float) -> None:
        inside = self._inside()
        for _ in range(RAW_READS):
            try:
                data, ancillary, _, sender = sock.recvmsg(LARGEST_PACKET, CMSG_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._counters.add("io.labels.receive.error")
                return
            if _interface(ancillary) in inside:
                self._counters.add("io.labels.refused")
                continue
            packet, udp = memoryview(data), encapsulation is Encapsulation.UDP
            if local.version == 4 and not udp:  # with its IP header
                try:
                    parsed = layout(packet)
                except Malformed:
                    continue
                packet = packet[parsed.upper : parsed.length]
            ports = (UDP_PORT, sender[1]) if udp else (0, 0)
            self._take(Endpoint(local, ports[0]), Endpoint(ip_address(sender[0]), ports[1]), encapsulation, packet, now)


def _interface(ancillary: list[tuple[int, int, bytes]]) -> str:
    """By which a packet came; "" when nobody says so."""
    for level, kind, data in ancillary:
        with suppress(OSError):
            if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                return socket.if_indextoname(_INDEX_V4.unpack(data)[0])
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                return socket.if_indextoname(_INDEX_V6.unpack(data)[0])
    return ""

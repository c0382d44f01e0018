"""Opens the IKE sockets of a local address, for kernels that leave that to the key manager."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from kernel_shim.model import PORT_IKE, PORT_NAT_T, IPAddress, KernelError

RECEIVE_BUFFER: Final = 1 << 20  # octets: a burst of IKE_SA_INITs while the loop is busy

# linux/udp.h
_UDP_ENCAP: Final = 100
_UDP_ENCAP_ESPINUDP: Final = 2


Bypass = Callable[[socket.socket], None]
"""Lets the packets of a socket pass every IPsec policy; each kernel has its own way."""


def open_ike_sockets(address: IPAddress, bypass: Bypass) -> tuple[int, int]:
    """Descriptors (port 500, port 4500) that pass every IPsec policy; the caller owns them. On port 4500 the kernel takes ESP out and leaves IKE.

    KernelError with the errno of what failed: EADDRINUSE, EADDRNOTAVAIL, EACCES.
    """
    plain = _open(address, PORT_IKE, bypass)
    try:
        natt = _open(address, PORT_NAT_T, bypass)
        try:
            natt.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, _UDP_ENCAP_ESPINUDP)
        except OSError as error:
            natt.close()
            raise KernelError.of(error, f"port {PORT_NAT_T} takes no ESP") from error
    except BaseException:
        plain.close()
        raise
    return plain.detach(), natt.detach()


def _open(address: IPAddress, port: int, bypass: Bypass) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if address.version == 6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        bypass(opened)
        opened.bind((str(address), port))
    except OSError as error:
        opened.close()
        raise KernelError.of(error, f"port {port} of {address}") from error
    return opened

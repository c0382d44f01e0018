"""The two IKE sockets of one local address.

Port 500 carries bare IKE and is served by asyncio-dgram. Port 4500 carries IKE behind a non-ESP marker; its socket has
UDP_GRO set by whoever opened it, so one read may hold several datagrams of one size and is split by its control message.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final

import asyncio_dgram

from kernel_shim.model import PORT_IKE, PORT_NAT_T, Endpoint, IPAddress

Receiver = Callable[[Endpoint, Endpoint, bytes], None]  # local, remote, IKE message

NON_ESP_MARKER: Final = bytes(4)  # RFC 3948 section 2.2
KEEPALIVE: Final = b"\xff"  # RFC 3948 section 2.3
SOL_UDP: Final = 17
UDP_GRO: Final = 104  # linux/udp.h
READ_SIZE: Final = 65536
READS_PER_WAKEUP: Final = 32  # so that one busy socket starves neither the other nor the timers


def _sockaddr(endpoint: Endpoint) -> tuple[str, int]:
    return (str(endpoint.address), endpoint.port)


def _endpoint(address: Any) -> Endpoint:
    return Endpoint(ip_address(str(address[0]).partition("%")[0]), int(address[1]))


class IkeSockets:
    """Owns both descriptors. `receive` is called for each IKE message from the event loop and must not block.

    `refused` is called when the network takes a message not: retransmission is the core's answer to it.
    """

    def __init__(self, address: IPAddress, descriptors: tuple[int, int], receive: Receiver, refused: Callable[[], None]) -> None:
        self.address: Final = address
        self._receive = receive
        self._plain_socket = socket.socket(fileno=descriptors[0])
        self._natt_socket = socket.socket(fileno=descriptors[1])
        self._plain: asyncio_dgram.aio.DatagramStream | None = None
        self._reader: asyncio.Task[None] | None = None
        self._buffer = bytearray(READ_SIZE)
        self._refused = refused

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._plain_socket.setblocking(False)
        self._natt_socket.setblocking(False)
        stream = await asyncio_dgram.from_socket(self._plain_socket)
        self._plain = stream
        self._reader = loop.create_task(self._read_plain(stream), name=f"ike-500-{self.address}")
        loop.add_reader(self._natt_socket.fileno(), self._read_natt)

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._natt_socket.fileno())
        self._natt_socket.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._plain is not None:
            self._plain.close()

    def send(self, local_port: int, remote: Endpoint, data: bytes) -> None:
        """Send one IKE message."""
        try:
            if local_port == PORT_IKE:
                self._plain_socket.sendto(data, _sockaddr(remote))
            else:
                self._natt_socket.sendmsg([NON_ESP_MARKER, data], [], 0, _sockaddr(remote))
        except OSError:
            self._refused()

    def send_keepalive(self, remote: Endpoint) -> None:
        try:
            self._natt_socket.sendto(KEEPALIVE, _sockaddr(remote))
        except OSError:
            self._refused()

    async def _read_plain(self, stream: asyncio_dgram.aio.DatagramStream) -> None:
        local = Endpoint(self.address, PORT_IKE)
        while True:
            try:
                data, address = await stream.recv()
            except asyncio_dgram.TransportClosed:
                return
            except OSError:
                continue  # an ICMP error of an earlier send: retransmission decides
            self._receive(local, _endpoint(address), data)

    def _read_natt(self) -> None:
        local = Endpoint(self.address, PORT_NAT_T)
        for _ in range(READS_PER_WAKEUP):
            try:
                length, ancillary, _flags, address = self._natt_socket.recvmsg_into([self._buffer], 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    return
                continue
            segment = length
            for level, kind, value in ancillary:
                if level == SOL_UDP and kind == UDP_GRO:
                    segment = int.from_bytes(value, "little")
            remote = _endpoint(address)
            for start in range(0, length, max(segment, 1)):
                datagram = bytes(self._buffer[start : min(start + segment, length)])
                if datagram.startswith(NON_ESP_MARKER):
                    self._receive(local, remote, datagram[len(NON_ESP_MARKER) :])

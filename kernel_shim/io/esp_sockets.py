"""Sockets that ESP leaves and arrives by: a member of a port 4500 group (RFC 3948), or a raw socket of protocol 50 (RFC 4303).

Both have an error queue that tells of path MTUs. UDP has the kernel's segmentation and coalescing; a raw socket costs a system call a packet.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Final, NamedTuple

from kernel_shim.io.counters import Counters
from kernel_shim.io.settings import RAW_READS, READ_BYTES, READS
from kernel_shim.model import NO_PORT, PORT_NAT_T, Endpoint

# linux/udp.h, linux/in.h, linux/in6.h, asm-generic/socket.h, linux/errqueue.h: what Python's socket module does not name
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
SO_MEMINFO: Final = 55
MEMORY: Final = struct.Struct("=9I")  # linux/sock_diag.h: SK_MEMINFO_*, the last is drops
IP_TOS: Final = 1
IP_RECVTOS: Final = 13
IP_MTU: Final = 14
IP_MTU_DISCOVER: Final = 10
IP_RECVERR: Final = 11
IP_PMTUDISC_DONT: Final = 0
IP_PMTUDISC_DO: Final = 2
IPV6_MTU: Final = 24
IPV6_RECVTCLASS: Final = 66
IPV6_TCLASS: Final = 67
IPV6_MTU_DISCOVER: Final = 23
IPV6_RECVERR: Final = 25
SO_EE_ORIGIN_LOCAL: Final = 1  # without a port; the send that failed has reported it
EXTENDED_ERROR: Final = struct.Struct("=IBBBBII")  # errno, origin, type, code, padding, info, data

CMSG_BYTES: Final = 64
ERROR_CMSG_BYTES: Final = 512
ERROR_READS: Final = 64
SEND_TRIES: Final = 4
SEND_WAIT: Final = 2  # milliseconds for a full socket to drain, a try
MAX_REMOTES: Final = 65_536  # remembered conversions of peer addresses
MAX_DATAGRAM: Final = 65_535
SMALLEST_MTU: Final = {4: 68, 6: 1280}  # RFC 791, RFC 8200: what an ICMP error may say

_PENDING_ERRORS: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPROTO, errno.EHOSTDOWN, errno.ENOPROTOOPT, errno.EACCES})
_NO_SEGMENTATION: Final = frozenset({errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP})

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
PathMtu = Callable[[Endpoint, Endpoint, int], None]  # local, remote, bytes


class Batch(NamedTuple):
    """What one receive put into the buffer."""

    remote: Endpoint
    length: int
    segment_size: int
    traffic_class: int = 0


def socket_address(endpoint: Endpoint) -> SocketAddress:
    """As Python's socket module wants it, without a look at the resolver."""
    address = endpoint.address
    if address.version == 4:
        return str(address), endpoint.port
    scope = address.scope_id
    index = 0 if scope is None else int(scope) if scope.isdigit() else socket.if_nametoindex(scope)
    return str(address).partition("%")[0], endpoint.port, 0, index


class EspSocket:
    """What the two kinds share: peers' addresses, single sends, the error queue. A kind says how many datagrams go and come at once."""

    def __init__(self, opened: socket.socket, local: Endpoint, mark: int, counters: Counters, path_mtu: PathMtu) -> None:
        self.local: Final = local
        self._socket: Final = opened
        self._mark: Final = mark
        self._counters: Final = counters
        self._path_mtu: Final = path_mtu
        self._remotes: dict[SocketAddress, Endpoint] = {}
        self._addresses: dict[Endpoint, SocketAddress] = {}
        version = local.address.version
        self._class: Final = (socket.IPPROTO_IP, IP_TOS) if version == 4 else (socket.IPPROTO_IPV6, IPV6_TCLASS)
        for option in (IP_RECVERR, IP_RECVTOS) if version == 4 else (IPV6_RECVERR, IPV6_RECVTCLASS):
            opened.setsockopt(self._class[0], option, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, buffer: memoryview) -> Iterator[Batch]:
        """As much as one wake-up takes; each batch is at the start of `buffer` until the next is asked for."""
        raise NotImplementedError

    def send(self, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        """Send datagrams of `segment_size` bytes, the last may be shorter. Never raises: what did not go is counted.

        With `whole` false the host may cut datagrams into fragments.
        """
        address = self._addresses.get(remote)
        if address is None:
            if len(self._addresses) >= MAX_REMOTES:
                self._addresses.clear()
            try:
                address = self._addresses[remote] = socket_address(remote)
            except OSError:
                self._counters.add("io.esp.send.unreachable", _datagrams(buffer, segment_size))
                return
        if not whole:
            self._discover_mtu(IP_PMTUDISC_DONT)
            self._send_singly(remote, address, buffer, segment_size, traffic_class)
            self._discover_mtu(IP_PMTUDISC_DO)
        elif len(buffer) > segment_size:
            self._send_many(remote, address, buffer, segment_size, traffic_class)
        else:
            self._attempt(remote, address, buffer, segment_size, traffic_class)

    def _send_many(self, remote: Endpoint, address: SocketAddress, buffer: memoryview, segment_size: int, traffic_class: int) -> None:
        self._send_singly(remote, address, buffer, segment_size, traffic_class)

    def _send_singly(self, remote: Endpoint, address: SocketAddress, buffer: memoryview, segment_size: int, traffic_class: int) -> bool:
        """Whether all went."""
        pieces = [buffer[start : start + segment_size] for start in range(0, len(buffer), segment_size)]
        went = [self._attempt(remote, address, piece, segment_size, traffic_class) for piece in pieces]
        return all(went)

    def _remote(self, address: SocketAddress, port: int) -> Endpoint:
        """The one object for each peer, so that it can be compared by identity."""
        remote = self._remotes.get(address)
        if remote is None:
            if len(self._remotes) >= MAX_REMOTES:
                self._remotes.clear()
            remote = self._remotes[address] = Endpoint(ip_address(address[0]), port)
        return remote

    def _discover_mtu(self, discovery: int) -> None:
        option = (socket.IPPROTO_IP, IP_MTU_DISCOVER) if self.local.address.version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
        self._socket.setsockopt(*option, discovery)

    def _attempt(self, remote: Endpoint, address: SocketAddress, buffer: memoryview, segment_size: int, traffic_class: int) -> bool | None:
        """One sendmsg, with its repetitions; whether it went. None asks for the datagrams one by one."""
        segments = len(buffer) > segment_size
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", segment_size))] if segments else []
        if traffic_class:
            ancillary.append((*self._class, struct.pack("=i", traffic_class)))
        failure = "busy"
        for _ in range(SEND_TRIES):
            try:
                self._socket.sendmsg((buffer,), ancillary, 0, address)
            except BlockingIOError:
                self._counters.add("io.esp.send.waits")
                _wait_writable(self._socket)
            except OSError as error:
                number = error.errno or 0
                if number == errno.EMSGSIZE:
                    self._report_mtu(remote)
                    failure = "too-big"
                    break
                if segments and number in _NO_SEGMENTATION:
                    return None
                failure = errno.errorcode.get(number, "other").lower()
                if number in _PENDING_ERRORS:  # an ICMP error for an earlier datagram: this one was not sent yet
                    self.read_errors()
                elif number != errno.ENOBUFS:
                    break
            else:
                return True
        self._counters.add(f"io.esp.send.{failure}", _datagrams(buffer, segment_size))
        return False

    def read_errors(self) -> None:
        """Empty the error queue: what ICMP said of the path, and the MTU that it carries."""
        for _ in range(ERROR_READS):
            try:
                _, control, _, address = self._socket.recvmsg(1, ERROR_CMSG_BYTES, socket.MSG_ERRQUEUE)
            except OSError:
                return
            self._counters.add("io.esp.icmp-errors")
            for level, kind, data in control:
                if (level, kind) not in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)) or len(data) < EXTENDED_ERROR.size:
                    continue
                number, origin, _, _, _, mtu, _ = EXTENDED_ERROR.unpack_from(data)
                if number == errno.EMSGSIZE and origin != SO_EE_ORIGIN_LOCAL and address:
                    self._mtu(Endpoint(ip_address(address[0]), address[1]), mtu)

    def losses(self) -> int:
        """Datagrams that found the receive queue full."""
        try:
            return int(MEMORY.unpack(self._socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMORY.size))[-1])
        except (OSError, struct.error):
            return 0

    def _report_mtu(self, remote: Endpoint) -> None:
        """EMSGSIZE of a segmented send leaves nothing in the error queue: a connected socket tells what the kernel knows."""
        version = self.local.address.version
        with suppress(OSError), socket.socket(self._socket.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            probe.bind(socket_address(Endpoint(self.local.address, 0)))
            probe.connect(socket_address(Endpoint(remote.address, remote.port or PORT_NAT_T)))
            level, option = (socket.IPPROTO_IP, IP_MTU) if version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU)
            self._mtu(remote, probe.getsockopt(level, option))
        self.read_errors()

    def _mtu(self, remote: Endpoint, mtu: int) -> None:
        if SMALLEST_MTU[remote.address.version] <= mtu <= MAX_DATAGRAM:
            self._path_mtu(self.local, remote, mtu)


class UdpEspSocket(EspSocket):
    """The ESP member of a port 4500 group."""

    def __init__(self, opened: socket.socket, local: Endpoint, mark: int, counters: Counters, path_mtu: PathMtu) -> None:
        super().__init__(opened, local, mark, counters, path_mtu)
        self._segmentation = True

    def receive(self, buffer: memoryview) -> Iterator[Batch]:
        """Up to `READS` batches and about `READ_BYTES`."""
        receive = self._socket.recvmsg_into
        total = 0
        for _ in range(READS):
            if total >= READ_BYTES:
                return
            try:
                length, control, _, address = receive((buffer,), CMSG_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self.read_errors()
                continue
            total += length
            segment_size, traffic_class = length, 0
            for level, kind, data in control:
                if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                    segment_size = int.from_bytes(data, sys.byteorder)
                elif (level, kind) == self._class:
                    traffic_class = data[0] if len(data) == 1 else int.from_bytes(data, sys.byteorder)
            yield Batch(self._remote(address, address[1]), length, segment_size, traffic_class)

    def _send_many(self, remote: Endpoint, address: SocketAddress, buffer: memoryview, segment_size: int, traffic_class: int) -> None:
        if self._segmentation and self._attempt(remote, address, buffer, segment_size, traffic_class) is not None:
            return
        if self._send_singly(remote, address, buffer, segment_size, traffic_class):
            # What did not go at once went singly: it was the segmentation. Else it was the address or the MTU (EINVAL in Linux 6.1).
            self._segmentation = False


class RawEspSocket(EspSocket):
    """Protocol 50 at one local address: every ESP packet that comes to it, whoever it is for."""

    def __init__(self, opened: socket.socket, local: Endpoint, mark: int, counters: Counters, path_mtu: PathMtu) -> None:
        super().__init__(opened, local, mark, counters, path_mtu)
        self._with_header = local.address.version == 4  # raw(7): IPv4 comes with its header, IPv6 without
        self._store: Final = memoryview(bytearray(MAX_DATAGRAM))

    def receive(self, buffer: memoryview) -> Iterator[Batch]:
        """Up to `RAW_READS` packets and about `READ_BYTES`, those of one peer and length side by side."""
        store, receive = self._store, self._socket.recvmsg_into
        remote, kind, end, segment, total = self.local, 0, 0, 0, 0
        for _ in range(RAW_READS):
            if total >= READ_BYTES:
                break
            try:
                length, control, _, address = receive((store,), CMSG_BYTES)
            except BlockingIOError:
                break
            except OSError:
                self.read_errors()
                continue
            begin, traffic_class = 0, 0
            if self._with_header and length:
                begin, traffic_class = (store[0] & 15) << 2, store[1]
            elif control:
                traffic_class = int.from_bytes(control[0][2], sys.byteorder)
            size = length - begin
            if size <= 0:
                continue
            total += size
            sender = self._remote(address, NO_PORT)
            if end and (sender is not remote or traffic_class != kind or size > segment or end + size > len(buffer)):
                yield Batch(remote, end, segment, kind)
                end = 0
            if not end:
                remote, kind, segment = sender, traffic_class, size
            buffer[end : end + size] = store[begin:length]
            end += size
            if size < segment:
                yield Batch(remote, end, segment, kind)
                end = 0
        if end:
            yield Batch(remote, end, segment, kind)


def _wait_writable(waiting: socket.socket) -> None:
    poll = select.poll()
    poll.register(waiting, select.POLLOUT)
    poll.poll(SEND_WAIT)


def _datagrams(buffer: memoryview, segment_size: int) -> int:
    return -(-len(buffer) // max(1, segment_size))

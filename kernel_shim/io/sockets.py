"""The UDP sockets of each local address: IKE on 500, IKE and ESP on 4500, error queues, segmentation and coalescing."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Final, NamedTuple

from kernel_shim.io import steering
from kernel_shim.io.counters import Counters
from kernel_shim.io.settings import READ_BYTES, READS, SOCKET_BUFFER
from kernel_shim.model import PORT_IKE, PORT_NAT_T, Endpoint, IPAddress, KernelError

# linux/udp.h, linux/in.h, linux/in6.h, asm-generic/socket.h, linux/errqueue.h: what Python's socket module does not name
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
SO_MEMINFO: Final = 55
MEMORY: Final = struct.Struct("=9I")  # linux/sock_diag.h: SK_MEMINFO_*, the last is drops
IP_MTU: Final = 14
IP_MTU_DISCOVER: Final = 10
IP_RECVERR: Final = 11
IP_PMTUDISC_DONT: Final = 0
IP_PMTUDISC_DO: Final = 2
IPV6_MTU: Final = 24
IPV6_MTU_DISCOVER: Final = 23
IPV6_RECVERR: Final = 25
SO_EE_ORIGIN_LOCAL: Final = 1  # without a port; the send that failed has reported it
EXTENDED_ERROR: Final = struct.Struct("=IBBBBII")  # errno, origin, type, code, padding, info, data

CMSG_BYTES: Final = 64
ERROR_CMSG_BYTES: Final = 512
ERROR_READS: Final = 64
SEND_TRIES: Final = 4
SEND_WAIT: Final = 2  # milliseconds for a full socket to drain, a try
MAX_ADDRESSES: Final = 256  # local addresses bound at a time
MAX_REMOTES: Final = 65_536  # remembered conversions of peer addresses
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


class Bound(NamedTuple):
    """The sockets of one local address."""

    ike: socket.socket
    ike_nat_t: socket.socket
    esp: EspSocket


def socket_address(endpoint: Endpoint) -> SocketAddress:
    """As Python's socket module wants it, without a look at the resolver."""
    address = endpoint.address
    if address.version == 4:
        return str(address), endpoint.port
    scope = address.scope_id
    index = 0 if scope is None else int(scope) if scope.isdigit() else socket.if_nametoindex(scope)
    return str(address).partition("%")[0], endpoint.port, 0, index


def open_udp(local: Endpoint, mark: int, *, fragment: bool, shared: bool = False) -> socket.socket:
    """A bound, non-blocking, marked UDP socket. `fragment`: IKE may be fragmented on its way, ESP never (RFC 4303 section 3.3.4)."""
    version = local.address.version
    opened = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        for forced, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                opened.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
            except PermissionError:
                opened.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
        discovery = IP_PMTUDISC_DONT if fragment else IP_PMTUDISC_DO
        if version == 4:
            opened.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, discovery)
        else:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)
        if shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(socket_address(local))
    except OSError as error:
        opened.close()
        number = error.errno or errno.EIO
        reason = "needs CAP_NET_BIND_SERVICE or ip_unprivileged_port_start" if number == errno.EACCES else os.strerror(number)
        raise KernelError(number, f"UDP {local}: {reason}") from error
    return opened


class EspSocket:
    """The ESP member of a port 4500 group."""

    def __init__(self, opened: socket.socket, local: Endpoint, mark: int, counters: Counters, path_mtu: PathMtu) -> None:
        self.local: Final = local
        self._socket: Final = opened
        self._mark: Final = mark
        self._counters: Final = counters
        self._path_mtu: Final = path_mtu
        self._segmentation = True
        self._remotes: dict[SocketAddress, Endpoint] = {}
        self._addresses: dict[Endpoint, SocketAddress] = {}
        version = local.address.version
        opened.setsockopt(*((socket.IPPROTO_IP, IP_RECVERR) if version == 4 else (socket.IPPROTO_IPV6, IPV6_RECVERR)), 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, buffer: memoryview) -> Iterator[Batch]:
        """Up to `READS` batches and about `READ_BYTES`; each is at the start of `buffer` until the next is asked for."""
        receive = self._socket.recvmsg_into
        remotes = self._remotes
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
            segment_size = length
            for level, kind, data in control:
                if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                    segment_size = int.from_bytes(data, "little")
            remote = remotes.get(address)
            if remote is None:
                if len(remotes) >= MAX_REMOTES:
                    remotes.clear()
                remote = remotes[address] = Endpoint(ip_address(address[0]), address[1])
            yield Batch(remote, length, segment_size)

    def send(self, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True) -> None:
        """Send datagrams of `segment_size` bytes, the last may be shorter. Never raises: what did not go is counted.

        With `whole` false the host may cut the datagram into fragments.
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
            self._attempt(remote, address, buffer, segment_size)
            self._discover_mtu(IP_PMTUDISC_DO)
        elif len(buffer) > segment_size:
            if self._segmentation and self._attempt(remote, address, buffer, segment_size) is not None:
                return
            singly = [self._attempt(remote, address, buffer[start : start + segment_size], segment_size) for start in range(0, len(buffer), segment_size)]
            if all(singly):
                # What did not go at once went singly: it was the segmentation. Else it was the address or the MTU (EINVAL in Linux 6.1).
                self._segmentation = False
        else:
            self._attempt(remote, address, buffer, segment_size)

    def _discover_mtu(self, discovery: int) -> None:
        option = (socket.IPPROTO_IP, IP_MTU_DISCOVER) if self.local.address.version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
        self._socket.setsockopt(*option, discovery)

    def _attempt(self, remote: Endpoint, address: SocketAddress, buffer: memoryview, segment_size: int) -> bool | None:
        """One sendmsg, with its repetitions; whether it went. None asks for the datagrams one by one."""
        segments = len(buffer) > segment_size
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", segment_size))] if segments else []
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
            probe.connect(socket_address(remote))
            level, option = (socket.IPPROTO_IP, IP_MTU) if version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU)
            self._mtu(remote, probe.getsockopt(level, option))
        self.read_errors()

    def _mtu(self, remote: Endpoint, mtu: int) -> None:
        if SMALLEST_MTU[remote.address.version] <= mtu <= 65535:
            self._path_mtu(self.local, remote, mtu)


def _wait_writable(waiting: socket.socket) -> None:
    poll = select.poll()
    poll.register(waiting, select.POLLOUT)
    poll.poll(SEND_WAIT)


def _datagrams(buffer: memoryview, segment_size: int) -> int:
    return -(-len(buffer) // max(1, segment_size))


class UdpSockets:
    """Every bound local address; the `IkeSocketProvider` of the PF_KEY server.

    Descriptors that `bind` gives stay the property of this object: it keeps them open, so that a restarted key manager
    gets the same ones, with what waits in them.
    """

    def __init__(self, mark: int, counters: Counters, path_mtu: PathMtu) -> None:
        self._mark: Final = mark
        self._counters: Final = counters
        self._path_mtu: Final = path_mtu
        self._bound: dict[IPAddress, Bound] = {}
        self.on_bound: Callable[[EspSocket], None] = lambda _: None
        self.on_unbound: Callable[[EspSocket], None] = lambda _: None

    def addresses(self) -> frozenset[IPAddress]:
        return frozenset(self._bound)

    def esp(self, address: IPAddress) -> EspSocket | None:
        bound = self._bound.get(address)
        return bound.esp if bound else None

    def losses(self) -> int:
        """Datagrams of ESP that found a receive queue full."""
        return sum(bound.esp.losses() for bound in self._bound.values())

    def bind(self, address: IPAddress) -> tuple[int, int]:
        """KernelError: EADDRNOTAVAIL, EADDRINUSE, EACCES, EMFILE."""
        bound = self._bound.get(address)
        if bound is None:
            if len(self._bound) >= MAX_ADDRESSES:
                raise KernelError(errno.EMFILE, f"{MAX_ADDRESSES} local addresses are bound already")
            bound = self._bound[address] = self._open(address)
            self.on_bound(bound.esp)
        return bound.ike.fileno(), bound.ike_nat_t.fileno()

    def _open(self, address: IPAddress) -> Bound:
        ike, nat_t = Endpoint(address, PORT_IKE), Endpoint(address, PORT_NAT_T)
        # Alone first: SO_REUSEPORT would join the group of another process without a word.
        open_udp(nat_t, self._mark, fragment=True).close()
        opened: list[socket.socket] = []
        try:
            opened.append(open_udp(ike, self._mark, fragment=True))
            # In the order of steering.IKE_MEMBER and steering.ESP_MEMBER.
            opened.append(open_udp(nat_t, self._mark, fragment=True, shared=True))
            opened.append(open_udp(nat_t, self._mark, fragment=False, shared=True))
            for member in opened[1:]:
                with suppress(OSError):  # an old kernel: datagrams come one by one
                    member.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            steering.attach(opened[1])
            return Bound(opened[0], opened[1], EspSocket(opened[2], nat_t, self._mark, self._counters, self._path_mtu))
        except OSError as error:
            for one in opened:
                one.close()
            raise KernelError(error.errno or errno.EIO, f"UDP {nat_t}: {error.strerror}") from error
        except KernelError:
            for one in opened:
                one.close()
            raise

    def unbind(self, address: IPAddress) -> None:
        bound = self._bound.pop(address, None)
        if bound is not None:
            self.on_unbound(bound.esp)
            for one in bound:
                one.close()

    def close(self) -> None:
        for address in list(self._bound):
            self.unbind(address)

"""The sockets of each local address: IKE on UDP 500, IKE and ESP on UDP 4500, and protocol 50 where raw sockets may be opened."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from kernel_shim.io import steering
from kernel_shim.io.counters import Counters
from kernel_shim.io.esp_sockets import (
    IP_MTU_DISCOVER,
    IP_PMTUDISC_DO,
    IP_PMTUDISC_DONT,
    IPV6_MTU_DISCOVER,
    UDP_GRO,
    EspSocket,
    PathMtu,
    RawEspSocket,
    UdpEspSocket,
    socket_address,
)
from kernel_shim.io.settings import SOCKET_BUFFER
from kernel_shim.model import NO_PORT, PORT_IKE, PORT_NAT_T, PROTOCOL_ESP, Endpoint, IPAddress, KernelError

# asm-generic/socket.h: what Python's socket module does not name
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33

MAX_ADDRESSES: Final = 256  # local addresses bound at a time


class Bound(NamedTuple):
    """The UDP sockets of one local address."""

    ike: socket.socket
    ike_nat_t: socket.socket
    esp: EspSocket


def raw_sockets_allowed() -> bool:
    """Whether this process may open raw sockets (CAP_NET_RAW)."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, PROTOCOL_ESP).close()
    except OSError:
        return False
    return True


def open_udp(local: Endpoint, mark: int, *, fragment: bool, shared: bool = False) -> socket.socket:
    """A bound, non-blocking, marked UDP socket. `fragment`: IKE may be fragmented on its way, ESP never (RFC 4303 section 3.3.4)."""
    return _open(socket.SOCK_DGRAM, 0, local, mark, fragment=fragment, shared=shared)


def open_raw(address: IPAddress, mark: int) -> socket.socket:
    """A bound, non-blocking, marked raw socket of protocol 50."""
    return _open(socket.SOCK_RAW, PROTOCOL_ESP, Endpoint(address, NO_PORT), mark, fragment=False, shared=False)


def _open(kind: int, protocol: int, local: Endpoint, mark: int, *, fragment: bool, shared: bool) -> socket.socket:
    version = local.address.version
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    what = f"protocol {protocol} at {local.address}" if protocol else f"UDP {local}"
    try:
        opened = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    except OSError as error:
        raise KernelError.of(error, what) from error
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
            if not protocol:  # a raw one is for one family anyway
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)
        if shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(socket_address(local))
    except OSError as error:
        opened.close()
        number = error.errno or errno.EIO
        reason = "needs CAP_NET_BIND_SERVICE or ip_unprivileged_port_start" if number == errno.EACCES else os.strerror(number)
        raise KernelError(number, f"{what}: {reason}") from error
    return opened


class GatewaySockets:
    """Every bound local address; the `IkeSocketProvider` of the PF_KEY server. `raw`: protocol 50 beside UDP.

    Descriptors that `bind` gives stay the property of this object: it keeps them open, so that a restarted key manager
    gets the same ones, with what waits in them.
    """

    def __init__(self, mark: int, counters: Counters, path_mtu: PathMtu, *, raw: bool = False) -> None:
        self._mark: Final = mark
        self._counters: Final = counters
        self._path_mtu: Final = path_mtu
        self._with_raw: Final = raw
        self._bound: dict[IPAddress, Bound] = {}
        self._raw: dict[IPAddress, EspSocket] = {}
        self.on_bound: Callable[[EspSocket], None] = lambda _: None
        self.on_unbound: Callable[[EspSocket], None] = lambda _: None

    def addresses(self) -> frozenset[IPAddress]:
        return frozenset(self._bound)

    def esp(self, local: Endpoint) -> EspSocket | None:
        """By which ESP leaves from `local`."""
        if not local.port:
            return self._raw.get(local.address)
        bound = self._bound.get(local.address)
        return bound.esp if bound else None

    def losses(self) -> int:
        """ESP packets that found a receive queue full."""
        return sum(bound.esp.losses() for bound in self._bound.values()) + sum(raw.losses() for raw in self._raw.values())

    def bind(self, address: IPAddress) -> tuple[int, int]:
        """KernelError: EADDRNOTAVAIL, EADDRINUSE, EACCES, EMFILE."""
        bound = self._bound.get(address)
        if bound is None:
            if len(self._bound) >= MAX_ADDRESSES:
                raise KernelError(errno.EMFILE, f"{MAX_ADDRESSES} local addresses are bound already")
            bound = self._open(address)
            try:
                # From the start: a peer may send as soon as it knows our SPI, which is before our SA has its keys.
                self.bind_raw(address)
            except KernelError:
                for one in bound:
                    one.close()
                raise
            self._bound[address] = bound
            self.on_bound(bound.esp)
        return bound.ike.fileno(), bound.ike_nat_t.fileno()

    def bind_raw(self, address: IPAddress) -> None:
        """Take protocol 50 at an address of this host, for a key manager with IKE sockets of its own too. Errors as `bind`."""
        if not self._with_raw or address in self._raw:
            return
        if len(self._raw) >= MAX_ADDRESSES:
            raise KernelError(errno.EMFILE, f"{MAX_ADDRESSES} local addresses are bound already")
        raw = RawEspSocket(open_raw(address, self._mark), Endpoint(address, NO_PORT), self._mark, self._counters, self._path_mtu)
        self._raw[address] = raw
        self.on_bound(raw)

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
            return Bound(opened[0], opened[1], UdpEspSocket(opened[2], nat_t, self._mark, self._counters, self._path_mtu))
        except OSError as error:
            for one in opened:
                one.close()
            raise KernelError.of(error, f"UDP {nat_t}") from error
        except KernelError:
            for one in opened:
                one.close()
            raise

    def unbind(self, address: IPAddress) -> None:
        raw = self._raw.pop(address, None)
        if raw is not None:
            self.on_unbound(raw)
            raw.close()
        bound = self._bound.pop(address, None)
        if bound is not None:
            self.on_unbound(bound.esp)
            for one in bound:
                one.close()

    def close(self) -> None:
        for address in {*self._bound, *self._raw}:
            self.unbind(address)

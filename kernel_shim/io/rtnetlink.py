"""Routes over netlink in batches: one send, one acknowledgement each (rtnetlink(7)).

pyroute2 serves for links, addresses and rules; a route takes it half a millisecond, and policies bring routes by the thousand
while packets wait.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kernel_shim.model import IPAddress, IPNetwork, KernelError

# linux/rtnetlink.h, linux/netlink.h
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_REPLACE: Final = 0x100
NLM_F_CREATE: Final = 0x400
NLMSG_ERROR: Final = 2
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_PRIORITY: Final = 6
RTA_PREFSRC: Final = 7
RTA_TABLE: Final = 15
RT_TABLE_UNSPEC: Final = 0  # the attribute tells the table
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_LINK: Final = 253

BATCH: Final = 128  # messages a send: their acknowledgements fit the smallest receive buffer
ANSWER_SECONDS: Final = 10.0
ANSWER_BYTES: Final = 65_536

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, destination and source length, TOS, table, protocol, scope, type, flags
_ATTRIBUTE: Final = struct.Struct("=HH")
_WORD: Final = struct.Struct("=I")
_ERROR: Final = struct.Struct("=i")


class RouteType(IntEnum):
    """`RTN_*`."""

    UNICAST = 1
    BLACKHOLE = 6
    UNREACHABLE = 7
    THROW = 9


@dataclass(frozen=True, slots=True)
class RouteChange:
    """Put a route, in place of one of the same table, prefix and metric, or take it away. `interface` is an index, for UNICAST."""

    put: bool
    kind: RouteType
    table: int
    destination: IPNetwork
    metric: int
    interface: int = 0
    preferred: IPAddress | None = None


class RouteSocket:
    """Synchronous: a change is in force when `change` returns. `protocol` marks the routes as ours."""

    def __init__(self, protocol: int) -> None:
        self._protocol: Final = protocol
        self._sequence = 0
        self._socket: Final = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.bind((0, 0))

    @property
    def port(self) -> int:
        """By which notices tell that a change was ours."""
        port: int = self._socket.getsockname()[0]
        return port

    def change(self, changes: Sequence[RouteChange]) -> list[int]:
        """An errno for each change, 0 where it took. KernelError when the kernel does not answer."""
        results: list[int] = []
        for start in range(0, len(changes), BATCH):
            results += self._exchange(changes[start : start + BATCH])
        return results

    def _exchange(self, changes: Sequence[RouteChange]) -> list[int]:
        first = self._sequence
        self._sequence = (first + len(changes)) & 0x7FFFFFFF
        numbers = {(first + index) & 0x7FFFFFFF: index for index in range(len(changes))}
        results = [errno.EIO] * len(changes)
        try:
            self._socket.send(b"".join(self._message(number, changes[index]) for number, index in numbers.items()))
            while numbers:
                data, sender = self._socket.recvfrom(ANSWER_BYTES)
                if sender[0] != 0:
                    continue  # only the kernel is believed
                for number, error in _answers(data):
                    index = numbers.pop(number, None)
                    if index is not None:
                        results[index] = error
        except OSError as error:
            raise KernelError(error.errno or errno.ETIMEDOUT, f"routes: {error.strerror or os.strerror(errno.ETIMEDOUT)}") from error
        return results

    def _message(self, number: int, change: RouteChange) -> bytes:
        network = change.destination
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        scope = RT_SCOPE_LINK if network.version == 4 and change.kind is RouteType.UNICAST else RT_SCOPE_UNIVERSE
        body = _ROUTE.pack(family, network.prefixlen, 0, 0, RT_TABLE_UNSPEC, self._protocol, scope, change.kind, 0)
        body += _attribute(RTA_TABLE, _WORD.pack(change.table)) + _attribute(RTA_PRIORITY, _WORD.pack(change.metric))
        body += _attribute(RTA_DST, network.network_address.packed)
        if change.interface:
            body += _attribute(RTA_OIF, _WORD.pack(change.interface))
        if change.preferred is not None:
            body += _attribute(RTA_PREFSRC, change.preferred.packed)
        kind, flags = (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE) if change.put else (RTM_DELROUTE, 0)
        return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, number, 0) + body

    def close(self) -> None:
        self._socket.close()


def _attribute(kind: int, value: bytes) -> bytes:
    """All our values are of whole words: no padding."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def _answers(data: bytes) -> list[tuple[int, int]]:
    """Sequence number and errno of each acknowledgement."""
    found = []
    offset = 0
    while offset + _HEADER.size + _ERROR.size <= len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, offset)
        if kind == NLMSG_ERROR:
            found.append((number, -_ERROR.unpack_from(data, offset + _HEADER.size)[0]))
        if length < _HEADER.size:
            break
        offset += (length + 3) & ~3
    return found

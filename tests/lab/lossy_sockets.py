"""Sockets to Linux's own IPsec that lose a part of every class of message, as a full receive buffer makes them.

Netlink says so (ENOBUFS); AF_KEY does not. Of a dump one datagram is lost or none, or no large one would ever come through.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from kernel_shim.channel.af_key_socket import AfKeyTransport
from kernel_shim.channel.netlink import NetlinkSocket
from kernel_shim.pfkey.codec import header_of
from kernel_shim.pfkey.constants import MessageType

NLM_F_MULTI: Final = 2
PFKEY_DUMPS: Final = frozenset({MessageType.DUMP, MessageType.X_SPDDUMP})
DEEPEST_LOSS: Final = 8  # datagrams into a dump
SQUEEZED: Final = 1  # octets of a receive buffer; the kernel makes its least of it
ROOMY: Final = 4 << 20


class Losses:
    """How many a hundred are lost, how many were, and the sockets that lose them."""

    def __init__(self, loss: float, seed: int) -> None:
        self.loss = loss
        self.lost = self.passed = 0
        self._draw = random.Random(seed)
        self._sockets: list[socket.socket] = []
        self._dumps: dict[int, int] = {}  # by the number of the dump: datagrams until the one that is lost

    def add(self, one: socket.socket) -> None:
        self._sockets.append(one)

    def squeeze(self, octets: int = SQUEEZED) -> None:
        """Receive buffers so small that the kernel itself overruns them."""
        for one in self._sockets:
            if one.fileno() >= 0:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, octets)

    def loses(self, dump: int | None = None) -> bool:
        if dump is None:
            lost = self._draw.random() < self.loss
        else:
            if dump not in self._dumps:
                self._dumps[dump] = self._draw.randrange(DEEPEST_LOSS) if self._draw.random() < self.loss else -1
            lost = self._dumps[dump] == 0
            self._dumps[dump] -= 1
        self.lost += lost
        self.passed += not lost
        return lost


class LossyNetlinkSocket(socket.socket):
    losses = Losses(0.0, 1)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._losses = self.losses
        self._losses.add(self)

    def recvmsg_into(self, buffers: Any, *arguments: Any) -> Any:
        got = super().recvmsg_into(buffers, *arguments)
        _, _, flags, sequence, _ = struct.unpack_from("=IHHII", buffers[0])
        if self._losses.loses(sequence if flags & NLM_F_MULTI else None):
            raise OSError(errno.ENOBUFS, "lost")
        return got


@contextmanager
def lossy_netlink(losses: Losses) -> Iterator[None]:
    """Channels opened meanwhile lose messages, also later."""
    LossyNetlinkSocket.losses = losses
    NetlinkSocket.socket_type = LossyNetlinkSocket
    try:
        yield
    finally:
        NetlinkSocket.socket_type = socket.socket


class _LossyKeySocket(socket.socket):
    losses: Losses
    dumps = 0

    def send(self, data: Any, *arguments: Any) -> int:
        self.dumps += header_of(bytes(data)).type in PFKEY_DUMPS
        return super().send(data, *arguments)

    def recv_into(self, buffer: Any, *arguments: Any) -> int:
        while True:
            length = super().recv_into(buffer, *arguments)
            header = header_of(bytes(buffer[:length]))
            if not self.losses.loses(self.dumps if header.type in PFKEY_DUMPS else None):
                return length


class LossyAfKeyTransport(AfKeyTransport):
    def __init__(self, losses: Losses) -> None:
        super().__init__()
        self._losses = losses

    async def connect(self) -> socket.socket:
        plain = await super().connect()
        # AF_KEY has no getsockname, by which a socket would find out for itself what it is.
        lossy = _LossyKeySocket(plain.family, plain.type, plain.proto, plain.detach())
        lossy.setblocking(False)
        lossy.losses = self._losses
        self._losses.add(lossy)
        return lossy

"""Sockets of Linux' AF_KEY, and how they tell that messages were dropped."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from struct import Struct
from typing import Final

from kernel_shim.model import Direction, KernelError
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import PF_KEY_V2, MessageType, SaType
from kernel_shim.pfkey.messages import Message

AF_KEY: Final = 15  # linux/socket.h
RECEIVE_BUFFER: Final = 8 << 20  # octets: some 5,000 ACQUIREs, each of which repeats all that the kernel could do
FULL: Final = (5, 6)  # of the buffer: from here on messages may have been dropped. A dump alone waits at 2/3 (pfkey_can_dump)

# asm-generic/socket.h, linux/sock_diag.h, linux/in.h, linux/in6.h, linux/ipsec.h
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO: Final = 55
_MEMINFO: Final = Struct("=II")  # SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_RCVBUF
_MEMINFO_SIZE: Final = 36
_IP_IPSEC_POLICY: Final = 16
_IPV6_IPSEC_POLICY: Final = 34
_IPSEC_POLICY_BYPASS: Final = 4
_SADB_X_POLICY: Final = Struct("=HHHBBII")
_SADB_X_EXT_POLICY: Final = 18


class AfKeyTransport:
    """`connect` raises KernelError(EPROTONOSUPPORT) where the kernel has no AF_KEY, PermissionError without CAP_NET_ADMIN."""

    answers_at_once = True

    def __init__(self, receive_buffer: int = RECEIVE_BUFFER) -> None:
        self._receive_buffer = receive_buffer
        self._full = False

    async def connect(self) -> socket.socket:
        opened = open_af_key(self._receive_buffer)
        try:
            # The first REGISTER has the kernel load its cipher modules, which may take seconds: not on the loop.
            await asyncio.get_running_loop().run_in_executor(None, _load_ciphers, opened)
        except BaseException:
            opened.close()
            raise
        return opened

    def receive(self, opened: socket.socket, buffer: bytearray) -> tuple[int, tuple[int, ...]]:
        return opened.recv_into(buffer), ()

    def overrun(self, opened: socket.socket) -> bool:
        """Said when a time of drops begins, and again when it is over."""
        filled, size = _MEMINFO.unpack_from(opened.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_SIZE))
        full = filled * FULL[1] > size * FULL[0]
        changed, self._full = full is not self._full, full
        return changed


def open_af_key(receive_buffer: int = RECEIVE_BUFFER) -> socket.socket:
    """A socket that does not block, with a receive buffer beyond net.core.rmem_max where we may. Errors as of `AfKeyTransport`."""
    try:
        opened = socket.socket(AF_KEY, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, PF_KEY_V2)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT):
            raise
        raise KernelError(errno.EPROTONOSUPPORT, f"this kernel has no AF_KEY (module af_key): {error.strerror}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer // 2)  # the kernel doubles it
    except OSError:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer // 2)
    return opened


def _load_ciphers(opened: socket.socket) -> None:
    opened.send(Codec().encode(Message(MessageType.REGISTER, SaType.UNSPEC, sequence=1, pid=os.getpid())))
    opened.recv(1 << 16)


def bypass_policies(opened: socket.socket) -> None:
    """Let a socket's own packets, in and out, pass every policy, where only AF_KEY says so. OSError where that is not permitted."""
    level, option = (socket.IPPROTO_IP, _IP_IPSEC_POLICY) if opened.family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_IPSEC_POLICY)
    for direction in (Direction.IN, Direction.OUT):
        words = _SADB_X_POLICY.size // 8
        opened.setsockopt(level, option, _SADB_X_POLICY.pack(words, _SADB_X_EXT_POLICY, _IPSEC_POLICY_BYPASS, direction, 0, 0, 0))

"""A netlink socket to the kernel, for asyncio: requests that all end, and bounded reading of what the kernel multicasts.

pyroute2's message classes are used, its sockets are not: their queues have no bound, so what a slow reader misses would become memory
instead of an overrun that is heard of.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import KernelError
from kernel_shim.xfrm.constants import NETLINK_XFRM, NetlinkFlag, NetlinkType
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message, decode, encode, error_of, error_text

# linux/netlink.h
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10  # an error does not repeat the request, which may hold keys
NETLINK_EXT_ACK: Final = 11  # an error says in words what is wrong

REPLY_TIMEOUT: Final = 5.0  # s without an answer, or without more of a dump; the kernel answers within the call unless it loads a module
LONG_TIMEOUT: Final = 30.0  # s, where the kernel may have to load cipher modules first
ATTEMPTS: Final = 3
MAX_UNDER_WAY: Final = 32  # requests; their answers fit the receive buffer many times over
MAX_DUMP_ENTRIES: Final = 1_000_000
SLICE: Final = 256  # entries of a dump that are translated at a time, so that it does not starve the rest of the loop
READ_SIZE: Final = 1 << 16  # the kernel fills at most 32 KB at a time (netlink_dump)
READS_A_WAKEUP: Final = 16  # datagrams, so that neither a dump nor a storm of ACQUIREs starves the rest of the loop
REPLY_BUFFER: Final = 1 << 20  # octets; doubled by the kernel
_LAST_SEQUENCE: Final = 0xFFFFFFFF
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h


@dataclass(slots=True)
class _Request:
    future: asyncio.Future[list[Message]]
    dump: bool
    timeout: float
    timer: asyncio.TimerHandle | None = None
    replies: list[Message] = field(default_factory=list)
    interrupted: bool = False


class _DumpInterrupted(Exception):
    """The table changed under a dump, which is thus no snapshot."""


class NetlinkSocket:
    """One netlink socket of the XFRM family. `on_message` hears what answers no request, `on_overrun` that messages were lost."""

    socket_type: ClassVar[type[socket.socket]] = socket.socket

    def __init__(
        self,
        groups: Iterable[int] = (),
        *,
        receive_buffer: int = REPLY_BUFFER,
        on_message: Callable[[Message], None] = lambda message: None,
        on_overrun: Callable[[], None] = lambda: None,
    ) -> None:
        self._groups = sum(1 << (group - 1) for group in groups)
        self._receive_buffer = receive_buffer
        self._on_message = on_message
        self._on_overrun = on_overrun
        self._socket: socket.socket | None = None
        self._requests: dict[int, _Request] = {}
        self._sequence = secrets.randbelow(1 << 31)
        self._window = asyncio.Semaphore(MAX_UNDER_WAY)
        self._dump_lock = asyncio.Lock()  # the kernel runs one dump a socket, and refuses a second with EBUSY
        self._repeating = asyncio.Lock()  # one by one, for together they may have been too many
        self.malformed = 0
        self.overruns = 0
        self.timeouts = 0

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def open(self) -> None:
        """In the network namespace of the calling thread. KernelError when the kernel has no such family, or does not let us."""
        self._loop = asyncio.get_running_loop()
        try:
            self._socket = self._opened()
        except OSError as error:
            raise KernelError.of(error, "NETLINK_XFRM does not open", needs="CAP_NET_ADMIN") from error
        self._buffer = bytearray(READ_SIZE)
        self._loop.add_reader(self._socket, self._readable)

    def _opened(self) -> socket.socket:
        opened = self.socket_type(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, NETLINK_XFRM)
        try:
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                with suppress(OSError):
                    opened.setsockopt(SOL_NETLINK, option, 1)
            _enlarge(opened, self._receive_buffer)
            opened.bind((0, self._groups))
            self._port = opened.getsockname()[0]
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Requests under way end with ChannelClosed."""
        opened, self._socket = self._socket, None
        if opened is not None:
            self._loop.remove_reader(opened)
            opened.close()
        for request in self._requests.values():
            _fail(request.future, ChannelClosed("the channel was closed"))

    # Requests

    async def request(self, message: Message, *, repeat: bool = True, timeout: float = REPLY_TIMEOUT) -> list[Message]:
        """The replies to `message`: one, none, or all of a dump.

        KernelError when the kernel refuses, TimeoutError when it does not answer, or when its answer was lost and `repeat` is unset:
        for requests that must not be made twice unlooked.
        """
        dump = message.flags & NetlinkFlag.DUMP == NetlinkFlag.DUMP
        async with self._dump_lock if dump else self._window:
            for left in reversed(range(ATTEMPTS if repeat else 1)):
                try:
                    if left == ATTEMPTS - 1 or not repeat:
                        return await self._once(message, dump, timeout)
                    async with self._repeating:
                        return await self._once(message, dump, timeout)
                except (TimeoutError, _DumpInterrupted):
                    if left == 0:
                        raise TimeoutError(f"no answer to message {message.type:#x}") from None
        raise AssertionError("unreachable")

    async def _once(self, message: Message, dump: bool, timeout: float) -> list[Message]:
        if self._socket is None:
            raise ChannelClosed("the channel is not open")
        sequence = self._next_sequence()
        request = _Request(self._loop.create_future(), dump, timeout)
        self._requests[sequence] = request
        self._restart_timer(request)
        try:
            self._send(encode(replace(message, sequence=sequence)))
            return await request.future
        except TimeoutError:
            self.timeouts += 1
            raise
        finally:
            del self._requests[sequence]
            if request.timer is not None:
                request.timer.cancel()

    def _send(self, data: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.send(data)
        except OSError as error:
            # The kernel works a request off within the call, and refuses the call itself only for want of memory, or to tell of an overrun.
            if error.errno == errno.ENOBUFS:
                self._overrun()
                raise TimeoutError("an overrun") from error
            number = error.errno or errno.EIO
            raise KernelError(number, f"netlink: {os.strerror(number)}") from error

    def _restart_timer(self, request: _Request) -> None:
        if request.timer is not None:
            request.timer.cancel()
        request.timer = self._loop.call_later(request.timeout, _fail, request.future, TimeoutError("no answer"))

    def _next_sequence(self) -> int:
        self._sequence = self._sequence + 1 if self._sequence < _LAST_SEQUENCE else 1  # 0 is the kernel's own
        return self._sequence

    # Reading

    def _readable(self) -> None:
        for _ in range(READS_A_WAKEUP):
            if not self.read():
                return

    def read(self) -> bool:
        """Take one datagram that is there already; False when there is none."""
        if self._socket is None:
            return False
        try:
            length, _, flags, sender = self._socket.recvmsg_into((self._buffer,))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self._overrun()
                return True
            raise
        if sender[0] != 0:
            return True  # only the kernel is believed
        if flags & socket.MSG_TRUNC:
            self._overrun()
        else:
            self._take(bytes(self._buffer[:length]))
        return True

    def _take(self, datagram: bytes) -> None:
        try:
            for message in decode(datagram):
                self._message(message)
        except MalformedMessage:
            self.malformed += 1

    def _message(self, message: Message) -> None:
        if message.type == NetlinkType.OVERRUN:
            self._overrun()
            return
        request = self._requests.get(message.sequence) if message.sequence else None
        if request is None or request.future.done():
            # An answer that came too late has our port id.
            if message.port != self._port and message.type not in (NetlinkType.NOOP, NetlinkType.ERROR, NetlinkType.DONE):
                self._on_message(message)
            return
        request.interrupted |= bool(message.flags & NetlinkFlag.DUMP_INTR)
        if message.type == NetlinkType.ERROR or message.type == NetlinkType.DONE:
            self._settle(request, message)
        elif message.type != NetlinkType.NOOP:
            if len(request.replies) >= MAX_DUMP_ENTRIES:
                _fail(request.future, KernelError(errno.EMSGSIZE, f"a dump of more than {MAX_DUMP_ENTRIES} entries"))
                return
            request.replies.append(message)
            if request.dump:
                self._restart_timer(request)

    def _settle(self, request: _Request, message: Message) -> None:
        number = error_of(message)
        if number:
            _fail(request.future, KernelError(number, error_text(message) or os.strerror(number)))
        elif request.interrupted:
            _fail(request.future, _DumpInterrupted())
        else:
            request.future.set_result(request.replies)

    def _overrun(self) -> None:
        """Something was lost, and nobody knows what: every request under way is in doubt."""
        self.overruns += 1
        for request in self._requests.values():
            _fail(request.future, TimeoutError("an overrun"))
        self._on_overrun()


def _fail(future: asyncio.Future[list[Message]], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _enlarge(opened: socket.socket, octets: int) -> None:
    """Beyond net.core.rmem_max where we may."""
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, octets)
    except OSError:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, octets)

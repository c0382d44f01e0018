"""PF_KEY over a socket, for asyncio: requests that all end, dumps, events. What they mean is for the channel above to say.

A `Transport` is all that differs between our shim's UNIX socket and Linux' AF_KEY.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, Protocol, TypeVar

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import KernelError, KernelEvent
from kernel_shim.pfkey.client import ClientSession, Overrun, Refused, Replied, Reported, SessionEvent, Ticket, TimedOut, Unclaimed
from kernel_shim.pfkey.constants import MAX_MESSAGE, MessageType, SaType
from kernel_shim.pfkey.messages import Extension, Message, PfKeyError

_T = TypeVar("_T")

READS_A_WAKEUP: Final = 64  # datagrams, so that a dump does not starve the rest of the loop
SLICE: Final = 256  # entries of a dump that are translated at a time, for the same reason
SOCKET_BUFFER: Final = 1 << 20  # octets
MAX_DESCRIPTORS: Final = 16  # that one datagram may bring
CONNECT_TRIES: Final = 20  # while the shim's backlog is full
CONNECT_PAUSE: Final = 0.05  # s


class Transport(Protocol):
    """A socket on which one datagram is one PF_KEY message.

    `answers_at_once`: the kernel works a request off within the call that sends it, and refuses with the call what it does not
    take. What has no answer once the socket is read empty was lost. Dumps come as `ClientSession` says of `numbered_dumps`.
    """

    answers_at_once: bool

    async def connect(self) -> socket.socket:
        """A socket that does not block, in the network namespace of the calling thread."""

    def receive(self, opened: socket.socket, buffer: bytearray) -> tuple[int, tuple[int, ...]]:
        """How many octets of `buffer` one datagram fills, and the descriptors that came with it; 0 when the other side is gone. OSError as of recv."""

    def overrun(self, opened: socket.socket) -> bool:
        """Whether messages may have been dropped since the last call."""


class UnixTransport:
    """To the shim that listens at `path`: a stream that drops nothing."""

    answers_at_once = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    async def connect(self) -> socket.socket:
        """ConnectionRefusedError or FileNotFoundError when none listens."""
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            for left in reversed(range(CONNECT_TRIES)):
                try:
                    opened.connect(self._path)
                    break
                except BlockingIOError:
                    if left == 0:
                        raise ConnectionRefusedError(errno.ECONNREFUSED, "the shim accepts no connection") from None
                    await asyncio.sleep(CONNECT_PAUSE)
        except BaseException:
            opened.close()
            raise
        return opened

    def receive(self, opened: socket.socket, buffer: bytearray) -> tuple[int, tuple[int, ...]]:
        length, ancillary, _, _ = opened.recvmsg_into((buffer,), socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
        return length, _descriptors_of(ancillary)

    def overrun(self, opened: socket.socket) -> bool:
        return False


class RequestRefused(KernelError):
    """The kernel refused a request that was sent more than once: perhaps only because it had its effect the first time."""


class PfKeyLink:
    """One connection; opened once. Listeners are called by way of the loop, as futures wake their waiters: replies and events keep their order."""

    def __init__(
        self,
        transport: Transport,
        *,
        on_event: Callable[[KernelEvent], None],
        on_overrun: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._on_event = on_event
        self._on_overrun = on_overrun
        self._on_lost = on_lost
        # High, for kernels without our extensions take a low number for that of an ACQUIRE.
        first = (1 << 30) + secrets.randbelow(1 << 29)
        self._session = ClientSession(os.getpid(), first_sequence=first, numbered_dumps=transport.answers_at_once)
        self._socket: socket.socket | None = None
        self._futures: dict[Ticket, asyncio.Future[Replied]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing = False
        self._looking = False
        self._buffer = bytearray()
        self.overruns = 0

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    @property
    def repeated(self) -> int:
        return self._session.repeated

    @property
    def malformed(self) -> int:
        return self._session.malformed

    # Life

    async def open(self) -> None:
        """Raises what the transport's `connect` raises."""
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(MAX_MESSAGE)
        self._socket = await self._transport.connect()
        self._loop.add_reader(self._socket, self._readable)

    def close(self) -> None:
        self._shut(ChannelClosed("the channel was closed"))

    def _shut(self, error: ChannelClosed) -> None:
        opened, self._socket = self._socket, None
        if opened is not None:
            self._loop.remove_reader(opened)
            self._loop.remove_writer(opened)
            opened.close()
        if self._timer is not None:
            self._timer.cancel()
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(error)

    def _lost(self) -> None:
        """The kernel side went away."""
        self._shut(ChannelClosed("the kernel side went away"))
        self._on_lost()

    # Requests

    async def request(self, kind: MessageType, extensions: Iterable[Extension], sequence: int = 0, *, sa_type: SaType = SaType.ESP) -> Replied:
        """The reply, or all of a dump; descriptors in it are the caller's.

        KernelError when refused (RequestRefused when that may be because of its own repetition), TimeoutError, ChannelClosed.
        """
        self.require_open()
        ticket = self._session.request(Message(kind, sa_type, sequence=sequence, extensions=tuple(extensions)), self._loop.time())
        future: asyncio.Future[Replied] = self._loop.create_future()
        self._futures[ticket] = future
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(ticket, future)
            raise

    async def ask(self, kind: MessageType, extensions: Iterable[Extension], sequence: int = 0, *, sa_type: SaType = SaType.ESP) -> Message:
        """As `request`, for those with one reply and no descriptors."""
        replied = await self.request(kind, extensions, sequence, sa_type=sa_type)
        close_all(replied.descriptors)
        return replied.messages[0]

    async def dump(self, kind: MessageType, translate: Callable[[Message], _T]) -> list[_T]:
        messages = (await self.request(kind, ())).messages
        entries: list[_T] = []
        for at in range(0, len(messages), SLICE):
            entries += [translate(message) for message in messages[at : at + SLICE]]
            await asyncio.sleep(0)
        return entries

    def notify(self, message: Message) -> None:
        """Sends what has no reply."""
        self.require_open()
        self._session.notify(message)
        self._pump()

    def _abandon(self, ticket: Ticket, future: asyncio.Future[Replied]) -> None:
        if self._futures.pop(ticket, None) is not None:
            self._session.cancel(ticket, self._loop.time())
        elif future.done() and not future.cancelled() and future.exception() is None:
            close_all(future.result().descriptors)

    def require_open(self) -> None:
        if self._socket is None:
            raise ChannelClosed("the channel is not open")

    # The socket

    def _readable(self) -> None:
        for _ in range(READS_A_WAKEUP):
            if self._socket is None:
                return
            if self._transport.overrun(self._socket):
                self.overruns += 1
                self._session.overrun()
            try:
                length, descriptors = self._transport.receive(self._socket, self._buffer)
            except BlockingIOError:
                if self._transport.answers_at_once:
                    self._session.nothing_left(self._loop.time())
                break
            except InterruptedError:
                break
            except OSError:
                self._lost()
                return
            if length == 0:
                close_all(descriptors)
                self._lost()
                return
            # More than MAX_MESSAGE octets cannot say their own length: the codec refuses the cut message.
            self._session.receive(bytes(self._buffer[:length]), descriptors, self._loop.time())
        self._pump()

    def _look(self) -> None:
        self._looking = False
        self._readable()

    def _writable(self) -> None:
        self._pump()

    def _pump(self) -> None:
        """Sends what waits, hands out what came, sets the one timer."""
        self._flush()
        while (event := self._session.next_event()) is not None:
            self._handle(event)
        if self._socket is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._session.next_deadline()
        self._timer = self._loop.call_at(deadline, self._tick) if deadline is not None else None

    def _tick(self) -> None:
        self._session.tick(self._loop.time())
        self._pump()

    def _flush(self) -> None:
        while self._socket is not None and (data := self._session.next_output()) is not None:
            try:
                self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._socket, self._writable)
                return
            except OSError as error:
                if self._transport.answers_at_once:
                    number = error.errno or errno.EIO
                    self._session.output_refused(KernelError(number, f"not taken by the kernel: {os.strerror(number)}"), self._loop.time())
                    continue
                self._lost()
                return
            self._session.output_sent()
            if self._transport.answers_at_once and not self._looking:
                self._looking = True
                self._loop.call_soon(self._look)  # also when nothing came: then the answer was lost
        if self._writing and self._socket is not None:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def _handle(self, event: SessionEvent) -> None:
        if isinstance(event, Reported):
            self._on_event(event.event)
        elif isinstance(event, Overrun):
            self._on_overrun()
        elif isinstance(event, Unclaimed):
            close_all(event.descriptors)
        else:
            self._settle(event)

    def _settle(self, event: Replied | Refused | TimedOut) -> None:
        future = self._futures.pop(event.ticket, None)
        if future is None or future.done():
            if isinstance(event, Replied):
                close_all(event.descriptors)
        elif isinstance(event, Replied):
            future.set_result(event)
        elif isinstance(event, TimedOut):
            future.set_exception(TimeoutError("the kernel side does not answer"))
        elif event.repeated and not isinstance(event.error, PfKeyError):
            future.set_exception(RequestRefused(event.error.errno, event.error.detail))
        else:
            future.set_exception(event.error)


def _descriptors_of(ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[int, ...]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return tuple(descriptors)


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)

"""PF_KEY over a UNIX SOCK_SEQPACKET socket, for asyncio: how a key manager reaches the shim."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import (
    AcquireSequence,
    Action,
    Capabilities,
    Direction,
    IPAddress,
    KernelError,
    KernelEvent,
    Policy,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from kernel_shim.pfkey.client import ClientSession, Overrun, Refused, Replied, Reported, SessionEvent, Ticket, TimedOut, Unclaimed
from kernel_shim.pfkey.constants import MAX_MESSAGE, ExtensionType, MessageType, SaType
from kernel_shim.pfkey.event_messages import plain_capabilities
from kernel_shim.pfkey.messages import Extension, Message, PolicyExtension, Sa
from kernel_shim.pfkey.policy_messages import policy_extensions, policy_from, require_policy_expressible, require_selector_expressible, selector_extensions
from kernel_shim.pfkey.private import BundleExtension, CapabilitiesExtension, Hello, PendingExtension, Statistics
from kernel_shim.pfkey.sa_messages import (
    host_address,
    require_expressible,
    sa_extensions,
    sa_id_extensions,
    spi_request_extensions,
    status_from,
)

_T = TypeVar("_T")

READS_A_WAKEUP: Final = 64  # datagrams, so that a dump does not starve the rest of the loop
SLICE: Final = 256  # entries of a dump that are translated at a time, for the same reason
SOCKET_BUFFER: Final = 1 << 20  # octets
MAX_DESCRIPTORS: Final = 16  # that one datagram may bring
MAX_HELD_EVENTS: Final = 8192  # until the first listener comes
CONNECT_TRIES: Final = 20  # while the shim's backlog is full
CONNECT_PAUSE: Final = 0.05  # s


class PfKeyChannel:
    """A `KernelChannel` to the shim that listens at `path`. `open` raises ConnectionRefusedError or FileNotFoundError when none does.

    `listens` False is for tools: the kernel does not take them for a key manager and sends no ACQUIRE or EXPIRE.
    `extensions` False keeps to what every PF_KEY kernel understands; what that cannot say is then refused by name.
    A channel is opened once.
    """

    def __init__(self, path: str | os.PathLike[str], *, listens: bool = True, extensions: bool = True) -> None:
        self._path = os.fspath(path)
        self._listens = listens
        self._ask_for_extensions = extensions
        self._private = False
        self._gone = False
        self._capabilities: Capabilities | None = None
        self._held: deque[KernelEvent] = deque()
        self._event_listeners: list[Callable[[KernelEvent], None]] = []
        self._overrun_listeners: list[Callable[[], None]] = []
        self._closed_listeners: list[Callable[[], None]] = []
        # High, for kernels without our extensions take a low number for that of an ACQUIRE.
        self._session = ClientSession(os.getpid(), first_sequence=(1 << 30) + secrets.randbelow(1 << 29))
        self._socket: socket.socket | None = None
        self._futures: dict[Ticket, asyncio.Future[Replied]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing = False
        self._buffer = bytearray()

    def capabilities(self) -> Capabilities:
        """Known once `open` has returned; ChannelClosed before."""
        if self._capabilities is None:
            raise ChannelClosed("the channel is not open")
        return self._capabilities

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """What came since `open` and had no listener yet goes to the first one."""
        self._event_listeners.append(listener)
        while self._held:
            self._loop.call_soon(listener, self._held.popleft())

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when the kernel side had to forget events: look at `sas()` and `policies()`."""
        self._overrun_listeners.append(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Also when it went away before."""
        self._closed_listeners.append(listener)
        if self._gone:
            self._loop.call_soon(listener)

    # Life

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(MAX_MESSAGE)
        self._socket = await self._connect()
        self._loop.add_reader(self._socket, self._readable)
        try:
            hello = (Hello(),) if self._ask_for_extensions else ()
            sa_type = SaType.ESP if self._listens else SaType.UNSPEC
            (reply,) = (await self._request(MessageType.REGISTER, hello, sa_type=sa_type)).messages
        except BaseException:
            await self.close()
            raise
        told = reply.find(CapabilitiesExtension)
        self._private = reply.find(Hello) is not None and told is not None
        self._capabilities = told.capabilities if told is not None else plain_capabilities(reply)

    async def close(self) -> None:
        self._shut(ChannelClosed("the channel was closed"))

    async def _connect(self) -> socket.socket:
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
        self._gone = True
        self._shut(ChannelClosed("the kernel side went away"))
        for listener in self._closed_listeners:
            self._loop.call_soon(listener)

    # Requests

    async def get_spi(self, request: SpiRequest) -> Spi:
        sequence = 0 if self._private else request.acquire
        reply = await self._ask(MessageType.GETSPI, spi_request_extensions(request, private=self._private), sequence)
        return Spi(reply.require(Sa).spi)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        await self._put_sa(MessageType.ADD, sa)

    async def update_sa(self, sa: SecurityAssociation) -> None:
        await self._put_sa(MessageType.UPDATE, sa)

    async def _put_sa(self, kind: MessageType, sa: SecurityAssociation) -> None:
        if not self._private:
            require_expressible(sa)
        await self._ask(kind, sa_extensions(sa, private=self._private, keys=True), 0 if self._private else sa.acquire)

    async def delete_sa(self, sa: SaId) -> None:
        await self._ask(MessageType.DELETE, sa_id_extensions(sa))

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        raise KernelError(errno.EOPNOTSUPP, "this kernel cannot move an SA to other addresses")

    async def get_sa(self, sa: SaId) -> SaStatus:
        return status_from(await self._ask(MessageType.GET, sa_id_extensions(sa)))

    async def sas(self) -> Sequence[SaStatus]:
        return await self._dump(MessageType.DUMP, status_from)

    async def flush_sas(self) -> None:
        await self._ask(MessageType.FLUSH, ())

    async def add_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(MessageType.X_SPDADD, policy)

    async def update_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(MessageType.X_SPDUPDATE, policy)

    async def _put_policy(self, kind: MessageType, policy: Policy) -> Policy:
        if not self._private:
            require_policy_expressible(policy)
        return policy_from(await self._ask(kind, policy_extensions(policy, private=self._private)))

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        if not self._private:
            require_selector_expressible(selector)
        which = PolicyExtension(Action.DISCARD, direction)
        await self._ask(MessageType.X_SPDDELETE, (*selector_extensions(selector, private=self._private), which))

    async def policies(self) -> Sequence[Policy]:
        return await self._dump(MessageType.X_SPDDUMP, policy_from)

    async def flush_policies(self) -> None:
        await self._ask(MessageType.X_SPDFLUSH, ())

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """Returns at once: PF_KEY has no reply to it (RFC 2367 section 3.1.6)."""
        self._require_open()
        self._session.notify(Message(MessageType.ACQUIRE, SaType.ESP, errno, sequence))
        self._pump()

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        replied = await self._request(MessageType.X_BIND, (host_address(ExtensionType.ADDRESS_SRC, address),))
        if len(replied.descriptors) != 2:
            _close_all(replied.descriptors)
            raise KernelError(errno.EPROTO, f"{len(replied.descriptors)} descriptors for {address}, 2 expected")
        return replied.descriptors[0], replied.descriptors[1]

    async def unbind(self, address: IPAddress) -> None:
        await self._ask(MessageType.X_UNBIND, (host_address(ExtensionType.ADDRESS_SRC, address),))

    async def pending_queues(self) -> Sequence[PendingQueue]:
        """What waits for an SA. KernelError(EOPNOTSUPP) on a kernel without our extensions, as for the next."""
        return await self._inspect(MessageType.X_PENDINGDUMP, lambda message: message.require(PendingExtension).queue)

    async def cached_bundles(self) -> Sequence[CachedBundle]:
        return await self._inspect(MessageType.X_BUNDLEDUMP, lambda message: message.require(BundleExtension).bundle)

    async def _inspect(self, kind: MessageType, translate: Callable[[Message], _T]) -> list[_T]:
        if not self._private:
            raise KernelError(errno.EOPNOTSUPP, "this kernel does not show it")
        return await self._dump(kind, translate)

    async def statistics(self) -> Mapping[str, int]:
        if not self._private:
            return {}
        return dict((await self._ask(MessageType.X_STATISTICS, ())).require(Statistics).counters)

    async def _dump(self, kind: MessageType, translate: Callable[[Message], _T]) -> list[_T]:
        messages = (await self._request(kind, ())).messages
        entries: list[_T] = []
        for at in range(0, len(messages), SLICE):
            entries += [translate(message) for message in messages[at : at + SLICE]]
            await asyncio.sleep(0)
        return entries

    async def _ask(self, kind: MessageType, extensions: Iterable[Extension], sequence: int = 0) -> Message:
        replied = await self._request(kind, extensions, sequence)
        _close_all(replied.descriptors)
        return replied.messages[0]

    async def _request(self, kind: MessageType, extensions: Iterable[Extension], sequence: int = 0, *, sa_type: SaType = SaType.ESP) -> Replied:
        self._require_open()
        ticket = self._session.request(Message(kind, sa_type, sequence=sequence, extensions=tuple(extensions)), self._loop.time())
        future: asyncio.Future[Replied] = self._loop.create_future()
        self._futures[ticket] = future
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(ticket, future)
            raise

    def _abandon(self, ticket: Ticket, future: asyncio.Future[Replied]) -> None:
        if self._futures.pop(ticket, None) is not None:
            self._session.cancel(ticket, self._loop.time())
        elif future.done() and not future.cancelled() and future.exception() is None:
            _close_all(future.result().descriptors)

    def _require_open(self) -> None:
        if self._socket is None:
            raise ChannelClosed("the channel is not open")

    # The socket

    def _readable(self) -> None:
        for _ in range(READS_A_WAKEUP):
            if self._socket is None:
                return
            try:
                length, ancillary, _, _ = self._socket.recvmsg_into((self._buffer,), socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._lost()
                return
            descriptors = _descriptors_of(ancillary)
            if length == 0:
                _close_all(descriptors)
                self._lost()
                return
            # More than MAX_MESSAGE octets cannot say their own length: the codec refuses the cut message.
            self._session.receive(bytes(self._buffer[:length]), descriptors, self._loop.time())
        self._pump()

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
            except OSError:
                self._lost()
                return
            self._session.output_sent()
        if self._writing and self._socket is not None:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def _handle(self, event: SessionEvent) -> None:
        # Listeners are called by way of the loop, as futures wake their waiters: so replies and events keep their order.
        if isinstance(event, Reported):
            self._tell(event.event)
        elif isinstance(event, Overrun):
            self._tell_overrun()
        elif isinstance(event, Unclaimed):
            _close_all(event.descriptors)
        else:
            self._settle(event)

    def _tell(self, event: KernelEvent) -> None:
        if not self._event_listeners:
            self._held.append(event)
            if len(self._held) > MAX_HELD_EVENTS:
                self._held.popleft()
                self._tell_overrun()
        for listener in self._event_listeners:
            self._loop.call_soon(listener, event)

    def _tell_overrun(self) -> None:
        for listener in self._overrun_listeners:
            self._loop.call_soon(listener)

    def _settle(self, event: Replied | Refused | TimedOut) -> None:
        future = self._futures.pop(event.ticket, None)
        if future is None or future.done():
            if isinstance(event, Replied):
                _close_all(event.descriptors)
        elif isinstance(event, Replied):
            future.set_result(event)
        else:
            future.set_exception(event.error if isinstance(event, Refused) else TimeoutError("the kernel side does not answer"))


def _descriptors_of(ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[int, ...]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return tuple(descriptors)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)

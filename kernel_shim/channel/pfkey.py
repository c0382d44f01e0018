"""PF_KEY over a UNIX SOCK_SEQPACKET socket, for asyncio: how a key manager reaches the shim."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.channel.listeners import EventListeners
from kernel_shim.channel.pfkey_link import PfKeyLink, UnixTransport, close_all
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
from kernel_shim.mpls.node import NodeEntry
from kernel_shim.pfkey.af_key import plain_capabilities
from kernel_shim.pfkey.constants import ExtensionType, MessageType, SaType
from kernel_shim.pfkey.messages import Message, PolicyExtension, Sa
from kernel_shim.pfkey.policy_messages import policy_extensions, policy_from, require_policy_expressible, require_selector_expressible, selector_extensions
from kernel_shim.pfkey.private import BundleExtension, CapabilitiesExtension, Hello, LabelEntries, PendingExtension, Statistics
from kernel_shim.pfkey.sa_messages import (
    host_address,
    require_expressible,
    sa_extensions,
    sa_id_extensions,
    spi_request_extensions,
    status_from,
)

_T = TypeVar("_T")

LABELS_AT_ONCE: Final = 128  # entries of one request


class PfKeyChannel:
    """A `KernelChannel` to the shim that listens at `path`. `open` raises ConnectionRefusedError or FileNotFoundError when none does.

    `listens` False is for tools: the kernel does not take them for a key manager and sends no ACQUIRE or EXPIRE.
    `extensions` False keeps to what every PF_KEY kernel understands; what that cannot say is then refused by name.
    A channel is opened once.
    """

    def __init__(self, path: str | os.PathLike[str], *, listens: bool = True, extensions: bool = True) -> None:
        self._listens = listens
        self._ask_for_extensions = extensions
        self._private = False
        self._capabilities: Capabilities | None = None
        self._listeners = EventListeners()
        heard = self._listeners
        self._link = PfKeyLink(UnixTransport(path), on_event=heard.tell, on_overrun=heard.tell_overrun, on_lost=heard.tell_closed)

    def capabilities(self) -> Capabilities:
        """Known once `open` has returned; ChannelClosed before."""
        if self._capabilities is None:
            raise ChannelClosed("the channel is not open")
        return self._capabilities

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """What came since `open` and had no listener yet goes to the first one."""
        self._listeners.on_event(listener)

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when the kernel side had to forget events: look at `sas()` and `policies()`."""
        self._listeners.on_overrun(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Also when it went away before."""
        self._listeners.on_closed(listener)

    # Life

    async def open(self) -> None:
        await self._link.open()
        try:
            hello = (Hello(),) if self._ask_for_extensions else ()
            sa_type = SaType.ESP if self._listens else SaType.UNSPEC
            reply = await self._link.ask(MessageType.REGISTER, hello, sa_type=sa_type)
        except BaseException:
            self._link.close()
            raise
        told = reply.find(CapabilitiesExtension)
        self._private = reply.find(Hello) is not None and told is not None
        self._capabilities = told.capabilities if told is not None else plain_capabilities(reply)

    async def close(self) -> None:
        self._link.close()

    # Requests

    async def get_spi(self, request: SpiRequest) -> Spi:
        sequence = 0 if self._private else request.acquire
        reply = await self._link.ask(MessageType.GETSPI, spi_request_extensions(request, private=self._private), sequence)
        return Spi(reply.require(Sa).spi)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        await self._put_sa(MessageType.ADD, sa)

    async def update_sa(self, sa: SecurityAssociation) -> None:
        await self._put_sa(MessageType.UPDATE, sa)

    async def _put_sa(self, kind: MessageType, sa: SecurityAssociation) -> None:
        if not self._private:
            require_expressible(sa)
        await self._link.ask(kind, sa_extensions(sa, private=self._private, keys=True), 0 if self._private else sa.acquire)

    async def delete_sa(self, sa: SaId) -> None:
        await self._link.ask(MessageType.DELETE, sa_id_extensions(sa))

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        moved = replace(old, source=new.source, destination=new.destination, encapsulation=new.encapsulation)
        if moved != new:
            raise KernelError(errno.EINVAL, f"SA {old.spi:#x} would change in more than its addresses")
        if not self._private:
            raise KernelError(errno.EOPNOTSUPP, "this kernel cannot move an SA to other addresses")
        await self._put_sa(MessageType.UPDATE, new)  # which finds it by SPI and keys (docs/pfkey-extensions.md, 1.2)

    async def get_sa(self, sa: SaId) -> SaStatus:
        return status_from(await self._link.ask(MessageType.GET, sa_id_extensions(sa)))

    async def sas(self) -> Sequence[SaStatus]:
        return await self._link.dump(MessageType.DUMP, status_from)

    async def flush_sas(self) -> None:
        await self._link.ask(MessageType.FLUSH, ())

    async def add_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(MessageType.X_SPDADD, policy)

    async def update_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(MessageType.X_SPDUPDATE, policy)

    async def _put_policy(self, kind: MessageType, policy: Policy) -> Policy:
        if not self._private:
            require_policy_expressible(policy)
        return policy_from(await self._link.ask(kind, policy_extensions(policy, private=self._private)))

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        if not self._private:
            require_selector_expressible(selector)
        which = PolicyExtension(Action.DISCARD, direction)
        await self._link.ask(MessageType.X_SPDDELETE, (*selector_extensions(selector, private=self._private), which))

    async def policies(self) -> Sequence[Policy]:
        return await self._link.dump(MessageType.X_SPDDUMP, policy_from)

    async def flush_policies(self) -> None:
        await self._link.ask(MessageType.X_SPDFLUSH, ())

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """Returns at once: PF_KEY has no reply to it (RFC 2367 section 3.1.6)."""
        self._link.notify(Message(MessageType.ACQUIRE, SaType.ESP, errno, sequence))

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        replied = await self._link.request(MessageType.X_BIND, (host_address(ExtensionType.ADDRESS_SRC, address),))
        if len(replied.descriptors) != 2:
            close_all(replied.descriptors)
            raise KernelError(errno.EPROTO, f"{len(replied.descriptors)} descriptors for {address}, 2 expected")
        return replied.descriptors[0], replied.descriptors[1]

    async def unbind(self, address: IPAddress) -> None:
        await self._link.ask(MessageType.X_UNBIND, (host_address(ExtensionType.ADDRESS_SRC, address),))

    async def pending_queues(self) -> Sequence[PendingQueue]:
        """What waits for an SA. KernelError(EOPNOTSUPP) on a kernel without our extensions, as for the next."""
        return await self._inspect(MessageType.X_PENDINGDUMP, lambda message: message.require(PendingExtension).queue)

    async def cached_bundles(self) -> Sequence[CachedBundle]:
        return await self._inspect(MessageType.X_BUNDLEDUMP, lambda message: message.require(BundleExtension).bundle)

    async def _inspect(self, kind: MessageType, translate: Callable[[Message], _T]) -> list[_T]:
        if not self._private:
            raise KernelError(errno.EOPNOTSUPP, "this kernel does not show it")
        return await self._link.dump(kind, translate)

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        """Add or replace entries of the label node. What was put before an entry that is refused stands; putting it all again is harmless."""
        for at in range(0, len(entries), LABELS_AT_ONCE):
            await self._ask_labels(MessageType.X_LABELPUT, entries[at : at + LABELS_AT_ONCE])

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        """Take entries away, by their keys; it is no error that one is gone."""
        for at in range(0, len(entries), LABELS_AT_ONCE):
            await self._ask_labels(MessageType.X_LABELDELETE, entries[at : at + LABELS_AT_ONCE])

    async def labels(self) -> Sequence[NodeEntry]:
        return [entry for chunk in await self._inspect(MessageType.X_LABELDUMP, lambda message: message.require(LabelEntries).entries) for entry in chunk]

    async def _ask_labels(self, kind: MessageType, entries: Sequence[NodeEntry]) -> None:
        if not self._private:
            raise KernelError(errno.EOPNOTSUPP, "this kernel forwards no labels")
        await self._link.ask(kind, (LabelEntries(tuple(entries)),))

    async def statistics(self) -> Mapping[str, int]:
        if not self._private:
            return {}
        return dict((await self._link.ask(MessageType.X_STATISTICS, ())).require(Statistics).counters)

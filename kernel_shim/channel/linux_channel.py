"""What both channels to Linux's own IPsec, NETLINK_XFRM and AF_KEY, have alike."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.channel.linux import HoldQueue
from kernel_shim.channel.listeners import EventListeners
from kernel_shim.model import AcquireSequence, Direction, IPAddress, KernelError, KernelEvent, Mode, ReqId, SecurityAssociation, Spi
from kernel_shim.secret import Secret


class Acquires(Protocol):
    """The larval SAs behind the ACQUIREs of a channel."""

    def look(self) -> None: ...
    async def stop(self) -> None: ...
    async def failed(self, sequence: AcquireSequence) -> None: ...


class LinuxChannel:
    """Events, ACQUIREs and the hold queue. `listens` False is for tools, which only look: no events, and no settings changed."""

    _acquires: Acquires

    def __init__(self, *, listens: bool, acquire_seconds: int, settings_file: Path | None) -> None:
        self._listens = listens
        self._acquire_seconds = acquire_seconds
        self._listeners = EventListeners()
        self._hold = HoldQueue(settings_file)

    @property
    def _is_open(self) -> bool:
        raise NotImplementedError

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """Larval SAs whose ACQUIREs an earlier listener, or none, has heard are reported too: they stand in the way of the next ACQUIRE."""
        self._listeners.on_event(listener)
        if self._is_open:
            self._acquires.look()

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when events were lost: look at `sas()` and `policies()`."""
        self._listeners.on_overrun(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Hardly ever called: this kernel goes away together with its host."""
        self._listeners.on_closed(listener)

    def _set_hold_queue(self) -> None:
        if self._listens:
            self._hold.switch_on(self._acquire_seconds)
        else:
            self._hold.look()

    def _overrun(self) -> None:
        self._listeners.tell_overrun()
        self._acquires.look()

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """The larval SA goes, so that the next packet asks again; it would block its flow for `acquire_seconds`, as RFC 2367's answer would."""
        await self._acquires.failed(sequence)

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        raise KernelError(errno.EOPNOTSUPP, "this kernel opens no IKE sockets: the key manager does")

    async def unbind(self, address: IPAddress) -> None:
        """Nothing was bound."""


def esp_probe(algorithm: EspAlgorithm, reqid: ReqId) -> SecurityAssociation:
    """An SA that nobody can use, which comes and goes again: a kernel that refuses it has no ESP (`no_esp`)."""
    address = IPv4Address("127.0.0.1")
    return SecurityAssociation(
        spi=Spi(secrets.randbelow(1 << 31) + 0x100),
        source=address,
        destination=address,
        direction=Direction.OUT,
        mode=Mode.TRANSPORT,
        reqid=reqid,
        algorithm=algorithm,
        encryption_key=Secret(secrets.token_bytes(algorithm.encryption_key_length)),
        integrity_key=Secret(secrets.token_bytes(algorithm.integrity_key_length)),
        replay_window=0,
    )


def no_esp(error: KernelError) -> KernelError:
    return KernelError(errno.EPROTONOSUPPORT, f"this kernel has no ESP (modules esp4, esp6): {error.detail}")

"""The kernels that the tool can look at, and what each of them shows."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import KernelError, Policy, SaStatus
from kernel_shim.mpls.node import NodeEntry


class Source(Protocol):
    """What every kernel shows. Errors as of `KernelChannel`."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def sas(self) -> Sequence[SaStatus]: ...
    async def policies(self) -> Sequence[Policy]: ...
    async def statistics(self) -> Mapping[str, int]: ...


class LabelSource(Source, Protocol):
    """What kernels show that forward labels."""

    async def labels(self) -> Sequence[NodeEntry]: ...


class InspectableSource(LabelSource, Protocol):
    """What only our own kernel shows."""

    async def pending_queues(self) -> Sequence[PendingQueue]: ...
    async def cached_bundles(self) -> Sequence[CachedBundle]: ...


def _userspace(socket: Path) -> InspectableSource:
    from kernel_shim.channel.pfkey import PfKeyChannel

    return PfKeyChannel(socket, listens=False)


def _xfrm(_socket: Path) -> Source:
    from kernel_shim.channel.xfrm import XfrmChannel

    return XfrmChannel(listens=False, require_esp=False)


def _af_key(_socket: Path) -> Source:
    from kernel_shim.channel.af_key import AfKeyChannel

    return AfKeyChannel(listens=False, require_esp=False)


def _shim_messages(path: Path) -> socket.socket:
    from kernel_shim.tool.monitor import open_shim

    return open_shim(path)


def _af_key_messages(_path: Path) -> socket.socket:
    from kernel_shim.channel.af_key_socket import open_af_key

    return open_af_key()


@dataclass(frozen=True, slots=True)
class Kernel:
    """`make` gives a source for the socket that was named: an `InspectableSource` where it is `inspectable`, at least a `LabelSource` where it has `labels`.

    `messages` connects to a kernel whose messages can be monitored.
    """

    make: Callable[[Path], Source]
    inspectable: bool = False
    labels: bool = False
    messages: Callable[[Path], socket.socket] | None = None


KERNELS: Final[Mapping[str, Kernel]] = {
    "userspace": Kernel(_userspace, inspectable=True, labels=True, messages=_shim_messages),
    "xfrm": Kernel(_xfrm, labels=True),
    "pfkey": Kernel(_af_key, messages=_af_key_messages),
}


@asynccontextmanager
async def opened(kernel: str, socket: Path) -> AsyncIterator[Source]:
    """Raises OSError when no kernel answers, KernelError when it refuses."""
    source = KERNELS[kernel].make(socket)
    await source.open()
    try:
        yield source
    finally:
        await source.close()


@asynccontextmanager
async def opened_inspectable(kernel: str, socket: Path) -> AsyncIterator[InspectableSource]:
    """As `opened`; KernelError(EOPNOTSUPP) for a kernel that shows no more than its tables."""
    _require(kernel, KERNELS[kernel].inspectable)
    async with opened(kernel, socket) as source:
        yield source  # type: ignore[misc]


@asynccontextmanager
async def opened_labels(kernel: str, socket: Path) -> AsyncIterator[LabelSource]:
    """As `opened`; KernelError(EOPNOTSUPP) for a kernel that forwards none."""
    _require(kernel, KERNELS[kernel].labels)
    async with opened(kernel, socket) as source:
        yield source  # type: ignore[misc]


def _require(kernel: str, condition: bool) -> None:
    if not condition:
        raise KernelError(errno.EOPNOTSUPP, f"the kernel {kernel} does not show this")

"""What the cache gives for a flow: everything that a packet of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kernel_shim.dataplane.mtu import PathMtus
from kernel_shim.model import Action, Mode, Policy
from kernel_shim.packet.ip import IPV4_HEADER, IPV6_HEADER, UDP_HEADER
from kernel_shim.sa.entry import SaEntry


class Bundle:
    """`limit` is the longest inner packet that fits the path. Without `entry` the packet is bypassed or discarded."""

    __slots__ = ("action", "entry", "limit", "policy", "transport")

    def __init__(self, action: Action, policy: Policy | None, entry: SaEntry | None = None, limit: int = 0) -> None:
        self.action: Final = action
        self.policy: Final = policy
        self.entry: Final = entry
        self.limit: Final = limit
        self.transport: Final = entry is not None and entry.sa.mode is Mode.TRANSPORT


def inner_limit(entry: SaEntry, paths: PathMtus, inner_version: int) -> int:
    """The longest packet that an SA carries without its outer packet passing the path's MTU."""
    assert entry.cipher is not None
    outer = IPV4_HEADER if entry.sa.source.version == 4 else IPV6_HEADER
    outer += UDP_HEADER if entry.local.port else 0
    room = paths.get(entry.local.address, entry.remote.address) - outer
    payload = entry.cipher.shape.largest_payload(room)
    if entry.sa.mode is Mode.TRANSPORT:
        payload += IPV4_HEADER if inner_version == 4 else IPV6_HEADER
    return min(payload, 65535)


@dataclass(frozen=True, slots=True)
class Held:
    """A frame that waits for an SA."""

    frame: bytes
    segments: int

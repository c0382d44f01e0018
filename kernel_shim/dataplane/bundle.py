"""What the cache gives for a flow: everything that a packet of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from kernel_shim.dataplane.mtu import PathMtus
from kernel_shim.dataplane.origin import Origin
from kernel_shim.esp.rows import MAX_DATAGRAMS
from kernel_shim.model import Action, Mode, Policy
from kernel_shim.packet.ip import IPV4_HEADER, IPV6_HEADER, LARGEST_PACKET, UDP_HEADER, Buffer
from kernel_shim.sa.entry import SaEntry


class Cover(Protocol):
    """What goes between ESP and a packet: labels, and what they travel in. A multiple of four octets."""

    @property
    def next_header(self) -> int: ...

    @property
    def length(self) -> int:
        """Octets."""

    def before(self, packet: Buffer, length: int) -> bytes:
        """The octets before `packet`, of which `length` octets go along; of a super-packet its first octets will do."""


class Bundle:
    """`limit` is the longest inner packet that fits the path, `padded` how long one is made with TFC padding.

    Without `entry` the packet is bypassed or discarded.
    `transport`: the SA takes the packet's own IP header for its outer one. Not with a `cover`, under which the packet goes whole.
    `landing`: it goes to the interface of this VRF.
    """

    __slots__ = ("action", "cover", "entry", "landing", "limit", "padded", "policy", "transport")

    def __init__(
        self,
        action: Action,
        policy: Policy | None,
        entry: SaEntry | None = None,
        limit: int = 0,
        cover: Cover | None = None,
        landing: str | None = None,
        padded: int = 0,
    ) -> None:
        self.action: Final = action
        self.policy: Final = policy
        self.entry: Final = entry
        self.limit: Final = limit
        self.cover: Final = cover
        self.landing: Final = landing
        self.transport: Final = cover is None and entry is not None and entry.sa.mode is Mode.TRANSPORT
        self.padded: Final = padded


def protect(policy: Policy, entry: SaEntry, paths: PathMtus, inner_version: int) -> Bundle:
    """The bundle for packets of one IP version that go into `entry`."""
    limit = inner_limit(entry, paths, inner_version)
    padded = min(entry.sa.tfc_padding, limit) if entry.sa.mode is Mode.TUNNEL else 0
    if not entry.sa.copies.df:
        assert entry.cipher is not None
        limit = entry.cipher.shape.largest_payload(MAX_DATAGRAMS)
    return Bundle(Action.PROTECT, policy, entry, limit, padded=padded)


def payload_limit(entry: SaEntry, paths: PathMtus) -> int:
    """The longest ESP payload that an SA carries without its outer packet passing the path's MTU."""
    assert entry.cipher is not None
    outer = IPV4_HEADER if entry.sa.source.version == 4 else IPV6_HEADER
    outer += UDP_HEADER if entry.local.port else 0
    room = paths.get(entry.local.address, entry.remote.address) - outer
    return entry.cipher.shape.largest_payload(room)


def inner_limit(entry: SaEntry, paths: PathMtus, inner_version: int) -> int:
    """The longest packet that an SA carries without its outer packet passing the path's MTU."""
    payload = payload_limit(entry, paths)
    if entry.sa.mode is Mode.TRANSPORT:
        payload += IPV4_HEADER if inner_version == 4 else IPV6_HEADER
    return min(payload, LARGEST_PACKET)


@dataclass(frozen=True, slots=True)
class Held:
    """A frame that waits for an SA. `origin` None: from the host's TUN."""

    frame: bytes
    segments: int
    origin: Origin | None = None

"""One SA of the SAD, with everything that changes about it."""

from __future__ import annotations

from typing import Final, NamedTuple

from kernel_shim.esp.cipher import EspCipher
from kernel_shim.esp.wire import EXTENDED_SEQUENCE_LIMIT, SEQUENCE_LIMIT
from kernel_shim.model import NO_PORT, Direction, Endpoint, Lifetime, Mode, SaState, SaStatus, SecurityAssociation, UdpEncapsulation
from kernel_shim.mpls.node import Tunnel
from kernel_shim.packet.traffic_class import DSCP, ECN
from kernel_shim.policy.flowkey import FieldMask
from kernel_shim.policy.pending import MAX_QUEUE_BYTES, MAX_QUEUE_SEGMENTS
from kernel_shim.sa.replay import ReplayWindow

UNLIMITED: Final = 1 << 128

# Limits of this implementation: what a peer may send before our keys are in. It may be one of us, who lets go with its answer what it held back for the SA.
LARVAL_PACKETS: Final = MAX_QUEUE_SEGMENTS
LARVAL_OCTETS: Final = MAX_QUEUE_BYTES + LARVAL_PACKETS * 128  # with the headers of each segment and of ESP

# A sequence space this far used up counts as a soft expiry: at a million packets a second 2^32 leave four minutes to rekey.
_SOFT_SEQUENCE_SHARE: Final = 16


class Waiting(NamedTuple):
    """A packet that arrived for a larval SA."""

    local: Endpoint
    remote: Endpoint
    packet: bytes
    traffic_class: int = 0


class SaEntry:
    """`sequence` is the last one sent (OUT).

    `local` and `remote` are this host's and the peer's UDP address, whatever the direction; with port 0 of ESP without UDP.
    `inner_class` masks what of an inner traffic class the outer header gets; `looks_outside`: what came in the outer one may change the inner one.
    """

    __slots__ = (
        "added",
        "cipher",
        "fields",
        "hard_at",
        "hard_octets",
        "hard_packets",
        "inner_class",
        "local",
        "local_seen",
        "looks_outside",
        "mapped_at",
        "octets",
        "packets",
        "remote",
        "sa",
        "sequence",
        "sequence_limit",
        "serial",
        "soft_at",
        "soft_octets",
        "soft_packets",
        "soft_sequence",
        "state",
        "tag",
        "tunnel",
        "used",
        "waiting",
        "waiting_octets",
        "window",
    )

    def __init__(self, sa: SecurityAssociation, cipher: EspCipher | None, serial: int, now: float) -> None:
        self.serial: Final = serial
        self.tag: Final = serial.to_bytes(8, "big")  # the serial as a part of cache keys
        self.octets = self.packets = 0
        self.added = now
        self.used: float | None = None
        self.sequence = 0
        self.state = SaState.LARVAL if cipher is None else SaState.MATURE
        self.cipher = cipher
        self.tunnel: Tunnel | None = None  # of labels, whose packets it may carry
        self.fields: FieldMask | None = None  # what the SA's selectors read, while that is counted
        self.window = ReplayWindow(sa.replay_window, sa.esn)
        self.mapped_at = float("-inf")
        self.waiting: list[Waiting] = []
        self.waiting_octets = 0
        self.configure(sa)

    def configure(self, sa: SecurityAssociation) -> None:
        """Take over lifetimes, selectors and ports; not keys, counters or windows."""
        self.sa = sa
        encapsulation = sa.encapsulation or UdpEncapsulation(NO_PORT, NO_PORT)
        source, destination = Endpoint(sa.source, encapsulation.source_port), Endpoint(sa.destination, encapsulation.destination_port)
        self.local, self.remote = (source, destination) if sa.direction is Direction.OUT else (destination, source)
        copies, transport = sa.copies, sa.mode is Mode.TRANSPORT
        # In transport mode there is one header, before and after.
        self.inner_class = 0xFF if transport else (DSCP if copies.dscp_out else 0) | (ECN if copies.ecn else 0)
        self.looks_outside = not transport and (copies.ecn or copies.dscp_in)
        self.local_seen: Endpoint | None = None  # the caller's own object for `local`, once the two were compared
        self.soft_at, self.soft_packets, self.soft_octets = self._bounds(sa.soft)
        self.hard_at, self.hard_packets, self.hard_octets = self._bounds(sa.hard)
        self.sequence_limit = EXTENDED_SEQUENCE_LIMIT if sa.esn else SEQUENCE_LIMIT
        self.soft_sequence = self.sequence_limit - self.sequence_limit // _SOFT_SEQUENCE_SHARE

    def _bounds(self, lifetime: Lifetime) -> tuple[float | None, int, int]:
        return self.added + lifetime.seconds if lifetime.seconds else None, lifetime.packets or UNLIMITED, lifetime.octets or UNLIMITED

    @property
    def usable(self) -> bool:
        return self.state is SaState.MATURE or self.state is SaState.DYING

    def room(self, packets: int) -> bool:
        """Whether as many packets more are within the hard packet lifetime and the sequence space."""
        return self.packets + packets <= self.hard_packets and self.sequence + packets <= self.sequence_limit

    def hold(self, waiting: Waiting) -> bool:
        """Keep a packet of a larval SA; False when the bounds are reached."""
        if len(self.waiting) >= LARVAL_PACKETS or self.waiting_octets + len(waiting.packet) > LARVAL_OCTETS:
            return False
        self.waiting.append(waiting)
        self.waiting_octets += len(waiting.packet)
        return True

    def status(self, epoch: float) -> SaStatus:
        """`epoch` is the Unix time at monotonic 0."""
        sequence = self.sequence if self.sa.direction is Direction.OUT else self.window.top
        used = None if self.used is None else self.used + epoch
        return SaStatus(self.sa, self.state, self.octets, self.packets, self.added + epoch, used, sequence)

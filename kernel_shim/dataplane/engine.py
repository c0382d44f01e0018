"""The userspace kernel as one object: SPD, SAD, pending packets and the two pipelines, on a clock that the caller owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kernel_shim.dataplane.output import Sink
from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    Endpoint,
    KernelEvent,
    Policy,
    PolicyIndex,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    SpiRequest,
)

FRAME_CAPACITY: Final = 10 + 65535  # a virtio_net_hdr and the largest IP packet
DATAGRAM_CAPACITY: Final = 65535  # the most that one UDP_GRO receive yields


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`epoch` is the Unix time at monotonic 0; `path_mtu` what a path is taken to carry before anything is known of it."""

    epoch: float = 0.0
    path_mtu: int = 1500
    slot: int = 0


class Engine:
    """Implements `kernel_shim.kernel.Kernel`, and takes packets.

    The engine owns both read buffers, so that nothing is copied: the caller reads into `outbound_buffer` or
    `inbound_buffer`, then says how much; both are free for the next read when the call returns.
    After the reads of one wake-up the caller calls `flush`; until then packets may stay in open batches.
    `now` is monotonic seconds.
    """

    def __init__(self, config: EngineConfig, entropy: Callable[[int], bytes], sink: Sink) -> None:
        self.outbound_buffer: memoryview = memoryview(bytearray(FRAME_CAPACITY))
        self.inbound_buffer: memoryview = memoryview(bytearray(DATAGRAM_CAPACITY))

    # Packets

    def outbound(self, length: int, now: float) -> None:
        """Take the frame of `length` bytes that a TUN read put at the start of `outbound_buffer`. Never raises."""
        raise NotImplementedError

    def inbound(self, local: Endpoint, remote: Endpoint, length: int, segment_size: int, now: float) -> None:
        """Take `length` bytes of UDP payload from `inbound_buffer`: datagrams of `segment_size` bytes, the last may be shorter.

        `segment_size` is what UDP_GRO says, `length` when it says nothing. `local` is the address and port it was received on.
        Never raises.
        """
        raise NotImplementedError

    def send(self, frame: bytes, now: float) -> None:
        """`outbound` of a frame that is elsewhere."""
        raise NotImplementedError

    def receive(self, local: Endpoint, remote: Endpoint, datagrams: bytes, segment_size: int, now: float) -> None:
        """`inbound` of datagrams that are elsewhere."""
        raise NotImplementedError

    def flush(self, now: float) -> None:
        """Send every batch that is open: the end of one wake-up."""
        raise NotImplementedError

    def path_mtu(self, local: Endpoint, remote: Endpoint, mtu: int, now: float) -> None:
        """The path from `local` to `remote` carries IP packets of `mtu` bytes (from an error queue or EMSGSIZE)."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `tick` is due; None when nothing waits."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        """Do what is due: lifetimes, acquires to repeat, packets that waited too long, slices of a drain."""
        raise NotImplementedError

    # Kernel

    def capabilities(self) -> Capabilities:
        raise NotImplementedError

    def get_spi(self, request: SpiRequest, now: float) -> SaStatus:
        raise NotImplementedError

    def add_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        raise NotImplementedError

    def update_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        raise NotImplementedError

    def delete_sa(self, sa: SaId) -> SaStatus:
        raise NotImplementedError

    def get_sa(self, sa: SaId) -> SaStatus:
        raise NotImplementedError

    def sas(self) -> Sequence[SaStatus]:
        raise NotImplementedError

    def flush_sas(self) -> int:
        raise NotImplementedError

    def add_policy(self, policy: Policy, now: float) -> Policy:
        raise NotImplementedError

    def update_policy(self, policy: Policy, now: float) -> Policy:
        raise NotImplementedError

    def delete_policy(self, direction: Direction, selector: Selector) -> Policy:
        raise NotImplementedError

    def delete_policy_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        raise NotImplementedError

    def get_policy(self, direction: Direction, index: PolicyIndex) -> Policy:
        raise NotImplementedError

    def policies(self) -> Sequence[Policy]:
        raise NotImplementedError

    def flush_policies(self) -> int:
        raise NotImplementedError

    def acquire_failed(self, sequence: AcquireSequence, errno: int, now: float) -> None:
        raise NotImplementedError

    def key_manager_listens(self, listening: bool, now: float) -> None:
        raise NotImplementedError

    def subscribe(self, listener: Callable[[KernelEvent], None]) -> None:
        raise NotImplementedError

    def statistics(self) -> Mapping[str, int]:
        raise NotImplementedError

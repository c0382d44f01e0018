"""What a shim process is told at its start, and the bounds of this implementation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel_shim.model import ROUTE_PROTOCOL, SOCKET_MARK
from kernel_shim.packet.ip import IPV6_SMALLEST_MTU, LARGEST_PACKET

DEFAULT_SOCKET: Final = Path("/run/vpnd/shim.sock")
DEFAULT_TUN: Final = "vpn0"
DEFAULT_TABLE: Final = 4500
DEFAULT_RULE_PRIORITY: Final = 200
DEFAULT_MARK: Final = SOCKET_MARK
DEFAULT_EGRESS_MTU: Final = 1500

TABLES: Final = 64  # routing tables from `table` on that are ours
PRIORITIES: Final = 100  # rule priorities from `rule_priority` on that are ours
PROTOCOL_NUMBER: Final = ROUTE_PROTOCOL

TRANSMIT_QUEUE: Final = 16_384  # frames; many times one pending queue's bound, as a TUN cannot push back, and 0.4 s of small packets
SOCKET_BUFFER: Final = 8 << 20  # bytes, each way

# How much one wake-up takes from a device or socket; it bounds how long control messages and the other direction wait.
READS: Final = 64  # frames, or batches of datagrams
RAW_READS: Final = 512  # ESP packets without UDP, each a system call of its own: about 2 ms
READ_BYTES: Final = 512 << 10  # about 3 ms of sealing
CONTROL_READS: Final = 64  # messages a wake-up and client
TAKEOVER_GRACE: Final = 60.0  # seconds that a registered key manager has to bring its policies back

# IPv4 + UDP + ESP header and IV + ICV of AES-GCM-16, the common case; ESP pads payload and trailer to 4 bytes.
TUNNEL_OVERHEAD: Final = 20 + 8 + 8 + 8 + 16
ESP_TRAILER: Final = 2


def tunnel_mtu(egress_mtu: int) -> int:
    """The largest inner packet that fits an egress of `egress_mtu` bytes with AES-GCM-16 in UDP over IPv4: 1438 for 1500. At least what IPv6 needs.

    Wider overheads (IPv6 outside, CBC) are caught a packet at a time by the data plane, which knows its SA.
    """
    return max(IPV6_SMALLEST_MTU, (egress_mtu - TUNNEL_OVERHEAD) // 4 * 4 - ESP_TRAILER)


@dataclass(frozen=True, slots=True)
class ShimSettings:
    """`mtu` is the TUN's, `egress_mtu` what a path to a peer is taken to carry before it says otherwise.

    `rule_priority` and `table` begin ranges of `PRIORITIES` and `TABLES`.
    """

    socket: Path = DEFAULT_SOCKET
    tun: str = DEFAULT_TUN
    mtu: int = tunnel_mtu(DEFAULT_EGRESS_MTU)
    egress_mtu: int = DEFAULT_EGRESS_MTU
    table: int = DEFAULT_TABLE
    rule_priority: int = DEFAULT_RULE_PRIORITY
    mark: int = DEFAULT_MARK
    ready_descriptor: int | None = None
    keep_privileges: bool = False

    def __post_init__(self) -> None:
        if not self.tun.isascii() or not 0 < len(self.tun) <= 9 or not all(c.isalnum() or c in "_-" for c in self.tun):
            raise ValueError(f"not an interface name of at most 9 letters: {self.tun!r}")
        for name, mtu in (("egress MTU", self.egress_mtu), ("MTU", self.mtu)):
            if not IPV6_SMALLEST_MTU <= mtu <= LARGEST_PACKET:
                raise ValueError(f"an {name} of {mtu} is outside {IPV6_SMALLEST_MTU}-{LARGEST_PACKET}")
        if not 256 <= self.table <= 0xFFFFFFFF - TABLES:
            raise ValueError(f"tables from {self.table} on are not all free for us")
        if not 1 <= self.rule_priority <= 32766 - PRIORITIES:
            raise ValueError(f"rule priorities from {self.rule_priority} on do not all come before the main table")
        if not 1 <= self.mark <= 0xFFFFFFFF:
            raise ValueError(f"not a packet mark: {self.mark:#x}")

    @property
    def clear_tun(self) -> str:
        """The interface by which bypassed packets leave again."""
        return f"{self.tun}-clear"

    @property
    def state_file(self) -> Path:
        """Beside the socket, so that shims of several network namespaces keep apart."""
        return self.socket.with_name(self.socket.name + ".state")

    @property
    def guard_table(self) -> str:
        """The stem of our nftables tables' names."""
        return f"kernel_shim_{self.tun.replace('-', '_')}"

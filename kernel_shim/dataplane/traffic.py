"""What the data plane counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from kernel_shim.reasons import DropReason


@dataclass(slots=True)
class Traffic:
    """Packets and bytes by direction, and drops by reason. A super-packet counts as its segments; octets are those inside ESP."""

    out_packets: int = 0
    out_octets: int = 0
    out_sends: int = 0
    in_packets: int = 0
    in_octets: int = 0
    in_writes: int = 0
    bypassed: int = 0
    hairpinned: int = 0
    router_alerts: int = 0
    ecn_alarms: int = 0  # pairs of ECN fields that RFC 6040 section 4.2 calls dangerous or currently unused
    tfc_padded: int = 0
    icmp_errors: int = 0
    icmp_suppressed: int = 0
    fragments_made: int = 0
    batch_fallbacks: int = 0
    drops: Counter[DropReason] = field(default_factory=Counter)

    def drop(self, reason: DropReason, packets: int = 1) -> None:
        self.drops[reason] += packets

    def statistics(self) -> dict[str, int]:
        counts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "drops"}
        return counts | {f"drop_{reason.value}": self.drops[reason] for reason in DropReason}

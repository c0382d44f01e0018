"""What became of the packets of two gateways, and what they did meanwhile."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from simulation.gateway import Gateway
from simulation.wire import Wire


@dataclass(slots=True)
class Outcome:
    """`missing`: packets that neither arrived nor were among those that the wire lost."""

    sent: int = 0
    received: int = 0
    wire_lost: int = 0
    repeated: int = 0
    clear: int = 0
    child_rekeys: int = 0
    ike_rekeys: int = 0
    memory: list[float] = field(default_factory=list)  # MB, from time to time
    counters: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)  # by our kernels, under their reasons

    @property
    def missing(self) -> int:
        return self.sent - self.received - self.wire_lost

    def note_memory(self) -> None:
        """Of this process, now."""
        with open("/proc/self/statm") as file:
            self.memory.append(int(file.read().split()[1]) * resource.getpagesize() / 1e6)

    def gather(self, gateways: Sequence[Gateway], wire: Wire) -> None:
        """All that is counted elsewhere."""
        self.received, self.wire_lost = sum(gateway.received.total() for gateway in gateways), wire.counts["esp.lost"]
        self.repeated, self.clear = sum(gateway.repeated for gateway in gateways), sum(gateway.clear for gateway in gateways)
        counters, drops = Counter[str](), Counter[str]()
        for gateway in gateways:
            counters.update(gateway.counters.snapshot())
            drops.update({name: number for name, number in gateway.engine.statistics().items() if name.startswith("drop_")})
        self.counters, self.drops = dict(counters), dict(+drops)
        # both sides count each
        self.child_rekeys, self.ike_rekeys = counters["child_rekeyed"] // 2, counters["ike_rekeyed"] // 2

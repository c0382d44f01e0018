"""A row of the table: what was measured, against whom, and what it has to reach."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Row:
    """`ours`, `peer`, `floor` and `aim` are in `unit`; None where there is none. The `runs` are what the figures are the median of."""

    name: str
    unit: str
    better: Literal["high", "low"]
    ours: float | None
    peer: float | None = None
    floor: float | None = None
    aim: float | None = None
    runs_ours: Sequence[float] = field(default=())
    runs_peer: Sequence[float] = field(default=())
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Above 1 ours is better. None without a peer, and where ours is 0 and the peer's is not, which no number says."""
        if self.ours is None or self.peer is None:
            return None
        above, below = (self.ours, self.peer) if self.better == "high" else (self.peer, self.ours)
        if below:
            return above / below
        return None if above else 1.0

    def reaches(self, mark: float | None) -> bool | None:
        if mark is None:
            return None
        if self.ours is None:
            return False
        return self.ours >= mark if self.better == "high" else self.ours <= mark

    @property
    def met(self) -> bool:
        """The floor is reached, or there is none and the figure stands."""
        return self.ours is not None and self.reaches(self.floor) is not False

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.ratio,
            "floor": self.floor,
            "aim": self.aim,
            "met": self.met,
            "runs": list(self.runs_ours),
            "peer_runs": list(self.runs_peer),
            "machine": machine(),
            "note": self.note,
        }


def median_row(
    name: str,
    unit: str,
    better: Literal["high", "low"],
    ours: Sequence[float],
    peer: Sequence[float] = (),
    *,
    floor: float | None = None,
    aim: float | None = None,
    note: str = "",
) -> Row:
    """A row of the medians; an empty sequence is a figure that could not be had."""
    return Row(
        name,
        unit,
        better,
        statistics.median(ours) if ours else None,
        statistics.median(peer) if peer else None,
        floor,
        aim,
        tuple(ours),
        tuple(peer),
        note,
    )


@cache
def machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}"

"""An hour of two gateways' life on a virtual clock, with 1,000 tunnels that are rekeyed all the time, over a wire that loses and reorders.

Both gateways are whole (key manager, channel, kernel) and in this process; what is lost beyond the wire's own loss is theirs.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import structlog
from simulation.hour import Life, LifeOutcome, live
from simulation.wire import Weather

from bench.rows import Row

TUNNELS: Final = 1000
SECONDS: Final = 3600.0
GAP: Final = 60.0  # s between two packets of a tunnel in one direction: the rekeyings, not the packets, are to be the work
LOSS: Final = 0.01
WEATHER: Final = Weather(delay=(0.005, 0.055), loss=LOSS, doubled=0.005)
GROWTH: Final = 10.0  # %; the first slices warm the allocator up


def run() -> list[Row | dict[str, Any]]:
    life = Life(TUNNELS, SECONDS, GAP, WEATHER, child_rekey=300, ike_rekey=1200)
    before = structlog.get_config()
    # two daemons that log a thousand tunnels would be measured as loggers
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        return list(rows(life, live(life)))
    finally:
        structlog.configure(**before)


def rows(life: Life, outcome: LifeOutcome) -> tuple[Row, ...]:
    settled = outcome.memory[len(outcome.memory) // 2 :]
    growth = 100 * (settled[-1] / settled[0] - 1)
    what = (
        f"{life.tunnels} tunnels, {life.seconds:.0f} s, {life.weather.loss:.0%} loss, a packet every {life.gap:.0f} s each way; "
        f"{outcome.child_rekeys} CHILD and {outcome.ike_rekeys} IKE rekeyings, {outcome.sent} packets, {outcome.wire_lost} lost by the wire"
    )
    apart = (
        (0 if outcome.equal else 1)
        + outcome.clear
        + outcome.repeated
        + outcome.numbers_repeated
        + sum(abs(standing - life.tunnels) for standing in outcome.ike_sas)
    )
    drops = ", ".join(f"{name} {number}" for name, number in outcome.drops.items() if number) or "none"
    return (
        Row("gateway-hour lost", "packets", "low", float(outcome.missing), floor=0.0, note=f"{what}; drops: {drops}"),
        Row(
            "gateway-hour faults",
            "faults",
            "low",
            float(apart),
            floor=0.0,
            note=f"SADs equal: {outcome.equal}; IKE SAs {outcome.ike_sas}; in clear {outcome.clear}; packets twice {outcome.repeated}; "
            f"numbers twice {outcome.numbers_repeated}",
        ),
        Row("gateway-hour growth", "%", "low", growth, floor=GROWTH, note="second half of the hour, MB: " + " ".join(f"{size:.0f}" for size in settled)),
        Row("gateway-hour cpu", "s", "low", outcome.cpu_seconds, note="both gateways, user time"),
    )

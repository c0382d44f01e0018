"""Rows `kernel-hold`: what becomes of packets that a real kernel holds for an SA, in packets and in milliseconds after the SA came.

With the kick (the policy is replaced once its SA is in, as `XfrmChannel` does), and left to the kernel's own polling, whose pauses double. The kernel is
Debian's under emulation: its milliseconds compare with each other only. This module runs on both sides: `run` here boots the guest, in which the
module itself is the program that measures.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from realkernel.kernel_ends import HELD, TRAP, Ends, Sink, outbound, send, two_ends, until, within

from bench.rows import Row, median_row
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import Acquire, KernelEvent

SENT: Final = 150  # packets before the SA
NEGOTIATIONS: Final = (0.05, 0.2, 0.4, 0.8, 1.8)  # s from the first packet to the SA; the kernel polls after 0.1, 0.3, 0.7, 1.5 and 3.1 s
WAIT: Final = 10.0  # s for what is held; more than two polls
BOOT_SECONDS: Final = 600
BOOT: Final = Path(__file__).resolve().parents[1] / "realkernel" / "boot"
REPOSITORY: Final = Path(__file__).resolve().parents[2]
AS_SHIPPED: Final = "as shipped"
POLLED: Final = "polled"
KICKED: Final = "kicked"


@dataclass(frozen=True, slots=True)
class Held:
    """`first` and `last` are ms from the SA to the first and last packet at the far end; None when none came."""

    way: str
    negotiation: float
    delivered: int
    first: float | None
    last: float | None


# In the guest


def _measure(ends: Ends, way: str, negotiation: float) -> Held:
    sink = Sink(ends.there)
    result: list[Held] = []

    async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
        stranger = XfrmChannel(listens=False)  # knows of no policy, so it kicks none
        await stranger.open()
        try:
            await measured(channel, stranger, events)
        finally:
            await stranger.close()

    async def measured(channel: XfrmChannel, stranger: XfrmChannel, events: list[KernelEvent]) -> None:
        if way == AS_SHIPPED:
            ends.here.sysctl(core__xfrm_larval_drop=1)
        await channel.add_policy(TRAP)
        begin = time.monotonic()
        send(SENT)
        await until(lambda: bool(events))
        event = events[0]
        assert isinstance(event, Acquire)
        await asyncio.sleep(max(0.0, begin + negotiation - time.monotonic()))
        adds = channel if way == KICKED else stranger
        added = time.monotonic()
        await adds.add_sa(outbound(acquire=event.sequence))
        while sink.look() < (HELD if way != AS_SHIPPED else SENT) and time.monotonic() < added + (WAIT if way != AS_SHIPPED else 1.0):
            await asyncio.sleep(0.001)
        times = [None if at is None else 1000 * max(0.0, at - added) for at in (sink.first, sink.last)]
        result.append(Held(way, negotiation, len(set(sink.numbers)), *times))

    try:
        within(ends.here, body)
    finally:
        sink.close()
    return result[0]


def measure_here(output: Path) -> None:
    """All of it, in this kernel; the results go to `output` as JSON."""
    with two_ends() as ends:
        _measure(ends, KICKED, NEGOTIATIONS[0])  # the first of its kind pays for what it loads
        plan = [(AS_SHIPPED, NEGOTIATIONS[0]), *((way, pause) for pause in NEGOTIATIONS for way in (KICKED, POLLED))]
        output.write_text(json.dumps([asdict(_measure(ends, way, pause)) for way, pause in plan]))


# On the host


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as exchange:
        environment = {**os.environ, "REALKERNEL_EXCHANGE": exchange, "REALKERNEL_TIMEOUT": str(BOOT_SECONDS)}
        program = ["env", f"PYTHONPATH={REPOSITORY}:{REPOSITORY / 'tests'}", sys.executable, "-m", "bench.kernel_hold", "/exchange/held.json"]
        done = subprocess.run([str(BOOT), *program], cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        results = Path(exchange, "held.json")
        if not results.exists():
            raise RuntimeError(f"the guest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:].decode(errors='replace')}")
        held = [Held(**entry) for entry in json.loads(results.read_text())]
    return rows(held)


def rows(held: list[Held]) -> list[Row]:
    by_way = {way: [entry for entry in held if entry.way == way] for way in (KICKED, POLLED, AS_SHIPPED)}
    kicked, polled = by_way[KICKED], by_way[POLLED]
    shipped = max(entry.delivered for entry in by_way[AS_SHIPPED])
    delivered = [float(entry.delivered) for entry in kicked], [float(entry.delivered) for entry in polled]
    result = [
        Row(
            "kernel-hold.delivered",
            "packets",
            "high",
            min(delivered[0]),
            statistics.median(delivered[1]),
            floor=float(HELD),
            aim=float(HELD),
            runs_ours=delivered[0],
            runs_peer=delivered[1],
            note=f"of {SENT} before the SA, worst run; peer: no kick; the queue holds {HELD}; Linux as shipped {shipped}",
        )
    ]
    for name in ("first", "last"):
        ours, peer = ([value for entry in entries if (value := getattr(entry, name)) is not None] for entries in (kicked, polled))
        note = f"after the SA; peer: no kick, worst {max(peer, default=0.0):.0f} ms; ours worst {max(ours, default=0.0):.0f} ms"
        result.append(median_row(f"kernel-hold.{name}", "ms", "low", ours, peer, note=note))
    return result


if __name__ == "__main__":
    measure_here(Path(sys.argv[1]))

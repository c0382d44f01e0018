"""Rows `shim-restart`: our shim is killed and started again under a standing tunnel.

Measured from when it listens, until the policies are back and until a packet passes. Policies come back as they were,
SAs by negotiation: their sequence numbers were lost with the shim.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from lab.gateway import Gateway
from lab.pairing import OURS, Pair, pair
from lab.tunnel import Tunnel

from bench.rows import Row
from kernel_shim.channel.pfkey import PfKeyChannel

RUNS: Final = 10
LIMIT: Final = 30.0  # s
PAUSE: Final = 0.01  # s between two looks
TRAPPED: Final = Tunnel(start_a="trap", start_b="trap")


async def policies_of(path: Path) -> int:
    channel = PfKeyChannel(path)
    try:
        await channel.open()
        return len(await channel.policies())
    finally:
        await channel.close()


def restart(link: Pair, gateway: Gateway) -> tuple[float, float]:
    """Seconds until all policies stand again, and until a packet passed."""
    before = asyncio.run(policies_of(gateway.shim_path))
    gateway.kill_shim()
    gateway.start_shim()
    began = time.monotonic()
    while asyncio.run(policies_of(gateway.shim_path)) < before:
        if time.monotonic() - began > LIMIT:
            raise TimeoutError(f"{before} policies are not back")
        time.sleep(PAUSE)
    back = time.monotonic() - began
    link.carries_again()
    return back, time.monotonic() - began


def run() -> list[Row]:
    with pair(OURS, OURS, TRAPPED) as link:
        assert isinstance(link.a, Gateway)
        assert link.ping().lost == 0
        runs = [restart(link, link.a) for _ in range(RUNS)]
        leaks = link.leaks()
    if leaks:
        raise RuntimeError(f"{len(leaks)} packets in clear on the wire: {leaks[0]}")
    back, carries = ([round(seconds, 3) for seconds in column] for column in zip(*runs, strict=True))
    return [
        Row("shim-restart.policies", "s", "low", max(back), floor=1.0, aim=0.5, runs_ours=tuple(back), note="worst run, from when the new shim listens"),
        Row("shim-restart.carries", "s", "low", max(carries), runs_ours=tuple(carries), note="worst run; with SAs that were negotiated anew"),
    ]

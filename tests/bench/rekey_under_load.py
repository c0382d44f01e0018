"""Rekeying against strongSwan in real time, under a TCP stream and two UDP probes: what is lost, and how long the stream stands still.

30 CHILD_SAs and 10 IKE SAs are rekeyed, in turn from both sides. The baseline is the same traffic through the same tunnel without
rekeying, just before; the peer column is strongSwan against strongSwan. The stream is paced, and of the probes no more is under way than
any queue holds: what a full queue drops is no rekeying's fault.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lab.pairing import OURS, STRONGSWAN, WINDOW, DaemonFactory, Pair, pair
from lab.process import LabError, wait_until
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel

from bench.rows import Row

CHILD_REKEYINGS: Final = 30
IKE_REKEYINGS: Final = 10
SECONDS: Final = 30.0  # without and with rekeyings, which have to be done within
SPACING: Final = 0.5  # s between two rekeyings
PROBE_RATE: Final = 200.0  # datagrams a second each way
STREAM: Final = "10M"  # bit/s, in small writes: bursts fill queues
INTERVAL: Final = 0.1  # s; a stall is counted in these
STALL_SLACK: Final = 2 * INTERVAL * 1000  # ms above the baseline's: two intervals are within what a shared machine does by itself
PORT: Final = 5202
TUNNEL: Final = Tunnel(esp_proposals="aes128gcm16-x25519")


@dataclass(frozen=True, slots=True)
class Figures:
    """`stall`: the longest time without a byte of the stream, ms. `rate`: of the stream, Mbit/s."""

    lost: int
    sent: int
    stall: float
    rate: float


def _nothing(_link: Pair) -> None:
    """The baseline."""


def _rekeyings(link: Pair) -> None:
    """In turn from both sides, three CHILD_SAs to one IKE SA."""
    begin = time.monotonic()
    for number in range(CHILD_REKEYINGS + IKE_REKEYINGS):
        time.sleep(max(0.0, begin + number * SPACING - time.monotonic()))
        daemon = link.daemon((Side.A, Side.B)[number // 4 % 2])
        children = number % 4 != 3
        done = link.rekeyed(children=children)
        daemon.rekey(**({"child": CHILD} if children else {"ike": CONNECTION}))
        done()


def _under_load(link: Pair, seconds: float, meanwhile: Callable[[Pair], None], name: str) -> Figures:
    near, far, target = link.ends(Side.A)
    with contextlib.ExitStack() as stack:
        server = far.start(["iperf3", "-s", "-1", "-p", str(PORT), "-i", str(INTERVAL), "-J"], f"iperf-{name}")
        stack.callback(lambda: server.kill() if server.running else None)
        wait_until(lambda: f":{PORT} " in far.run(["ss", "-Hltn"]).stdout, "iperf3 listens")
        client = near.start(["iperf3", "-c", str(target), "-p", str(PORT), "-b", STREAM, "-l", "4K", "-t", str(seconds)], f"iperf-client-{name}")
        stack.callback(lambda: client.kill() if client.running else None)
        sinks, probes = {}, {}
        for side in Side:
            source, sink, address = link.ends(side)
            sinks[side] = stack.enter_context(udp_sink(sink, address, acknowledge=WINDOW // 4))
            probes[side] = UdpStream(source, [(address, sinks[side].port)], count=int(PROBE_RATE * seconds), rate=PROBE_RATE, window=WINDOW)
            stack.callback(probes[side].abandon)
        begin = time.monotonic()
        meanwhile(link)
        if time.monotonic() - begin > seconds:
            raise LabError(f"what was to go on under load took {time.monotonic() - begin:.0f} s, longer than the load")
        sent = {side: probes[side].wait().sent for side in Side}
        received = sum(sinks[side].expect(sent[side], timeout=3.0).received for side in Side)
        wait_until(lambda: not server.running, "iperf3 has ended", 15.0, 0.1)
        stream = json.loads(server.log())
    total = sum(sent.values())
    return Figures(total - received, total, _longest_stall(stream), stream["end"]["sum_received"]["bits_per_second"] / 1e6)


def _longest_stall(stream: dict[str, Any]) -> float:
    longest = silent = 0.0
    for interval in stream["intervals"][1:-1]:  # TCP's start and end are no stalls
        summary = interval["sum"]
        silent = 0.0 if summary["bytes"] else silent + summary["seconds"]
        longest = max(longest, silent)
    return longest * 1000


def measure(a: DaemonFactory, b: DaemonFactory) -> tuple[Figures, Figures]:
    """Without and with rekeying."""
    with pair(a, b, TUNNEL, capture=False) as link:
        link.a.initiate()
        baseline = _under_load(link, SECONDS, _nothing, "baseline")
        loaded = _under_load(link, SECONDS, _rekeyings, "loaded")
        return baseline, loaded


def run() -> list[Row]:
    _, peer = measure(STRONGSWAN, STRONGSWAN)
    baseline, ours = measure(OURS, STRONGSWAN)
    note = f"{CHILD_REKEYINGS} CHILD_SAs and {IKE_REKEYINGS} IKE SAs rekeyed with strongSwan, from both sides; baseline {baseline.lost} of {baseline.sent}"
    longest = f"longest of the stream; baseline {baseline.stall:.0f}"
    return [
        Row("rekey-under-load.lost", "packets", "low", ours.lost, peer.lost, baseline.lost, 0.0, note=note),
        Row("rekey-under-load.stall", "ms", "low", ours.stall, peer.stall, baseline.stall + STALL_SLACK, 0.0, note=longest),
        Row("rekey-under-load.stream", "Mbit/s", "high", ours.rate, peer.rate, 0.9 * baseline.rate, baseline.rate, note=f"baseline {baseline.rate:.1f}"),
    ]

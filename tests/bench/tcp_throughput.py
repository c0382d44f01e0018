"""One TCP stream through a tunnel, AES-128-GCM-16 in UDP, MTU 1500; strongSwan's kernel-libipsec in the same topology, turn about."""

from __future__ import annotations

import json
from typing import Final

from lab.namespaces import Namespace
from lab.pairing import OURS, STRONGSWAN, DaemonFactory, Pair, pair
from lab.process import wait_until
from lab.traffic import IPAddress
from lab.tunnel import Side, Tunnel

from bench.rows import Row, median_row

ROUNDS: Final = 3
SECONDS: Final = 4
FLOOR_RATIO: Final = 3.0
AIM_RATIO: Final = 6.8  # what one prototype of this data plane did
PORT: Final = 5201


def iperf(sender: Namespace, receiver: Namespace, target: IPAddress, *, seconds: float, name: str) -> float:
    """Gbit/s that the receiver got, from one TCP stream; the first second, TCP's start, is left out."""
    server = receiver.start(["iperf3", "-s", "-1", "-p", str(PORT), "-J"], f"iperf-{name}")
    try:
        wait_until(lambda: f":{PORT} " in receiver.run(["ss", "-Hltn"]).stdout, "iperf3 listens")
        done = sender.run(["iperf3", "-c", str(target), "-p", str(PORT), "-t", str(seconds), "-O", "1", "-J"], timeout=seconds + 30)
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        if server.running:
            server.kill()


def _stream(link: Pair, number: int) -> float:
    return iperf(*link.ends(Side.A), seconds=SECONDS, name=str(number))


def _measure(factory: DaemonFactory, number: int) -> float:
    with pair(factory, factory, Tunnel(), capture=False) as link:
        link.a.initiate()
        rate = _stream(link, number)
        # A figure counts only when the tunnel, not a route around it, carried the bytes.
        sent = link.a.child().bytes_out
        if sent * 8 / 1e9 < rate * SECONDS * 0.9:
            raise RuntimeError(f"the tunnel carried {sent} bytes only")
        return rate


def run() -> list[Row]:
    ours, peer = [], []
    for number in range(ROUNDS):
        peer.append(_measure(STRONGSWAN, number))
        ours.append(_measure(OURS, number))
    row = median_row("tcp-throughput", "Gbit/s", "high", ours, peer)
    assert row.peer is not None
    return [
        median_row("tcp-throughput", "Gbit/s", "high", ours, peer, floor=FLOOR_RATIO * row.peer, aim=AIM_RATIO * row.peer, note="peer: strongSwan libipsec")
    ]

"""One TCP stream under a label from VRF to VRF, MPLS in GRE in ESP; and the same without labels through a tunnel of the same algorithm, turn about."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from lab.pairing import OURS, pair
from lab.provider_edges import provider_edges
from lab.tunnel import Side, Tunnel

from bench.rows import Row, median_row
from bench.tcp_throughput import iperf

ROUNDS: Final = 3
SECONDS: Final = 4
FLOOR_RATIO: Final = 0.8
AIM_RATIO: Final = 0.9
ESP: Final = "aes128gcm16"


def _labelled(number: int) -> float:
    with tempfile.TemporaryDirectory() as directory, provider_edges(Path(directory), capture=False) as edges:
        edges.reaches("red")
        near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
        return iperf(near.host, far.host, far.host4, seconds=SECONDS, name=f"labelled-{number}")


def _unlabelled(number: int) -> float:
    with pair(OURS, OURS, Tunnel(esp_proposals=ESP), capture=False) as link:
        link.a.initiate()
        return iperf(*link.ends(Side.A), seconds=SECONDS, name=f"unlabelled-{number}")


def run() -> list[Row]:
    labelled, unlabelled = [], []
    for number in range(ROUNDS):
        unlabelled.append(_unlabelled(number))
        labelled.append(_labelled(number))
    row = median_row("mpls-throughput", "Gbit/s", "high", labelled, unlabelled)
    assert row.peer is not None
    floor, aim = FLOOR_RATIO * row.peer, AIM_RATIO * row.peer
    return [median_row("mpls-throughput", "Gbit/s", "high", labelled, unlabelled, floor=floor, aim=aim, note="peer: our own tunnel without labels")]

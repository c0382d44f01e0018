"""What the first packets of a flow cost, while its policy waits for a tunnel: a 100 packet/s stream, and a TCP connect().

Each run begins without an IKE SA and with the trap installed. strongSwan has no figure here: Debian's 5.9.8 installs no
traps with kernel-libipsec; 6.0.6 loses 1 to 10 packets of the stream and takes 1.0 to 1.1 s for the connect().
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

from lab.capture import WirePacket
from lab.pairing import OURS, Pair, pair
from lab.process import LabError
from lab.relay import RelaySettings
from lab.traffic import UdpStream, tcp_connect, tcp_server, udp_sink
from lab.tunnel import Side, Tunnel

from bench.rows import Row, median_row

RUNS: Final = 10
STREAM_RUNS: Final = 3
STREAM_RATE: Final = 100.0
STREAM_PACKETS: Final = 150
DELAYS: Final = (0.0, 0.050)  # seconds of the whole way there; a round trip takes twice as much
IKE_AUTH: Final = 35  # RFC 7296 section 3.1
SLACK: Final = 0.020  # seconds above twice the exchange
TRAPPED: Final = Tunnel(start_a="trap")


@dataclass(frozen=True, slots=True)
class Connect:
    """Seconds of a connect(), and of the IKE exchange that it set off."""

    seconds: float
    exchange: float


def exchange_seconds(packets: list[WirePacket]) -> float:
    """From the first IKE packet to the response of IKE_AUTH, at gateway A."""
    ike = [packet for packet in packets if packet.ike_exchange is not None]
    answers = [packet for packet in ike if packet.ike_exchange == (IKE_AUTH, True)]
    if not answers:
        raise LabError("no IKE_AUTH response was seen")
    return answers[0].time - ike[0].time


def connects(link: Pair, runs: int) -> list[Connect]:
    """connect() into the trapped policy, `runs` times from scratch."""
    results = []
    near, far, target = link.ends(Side.A)
    with tcp_server(far, target) as port:
        for _ in range(runs):
            link.down()
            seen = len(link.capture.packets())
            seconds = tcp_connect(near, target, port).seconds
            results.append(Connect(seconds, exchange_seconds(link.capture.packets()[seen:])))
    return results


def lost(link: Pair, runs: int) -> list[float]:
    """Packets lost of a stream into the trapped policy, `runs` times from scratch."""
    losses = []
    near, far, target = link.ends(Side.A)
    for _ in range(runs):
        link.down()
        with udp_sink(far, target) as sink:
            stream = UdpStream(near, [(target, sink.port)], count=STREAM_PACKETS, rate=STREAM_RATE)
            sent = stream.wait()
            losses.append(float(sent.sent - sink.expect(sent.sent, timeout=2.0).received))
    return losses


def run() -> list[Row]:
    rows = []
    for delay in DELAYS:
        suffix = f"-{delay * 1000:.0f}ms"
        with pair(OURS, OURS, TRAPPED, relay=RelaySettings(delay=delay) if delay else None) as link:
            losses = lost(link, STREAM_RUNS)
            timed = connects(link, RUNS)
            leaks = link.leaks()
        if leaks:
            raise RuntimeError(f"{len(leaks)} packets in clear on the wire: {leaks[0]}")
        exchange = statistics.median(entry.exchange for entry in timed)
        rows.append(Row(f"first-packet.lost{suffix}", "packets", "low", max(losses), floor=0.0, aim=0.0, runs_ours=losses, note="worst run"))
        rows.append(
            median_row(
                f"first-packet.connect{suffix}",
                "ms",
                "low",
                [entry.seconds * 1000 for entry in timed],
                floor=(2 * exchange + SLACK) * 1000,
                aim=exchange * 1000 + 2 * delay * 1000 + 5,
                note=f"IKE exchange {exchange * 1000:.1f} ms",
            )
        )
    return rows

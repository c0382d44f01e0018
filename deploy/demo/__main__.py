"""Two of our gateways and a host behind each, in network namespaces: a tunnel that the first packet starts, and that loses none.

Exit status 0 when all went as told, else 1. Nothing stays behind, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import Final

from lab.capture import Capture
from lab.gateway import Gateway
from lab.pairing import OURS, Pair, pair
from lab.process import LabError
from lab.topology import WAN
from lab.traffic import UdpStream, tcp_bulk, tcp_server, udp_sink
from lab.tunnel import Side, Tunnel

from demo.narrator import Narrator

TOOLS: Final = {"ip": "iproute2", "nft": "nftables", "ping": "iputils-ping", "ethtool": "ethtool", "setpriv": "util-linux"}
PINGS: Final = 5
STREAM_PACKETS: Final = 100
STREAM_RATE: Final = 100.0  # packets a second
THROUGHPUT_SECONDS: Final = 4.0


class Disappointed(Exception):
    """Something did not go as told."""


def missing() -> str | None:
    """One sentence about what the machine lacks; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "The demo makes network namespaces and a TUN device, so it needs root: run it as root, or with sudo."
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"The demo needs a TUN device, and /dev/net/tun does not open ({error.strerror}): load the module tun, or pass the device into this container."
    lacks = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if lacks:
        return f"The demo needs {', '.join(lacks)}: apt-get install {' '.join(lacks)}."
    return None


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Disappointed(otherwise)


def gateways(link: Pair) -> tuple[Gateway, Gateway]:
    assert isinstance(link.a, Gateway)
    assert isinstance(link.b, Gateway)
    return link.a, link.b


def first_packets(link: Pair, say: Narrator) -> tuple[int, float]:
    """Each begins without an SA. Packets sent, and seconds of the connect()."""
    a, _ = gateways(link)
    near, far, target = link.ends(Side.A)

    say.step("The policy is trapped, no key has been exchanged: $ vpnctl policies")
    expect(not a.ike_sas(), "there is an IKE SA already")
    say.show(a.vpnctl("policies"))

    say.step(f"A ping starts the tunnel: $ ping -c {PINGS} {target}")
    pinged = link.ping(count=PINGS)
    expect(pinged.lost == 0, f"{pinged.lost} of {PINGS} pings were lost")
    first, last = pinged.times[0] * 1000, pinged.times[-1] * 1000
    say.tell(f"{pinged.received} of {PINGS} answered; the first took {first:.0f} ms with the key exchange, the last {last:.1f} ms")

    say.step(f"Tunnel down; then {STREAM_RATE:.0f} datagrams a second into the trap")
    link.down()
    with udp_sink(far, target) as sink:
        sent = UdpStream(near, [(target, sink.port)], count=STREAM_PACKETS, rate=STREAM_RATE).wait()
        got = sink.expect(sent.sent)
    expect(got.received == sent.sent, f"{sent.sent - got.received} of {sent.sent} datagrams were lost")
    expect(not got.reordered, f"{got.reordered} datagrams came out of order")
    say.tell(f"{got.received} of {sent.sent} arrived, in order; the slowest took {got.slowest * 1000:.0f} ms")

    say.step("Tunnel down; then a TCP connection, whose SYN waits in the gateway")
    link.down()
    with tcp_server(far, target) as port:
        seconds, lost = link.connect(port)
    expect(lost == 0, "the SYN was lost and had to be sent again")
    say.tell(f"connect() took {seconds * 1000:.0f} ms with the key exchange; a lost SYN costs a second")
    return PINGS + sent.sent, seconds


def throughput(link: Pair, say: Narrator) -> float:
    """Gbit/s of one TCP stream."""
    a, _ = gateways(link)
    near, far, target = link.ends(Side.A)
    say.step(f"One TCP stream for {THROUGHPUT_SECONDS:.0f} s, every byte checked at the far end")
    before = a.child().bytes_out
    with tcp_server(far, target) as port:
        result = tcp_bulk(near, target, port, seconds=THROUGHPUT_SECONDS)
    expect(result.intact, "the stream arrived damaged")
    expect(a.child().bytes_out - before > result.bytes, "the tunnel did not carry the stream")
    say.tell(f"{result.bytes / 1e6:,.0f} MB intact, {result.gigabits:.2f} Gbit/s through AES-128-GCM in UDP")
    say.step("The security associations: $ vpnctl sas")
    say.show(a.vpnctl("sas"))
    return result.gigabits


def demonstrate(say: Narrator) -> str:
    """The summary."""
    say.title("Two gateways, a host behind each")
    say.step("Starting vpnd and kernel-shim on both gateways")
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap"), capture=False) as link:
        a, b = gateways(link)
        with Capture(a.namespace, WAN) as capture:
            packets, connect = first_packets(link, say)
            clear = capture.clear_packets(link.sites.inner_networks)
            say.step("What an eavesdropper between the gateways saw of it")
            say.tell(f"{len(capture.ike())} packets of IKE, {len(capture.esp())} of ESP, {len(clear)} in clear")
            expect(not clear, f"{len(clear)} packets were on the wire in clear")
        rate = throughput(link, say)

        say.step("An orderly shutdown")
        a.stop()
        b.wait_gone()
        b.stop()
        left = a.traces() + b.traces()
        expect(not left, f"left behind: {'; '.join(left)}")
        say.tell("SAs deleted at the peer; no route, rule, table or device of ours is left")
    return (
        f"0 of {packets} first packets lost, connect() {connect * 1000:.0f} ms with the key exchange, "
        f"{rate:.2f} Gbit/s, nothing in clear, nothing left behind ({say.seconds:.0f} s)"
    )


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    lacking = missing()
    if lacking:
        print(lacking, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _terminated)
    say = Narrator()
    try:
        say.end(demonstrate(say), good=True)
    except KeyboardInterrupt:
        say.end("interrupted; nothing is left behind", good=False)
        return 1
    except (Disappointed, LabError) as error:
        say.end(f"FAILED: {error}", good=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

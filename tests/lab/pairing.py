"""A tunnel between two gateways of any kind, and the traffic that shows that it carries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from lab.capture import Capture
from lab.daemon import ChildSa, Daemon, IkeSa, NegotiationFailed
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, wait_until
from lab.relay import RelaySettings
from lab.strongswan import NewerStrongSwan, StrongSwan
from lab.topology import LAN, WAN, Sites, sites
from lab.traffic import BulkResult, PingResult, Received, UdpStream, ping, tcp_bulk, tcp_connect, tcp_server, udp_sink
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel

DaemonFactory = Callable[[Namespace, Path], Daemon]
IPAddress = IPv4Address | IPv6Address

OURS: DaemonFactory = Gateway
STRONGSWAN: DaemonFactory = StrongSwan
NEWER_STRONGSWAN: DaemonFactory = NewerStrongSwan

# retransmissions: after 3 s a peer is dead, and so long even a busy machine does not let one wait
GIVES_UP_SOON: Final = {"retransmit_timeout": "1.0", "retransmit_tries": "1"}

WINDOW: Final = 128  # datagrams under way; strongSwan's libipsec and every socket buffer hold as many


@dataclass(frozen=True, slots=True)
class Pair:
    """Two gateways that run, with a capture on the wire since before they started."""

    sites: Sites
    tunnel: Tunnel
    a: Daemon
    b: Daemon
    recorder: Capture | None

    @property
    def capture(self) -> Capture:
        """What was on the wire; LabError when this pair was made without."""
        if self.recorder is None:
            raise LabError("this pair has no capture")
        return self.recorder

    def daemon(self, side: Side) -> Daemon:
        return self.a if side is Side.A else self.b

    def leaks(self, *, of: Side | None = None) -> list[str]:
        """What was on the wire in clear of the inner networks, in transport mode of the gateways themselves; a test wants none.

        `of`: only what came from that side's networks.
        """
        if self.tunnel.mode == "transport":
            between = {self.sites.a.wan4, self.sites.a.wan6, self.sites.b.wan4, self.sites.b.wan6}
            packets = [packet for packet in self.capture.packets() if {packet.source, packet.destination} <= between]
            return [str(packet) for packet in packets if not (packet.is_esp or packet.is_ike or packet.is_keepalive)]
        packets = self.capture.clear_packets(self.sites.inner_networks)
        if of is not None:
            site = self.sites.a if of is Side.A else self.sites.b
            packets = [packet for packet in packets if packet.source in (site.net4 if packet.source.version == 4 else site.net6)]
        return [str(packet) for packet in packets]

    def carries_again(self, side: Side = Side.A, timeout: float = PATIENCE) -> None:
        """Until a ping from `side` comes back."""
        wait_until(lambda: self.ping(side, count=1, timeout=1.0).received, "traffic passes", timeout, 0.2)

    def ends(self, side: Side) -> tuple[Namespace, Namespace, IPAddress]:
        """Who sends from `side`, who receives, and at which address. In transport mode the gateways are the hosts."""
        near, far = (self.sites.a, self.sites.b) if side is Side.A else (self.sites.b, self.sites.a)
        if self.tunnel.mode == "transport":
            return near.gateway, far.gateway, far.wan4 if self.tunnel.outer_version == 4 else far.wan6
        return near.host, far.host, far.host4 if self.tunnel.inner_version == 4 else far.host6

    def ping(self, side: Side = Side.A, *, count: int = 3, timeout: float = PATIENCE / 3) -> PingResult:
        near, _, target = self.ends(side)
        return ping(near, target, count=count, timeout=timeout)

    def bulk(self, side: Side = Side.A, *, size: int = 8 << 20, seconds: float = 0.0) -> BulkResult:
        """One TCP stream from the host at `side` to the other."""
        near, far, target = self.ends(side)
        with tcp_server(far, target) as port:
            return tcp_bulk(near, target, port, size=size, seconds=seconds)

    def connect(self, port: int, side: Side = Side.A) -> tuple[float, int]:
        """Seconds of a connect() from the host at `side` to the other, and how many of its SYNs did not come there.

        That there was more than one says only that the answer took a second.
        """
        near, far, target = self.ends(side)
        with Capture(far, LAN) as arrived:
            connected = tcp_connect(near, target, port)
            came = sum(packet.is_syn and packet.destination_port == port for packet in arrived.packets())
        return connected.seconds, 1 + connected.retransmissions - came

    def datagrams(self, *, count: int = 10_000, rate: float = 6000.0, size: int = 256, window: int = WINDOW) -> dict[Side, Received]:
        """`count` numbered datagrams each way at once; by the sending side, what the other received.

        No more are under way than any peer's queues hold, however slow the machine: what is lost then, a gateway lost.
        """
        with contextlib.ExitStack() as stack:
            sinks, streams = {}, {}
            for side in Side:
                _, far, target = self.ends(side)
                sinks[side] = stack.enter_context(udp_sink(far, target, acknowledge=window // 4, whole=count))
            for side in Side:
                near, _, target = self.ends(side)
                streams[side] = UdpStream(near, [(target, sinks[side].port)], count=count, rate=rate, size=size, window=window)
                stack.callback(streams[side].abandon)
            sent = {side: stream.wait() for side, stream in streams.items()}
            return {side: sinks[side].expect(sent[side].sent - sent[side].refused, timeout=PATIENCE / 3) for side in Side}

    @contextlib.contextmanager
    def datagrams_all_the_while(self, *, rate: float = 400.0, longest: float = 60.0) -> Iterator[None]:
        """Datagrams both ways; LabError when one of them is lost or doubled, or when what goes on meanwhile takes more than `longest` seconds."""
        with contextlib.ExitStack() as stack:
            sinks, streams = {}, {}
            for side in Side:
                near, far, target = self.ends(side)
                sinks[side] = stack.enter_context(udp_sink(far, target, acknowledge=WINDOW // 4))
                streams[side] = UdpStream(near, [(target, sinks[side].port)], count=int(rate * longest), rate=rate, size=256, window=WINDOW)
                stack.callback(streams[side].abandon)
            for side in Side:
                sinks[side].expect(1)
            yield
            for side in Side:
                if not streams[side].running:
                    raise LabError("the datagrams were to run all the while")
                sent = streams[side].finish()
                received = sinks[side].expect(sent.sent)
                if (sent.refused, received.received, received.duplicates) != (0, sent.sent, 0):
                    raise LabError(f"from {side.value}: {sent} but {received}")

    def rekeyed(self, *, children: bool = True, timeout: float = PATIENCE) -> Callable[[], None]:
        """Call what it returns to wait until other SAs than now stand on both sides, as `settled` has it."""

        def keys(sides: list[list[IkeSa]]) -> set[object]:
            ikes = [ike for side in sides for ike in side]
            if children:
                return {(child.spi_in, child.spi_out) for ike in ikes for child in _left(ike)}
            return {(ike.initiator_spi, ike.responder_spi) for ike in ikes}

        before = keys(self._ike_sas())
        return lambda: self._wait_alike(lambda sides: not before & keys(sides), "rekeyed", timeout)

    def settled(self, timeout: float = PATIENCE) -> None:
        """Until the same IKE SA and CHILD_SA stand on both sides, no other is left, and no exchange is under way that may change that."""
        self._wait_alike(lambda sides: True, "settled", timeout)

    def _ike_sas(self) -> list[list[IkeSa]]:
        return [daemon.ike_sas() for daemon in (self.a, self.b)]

    def _wait_alike(self, condition: Callable[[list[list[IkeSa]]], bool], what: str, timeout: float) -> None:
        try:
            wait_until(lambda: _alike(sides := self._ike_sas()) and condition(sides), what, timeout, 0.05)
        except LabError as error:
            raise LabError(f"{error}: {self._ike_sas()}") from None

    def down(self, timeout: float = PATIENCE) -> None:
        """No IKE SA on either side; traps stay. A late packet of earlier traffic may start one anew, so it looks again."""

        def gone() -> bool:
            for daemon in (self.a, self.b):
                if daemon.ike_sas():
                    with contextlib.suppress(NegotiationFailed):  # the peer's delete was faster
                        daemon.terminate()
                    return False
            return True

        wait_until(gone, "no IKE SA left", timeout, 0.02)

    def children(self, name: str = CHILD) -> tuple[ChildSa, ChildSa]:
        """The one installed CHILD_SA of either side; LabError when a side has none or several."""
        return self.a.child(name), self.b.child(name)


def _left(ike: IkeSa) -> list[ChildSa]:
    return [child for child in ike.children if child.state != "DELETED"]


def _alike(sides: list[list[IkeSa]]) -> bool:
    if any(len(ikes) != 1 or ikes[0].state != "ESTABLISHED" or ikes[0].tasks or len(_left(ikes[0])) != 1 for ikes in sides):
        return False
    (a,), (b,) = sides
    (child_a,), (child_b,) = _left(a), _left(b)
    same_ike = (a.initiator_spi, a.responder_spi) == (b.initiator_spi, b.responder_spi)
    same_child = (child_a.spi_in, child_a.spi_out) == (child_b.spi_out, child_b.spi_in)
    return same_ike and same_child and child_a.state == child_b.state == "INSTALLED"


@contextlib.contextmanager
def pair(
    make_a: DaemonFactory,
    make_b: DaemonFactory,
    tunnel: Tunnel,
    *,
    relay: RelaySettings | None = None,
    offloads: bool = True,
    mtu: int = 1500,
    capture: bool = True,
) -> Iterator[Pair]:
    """Both daemons up with `tunnel` loaded, B first: what A starts finds a responder. A capture costs throughput."""
    with sites(relay=relay, offloads=offloads, mtu=mtu) as places:
        directory = places.lab.directory
        a = make_a(places.a.gateway, tunnel.write(places, Side.A, directory / "a"))
        b = make_b(places.b.gateway, tunnel.write(places, Side.B, directory / "b"))
        with contextlib.ExitStack() as stack:
            recorder = stack.enter_context(Capture(places.a.gateway, WAN)) if capture else None
            try:
                b.start()
                a.start()
                yield Pair(places, tunnel, a, b, recorder)
            except BaseException as error:
                for daemon in (a, b):
                    with contextlib.suppress(OSError, LabError):
                        error.add_note(f"--- {daemon.kind} at {daemon.namespace.role}\n{daemon.account()[-8000:]}")
                raise
            finally:
                for daemon in (a, b):
                    daemon.kill()


def facing(
    ours: Side, tunnel: Tunnel, *, mine: DaemonFactory = OURS, theirs: DaemonFactory = STRONGSWAN, offloads: bool = True
) -> contextlib.AbstractContextManager[Pair]:
    """A `pair` with our gateway at side `ours` and strongSwan at the other."""
    return pair(mine if ours is Side.A else theirs, mine if ours is Side.B else theirs, tunnel, offloads=offloads)


def carries_a_little(link: Pair) -> None:
    """Ping and some TCP both ways through the tunnel, and nothing in clear."""
    for side in Side:
        assert link.ping(side).lost == 0
        assert link.bulk(side, size=1 << 20).intact
    for child in link.children():
        assert min(child.packets_in, child.packets_out) >= 6
    assert link.leaks() == []


def carries_everything(link: Pair, *, datagrams: int = 10_000, bulk: int = 16 << 20) -> None:
    """Ping, UDP and TCP, both ways, complete and intact; the SAs of both sides counted them; nothing was on the wire in clear."""
    before = link.children()
    for side in Side:
        assert link.ping(side).lost == 0
    received = link.datagrams(count=datagrams)
    assert {side: account.received for side, account in received.items()} == dict.fromkeys(Side, datagrams)
    assert all(account.duplicates == 0 for account in received.values())
    counted = link.children()
    # At this rate nothing is lost on the way, so each packet that one side sent the other took in.
    counted_alike(*counted)
    for old, new in zip(before, counted, strict=True):
        assert new.packets_out - old.packets_out >= datagrams
        assert new.packets_in - old.packets_in >= datagrams
    # TCP fills every buffer, and what overflows is sent again: here the counters bound each other.
    for side in Side:
        assert link.bulk(side, size=bulk).intact
    for old, new in zip(counted, link.children(), strict=True):
        assert new.bytes_out - old.bytes_out > bulk
        assert new.bytes_in - old.bytes_in > bulk
    # A large send is one frame on a wire that lets it pass, so bytes are counted.
    assert sum(packet.length for packet in link.capture.esp()) > 2 * bulk
    assert link.leaks() == []


def rekey_in_turn(link: Pair, rounds: int = 1) -> None:
    """The CHILD_SA and the IKE SA, from either side."""
    for _ in range(rounds):
        for side in Side:
            done = link.rekeyed()
            link.daemon(side).rekey(child=CHILD)
            done()
            done = link.rekeyed(children=False)
            link.daemon(side).rekey(ike=CONNECTION)
            done()


def rekey_at_once(link: Pair, rounds: int = 1) -> None:
    """The same, begun by both sides."""
    for _ in range(rounds):
        done = link.rekeyed()
        for side in Side:
            link.daemon(side).rekey(child=CHILD)
        done()
        done = link.rekeyed(children=False)
        for side in Side:
            link.daemon(side).rekey(ike=CONNECTION)
        done()


def counted_alike(a: ChildSa, b: ChildSa) -> None:
    """What one side sent the other received, packet by packet; true while nothing is lost or under way."""
    assert (a.spi_in, a.spi_out) == (b.spi_out, b.spi_in)
    assert (a.packets_out, a.packets_in) == (b.packets_in, b.packets_out)
    assert (a.bytes_out, a.bytes_in) == (b.bytes_in, b.bytes_out)

"""What two peers do at the same moment (RFC 7296 sections 2.8.1, 2.8.2 and 2.25), message after message, and what must hold after each."""

from __future__ import annotations

from collections.abc import Callable

from kernel_shim.model import Direction
from lab.ike_pair import Datagram, Pair, Peer, agree, child, connection, mirrored, psk
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import ChildClosed, Reason
from vpnd.ike.sa import ChildSaState, IkeSaState
from vpnd.ike.transport import ANSWER_ARRIVES

NET = child("net", "10.1.0.0/16", "10.2.0.0/16", "aes128gcm16-x25519")
OTHER = child("other", "10.3.0.0/16", "10.4.0.0/16")
DELAY = IkeSettings().rekeyed_delay

Act = Callable[[Pair, Peer], None]


def collide(pair: Pair, first: Act, second: Act) -> None:
    """Both requests are on the wire, `a`'s first."""
    first(pair, pair.a)
    second(pair, pair.b)
    assert [datagram.sender for datagram in pair.flight] == ["a", "b"]


def make_pair(lower: str = "a") -> Pair:
    """`lower` is who will draw the lower nonces, and so make the SA that goes."""
    pair = Pair(connection("to-b", psk("a"), psk("b"), [NET, OTHER]), connection("to-a", psk("b"), psk("a"), [mirrored(NET), mirrored(OTHER)]))
    pair.connect()
    pair.log.clear()
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.0, tries=60))
        first = b"\x00" if peer.name == lower else b"\x7f"

        def entropy(octets: int, drawn: Callable[[int], bytes] = peer.entropy, first: bytes = first) -> bytes:
            # until the requests cross, what is drawn goes into them; the nonces of the answers decide nothing
            return (b"\x80" if pair.log else first) + drawn(octets - 1)

        peer.entropy = entropy  # type: ignore[method-assign]
    return pair


def rekey_child(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey_child(min(peer.sa.children), pair.now), pair.now)


def delete_child(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.delete_child(min(peer.sa.children), pair.now), pair.now)


def expire_child(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.child_expired(min(peer.sa.children), pair.now), pair.now)


def create_child(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.create_child(peer.connections[0].children["other"], pair.now), pair.now)


def rekey_ike(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey(pair.now), pair.now)


def delete_ike(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.delete(pair.now), pair.now)


def deliver(pair: Pair, sender: str) -> str:
    """Let the oldest datagram of that sender arrive; what it was."""
    while not any(datagram.sender == sender for datagram in pair.flight):
        assert pair.tick(), f"nothing of {sender} is in flight: {pair.log}"
    datagram = next(datagram for datagram in pair.flight if datagram.sender == sender)
    pair.flight.remove(datagram)
    pair.deliver(datagram)
    return str(datagram)


def invariants(pair: Pair, *, lossless: bool = True) -> None:
    """At any moment: the SAs out of a kernel are those that its key manager sends by, it has none that the key manager does not know, nothing waits unsaid.

    `lossless`: each side sends, and the other one can receive it.
    """
    for peer, other in (pair.peers, pair.peers[::-1]):
        outbound = [sa for sa in peer.sad.values() if sa.direction is Direction.OUT]
        if lossless:
            assert outbound, f"{peer.name} cannot send"
            assert outbound[-1].spi in {sa.spi for sa in other.sad.values() if sa.direction is Direction.IN}, f"{peer.name} sends what {other.name} cannot open"
        children = [one for ike in peer.standing for one in ike.children.values()]
        assert {sa.id for sa in outbound} == {one.sa.outbound.id for one in children if one.sends}
        assert len(peer.twins) == len(children)
        assert not any(ike.effects for ike in peer.sas.values())
        known = {sa_id for ike in peer.standing for one in ike.children.values() for sa_id in (one.sa.inbound.id, one.sa.outbound.id)}
        assert set(peer.sad) <= known | set(peer.lingering)


def finish(pair: Pair, children: int, *, drop: Callable[[Datagram], bool] = lambda datagram: False, lossless: bool = False) -> None:
    def watched(datagram: Datagram) -> bool:
        invariants(pair, lossless=lossless)
        return drop(datagram)

    for _ in range(400):
        pair.settle(watched)
        invariants(pair, lossless=lossless)
        pair.wait(0.1, watched)
    pair.wait(ANSWER_ARRIVES + DELAY)
    agree(pair, children)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    for peer in pair.peers:
        assert peer.sa.state is IkeSaState.ESTABLISHED
        assert {one.state for one in peer.sa.children.values()} <= {ChildSaState.INSTALLED}
        assert not peer.lingering
        assert not peer.sa.held
        assert peer.sa.tasks_active == peer.sa.tasks_queued == ()
    assert sorted(pair.a.up) == sorted(pair.b.up)
    assert len(pair.a.up) == children


def reasons(peer: Peer) -> list[Reason]:
    return [event.reason for event in peer.events if isinstance(event, ChildClosed)]

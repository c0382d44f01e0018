"""Two peers live at random: whatever is lost, repeated, late or refused, both end with the same SAs once the network is quiet."""

from __future__ import annotations

import random

import pytest
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk

from vpnd.config.model import ChildConfig
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.exchanges.rekey_ike import REPLACED_TIMEOUT
from vpnd.ike.iana import Exchange
from vpnd.ike.sa import ChildSaState, IkeSaState
from vpnd.ike.transport import RESPONDERS

pytestmark = pytest.mark.property

IKE = "aes128-sha256-x25519"
ADDITIONAL = "-ke1_mlkem768-ke2_ecp256"


def children_of(additional: str) -> list[ChildConfig]:
    esp = [f"aes128gcm16-x25519{additional}" if number % 2 else "aes128gcm16" for number in range(4)]
    return [child(f"c{number}", f"10.{number}.0.0/16", f"172.16.{number}.0/24", esp[number]) for number in range(4)]


CHILDREN = children_of("")


class Weather:
    """Loss, doubling and delay, from a seed."""

    def __init__(self, pair: Pair, rng: random.Random) -> None:
        self.pair, self.rng, self.bad = pair, rng, True
        self.late: list[Datagram] = []

    def __call__(self, datagram: Datagram) -> bool:
        if not self.bad:
            return False
        chance = self.rng.random()
        if chance < 0.2:
            return True
        if chance < 0.3:
            self.late.append(datagram)
            return True
        if chance < 0.4:
            self.late.append(datagram)
        if self.late and self.rng.random() < 0.5:
            self.pair.deliver(self.late.pop(self.rng.randrange(len(self.late))))
        return False


@pytest.mark.parametrize(("seed", "additional"), [*((seed, "") for seed in range(100)), *((seed, ADDITIONAL) for seed in range(1000, 1100))])
def test_both_sides_end_with_the_same_sas(seed: int, additional: str) -> None:
    rng = random.Random(seed)
    children = children_of(additional)
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), children, IKE + additional, dpd_delay=rng.choice([0.0, 30.0])),
        connection("to-a", psk("b"), psk("a"), [mirrored(config) for config in children], IKE + additional, dpd_delay=rng.choice([0.0, 20.0])),
        nat_a=rng.choice([None, "198.51.100.7"]),
    )
    weather = Weather(pair, rng)
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.0, tries=90, jitter=0.3), half_open_timeout=600.0)
    pair.a.start(pair.outside(pair.b.endpoint), pair.now, children[0])
    pair.wait(100.0, weather)
    assert pair.a.established()
    assert pair.b.established()
    for _ in range(30):
        peer = rng.choice(pair.peers)
        sa = rng.choice(peer.standing)
        stands = [number for number, entry in sa.children.items() if entry.state is ChildSaState.INSTALLED]
        match rng.randrange(10):
            case 0 | 1:
                peer.run(sa, sa.create_child(rng.choice(list(sa.connection.children.values())), pair.now), pair.now)
            case 2 if stands:
                peer.run(sa, sa.delete_child(rng.choice(stands), pair.now), pair.now)
            case 3 if stands:
                peer.run(sa, sa.child_expired(rng.choice(stands), pair.now), pair.now)
            case 4:
                peer.run(sa, sa.probe(pair.now), pair.now)
            case 5:
                share = rng.choice([0.0, 0.3])
                peer.refuse_install = lambda sa, share=share: rng.random() < share  # type: ignore[misc]
                peer.refuse_spi = rng.random() < 0.1
            case 7 | 8 if stands:
                number = rng.choice(stands)
                peer.run(sa, sa.rekey_child(number, pair.now), pair.now)
                if rng.random() < 0.5:
                    # the same one from the other side, by the SPIs
                    spi = sa.children[number].sa.outbound.spi
                    other = pair.b if peer is pair.a else pair.a
                    for theirs in other.standing:
                        for twin in [child.sa.id for child in theirs.children.values() if child.sa.inbound.spi == spi]:
                            other.run(theirs, theirs.rekey_child(twin, pair.now), pair.now)
            case 9:
                peer.run(sa, sa.rekey(pair.now), pair.now)
                if rng.random() < 0.5:
                    other = pair.b if peer is pair.a else pair.a
                    theirs = other.standing[-1]
                    other.run(theirs, theirs.rekey(pair.now), pair.now)
            case 6:
                peer.hold_spis = not peer.hold_spis
        pair.wait(rng.choice([0.0, 0.5, 3.0, 20.0]), weather)
        if rng.random() < 0.3:
            peer.give_spis(pair.now)
    weather.bad = False
    for peer in pair.peers:
        peer.hold_spis = False
        peer.give_spis(pair.now)
        peer.refuse_install = lambda sa: False  # type: ignore[misc]
        peer.refuse_spi = False
    pair.wait(100.0 + 2 * REPLACED_TIMEOUT)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    assert {pair.a.closed, pair.b.closed} <= {None, Reason.REKEYED}
    (one,), (other,) = pair.a.standing, pair.b.standing
    assert (one.spi_local, one.spi_remote, one.initiator) == (other.spi_remote, other.spi_local, not other.initiator)
    assert one.state is other.state is IkeSaState.ESTABLISHED
    assert len(pair.a.sa.children) == len(pair.b.sa.children)
    agree(pair, len(pair.a.sa.children))
    assert sorted(pair.a.up) == sorted(pair.b.up)
    for peer in pair.peers:
        assert peer.sa.tasks_active == peer.sa.tasks_queued == ()
        assert not peer.sa.held
        assert not peer.lingering
        assert {child.state for child in peer.sa.children.values()} <= {ChildSaState.INSTALLED}
    # and then nothing is left
    last = rng.choice(pair.peers)
    last.run(last.sa, last.sa.delete(pair.now), pair.now)
    pair.wait(10.0)
    agree(pair, 0)
    assert {pair.a.closed, pair.b.closed} == {Reason.DELETED, Reason.PEER_DELETED}
    assert pair.a.up == pair.b.up == []


@pytest.mark.parametrize("authenticated", [False, True])
@pytest.mark.parametrize("exchange", [*Exchange, 0, 255])
def test_every_exchange_in_every_state_has_a_defined_end(exchange: int, authenticated: bool) -> None:
    pair = Pair(connection("to-b", psk("a"), psk("b"), CHILDREN), connection("to-a", psk("b"), psk("a"), [mirrored(config) for config in CHILDREN]))
    pair.a.start(pair.b.endpoint, pair.now, CHILDREN[0])
    for _ in range(4 if authenticated else 2):
        pair.step()
    pair.flight.clear()
    request = pair.a.sa._seal(exchange, 2 if authenticated else 1, (), response=False).datagrams[0]
    effects = pair.b.sa.receive(request, pair.b.endpoint, pair.a.endpoint, pair.now)
    known = (authenticated, exchange) in RESPONDERS
    # a peer that has authenticated itself always gets an answer; before that, only for IKE_AUTH
    assert bool(effects) is (authenticated or known)
    assert pair.b.sa.state in (IkeSaState.ESTABLISHED, IkeSaState.CONNECTING, IkeSaState.DESTROYING)
    assert (pair.b.sa.state is IkeSaState.ESTABLISHED) is authenticated

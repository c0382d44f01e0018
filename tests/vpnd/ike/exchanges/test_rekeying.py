"""Rekeying of CHILD_SAs and of the IKE SA by either side: no packet is lost, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from lab.ike_pair import Datagram, Pair, Peer, agree, child, connection, mirrored, psk

from kernel_shim.model import AcquireSequence, Direction
from vpnd.config.model import ChildConfig
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import ChildClosed, ChildEstablished, IkeHandedOver, IkeOpened, Reason, RekeyFailed
from vpnd.ike.exchanges.rekey_ike import REPLACED_TIMEOUT
from vpnd.ike.iana import Group
from vpnd.ike.sa import ChildSaState, IkeSaState
from vpnd.ike.session import REKEY_AGAIN, RETRIES, RETRY_LAST

PLAIN = child("plain", "10.1.0.0/16", "10.2.0.0/16")
PFS = child("pfs", "10.1.0.0/16", "10.2.0.0/16", "aes128gcm16-x25519")
OTHER = child("other", "10.3.0.0/16", "10.4.0.0/16")
DELAY = IkeSettings().rekeyed_delay
SILENCE = Retransmission().total() + 1.0  # until a peer counts as silent


def pair_of(config: ChildConfig = PLAIN, **options: object) -> Pair:
    a = connection("to-b", psk("a"), psk("b"), [config, OTHER], **options)
    b = connection("to-a", psk("b"), psk("a"), [mirrored(config), mirrored(OTHER)], **options)
    pair = Pair(a, b)
    pair.connect()
    pair.log.clear()
    return pair


def of(pair: Pair, name: str) -> tuple[Peer, Peer]:
    return (pair.a, pair.b) if name == "a" else (pair.b, pair.a)


def rekey_child(pair: Pair, peer: Peer) -> None:
    child_id = min(peer.sa.children)
    peer.run(peer.sa, peer.sa.rekey_child(child_id, pair.now), pair.now)


def rekey_ike(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey(pair.now), pair.now)


def spis(peer: Peer) -> dict[Direction, set[int]]:
    return {direction: {sa.spi for sa in peer.sad.values() if sa.direction is direction} for direction in Direction}


def passes(pair: Pair) -> None:
    """Whatever SA either kernel sends with, the newest of its SAs out, the other one can receive now."""
    for peer, other in (pair.peers, pair.peers[::-1]):
        newest = [sa for sa in peer.sad.values() if sa.direction is Direction.OUT][-1]
        assert newest.spi in {sa.spi for sa in other.sad.values() if sa.direction is Direction.IN}


# CHILD_SAs


@pytest.mark.parametrize("config", [PLAIN, PFS], ids=["without-pfs", "with-pfs"])
@pytest.mark.parametrize("asks", ["a", "b"])
def test_a_child_is_replaced(asks: str, config: ChildConfig) -> None:
    pair = pair_of(config)
    peer, other = of(pair, asks)
    old = {each.name: each.sa.children[1].sa for each in pair.peers}
    # CREATE_CHILD_SA { N(REKEY_SA), SA, Ni, [KEi], TSi, TSr } -->
    rekey_child(pair, peer)
    assert peer.sa.children[1].state is ChildSaState.REKEYING
    pair.step()
    # the responder takes packets with the new SA, and sends with the old one
    assert other.sa.children[1].state is ChildSaState.REKEYED
    assert [len(spis(other)[direction]) for direction in (Direction.IN, Direction.OUT)] == [2, 1]
    passes(pair)
    # <-- CREATE_CHILD_SA { SA, Nr, [KEr], TSi, TSr }
    pair.step()
    assert [len(spis(peer)[direction]) for direction in (Direction.IN, Direction.OUT)] == [2, 2]
    passes(pair)
    # INFORMATIONAL { D(old) } -->
    pair.tick()
    pair.step()
    assert spis(other)[Direction.OUT] == spis(peer)[Direction.IN] - {old[peer.name].inbound.spi}
    passes(pair)
    # <-- INFORMATIONAL { D(old) }
    pair.settle()
    passes(pair)
    assert len(pair.log) == 4
    # packets that are under way are still taken for a while
    for each in pair.peers:
        assert old[each.name].inbound.id in each.sad
        assert old[each.name].outbound.id not in each.sad
        (closed,) = each.happened(ChildClosed)
        assert isinstance(closed, ChildClosed)
        assert (closed.child.id, closed.reason) == (1, Reason.REKEYED)
        fresh = each.happened(ChildEstablished)[-1]
        assert isinstance(fresh, ChildEstablished)
        assert fresh.replaces is old[each.name]
        assert (fresh.child.reqid, fresh.child.local_ts, fresh.child.remote_ts) == (1, old[each.name].local_ts, old[each.name].remote_ts)
        assert fresh.child.outbound.encryption_key != old[each.name].outbound.encryption_key
    pair.wait(DELAY)
    agree(pair, 1)
    assert [child.state for each in pair.peers for child in each.sa.children.values()] == [ChildSaState.INSTALLED] * 2


def test_pfs_makes_a_key_exchange_and_none_without() -> None:
    sizes = {}
    for config in (PLAIN, PFS):
        pair = pair_of(config)
        rekey_child(pair, pair.a)
        sizes[config.name] = len(pair.flight[0].data)
    assert sizes["pfs"] - sizes["plain"] >= 40  # KE(x25519), and its transform


@pytest.mark.parametrize(
    ("peers", "groups"),
    [("aes128gcm16-ecp256", (Group.ECP_256,)), ("aes128gcm16-modp2048-modpnone", (Group.MODP_2048,)), ("aes128gcm16-modpnone", ()), ("aes128gcm16", ())],
    ids=["must", "may", "must not, in so many words", "must not"],
)
@pytest.mark.parametrize("asks", ["a", "b"])
def test_the_defaults_leave_a_key_exchange_to_the_peer(asks: str, peers: str, groups: tuple[Group, ...]) -> None:
    ours = child("net", "10.1.0.0/16", "10.2.0.0/16", "default")
    theirs = child("net", "10.2.0.0/16", "10.1.0.0/16", peers)
    pair = Pair(connection("to-b", psk("a"), psk("b"), [ours]), connection("to-a", psk("b"), psk("a"), [theirs]))
    pair.connect()
    rekey_child(pair, of(pair, asks)[0])
    pair.settle()
    pair.wait(DELAY)
    agree(pair, 1)
    assert not pair.a.happened(RekeyFailed)
    assert not pair.b.happened(RekeyFailed)
    for peer in pair.peers:
        (established,) = peer.sa.children.values()
        assert established.proposal.groups == groups


def test_the_selectors_in_use_are_asked_for_again() -> None:
    wide = child("wide", "10.0.0.0/8", "10.0.0.0/8")
    pair = Pair(connection("to-b", psk("a"), psk("b"), [wide]), connection("to-a", psk("b"), psk("a"), [mirrored(PLAIN)]))
    pair.connect()
    for asks in pair.peers:
        before = asks.sa.children[min(asks.sa.children)].sa
        rekey_child(pair, asks)
        pair.wait(DELAY)
        agree(pair, 1)
        (now,) = asks.sa.children.values()
        assert (now.sa.local_ts, now.sa.remote_ts) == (before.local_ts, before.remote_ts)


def test_another_group_than_the_peer_wants() -> None:
    ours = child("pfs", esp="aes128gcm16-x25519-ecp256")
    a = connection("to-b", psk("a"), psk("b"), [ours], ike="aes128-sha256-x25519-ecp256")
    b = connection("to-a", psk("b"), psk("a"), [mirrored(child("pfs", esp="aes128gcm16-ecp256"))], ike="aes128-sha256-x25519-ecp256")
    pair = Pair(a, b)
    pair.connect()
    pair.log.clear()
    rekey_child(pair, pair.a)
    # { KE(x25519) } -->  <-- { N(INVALID_KE_PAYLOAD) }  { KE(ecp256) } -->  <-- { ... }  { D } -->  <-- { D }
    pair.wait(DELAY)
    assert len(pair.log) == 6
    agree(pair, 1)
    pair.b.sa.connection = replace(pair.b.sa.connection, proposals=connection("x", psk("a"), psk("b"), [], ike="aes128-sha256-ecp256").proposals)
    pair.log.clear()
    rekey_ike(pair, pair.a)
    pair.settle()
    assert len(pair.log) == 6
    assert pair.a.sa.keys.suite.group == 19
    agree(pair, 1)


def test_children_are_rekeyed_of_their_own_accord() -> None:
    pair = pair_of(child("plain", "10.1.0.0/16", "10.2.0.0/16", rekey_time=100.0, rand_time=20.0, life_time=150.0), rekey_time=0.0)
    before = {}
    for _ in range(20):
        before.update({peer.name: set(peer.sad) for peer in pair.peers})
        pair.wait(106.0)
        assert not any(set(peer.sad) & before[peer.name] for peer in pair.peers)
        assert len(pair.a.sa.children) == len(pair.b.sa.children) == 1
    pair.wait(DELAY)
    agree(pair, 1)
    assert pair.a.up == pair.b.up == ["plain"]


def test_the_jitter_takes_up_to_its_whole_off() -> None:
    at = set()
    for seed in range(30):
        pair = Pair(connection("to-b", psk("a"), psk("b"), [PLAIN]), connection("to-a", psk("b"), psk("a"), [mirrored(PLAIN)]))
        pair.a.random.seed(seed)
        pair.connect()
        at.add(pair.a.sa.children[1].sa.outbound.soft.seconds)
    assert min(at) >= 3600 - 360
    assert max(at) <= 3600
    assert len(at) > 20


def test_a_rekeying_that_is_refused_is_tried_again_and_the_old_one_goes_on() -> None:
    pair = pair_of(PFS)
    pair.b.sa.children[1].config = mirrored(replace(PFS, esp_proposals=()))
    rekey_child(pair, pair.a)
    pair.settle()
    # <-- CREATE_CHILD_SA { N(NO_PROPOSAL_CHOSEN) }
    (failed,) = pair.a.happened(RekeyFailed)
    assert isinstance(failed, RekeyFailed)
    assert (failed.child_id, failed.reason) == (1, Reason.NO_PROPOSAL_CHOSEN)
    agree(pair, 1)
    assert pair.a.sa.children[1].state is ChildSaState.INSTALLED
    pair.b.sa.children[1].config = mirrored(PFS)
    pair.wait(REKEY_AGAIN + DELAY)
    agree(pair, 1)
    assert min(pair.a.sa.children) > 1


def test_a_peer_that_is_busy_for_ever_is_out_of_step() -> None:
    pair = pair_of()
    pair.b.refuse_spi = True
    rekey_child(pair, pair.a)
    pair.wait(RETRY_LAST * (RETRIES + 1))
    # RFC 7296 section 2.25: several minutes of TEMPORARY_FAILURE
    assert len(pair.a.happened(RekeyFailed)) == RETRIES
    assert pair.a.closed is Reason.TEMPORARY_FAILURE
    assert pair.b.closed is Reason.PEER_DELETED
    assert not pair.a.sad
    assert not pair.b.sad


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
@pytest.mark.parametrize("refuses", ["a", "b"])
def test_a_kernel_that_refuses_the_new_sa(refuses: str, direction: Direction) -> None:
    pair = pair_of()
    peer, _ = of(pair, refuses)
    peer.refuse_install = lambda sa: sa.direction is direction
    rekey_child(pair, pair.a)
    pair.wait(0.2)
    peer.refuse_install = lambda sa: False
    pair.wait(REKEY_AGAIN + DELAY)
    if (refuses, direction) == ("b", Direction.OUT):
        # its late SA out was refused when the old one had gone: nothing stands on either side
        agree(pair, 0)
        assert pair.a.up == pair.b.up == []
    else:
        agree(pair, 1)
        assert pair.a.up == pair.b.up == ["plain"]
    assert not any(peer.lingering or peer.sa.held for peer in pair.peers)


def test_a_rekeyed_child_that_its_peer_forgets_to_delete_passes_on_when_it_expires() -> None:
    pair = pair_of()
    rekey_child(pair, pair.a)
    pair.step()
    pair.step()
    (forgotten,) = [task for task in pair.a.sa.queue if task.name == "CHILD_DELETE"]
    pair.a.sa.queue.remove(forgotten)
    assert len(spis(pair.b)[Direction.OUT]) == 1
    pair.b.run(pair.b.sa, pair.b.sa.child_expired(1, pair.now), pair.now)
    assert len(spis(pair.b)[Direction.OUT]) == 1
    pair.wait(DELAY)
    agree(pair, 1)


# The IKE SA


@pytest.mark.parametrize("asks", ["a", "b"])
def test_the_ike_sa_is_replaced(asks: str) -> None:
    pair = pair_of()
    peer, other = of(pair, asks)
    old = {each.name: each.sa for each in pair.peers}
    sads = {each.name: dict(each.sad) for each in pair.peers}
    # CREATE_CHILD_SA { SA, Ni, KEi } -->
    rekey_ike(pair, peer)
    assert peer.sa.state is IkeSaState.REKEYING
    pair.step()
    assert old[other.name].state is IkeSaState.REKEYED
    # <-- CREATE_CHILD_SA { SA, Nr, KEr }
    pair.step()
    # INFORMATIONAL { D(IKE) } -->  <-- INFORMATIONAL { }
    pair.settle()
    assert len(pair.log) == 4
    for each in pair.peers:
        new = each.sa
        assert old[each.name].close_reason is Reason.REKEYED
        assert each.standing == [new]
        assert new.initiator is (each is peer)
        assert len(each.happened(IkeOpened)) == len(each.happened(IkeHandedOver)) == 1
        assert set(new.children) == {1}
        assert not old[each.name].children
        assert (new.local_id, new.remote_id, new.established_at) == (old[each.name].local_id, old[each.name].remote_id, pair.now)
        assert each.sad == sads[each.name], "the CHILD_SAs stay as they are"
    a, b = pair.a.sa, pair.b.sa
    assert (a.spi_local, a.spi_remote) == (b.spi_remote, b.spi_local)
    assert a.spi_local != old["a"].spi_local
    assert a.keys.keys.d.reveal() == b.keys.keys.d.reveal() != old["a"].keys.keys.d.reveal()
    # message ids begin at 0 again, both ways, and everything goes on
    pair.log.clear()
    for each in pair.peers:
        each.run(each.sa, each.sa.probe(pair.now), pair.now)
        pair.settle()
    assert pair.log == [line for name, back in ("ab", "ba") for line in (f"{name}: INFORMATIONAL request 0", f"{back}: INFORMATIONAL response 0")]
    rekey_child(pair, other)
    pair.wait(DELAY)
    agree(pair, 1)
    pair.b.run(pair.b.sa, pair.b.sa.delete(pair.now), pair.now)
    pair.settle()
    agree(pair, 0)
    assert pair.a.up == pair.b.up == []


def test_ike_sas_are_rekeyed_of_their_own_accord() -> None:
    pair = pair_of(rekey_time=1000.0, rand_time=100.0, over_time=100.0)
    generations = set()
    for _ in range(20):
        pair.wait(1001.0)
        generations.add(pair.a.sa.spi_local)
        assert len(pair.a.standing) == len(pair.b.standing) == 1
        assert len(pair.a.sa.children) == len(pair.b.sa.children) == 1
    assert len(generations) == 20
    assert {pair.a.closed, pair.b.closed} == {Reason.REKEYED}
    pair.wait(DELAY)
    agree(pair, 1)


def test_what_waits_goes_on_under_the_new_keys() -> None:
    pair = pair_of()
    old = pair.a.sa
    rekey_ike(pair, pair.a)
    for peer in pair.peers:
        peer.run(peer.sa, peer.sa.create_child(peer.connections[0].children["other"], pair.now, acquire=AcquireSequence(8)), pair.now)
        if peer is pair.a:
            peer.run(peer.sa, peer.sa.delete_child(1, pair.now), pair.now)
            # CREATE_CHILD_SA { SA, Ni, KEi } -->  <-- { SA, Nr, KEr }, then the rest on the new IKE SA
            pair.settle()
    pair.settle()
    assert old.closed
    assert pair.a.up == pair.b.up == ["other", "other"]
    agree(pair, 2)
    assert pair.a.failed == pair.b.failed == []


def test_an_old_ike_sa_that_nobody_deletes_goes_after_a_while() -> None:
    pair = pair_of()
    rekey_ike(pair, pair.a)
    pair.step()
    pair.step()
    (forgotten,) = [sa for sa in pair.a.sas.values() if sa.state is IkeSaState.DELETING]
    effects = forgotten.abort(pair.now, Reason.SHUTDOWN)
    pair.a.run(forgotten, effects, pair.now)
    pair.flight.clear()
    pair.wait(REPLACED_TIMEOUT + SILENCE)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    agree(pair, 1)


def test_a_peer_that_never_deletes_old_ike_sas_gets_no_further_ones() -> None:
    pair = pair_of()
    rekey_ike(pair, pair.a)
    pair.settle(lambda datagram: "INFORMATIONAL" in str(datagram))
    assert len(pair.b.standing) == 2
    rekey_ike(pair, pair.a)
    pair.settle(lambda datagram: "INFORMATIONAL" in str(datagram))
    # <-- CREATE_CHILD_SA { N(TEMPORARY_FAILURE) }
    assert len(pair.b.standing) == 2
    agree(pair, 1)
    pair.wait(REPLACED_TIMEOUT)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    agree(pair, 1)


@pytest.mark.parametrize("lost", range(4))
@pytest.mark.parametrize("act", [rekey_child, rekey_ike], ids=["child", "ike"])
@pytest.mark.parametrize("repeated", [False, True], ids=["lost", "repeated"])
def test_any_message_may_be_lost_or_repeated(act: Callable[[Pair, Peer], None], lost: int, repeated: bool) -> None:
    pair, seen = pair_of(PFS), [-1]

    def disturb(datagram: Datagram) -> bool:
        seen[0] += 1
        if seen[0] == lost and repeated:
            pair.deliver(datagram)
        return seen[0] == lost and not repeated

    act(pair, pair.a)
    pair.wait(SILENCE, disturb)
    agree(pair, 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    assert [child.state for peer in pair.peers for child in peer.sa.children.values()] == [ChildSaState.INSTALLED] * 2

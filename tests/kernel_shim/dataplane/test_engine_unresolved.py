"""Packets that meet a policy without an SA: kept, asked for, sent in order, or lost under a reason that their sender hears."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

import pytest
from dataplane_pair import Pair, addresses, policy_pair, selector
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

from kernel_shim.model import Action, Direction, Expire, Lifetime, Mode, Policy, ReqId, SaId, Selector, Template, Unresolved
from kernel_shim.packet import virtio


@pytest.mark.parametrize("inner", [4, 6])
def test_the_first_packets_are_kept_and_leave_in_order_when_the_sa_comes(inner: int) -> None:
    pair = Pair(inner)
    packets = [pair.packet(n, sport=1000 + n % 3) for n in range(100)]
    pair.send(*packets)
    assert len(pair.left.acquires()) == 1
    acquire = pair.left.acquires()[0]
    assert acquire.flow is not None
    assert str(acquire.flow.source) == pair.hosts(9)[0]
    pair.connect()
    pair.settle()
    assert pair.right.received() == packets
    assert pair.left.count("pending_packets") == 0


def test_a_super_packet_waits_and_leaves_as_one() -> None:
    pair = Pair()
    payload = random.Random(2).randbytes(30_000)
    pair.left.engine.send(pair.super_frame(payload, 1000), pair.now)
    pair.connect()
    pair.settle()
    assert b"".join(packet[52:] for packet in pair.right.received()) == payload


def test_new_packets_queue_up_behind_what_still_drains() -> None:
    pair = Pair()
    packets = [pair.packet(n) for n in range(600)]
    pair.send(*packets[:500])
    pair.connect()  # drains its first slices only
    assert pair.left.count("pending_packets") > 0
    assert pair.left.engine.next_deadline() == pair.now
    pair.send(*packets[500:])
    pair.settle()
    assert pair.right.received() == packets


def test_an_sa_that_does_not_cover_the_flow_does_not_carry_it() -> None:
    pair = Pair()
    pair.send(pair.packet(1, host=9))
    pair.connect(source_selectors=(selector("10.1.0.77/32"),), destination_selectors=(selector("10.2.0.0/16"),))
    pair.settle()
    assert pair.right.received() == []
    assert pair.left.count("pending_packets") == 1
    pair.next_spis()
    pair.connect()
    pair.settle()
    assert pair.right.received() == [pair.packet(1, host=9)]


@pytest.mark.parametrize(("inner", "kind"), [(4, ICMP), (6, ICMPv6DestUnreach)])
def test_a_failed_negotiation_tells_the_senders(inner: int, kind: type) -> None:
    pair = Pair(inner)
    pair.send(pair.packet(1), pair.packet(2))
    pair.left.engine.acquire_failed(pair.left.acquires()[0].sequence, errno.ECONNREFUSED, pair.now)
    errors = pair.left.received()
    assert len(errors) == 2
    parsed = IP(errors[0]) if inner == 4 else IPv6(errors[0])
    assert parsed.dst == pair.hosts(9)[0]
    assert kind in parsed
    assert pair.left.count("drop_acquire_failed") == 2
    # It backs off: the next packet is refused at once.
    pair.send(pair.packet(3))
    assert len(pair.left.acquires()) == 1
    assert pair.left.count("drop_acquire_backoff") == 1


def test_an_acquire_that_nobody_answers_is_repeated_and_its_packets_age() -> None:
    pair = Pair()
    pair.send(pair.packet(1))
    begin = pair.now
    while (deadline := pair.left.engine.next_deadline()) is not None and deadline < begin + 200:
        pair.now = deadline
        pair.left.engine.tick(pair.now)
    assert len(pair.left.acquires()) > 3
    assert len({acquire.sequence for acquire in pair.left.acquires()[:3]}) == 1
    assert pair.left.count("drop_pending_aged") == 1
    assert len(pair.left.received()) == 1


def test_an_acquire_without_a_listener_is_repeated_when_one_comes() -> None:
    pair = Pair()
    pair.left.engine.key_manager_listens(False, pair.now)
    pair.send(pair.packet(1))
    pair.left.events.clear()
    pair.left.engine.key_manager_listens(True, pair.now)
    assert len(pair.left.acquires()) == 1


@pytest.mark.parametrize(("mode", "reason", "errors"), [(Unresolved.DROP, "drop_unresolved_drop", 0), (Unresolved.EAGAIN, "drop_unresolved_eagain", 1)])
def test_modes_that_do_not_queue_still_ask(mode: Unresolved, reason: str, errors: int) -> None:
    pair = Pair(policies=False)
    for policy in policy_pair(*pair.nets, "192.0.2.1", "192.0.2.2", unresolved=mode):
        pair.left.engine.add_policy(policy, pair.now)
    pair.send(pair.packet(1))
    assert len(pair.left.acquires()) == 1
    assert pair.left.count(reason) == 1
    assert len(pair.left.received()) == errors


def test_bypass_discard_and_no_policy() -> None:
    pair = Pair()
    inner = Selector(addresses("10.1.0.0/16"), addresses("10.2.0.0/24"))
    pair.left.engine.add_policy(Policy(inner, Direction.OUT, Action.DISCARD, 10), pair.now)
    pair.send(pair.packet(1))
    assert pair.left.count("drop_policy_discard") == 1
    pair.left.engine.update_policy(Policy(inner, Direction.OUT, Action.BYPASS, 10), pair.now)
    pair.send(pair.packet(2))
    assert [frame[virtio.LENGTH :] for frame in pair.left.sink.clear] == [pair.packet(2)]
    pair.left.engine.delete_policy(Direction.OUT, inner)
    pair.send(pair.packet(3))
    assert len(pair.left.acquires()) == 1
    assert len(pair.left.sink.clear) == 1


def test_waiting_packets_do_not_leave_in_clear_when_their_policy_goes() -> None:
    pair = Pair()
    pair.send(pair.packet(1))
    pair.left.engine.delete_policy(Direction.OUT, Selector(addresses("10.1.0.0/16"), addresses("10.2.0.0/16")))
    pair.settle()
    assert pair.left.sink.clear == []
    assert pair.left.count("drop_pending_policy_gone") == 1


def test_waiting_packets_follow_a_replaced_policy() -> None:
    pair = Pair()
    pair.send(pair.packet(1), pair.packet(2))
    out = policy_pair(*pair.nets, "192.0.2.1", "192.0.2.2", reqid=8)[0]
    pair.left.engine.update_policy(out, pair.now)
    pair.settle()
    pair.left.engine.add_sa(pair.sa(True, Direction.OUT, reqid=ReqId(8)), pair.now)
    assert len([d for sent in pair.left.sent() for d in sent.datagrams()]) == 2


def test_a_new_sa_is_used_from_the_next_packet_on_and_the_old_one_until_then() -> None:
    pair = Pair()
    pair.connect()
    pair.send(pair.packet(1))
    old = pair.left.sent()
    pair.next_spis()
    pair.connect()
    pair.send(pair.packet(2))
    new = pair.left.sent()
    assert old[0].data[:4] != new[0].data[:4]
    pair.right.take(old + new, pair.now)
    assert pair.right.received() == [pair.packet(1), pair.packet(2)]


def test_a_dying_sa_yields_to_a_mature_one_and_a_deleted_one_is_missed() -> None:
    pair = Pair()
    pair.connect(soft=Lifetime(seconds=10))
    pair.now += 11
    pair.left.engine.tick(pair.now)
    assert [event.hard for event in pair.left.events if isinstance(event, Expire)] == [False, False]
    pair.send(pair.packet(1))
    pair.pass_on()
    assert pair.right.received() == [pair.packet(1)]
    sa = pair.sa(True, Direction.OUT)
    pair.left.engine.delete_sa(SaId(sa.destination, sa.spi))
    pair.send(pair.packet(2))
    assert pair.left.sent() == []
    assert len(pair.left.acquires()) == 1


def test_a_hard_expiry_by_packets_ends_in_an_acquire_and_loses_nothing() -> None:
    pair = Pair()
    pair.connect(hard=Lifetime(packets=10), soft=Lifetime(packets=8))
    packets = [pair.packet(n) for n in range(25)]
    pair.send(*packets[:15])
    expiries = [event.hard for event in pair.left.events if isinstance(event, Expire)]
    assert expiries == [False, True]
    assert len(pair.left.acquires()) == 1
    pair.pass_on()
    for _ in range(2):
        pair.next_spis()
        pair.connect(hard=Lifetime(packets=10))
        pair.send(*packets[15:]) if len(pair.left.acquires()) == 1 else None
        pair.settle()
    assert pair.right.received() == packets


def test_a_lifetime_shorter_than_what_waits_is_kept() -> None:
    pair = Pair()
    packets = [pair.packet(n) for n in range(30)]
    pair.send(*packets)
    for _ in range(3):
        pair.connect(hard=Lifetime(packets=10))
        pair.settle()
        pair.next_spis()
    assert pair.right.received() == packets


def test_a_hard_expiry_by_time_and_octets() -> None:
    pair = Pair()
    pair.connect(hard=Lifetime(seconds=60))
    pair.now += 61
    pair.left.engine.tick(pair.now)
    assert pair.left.engine.sas() == []
    pair.next_spis()
    pair.connect(hard=Lifetime(octets=5000))
    pair.left.engine.send(pair.super_frame(bytes(20_000), 1000), pair.now)
    pair.send(pair.packet(9))
    assert len(pair.left.acquires()) == 1


def test_a_template_for_any_peer_keeps_peers_apart() -> None:
    pair = Pair(policies=False)
    any_peer = Template(Mode.TRANSPORT, ReqId(9))
    everywhere = Selector(addresses("10.1.0.0/16"), addresses("10.2.0.0/16"))
    pair.left.engine.add_policy(Policy(everywhere, Direction.OUT, Action.PROTECT, 5, (any_peer,)), pair.now)
    pair.send(pair.packet(1, host=9), pair.packet(2, host=10), pair.packet(3, host=9))
    acquires = pair.left.acquires()
    assert [str(acquire.destination) for acquire in acquires] == ["10.2.0.9", "10.2.0.10"]


def test_policies_that_the_pipelines_cannot_carry_out_are_refused() -> None:
    pair = Pair(policies=False)
    good = policy_pair(*pair.nets, "192.0.2.1", "192.0.2.2")[0]
    for bad in (
        replace(good, templates=()),
        replace(good, templates=good.templates * 2),
        replace(good, templates=(replace(good.templates[0], protocol=51),)),
        replace(good, action=Action.BYPASS),
    ):
        with pytest.raises(Exception, match="errno"):
            pair.left.engine.add_policy(bad, pair.now)

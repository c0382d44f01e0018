"""SADB_X_MIGRATE in the data plane: SAs and templates go to new addresses, sequence numbers and replay windows stay."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from dataplane_pair import Gateway, Pair, policy_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.model import Direction, KernelError, Migration, Mode, Move, PolicyExpire, ReqId

LEFT, RIGHT = ip_address("192.0.2.1"), ip_address("192.0.2.2")
ROAMED = ip_address("198.51.100.7")


def move(old_source, old_destination, new_source, new_destination, reqid=0):
    return Move(Mode.TUNNEL, ReqId(reqid), old_source, old_destination, new_source, new_destination)


def migrate(gateway, now):
    """The left end has gone from LEFT to ROAMED."""
    for policy in gateway.engine.policies():
        (template,) = policy.templates
        ends = [ROAMED if end == LEFT else end for end in (template.source, template.destination)]
        moves = (move(template.source, template.destination, *ends),)
        after = gateway.engine.migrate(Migration(policy.direction, policy.selector, moves), now)
        assert (after.templates[0].source, after.templates[0].destination, after.index) == (*ends, policy.index)
    assert {ROAMED} < {end for status in gateway.engine.sas() for end in (status.sa.source, status.sa.destination)}


def test_packets_go_on_between_the_new_addresses_and_nothing_starts_over():
    pair = Pair()
    pair.connect()
    pair.send(*(pair.packet(number) for number in range(5)))
    early = pair.left.sent()
    pair.right.take(early, pair.now)
    assert len(pair.right.received()) == 5
    before = {status.sa.spi: status for gateway in (pair.left, pair.right) for status in gateway.engine.sas()}
    for gateway in (pair.left, pair.right):
        migrate(gateway, pair.now)
    for gateway in (pair.left, pair.right):
        for status in gateway.engine.sas():
            old = before[status.sa.spi]
            assert (status.sequence, status.packets, status.added, status.sa.encryption_key) == (old.sequence, old.packets, old.added, old.sa.encryption_key)
    pair.send(pair.packet(7))
    (sent,) = pair.left.sent()
    assert (sent.local.address, sent.remote.address) == (ROAMED, RIGHT)
    assert int.from_bytes(sent.data[4:8], "big") == 6  # the next sequence number, and no ACQUIRE
    assert not pair.left.acquires()
    pair.right.take([sent], pair.now)
    assert pair.right.received() == [pair.packet(7)]
    pair.right.take([replace(item, local=sent.local) for item in early], pair.now)  # the replay window stayed, too
    assert not pair.right.received()
    pair.send(pair.packet(8, left=False), left=False)
    (back,) = pair.right.sent()
    assert back.remote.address == ROAMED


def test_packets_that_wait_go_out_from_the_new_address_once_there_is_an_sa():
    pair = Pair()
    pair.send(pair.packet(1))
    assert [acquire.source for acquire in pair.left.acquires()] == [LEFT]
    policy = next(policy for policy in pair.left.engine.policies() if policy.direction is Direction.OUT)
    pair.left.engine.migrate(Migration(Direction.OUT, policy.selector, (move(LEFT, RIGHT, ROAMED, RIGHT),)), pair.now)
    assert [acquire.source for acquire in pair.left.acquires()] == [LEFT, ROAMED]
    pair.left.engine.add_sa(replace(pair.sa(True, Direction.OUT), source=ROAMED, acquire=pair.left.acquires()[-1].sequence), pair.now)
    assert len(pair.left.sent()) == 1


def refused(gateway, migration):
    before = gateway.engine.policies(), gateway.engine.sas()
    with pytest.raises(KernelError) as error:
        gateway.engine.migrate(migration, 100.0)
    assert (gateway.engine.policies(), gateway.engine.sas()) == before
    return error.value.errno


def test_what_cannot_move_is_refused_and_nothing_has_moved():
    pair = Pair()
    pair.connect()
    policy = next(policy for policy in pair.left.engine.policies() if policy.direction is Direction.OUT)
    elsewhere = move(ROAMED, RIGHT, LEFT, RIGHT)
    assert refused(pair.left, Migration(Direction.OUT, policy.selector, (elsewhere,))) == errno.ENODATA
    assert refused(pair.left, Migration(Direction.FORWARD, policy.selector, (elsewhere,))) == errno.ENOENT
    assert refused(pair.left, Migration(Direction.OUT, policy.selector, (move(LEFT, RIGHT, ROAMED, RIGHT, reqid=8),))) == errno.ENODATA
    taken = replace(pair.sa(True, Direction.OUT), destination=ROAMED, encryption_key=pair.sa(True, Direction.OUT, spi=0x7777).encryption_key)
    pair.left.engine.add_sa(taken, pair.now)
    assert refused(pair.left, Migration(Direction.OUT, policy.selector, (move(LEFT, RIGHT, LEFT, ROAMED),))) == errno.EEXIST


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), max_size=12))
def test_wherever_it_goes_no_sequence_number_is_used_twice(path):
    pair = Pair()
    pair.connect()
    here, seen = LEFT, []
    policy = next(policy for policy in pair.left.engine.policies() if policy.direction is Direction.OUT)
    for number, moves in enumerate(path):
        if moves:
            there = LEFT if here == ROAMED else ROAMED
            pair.left.engine.migrate(Migration(Direction.OUT, policy.selector, (move(here, RIGHT, there, RIGHT),)), pair.now)
            here = there
        pair.send(pair.packet(number))
        (sent,) = pair.left.sent()
        assert sent.local.address == here
        seen.append(int.from_bytes(sent.data[4:8], "big"))
    assert seen == list(range(1, len(path) + 1))


# Lifetimes of policies


def gateway_with(**lifetimes):
    gateway = Gateway(1)
    out, _ = policy_pair("10.1.0.0/16", "10.2.0.0/16", str(LEFT), str(RIGHT), **lifetimes)
    return gateway, gateway.engine.add_policy(out, 0.0)


def expiries(gateway):
    return [(event.policy.index, event.hard) for event in gateway.events if isinstance(event, PolicyExpire)]


def test_a_policy_says_when_it_gets_old_and_goes_when_it_is_over():
    gateway, policy = gateway_with(soft_seconds=10, hard_seconds=30)
    gateway.engine.tick(9.9)
    assert expiries(gateway) == []
    assert gateway.engine.next_deadline() == 10.0
    gateway.engine.tick(10.0)
    assert expiries(gateway) == [(policy.index, False)]
    assert gateway.engine.next_deadline() == 30.0
    gateway.engine.tick(30.0)
    assert expiries(gateway) == [(policy.index, False), (policy.index, True)]
    assert not gateway.engine.policies()
    assert gateway.engine.next_deadline() is None


def test_a_replaced_policy_begins_anew_and_a_moved_one_does_not():
    gateway, policy = gateway_with(hard_seconds=30)
    gateway.engine.update_policy(policy, 20.0)
    gateway.engine.migrate(Migration(Direction.OUT, policy.selector, (move(LEFT, RIGHT, ROAMED, RIGHT),)), 25.0)
    gateway.engine.tick(31.0)
    assert expiries(gateway) == []
    gateway.engine.tick(50.0)
    assert expiries(gateway) == [(policy.index, True)]


def test_a_policy_that_went_before_says_nothing():
    gateway, policy = gateway_with(soft_seconds=10, hard_seconds=30)
    gateway.engine.delete_policy(policy.direction, policy.selector)
    assert gateway.engine.next_deadline() is None
    another = gateway.engine.add_policy(replace(policy, soft_seconds=0, hard_seconds=0), 5.0)
    gateway.engine.tick(100.0)
    assert expiries(gateway) == []
    assert gateway.engine.policies() == [another]
    gateway.engine.update_policy(replace(policy, hard_seconds=10), 100.0)
    gateway.engine.flush_policies()
    gateway.engine.tick(200.0)
    assert expiries(gateway) == []

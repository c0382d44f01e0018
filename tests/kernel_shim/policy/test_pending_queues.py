"""Pending queues: in order within each flow, or counted; never past a bound."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernel_shim.model import PolicyIndex, Unresolved
from kernel_shim.policy import pending
from kernel_shim.policy.peer import PeerKey
from kernel_shim.policy.pending import Dropped, PendingQueues, Run
from kernel_shim.reasons import DropReason


class Packet(NamedTuple):
    flow: int
    number: int
    segments: int = 1


A, B = PeerKey(PolicyIndex(9), None, None), PeerKey(PolicyIndex(17), None, None)


def flow_name(packet: Packet) -> bytes:
    return b"flow%d" % packet.flow


def fill(queues: PendingQueues[Packet], key: PeerKey, packets: list[Packet], now: float = 0.0, size: int = 100, mode: Unresolved = Unresolved.QUEUE) -> None:
    for packet in packets:
        assert queues.offer(key, flow_name(packet), packet, size, packet.segments, mode, now) is None


def drain(queues: PendingQueues[Packet], limit: int = pending.SLICE_SEGMENTS) -> list[Packet]:
    sent: list[Packet] = []
    while (run := queues.next_run(limit)) is not None:
        sent += queues.take(run)
    return sent


def test_a_ready_queue_gives_everything_in_order_of_its_flows() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(n % 3, n) for n in range(100)])
    assert queues.next_run() is None
    queues.ready(A)
    sent = drain(queues)
    assert sorted(sent, key=lambda p: p.number) == [Packet(n % 3, n) for n in range(100)]
    for flow in range(3):
        assert [p.number for p in sent if p.flow == flow] == list(range(flow, 100, 3))
    assert queues.flows == {}
    assert queues.next_deadline() is None


def test_slices_take_turns_between_queues() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(1, n) for n in range(300)])
    fill(queues, B, [Packet(2, n) for n in range(10)])
    queues.ready(A)
    queues.ready(B)
    turns = []
    while (run := queues.next_run(50)) is not None:
        turns.append((run.key, len(queues.take(run))))
    assert turns[0] == (A, 50)
    assert turns[1] == (B, 10)
    assert [count for key, count in turns if key == A] == [50] * 6


def test_a_new_packet_of_a_waiting_flow_goes_behind_it() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(1, n) for n in range(80)])
    queues.ready(A)
    first = queues.next_run(50)
    assert first is not None
    sent = queues.take(first)
    assert b"flow1" in queues.flows
    assert queues.join(b"flow1", Packet(1, 80), 100, 1, 1.0) is None
    sent += drain(queues)
    assert [p.number for p in sent] == list(range(81))


def test_an_sa_that_covers_one_flow_leaves_the_other_waiting() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(n % 2, n) for n in range(20)])
    queues.ready(A)
    sent: list[Packet] = []
    while (run := queues.next_run()) is not None:
        if run.flow == b"flow0":
            sent += queues.take(run)
        else:
            queues.keep(run)
    assert [p.number for p in sent] == list(range(0, 20, 2))
    assert list(queues.flows) == [b"flow1"]
    assert queues.head(A) == Packet(1, 1)
    queues.ready(A)
    assert [p.number for p in drain(queues)] == list(range(1, 20, 2))


def test_a_flow_that_another_policy_now_matches_moves_whole() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(n % 2, n) for n in range(100)])
    queues.ready_all()
    run = queues.next_run(4)
    assert run is not None
    queues.move(run, B, Unresolved.QUEUE)
    assert {status.key: status.packets for status in queues.snapshot()} == {A: 50, B: 50}
    assert queues.flows[run.flow] == B
    # A stale lookup result must not open a second line for the flow.
    fill(queues, A, [Packet(0, 100)])
    queues.ready_policy(B.policy)
    queues.discard(A, DropReason.ACQUIRE_FAILED)
    assert [p.number for p in drain(queues)] == [*range(0, 100, 2), 100]


def test_an_sa_readies_only_the_peers_it_may_serve() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    one, two = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    for number, destination in enumerate((one, two, None)):
        fill(queues, PeerKey(PolicyIndex(9), None, destination), [Packet(number, number)])
    queues.ready_policy(PolicyIndex(9), two)
    assert [p.flow for p in drain(queues)] == [2, 1]
    queues.ready_policy(PolicyIndex(17))
    assert drain(queues) == []
    queues.ready_policy(PolicyIndex(9))
    assert [p.flow for p in drain(queues)] == [0]


def test_the_oldest_makes_room() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(n, n) for n in range(pending.MAX_QUEUE_SEGMENTS + 7)])
    assert queues.drops == {DropReason.PENDING_OVERFLOW_PACKETS: 7}
    assert queues.head(A) == Packet(7, 7)
    assert len(queues.flows) == pending.MAX_QUEUE_SEGMENTS


def test_bytes_are_bounded_under_block_as_well() -> None:
    for mode in (Unresolved.QUEUE, Unresolved.BLOCK):
        queues: PendingQueues[Packet] = PendingQueues()
        fill(queues, A, [Packet(1, n) for n in range(20)], size=pending.MAX_QUEUE_BYTES // 16, mode=mode)
        assert queues.drops == {DropReason.PENDING_OVERFLOW_BYTES: 4}


def test_block_is_not_bounded_in_packets() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(1, n) for n in range(pending.MAX_QUEUE_SEGMENTS * 2)], mode=Unresolved.BLOCK)
    assert not queues.drops


def test_too_large_for_any_queue() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    assert queues.offer(A, b"x", Packet(1, 1), pending.MAX_QUEUE_BYTES + 1, 1, Unresolved.BLOCK, 0.0) is DropReason.PENDING_TOO_LARGE
    assert queues.offer(A, b"x", Packet(1, 1), 10, pending.MAX_QUEUE_SEGMENTS + 1, Unresolved.QUEUE, 0.0) is DropReason.PENDING_TOO_LARGE
    assert queues.snapshot() == []


@pytest.mark.parametrize(("mode", "reason"), [(Unresolved.EAGAIN, DropReason.UNRESOLVED_EAGAIN), (Unresolved.DROP, DropReason.UNRESOLVED_DROP)])
def test_modes_that_do_not_wait(mode: Unresolved, reason: DropReason) -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    assert queues.offer(A, b"x", Packet(1, 1), 100, 3, mode, 0.0) is reason
    assert queues.drops == {reason: 3}
    assert queues.flows == {}


def test_all_queues_together_are_bounded_and_the_greedy_one_pays() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    keys = [PeerKey(PolicyIndex(8 * n), None, None) for n in range(1, pending.MAX_TOTAL_SEGMENTS // pending.MAX_QUEUE_SEGMENTS + 1)]
    small, greedy = keys[0], keys[-1]
    fill(queues, small, [Packet(0, 0)])
    for number, key in enumerate(keys[1:], 1):
        fill(queues, key, [Packet(number, n) for n in range(pending.MAX_QUEUE_SEGMENTS)])
    extra = PeerKey(PolicyIndex(8 * len(keys) + 8), None, None)
    fill(queues, extra, [Packet(9999, n) for n in range(pending.MAX_QUEUE_SEGMENTS)])
    assert queues.drops == {DropReason.PENDING_OVERFLOW_GLOBAL: 1}
    assert queues.statistics()["pending_segments"] == pending.MAX_TOTAL_SEGMENTS
    assert queues.head(small) == Packet(0, 0)
    fill(queues, small, [Packet(0, 1)])
    # Now a queue below its share asks for room: the oldest of all goes, which is its own first packet.
    assert queues.head(small) == Packet(0, 1)
    assert queues.head(greedy) is not None


def test_age() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(1, 1)], now=10.0)
    fill(queues, B, [Packet(2, 1)], now=11.0, mode=Unresolved.BLOCK)
    fill(queues, A, [Packet(1, 2)], now=12.0)
    assert queues.next_deadline() == 10.0 + pending.MAX_QUEUE_SECONDS
    assert queues.expire(10.0 + pending.MAX_QUEUE_SECONDS - 0.1) == []
    assert queues.expire(10.0 + pending.MAX_QUEUE_SECONDS) == [Dropped(A, Packet(1, 1), DropReason.PENDING_AGED)]
    assert [d.packet for d in queues.expire(100.0)] == [Packet(1, 2)]
    assert queues.next_deadline() == 11.0 + pending.MAX_BLOCK_SECONDS
    assert [d.packet for d in queues.expire(1000.0)] == [Packet(2, 1)]
    assert queues.next_deadline() is None


def test_rekey_joins_flows_that_are_now_one_in_order() -> None:
    queues: PendingQueues[Packet] = PendingQueues()
    fill(queues, A, [Packet(1, 0), Packet(2, 1), Packet(1, 2)])
    fill(queues, B, [Packet(3, 3), Packet(7, 4)])
    queues.ready(A)
    lost = queues.rekey(lambda packet: None if packet.flow == 7 else b"one")
    assert lost == [Dropped(B, Packet(7, 4), DropReason.FRAGMENT_WITHOUT_FIRST)]
    assert queues.flows == {b"one": A}
    assert [p.number for p in drain(queues)] == [0, 1, 2, 3]


class Conservation(RuleBasedStateMachine):
    """Every packet is sent in order of its flow, still waits, or is counted."""

    @initialize()
    def start(self) -> None:
        self.queues: PendingQueues[Packet] = PendingQueues()
        self.now = 0.0
        self.number = 0
        self.offered = 0
        self.sent: dict[int, list[int]] = {}
        self.open: Run[Packet] | None = None
        self.refused: Counter[DropReason] = Counter()

    keys = st.sampled_from([A, B, PeerKey(PolicyIndex(9), None, None)._replace(policy=PolicyIndex(25))])
    modes = st.sampled_from([Unresolved.QUEUE, Unresolved.QUEUE, Unresolved.BLOCK, Unresolved.EAGAIN, Unresolved.DROP])

    @rule(
        key=keys,
        flows=st.lists(st.integers(0, 5), min_size=1, max_size=30),
        mode=modes,
        size=st.sampled_from((60, 1400, 64000, 400_000)),
        segments=st.sampled_from((1, 1, 45, 200)),
    )
    def offer(self, key: PeerKey, flows: list[int], mode: Unresolved, size: int, segments: int) -> None:
        for flow in flows:
            self.number += 1
            self.offered += segments
            packet = Packet(flow, self.number, segments)
            name = flow_name(packet)
            if name in self.queues.flows:
                assert self.queues.join(name, packet, size, segments, self.now) is None
            else:
                self.queues.offer(key, name, packet, size, segments, mode, self.now)

    @rule(key=keys)
    def ready(self, key: PeerKey) -> None:
        self.queues.ready(key)

    @rule()
    def ready_all(self) -> None:
        self.queues.ready_all()

    @rule(
        answers=st.lists(st.sampled_from(["take", "take", "keep", "move", "drop", "nothing"]), min_size=1, max_size=10),
        key=keys,
        mode=modes,
        limit=st.integers(1, 64),
    )
    def drain(self, answers: list[str], key: PeerKey, mode: Unresolved, limit: int) -> None:
        for answer in answers:
            run = self.queues.next_run(limit)
            if run is None:
                break
            assert len(run.packets) == 1 or sum(p.segments for p in run.packets) <= limit
            if answer == "take":
                for packet in self.queues.take(run):
                    self.sent.setdefault(packet.flow, []).append(packet.number)
            elif answer == "keep":
                self.queues.keep(run)
            elif answer == "move":
                self.queues.move(run, key, mode)
            elif answer == "drop":
                self.queues.drop(run, DropReason.POLICY_DISCARD)

    @rule(key=keys)
    def discard(self, key: PeerKey) -> None:
        for dropped in self.queues.discard(key, DropReason.ACQUIRE_FAILED):
            assert dropped.key == key

    @rule(seconds=st.sampled_from((0.1, 5.0, 31.0, 200.0)))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.queues.expire(self.now)
        deadline = self.queues.next_deadline()
        assert deadline is None or deadline > self.now

    @rule()
    def rekey(self) -> None:
        assert self.queues.rekey(flow_name) == []

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "queues"):
            return
        numbers = self.queues.statistics()
        assert self.offered == numbers["pending_segments"] + numbers["pending_released"] + self.queues.drops.total()
        statuses = self.queues.snapshot()
        assert sum(s.packets for s in statuses) == numbers["pending_packets"]
        assert sum(s.octets for s in statuses) == numbers["pending_bytes"] <= pending.MAX_TOTAL_BYTES
        assert sum(s.flows for s in statuses) == numbers["pending_flows"] == len(self.queues.flows)
        for status in statuses:
            assert status.octets <= pending.MAX_QUEUE_BYTES
            assert status.mode is Unresolved.BLOCK or status.segments <= pending.MAX_QUEUE_SEGMENTS
        for order in self.sent.values():
            assert order == sorted(order)


Conservation.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestConservation = pytest.mark.property(Conservation.TestCase)

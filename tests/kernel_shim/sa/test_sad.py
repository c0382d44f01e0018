"""The SAD: SPIs, the replay window against a naive one, lifetimes, what it refuses."""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from ipaddress import ip_address

import pytest
from dataplane_pair import GCM, Pair, entropy
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.model import Direction, Expire, KernelError, Lifetime, Mode, Move, ReqId, SaState, SpiRequest, UdpEncapsulation
from kernel_shim.sa.database import REMEMBERED_KEYS, Sad
from kernel_shim.sa.replay import ReplayWindow
from kernel_shim.sa.spi import SLOTS, choose_spi
from kernel_shim.secret import Secret

A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")
pair = Pair(policies=False)


class Naive:
    """A window as a set of everything that was ever accepted."""

    def __init__(self, size: int) -> None:
        self.size, self.seen, self.top = size, set[int](), 0

    def fresh(self, sequence: int) -> bool:
        return sequence > 0 and sequence not in self.seen and sequence > self.top - self.size

    def accept(self, sequence: int) -> None:
        self.seen.add(sequence)
        self.top = max(self.top, sequence)


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(st.sampled_from([32, 64, 333, 4096]), st.lists(st.tuples(st.integers(-5000, 300), st.integers(1, 64)), max_size=60))
def test_the_replay_window_is_a_naive_one(size: int, steps: list[tuple[int, int]]) -> None:
    window, naive = ReplayWindow(size, esn=False), Naive(size)
    for offset, count in steps:
        first = max(1, naive.top + offset)
        run = range(first, first + count)
        assert [window.fresh(n) for n in run] == [naive.fresh(n) for n in run]
        if all(map(naive.fresh, run)):
            window.accept_run(first, count)
            for sequence in run:
                naive.accept(sequence)
        elif naive.fresh(first):
            window.accept(first)
            naive.accept(first)
        assert window.top == naive.top


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1 << 40), st.integers(-2000, 1 << 30), st.sampled_from([64, 2048]))
def test_the_upper_half_of_a_sequence_number_is_inferred(top: int, step: int, size: int) -> None:
    """Right for whatever lies between the window's bottom and 2^32 beyond it (RFC 4303 appendix A2)."""
    window = ReplayWindow(size, esn=True)
    window.accept(top)
    sequence = top + max(step, 1 - size)
    if sequence > 0:
        assert window.extend(sequence & 0xFFFFFFFF) == sequence


def test_a_number_from_before_the_beginning_is_none() -> None:
    window = ReplayWindow(64, esn=True)
    assert window.extend(0xFFFFFFF0) == -1
    assert not window.fresh(-1)
    assert ReplayWindow(0, esn=False).fresh(5)
    assert not ReplayWindow(64, esn=False).fresh(0)


@given(st.integers(0, 63), st.integers(0x100, 0xFFFFFFFF), st.integers(0, 5000))
def test_spis_carry_their_slot(slot: int, minimum: int, width: int) -> None:
    maximum = min(0xFFFFFFFF, minimum + 64 + width)
    if maximum - minimum < 64:
        return
    spi = choose_spi(minimum, maximum, slot, set(), random.Random(1).randbytes)
    assert minimum <= spi <= maximum
    assert spi % SLOTS == slot


def test_the_last_free_spi_is_found_and_then_there_is_none() -> None:
    taken: set[int] = set()
    for _ in range(4):
        taken.add(choose_spi(0x1000, 0x10FF, 5, taken, random.Random(1).randbytes))
    assert {spi & 63 for spi in taken} == {5}
    with pytest.raises(KernelError) as caught:
        choose_spi(0x1000, 0x10FF, 5, taken, random.Random(1).randbytes)
    assert caught.value.errno == errno.ENOENT
    assert choose_spi(0x1234, 0x1234, 0, taken, random.Random(1).randbytes) == 0x1234
    for minimum, maximum in ((0, 0xFF), (0x200, 0x100), (0x100, 1 << 32)):
        with pytest.raises(KernelError, match="range"):
            choose_spi(minimum, maximum, 0, taken, random.Random(1).randbytes)


def new_sad() -> tuple[Sad, list[object]]:
    events: list[object] = []
    return Sad(entropy(1), events.append, lambda: None, lambda entry: None), events


def refused(sad: Sad, sa: object) -> int:
    with pytest.raises(KernelError) as caught:
        sad.add(sa, 0.0)  # type: ignore[arg-type]
    return caught.value.errno


def test_what_cannot_be_is_refused_and_leaves_nothing() -> None:
    sad, _ = new_sad()
    good = pair.sa(True, Direction.OUT)
    assert refused(sad, replace(good, encapsulation=None)) == errno.EPROTONOSUPPORT
    assert refused(sad, replace(good, spi=0x20)) == errno.EINVAL
    assert refused(sad, replace(good, encryption_key=Secret(bytes(5)))) == errno.EINVAL
    assert refused(sad, replace(good, algorithm=EspAlgorithm(EncryptionId.AES_CTR, 128))) == errno.EINVAL
    assert refused(sad, replace(good, replay_window=8)) == errno.EINVAL
    assert refused(sad, replace(good, source=ip_address("::1"))) == errno.EINVAL
    assert len(sad) == 0
    sad.add(good, 0.0)
    assert refused(sad, good) == errno.EEXIST


def test_an_outbound_key_is_never_taken_twice() -> None:
    sad, _ = new_sad()
    sa = pair.sa(True, Direction.OUT)
    sad.add(sa, 0.0)
    assert refused(sad, replace(sa, spi=0x9999)) == errno.EEXIST
    sad.delete(sa.id)
    assert refused(sad, sa) == errno.EEXIST
    sad.flush()
    assert refused(sad, sa) == errno.EEXIST
    assert REMEMBERED_KEYS >= 65_536


def test_update_gives_keys_to_a_larval_sa_and_lifetimes_to_a_mature_one() -> None:
    sad, _ = new_sad()
    larval = sad.reserve(SpiRequest(A, B, Mode.TUNNEL, ReqId(7)), 1.0)
    assert larval.state is SaState.LARVAL
    sa = replace(pair.sa(True, Direction.IN), spi=larval.sa.spi)
    entry = sad.update(sa, 2.0)
    assert entry.state is SaState.MATURE
    entry.window.accept(9)
    changed = sad.update(replace(sa, hard=Lifetime(seconds=5), encapsulation=UdpEncapsulation(1024, 4500)), 3.0)
    assert changed is entry
    assert (entry.remote.port, entry.window.top) == (1024, 9)
    assert sad.next_deadline() == 7.0  # from its addition
    with pytest.raises(KernelError) as caught:
        sad.update(replace(sa, encryption_key=Secret(bytes(20))), 3.0)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(KernelError) as caught:
        sad.update(replace(sa, spi=0x7777), 3.0)
    assert caught.value.errno == errno.ESRCH


def test_lifetimes_in_seconds_fire_once_each_in_order() -> None:
    sad, events = new_sad()
    for number in range(50):
        sa = pair.sa(True, Direction.IN, spi=0x1000 + number, soft=Lifetime(seconds=10 + number), hard=Lifetime(seconds=100 + number))
        sad.add(sa, 0.0)
    seen: list[float] = []
    while (deadline := sad.next_deadline()) is not None:
        seen.append(deadline)
        sad.tick(deadline)
    assert seen == sorted(seen)
    assert [event.hard for event in events if isinstance(event, Expire)] == [False] * 50 + [True] * 50
    assert len(sad) == 0


def test_sequence_numbers_never_wrap() -> None:
    sad, events = new_sad()
    for esn, limit in ((False, (1 << 32) - 1), (True, (1 << 64) - 1)):
        events.clear()
        entry = sad.add(pair.sa(True, Direction.OUT, spi=0x3000 + esn, esn=esn), 0.0)
        entry.sequence = limit - 10
        assert entry.room(10)
        assert not entry.room(11)
        entry.sequence += 10
        sad.charge(entry, 10, 100, 1.0)
        assert [event.hard for event in events if isinstance(event, Expire)] == [False, True]
        assert entry.state is SaState.DEAD


def test_deleted_sas_leave_no_deadlines_behind() -> None:
    sad, _ = new_sad()
    for number in range(2000):
        sa = pair.sa(True, Direction.IN, spi=0x1000 + number, hard=Lifetime(seconds=3600))
        sad.add(sa, 0.0)
        sad.delete(sa.id)
    assert sad.deadlines < 200
    assert sad.next_deadline() is None


def test_two_destinations_may_share_an_spi() -> None:
    sad, _ = new_sad()
    one = pair.sa(True, Direction.IN)
    other = replace(one, destination=ip_address("192.0.2.99"))
    sad.add(one, 0.0)
    sad.add(other, 0.0)
    assert {entry.sa.destination for entry in sad.inbound(one.spi)} == {one.destination, other.destination}
    sad.delete(one.id)
    assert [entry.sa for entry in sad.inbound(one.spi)] == [other]
    assert one.algorithm == GCM


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
def test_an_sa_whose_peer_moved_goes_on_counting(direction: Direction) -> None:
    sad, _ = new_sad()
    sa = pair.sa(True, direction)
    entry = sad.add(sa, 1.0)
    entry.sequence, entry.packets = 77, 70
    entry.window.accept(9)
    elsewhere = ip_address("198.51.100.7")
    moved = replace(sa, destination=elsewhere, encapsulation=UdpEncapsulation(4500, 61000))
    assert sad.update(moved, 2.0) is entry
    assert (entry.sequence, entry.packets, entry.window.top) == (77, 70, 9)
    assert (entry.remote if direction is Direction.OUT else entry.local).address == elsewhere
    assert refused(sad, sa) == errno.EEXIST if direction is Direction.OUT else sad.delete(moved.id) is entry
    with pytest.raises(KernelError):
        sad.get(sa.id)


def test_an_update_that_is_not_of_the_sa_changes_nothing() -> None:
    sad, _ = new_sad()
    sa = pair.sa(True, Direction.OUT)
    entry = sad.add(sa, 1.0)
    elsewhere = ip_address("198.51.100.7")
    for wrong in (
        replace(sa, reqid=ReqId(8)),
        replace(sa, destination=elsewhere, encryption_key=Secret(bytes(20))),
        replace(sa, destination=elsewhere, reqid=ReqId(8)),
        replace(sa, destination=elsewhere, esn=True),
        replace(sa, destination=ip_address("2001:db8::9")),
    ):
        with pytest.raises(KernelError):
            sad.update(wrong, 2.0)
    assert sad.get(sa.id) is entry
    assert sad.outbound(sa.reqid) == [entry]
    assert sad.delete(sa.id) is entry
    assert len(sad) == 0


def test_outbound_sas_are_found_by_their_destination_newest_last() -> None:
    sad, _ = new_sad()
    near, far = pair.sa(True, Direction.OUT), ip_address("198.51.100.7")
    first, second = sad.add(near, 0.0), sad.add(pair.sa(True, Direction.OUT, spi=0x2000, reqid=ReqId(8)), 0.0)
    other = sad.add(pair.sa(True, Direction.OUT, spi=0x3000, destination=far), 0.0)
    assert sad.outbound_to(near.destination) == [first, second]
    assert sad.outbound_to(far) == [other]
    sad.move([Move(near.mode, near.reqid, near.source, near.destination, near.source, far)])
    assert sad.outbound_to(near.destination) == [second]
    assert sad.outbound_to(far) == [first, other]
    sad.delete(first.sa.id)
    assert sad.outbound_to(far) == [other]
    sad.flush()
    assert sad.outbound_to(far) == sad.outbound_to(near.destination) == []

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.contrib.mpls import MPLS
from scapy.packet import Raw

from kernel_shim.mpls.allocator import LabelAllocator, LabelsExhausted
from kernel_shim.mpls.labels import FIRST_LABEL, LAST_LABEL, MAX_DEPTH, Entry, Label, LabelRange, LabelSet, MalformedStack, read_stack, write_stack

entries = st.builds(Entry, st.integers(0, LAST_LABEL).map(Label), st.integers(0, 7), st.integers(0, 255))
stacks = st.lists(entries, min_size=1, max_size=MAX_DEPTH).map(tuple)


@given(stacks, st.binary(max_size=40))
def test_a_stack_reads_back_and_scapy_agrees(stack: tuple[Entry, ...], payload: bytes) -> None:
    wire = write_stack(stack)
    assert read_stack(wire + payload) == stack
    layers = b"".join(
        bytes(MPLS(label=entry.label, cos=entry.tc, s=int(index == len(stack) - 1), ttl=entry.ttl) / Raw(b"")) for index, entry in enumerate(stack)
    )
    assert layers == wire


def test_the_encoding_of_rfc_3032() -> None:
    # Label 16, class 5, bottom, TTL 64: 20 bits, 3 bits, 1 bit, 8 bits.
    assert write_stack([Entry(Label(16), 5, 64)]) == bytes.fromhex("00010b40")
    assert write_stack([Entry(Label(0xABCDE), 0, 255), Entry(Label(17), 7, 1)]) == bytes.fromhex("abcde0ff00011f01")


@given(st.binary(max_size=4 * MAX_DEPTH + 8))
def test_any_bytes_are_a_stack_or_malformed(data: bytes) -> None:
    try:
        stack = read_stack(data)
    except MalformedStack:
        return
    assert data.startswith(write_stack(stack))


@given(stacks)
def test_a_stack_without_its_end_is_malformed(stack: tuple[Entry, ...]) -> None:
    wire = write_stack(stack)
    for end in range(len(wire)):
        with pytest.raises(MalformedStack) as caught:
            read_stack(wire[:end])
        assert not caught.value.too_deep


def test_a_stack_too_deep_is_refused() -> None:
    with pytest.raises(MalformedStack) as caught:
        read_stack(bytes(4 * (MAX_DEPTH + 1)))
    assert caught.value.too_deep


ranges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: LabelRange(Label(min(pair)), Label(max(pair))))


@given(st.lists(ranges, max_size=8))
def test_a_set_holds_what_its_ranges_hold(spans: list[LabelRange]) -> None:
    labels = LabelSet(spans)
    for label in range(65):
        assert (label in labels) == any(first <= label <= last for first, last in spans)
    assert LabelSet(labels) == labels
    found = list(labels)
    assert all(left.last + 1 < right.first for left, right in pairwise(found))


@pytest.mark.parametrize(("first", "last"), [(5, 4), (-1, 4), (0, LAST_LABEL + 1)])
def test_a_range_that_is_none_is_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="range"):
        LabelSet([LabelRange(Label(first), Label(last))])


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60))
def test_the_allocator_never_gives_a_label_twice(steps: list[int | None]) -> None:
    """None allocates, a number releases the one at that place of those that are out."""
    allocator = LabelAllocator(LabelSet([LabelRange(Label(100), Label(104)), LabelRange(Label(200), Label(203))]))
    out: list[Label] = []
    for step in steps:
        if step is None:
            if len(out) == 9:
                with pytest.raises(LabelsExhausted):
                    allocator.allocate()
                continue
            label = allocator.allocate()
            assert label not in out
            assert 100 <= label <= 104 or 200 <= label <= 203
            out.append(label)
        elif step < len(out):
            allocator.release(out.pop(step))
        assert allocator.taken == len(out)


def test_a_released_label_comes_again_last() -> None:
    allocator = LabelAllocator(LabelSet([LabelRange(Label(16), Label(19))]))
    first = allocator.allocate()
    allocator.release(first)
    assert [allocator.allocate() for _ in range(4)] == [17, 18, 19, first]


def test_a_reserved_label_is_not_given_out() -> None:
    allocator = LabelAllocator(LabelSet([LabelRange(Label(16), Label(17))]))
    allocator.reserve(Label(16))
    with pytest.raises(ValueError, match="taken"):
        allocator.reserve(Label(16))
    with pytest.raises(ValueError, match="outside"):
        allocator.reserve(Label(18))
    assert allocator.allocate() == 17
    with pytest.raises(LabelsExhausted):
        allocator.allocate()
    allocator.release(Label(16))
    assert allocator.allocate() == 16


def test_special_purpose_labels_are_not_allocated() -> None:
    with pytest.raises(ValueError, match="special"):
        LabelAllocator(LabelSet([LabelRange(Label(FIRST_LABEL - 1), Label(20))]))

"""The bundle cache against a dictionary that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.policy.bundle import BundleCache, Generations
from kernel_shim.policy.flowkey import FieldMask


def test_generations_have_one_stamp() -> None:
    generations = Generations()
    stamps = [generations.stamp]
    for bump in (generations.bump_spd, generations.bump_sad, generations.bump_route):
        bump()
        stamps.append(generations.stamp)
    assert len(set(stamps)) == 4
    assert (generations.spd, generations.sad, generations.route) == (1, 1, 1)


@pytest.mark.parametrize("bump", ["bump_spd", "bump_sad", "bump_route"])
def test_any_change_makes_a_bundle_stale(bump: str) -> None:
    generations = Generations()
    cache: BundleCache[str] = BundleCache(generations)
    cache.put(b"k", "bundle")
    assert cache.get(b"k") == "bundle"
    getattr(generations, bump)()
    assert cache.get(b"k") is None
    assert cache.get(b"k") is None
    assert (cache.hits, cache.misses, cache.stale, len(cache)) == (1, 2, 1, 0)
    cache.put(b"k", "again")
    assert cache.get(b"k") == "again"


def test_a_changed_mask_clears() -> None:
    cache: BundleCache[int] = BundleCache(Generations(), FieldMask.ADDRESSES)
    cache.put(b"k", 1)
    assert not cache.set_mask(FieldMask.ADDRESSES)
    assert cache.get(b"k") == 1
    assert cache.set_mask(FieldMask.FLOW)
    assert cache.get(b"k") is None
    assert cache.statistics()["bundle_cleared"] == 1


def test_the_bundle_made_first_makes_room() -> None:
    cache: BundleCache[int] = BundleCache(Generations(), limit=2)
    cache.put(b"a", 1)
    cache.put(b"b", 2)
    cache.put(b"a", 3)
    cache.put(b"c", 4)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [3, None, 4]
    assert cache.evicted == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 11)),
        st.tuples(st.just("get"), st.integers(0, 11)),
        st.tuples(st.just("remove"), st.integers(0, 11)),
        st.tuples(st.sampled_from(("bump_spd", "bump_sad", "bump_route")), st.just(0)),
        st.tuples(st.just("mask"), st.integers(0, 3)),
    ),
    max_size=80,
)


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_against_a_plain_dictionary(steps: list[tuple[str, int]]) -> None:
    limit = 6
    generations = Generations()
    cache: BundleCache[int] = BundleCache(generations, FieldMask.NONE, limit)
    naive: dict[bytes, int] = {}  # what is current, in order of making
    gets = 0
    for turn, (what, number) in enumerate(steps):
        key = b"%d" % number
        if what == "put":
            naive.pop(key, None)
            naive[key] = turn
            cache.put(key, turn)
        elif what == "get":
            gets += 1
            found = cache.get(key)
            # An eviction may lose an entry, and stale ones take room: a hit must be right, a miss is only a cost.
            assert found in (None, naive.get(key))
            if key in list(naive)[-1:]:
                assert found == naive[key]
        elif what == "remove":
            naive.pop(key, None)
            cache.remove(key)
        elif what == "mask":
            if cache.set_mask(FieldMask(number)):
                naive.clear()
        else:
            getattr(generations, what)()
            naive.clear()
        assert len(cache) <= limit
    assert cache.hits + cache.misses == gets
    if not cache.evicted:
        for key, value in naive.items():
            assert cache.get(key) == value

"""An allow-list of labels as blocks under masks, which is what a filter of Linux takes."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.channel.linux_mpls.ingress import MAX_BLOCKS, Block, blocks
from kernel_shim.mpls.labels import LAST_LABEL, Label, LabelRange, LabelSet

labels = st.integers(0, LAST_LABEL)


@settings(max_examples=100)
@given(st.lists(st.tuples(labels, labels), max_size=8), labels)
def test_blocks_make_up_the_set(ends: list[tuple[int, int]], probe: int) -> None:
    wanted = LabelSet(LabelRange(Label(min(pair)), Label(max(pair))) for pair in ends)
    found = list(blocks(wanted))
    assert LabelSet(block.labels for block in found) == wanted
    for label in (probe, *(each for pair in ends for each in pair)):
        assert sum(label & block.mask == block.value for block in found) == (label in wanted)


def test_few_blocks_do() -> None:
    assert list(blocks(LabelSet([LabelRange(Label(0), Label(LAST_LABEL))]))) == [Block(0, 0)]
    assert list(blocks(LabelSet([LabelRange(Label(16), Label(31))]))) == [Block(16, 0xFFFF0)]
    longest = list(blocks(LabelSet([LabelRange(Label(1), Label(LAST_LABEL - 1))])))
    assert len(longest) == 38
    # What a configuration's allow-list may have at most: 512 ranges.
    ranges = [LabelRange(Label(at << 11), Label((at << 11) + random.Random(at).randrange(100))) for at in range(512)]
    assert len(list(blocks(LabelSet(ranges)))) <= MAX_BLOCKS

"""SAs narrower than their policy: what is left uncovered is asked for, by one ACQUIRE at a time that is not lost."""

from __future__ import annotations

from dataplane_pair import Pair, selector


def test_flows_that_an_sa_covers_do_not_make_the_acquire_for_the_others_forgotten() -> None:
    pair = Pair()
    first, left_out, last = ([pair.packet(n, host=host) for n in range(50)] for host in (9, 10, 8))
    pair.send(first[0], left_out[0], last[0], *first[1:], *left_out[1:], *last[1:])
    assert len(pair.left.acquires()) == 1
    pair.connect(source_selectors=(selector("10.1.0.8/31"),), destination_selectors=(selector("10.2.0.0/16"),))
    pair.settle()
    assert pair.right.received() == [*first, *last]
    asked = pair.left.acquires()
    assert len(asked) == 2
    assert asked[1].flow is not None
    assert str(asked[1].flow.source) == "10.1.0.10"
    # Another flow that is not covered waits for the same answer.
    more = pair.packet(0, host=11)
    pair.send(more)
    assert pair.left.acquires() == asked
    pair.next_spis()
    pair.connect()
    pair.settle()
    assert pair.right.received() == [*left_out, more]
    assert pair.left.acquires() == asked

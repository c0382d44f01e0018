"""Every exchange that one peer may begin against every one that the other may (RFC 7296 section 2.25): whole, with any message lost or
repeated, and with both sides' first messages lost. After each message no kernel has an SA that its key manager does not know, and where
both rekey, what is sent can be received; at the end both SADs hold the same SAs, and those that are to be there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from lab.collisions import Act, create_child, delete_child, delete_ike, expire_child, finish, invariants, make_pair, rekey_child, rekey_ike
from lab.ike_pair import Datagram, Pair, Peer, agree

from vpnd.ike.exchanges.rekey_ike import REPLACED_TIMEOUT

ACTS: dict[str, Act] = {
    "rekey-child": rekey_child,
    "delete-child": delete_child,
    "expire-child": expire_child,
    "create-child": create_child,
    "rekey-ike": rekey_ike,
    "delete-ike": delete_ike,
}
PAIRS = list(itertools.product(ACTS, repeat=2))
LONGEST = 8  # messages that a collision of two takes, more or less
DISTURBANCES = ["none", "both-lost", *(f"{what}-{number}" for what in ("lost", "repeated") for number in range(LONGEST))]


def expected(one: str, other: str) -> set[int]:
    """How many CHILD_SAs stand at the end. None is left where nobody wants one."""
    acts = (one, other)
    if "delete-ike" in acts:
        return {0}
    kept = 0 if "delete-child" in acts or "expire-child" in acts else 1
    created = acts.count("create-child")
    # CHILD_SA_NOT_FOUND says that the peer lost it, not that it meant to: whether it is made from scratch depends on which message comes first
    return {kept + created} if set(acts) != {"rekey-child", "expire-child"} else {0, 1}


def disturb(pair: Pair, kind: str) -> Callable[[Datagram], bool]:
    what, _, number = kind.rpartition("-")
    seen = [-1]

    def act(datagram: Datagram) -> bool:
        seen[0] += 1
        if kind == "both-lost":
            return seen[0] < 2
        if seen[0] != (int(number) if number.isdecimal() else -1):
            return False
        if what == "repeated":
            pair.deliver(datagram)
        return what == "lost"

    return act


def begin(pair: Pair, peer: Peer, act: Act) -> None:
    if peer.sa.children or act in (rekey_ike, delete_ike, create_child):
        act(pair, peer)


@pytest.mark.parametrize("kind", DISTURBANCES)
@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_whatever_two_peers_begin_at_once(one: str, other: str, kind: str) -> None:
    pair = make_pair()
    begin(pair, pair.a, ACTS[one])
    begin(pair, pair.b, ACTS[other])
    drop = disturb(pair, kind)
    # a CHILD_SA that is new on one side may be used before the other side has the answer: its SPI is reserved there, and packets wait for the keys
    lossless = all(act.startswith("rekey") for act in (one, other))
    for _ in range(200):
        if pair.flight:
            datagram = pair.take()
            if not drop(datagram):
                pair.deliver(datagram)
            invariants(pair, lossless=lossless)
        elif not pair.tick():
            pair.wait(0.25, drop)
    wanted = expected(one, other)
    if "delete-ike" in (one, other):
        pair.wait(400.0)
        agree(pair, 0)
        assert pair.a.standing == pair.b.standing == []
        return
    pair.wait(REPLACED_TIMEOUT)
    children = len(pair.a.sa.children)
    assert children in wanted
    finish(pair, children)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("act", [rekey_child, delete_child])
def test_both_act_on_different_children(act: Act, order: str) -> None:
    pair = make_pair()
    create_child(pair, pair.a)
    pair.settle()
    pair.log.clear()
    # a: the first CHILD_SA, b: the second
    act(pair, pair.a)
    second = max(pair.b.sa.children)
    effects = pair.b.sa.rekey_child(second, pair.now) if act is rekey_child else pair.b.sa.delete_child(second, pair.now)
    pair.b.run(pair.b.sa, effects, pair.now)
    if order == "ba":
        pair.flight.reverse()
    finish(pair, 2 if act is rekey_child else 0)


@pytest.mark.parametrize("rounds", [3])
@pytest.mark.parametrize(("one", "other"), [("rekey-child", "rekey-child"), ("rekey-ike", "rekey-ike"), ("rekey-child", "rekey-ike")])
def test_again_and_again(one: str, other: str, rounds: int) -> None:
    pair = make_pair()
    for _ in range(rounds):
        begin(pair, pair.a, ACTS[one])
        begin(pair, pair.b, ACTS[other])
        finish(pair, 1, lossless=True)

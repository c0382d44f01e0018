"""An outbound key is installed once, whoever deletes what and in which order: its sequence numbers, and so its nonces, would begin anew.

`lab.ike_pair` refuses a second installation in every other test as well.
"""

from __future__ import annotations

from lab.ike_pair import Pair, psk_pair


def two_ike_sas() -> Pair:
    """With the same CHILD_SA in both, as while a peer is reauthenticated."""
    pair = psk_pair()
    pair.connect()
    pair.connect()
    assert len(pair.a.sad) == len(pair.b.sad) == 4
    return pair


def test_what_ceased_to_send_does_not_begin_again() -> None:
    """The peer's rekeying is at its last message when we delete the IKE SA for another one: it ceased, and its successor is not let send."""
    pair = two_ike_sas()
    at_a, at_b = pair.a.standing[0], pair.b.standing[0]
    # <-- CREATE_CHILD_SA { N(REKEY_SA), ... }   CREATE_CHILD_SA { ... } -->
    pair.b.run(at_b, at_b.rekey_child(min(at_b.children), pair.now), pair.now)
    pair.step()
    pair.step()
    assert len(at_a.children) == 2
    while not pair.flight:
        assert pair.tick()
    # <-- INFORMATIONAL { D(old) }, on its way
    (old_goes,) = [pair.take() for _ in range(len(pair.flight))]
    # INFORMATIONAL { D } -->, on its way
    pair.a.run(at_a, at_a.delete(pair.now), pair.now)
    pair.deliver(old_goes)
    assert len(pair.a.outbound_keys) == 2
    pair.wait(10.0)
    assert len(pair.a.sad) == len(pair.b.sad) == 2

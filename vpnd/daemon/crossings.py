"""Two peers that bring up the same CHILD_SA at the same moment end with one of it, not two.

Both sides see both results and judge them alike; who made the superfluous one deletes it, after a while in which packets under way arrive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vpnd.ike.effects import ChildSa
from vpnd.ike.sa import IkeSa
from vpnd.ike.state import Child, ChildSaState

CROSSING: Final = 10.0  # s; two results further apart than this did not cross: somebody wants both
SETTLE: Final = 1.0  # s, for which the superfluous one still takes packets


def superfluous_child(ike: IkeSa, child: ChildSa) -> Child | None:
    """The CHILD_SA that we are to delete, now that `child` stands: of two that crossed the one of the IKE SA's initiator stays."""
    new = ike.children.get(child.id)
    if new is None:
        return None
    for other in ike.children.values():
        if other.sa.id == child.id or other.initiator == new.initiator or other.replaces or other.state is not ChildSaState.INSTALLED:
            continue
        if abs(other.installed_at - new.installed_at) > CROSSING or not same(other.sa, child):
            continue
        loser = new if new.initiator != ike.initiator else other
        return loser if loser.initiator else None
    return None


def superfluous_ike(ike: IkeSa, others: Iterable[IkeSa]) -> IkeSa | None:
    """The IKE SA that we are to delete: of two that crossed the one with the lower initiator SPI goes, when the other has all that it has."""
    for other in others:
        if other is ike or other.initiator == ike.initiator or other.closed or other.established_at is None or ike.established_at is None:
            continue
        if abs(other.established_at - ike.established_at) > CROSSING or other.connection.name != ike.connection.name:
            continue
        loser, winner = (ike, other) if ike.spi_initiator < other.spi_initiator else (other, ike)
        if loser.children and all(any(same(one.sa, kept.sa) for kept in winner.children.values()) for one in loser.children.values()):
            return loser if loser.initiator else None
    return None


def same(one: ChildSa, other: ChildSa) -> bool:
    """Whether two CHILD_SAs are for the same packets of the same child."""
    return (one.name, one.mode, set(one.local_ts), set(one.remote_ts)) == (other.name, other.mode, set(other.local_ts), set(other.remote_ts))

"""Two peers that bring up the same CHILD_SA at the same moment end with one of it, not two; and one peer does not make it twice.

Both sides see both results and judge them alike; who made the superfluous one deletes it, after a while in which packets under way arrive.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Final

from kernel_shim.model import TrafficSelector
from vpnd.config.model import ChildConfig
from vpnd.ike.effects import ChildSa
from vpnd.ike.narrowing import resolve
from vpnd.ike.sa import IkeSa
from vpnd.ike.session import Origin
from vpnd.ike.state import Child, ChildSaState, IkeSaState

CROSSING: Final = 60.0  # s; two results further apart than this did not cross, not even with answers lost: somebody wants both
STANDING: Final = (ChildSaState.INSTALLED, ChildSaState.REKEYING)


def superfluous_child(ike: IkeSa, child: ChildSa) -> Child | None:
    """The CHILD_SA that we are to delete, now that `child` stands: of two that crossed the one of the IKE SA's initiator stays.

    Either may have been rekeyed since, and so may the IKE SA: what counts is who brought up the first.
    """
    new = ike.children.get(child.id)
    if new is None:
        return None
    for other in ike.children.values():
        if other.place == new.place or other.founded == new.founded or other.state not in STANDING:
            continue
        if abs(other.founded_at - new.founded_at) > CROSSING or not same(other.sa, child):
            continue
        loser = new if new.founded != ike.original_initiator else other
        if loser.founded:
            return loser
    return None


def standing_child(ike: IkeSa, config: ChildConfig) -> Child | None:
    """The CHILD_SA that has all that its configuration can ask for: another one would be its double."""
    wanted = set(resolve(config.local_ts, ike.local.address)), set(resolve(config.remote_ts, ike.remote.address))
    usable = (child for child in ike.children.values() if child.config == config and child.state in STANDING)
    return next((child for child in usable if (set(child.sa.local_ts), set(child.sa.remote_ts)) == wanted), None)


def doubled_children(ike: IkeSa, child: ChildSa) -> list[Child]:
    """Older CHILD_SAs of ours that turn out to be the same, for the peer narrowed them alike; the newest one stays, for it is what both send by."""
    new = ike.children.get(child.id)
    if new is None or not new.initiator or new.replaces:
        return []
    return [other for other in ike.children.values() if other is not new and other.founded and other.state in STANDING and same(other.sa, child)]


def doubled(ike: IkeSa, child: ChildSa) -> bool:
    """Whether the same stands in another place."""
    new = ike.children.get(child.id)
    return new is not None and any(other.place != new.place and other.state in STANDING and same(other.sa, child) for other in ike.children.values())


def still_superfluous(ike: IkeSa, extra: Child) -> list[Child]:
    """What stands in the place of `extra` now, while another place has the same."""
    standing = [child for child in ike.children.values() if child.state in STANDING]
    others = [child for child in standing if child.place != extra.place]
    return [child for child in standing if child.place == extra.place and any(same(other.sa, child.sa) for other in others)]


def superfluous_ike(ike: IkeSa, others: Iterable[IkeSa]) -> IkeSa | None:
    """The IKE SA that we are to delete: `ike`, or one that did the same as it."""
    for other in others:
        if gives_way(ike, other):
            return ike
        if gives_way(other, ike):
            return other
    return None


def gives_way(ike: IkeSa, other: IkeSa, *, surely: bool = False) -> bool:
    """Whether of two IKE SAs that crossed `ike` is to go, and ours to delete: the other one has all that it has.

    One that has CHILD_SAs stays beside one that has none; else that with the higher SPI of the initiator stays.
    `surely`: what the peer may not have yet, for our answer is perhaps lost, does not count.
    """
    if other is ike or not ike.original_initiator or ike.asks_for_children or not (_stands(ike) and _stands(other)):
        return False
    if ike.origin is None or other.origin is None or ike.connection.name != other.connection.name or abs(other.origin.at - ike.origin.at) > CROSSING:
        return False
    has, others = _served(ike), _served(other, surely=surely)
    if bool(has) is not bool(others):
        return not has
    return has <= others and _lower(ike.origin, other.origin, ours=other.original_initiator)


def _stands(ike: IkeSa) -> bool:
    return not ike.closed and ike.heir is None and ike.state in (IkeSaState.ESTABLISHED, IkeSaState.REKEYING)


def _served(ike: IkeSa, *, surely: bool = False) -> set[Hashable]:
    return {packets(child.sa) for child in ike.children.values() if child.state is not ChildSaState.DELETING and (child.taken or not surely)}


def _lower(one: Origin, other: Origin, *, ours: bool) -> bool:
    """`ours`: we made both, for each of two that crossed was reauthenticated; the later one stays, which the peer need not judge."""
    return one.at < other.at if ours else one.spi < other.spi


def same(one: ChildSa, other: ChildSa) -> bool:
    """Whether two CHILD_SAs are for the same packets of the same child."""
    # an IKE SA may have thousands, of one child and unlike in a selector: what differs is seen before anything is hashed
    alike = one.name == other.name and one.mode == other.mode
    return alike and _alike(one.remote_ts, other.remote_ts) and _alike(one.local_ts, other.local_ts)


def _alike(some: Sequence[TrafficSelector], others: Sequence[TrafficSelector]) -> bool:
    """In whatever order."""
    return some == others or (max(len(some), len(others)) > 1 and set(some) == set(others))


def packets(child: ChildSa) -> Hashable:
    """The same for CHILD_SAs that are for the same packets of the same child."""
    return child.name, child.mode, frozenset(child.local_ts), frozenset(child.remote_ts)

"""CHILD_SAs for the same packets between the same identities, of one IKE SA or of several: both sides made one at once, or reauthenticate."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

from vpnd.ike.effects import ChildSa
from vpnd.ike.identity import Identity
from vpnd.ike.state import Child, ChildSaState, IkeSaState

if TYPE_CHECKING:
    from vpnd.ike.session import Session

Standing = tuple["Session", Child]


class Twins:
    """Every CHILD_SA of the daemon that stands, with its IKE SA, found in one step."""

    def __init__(self) -> None:
        # by the hash of what they are for: almost all are alone, and what it is made of takes ten times the room
        self._alike: dict[int, tuple[Standing, ...]] = {}

    def enter(self, session: Session, child: Child) -> None:
        key = hash(_what(session.local_id, session.remote_id, child.sa))
        self._alike[key] = (*self._alike.get(key, ()), (session, child))

    def leave(self, session: Session, child: Child) -> None:
        """That it is not there is no error."""
        key = hash(_what(session.local_id, session.remote_id, child.sa))
        left = tuple(standing for standing in self._alike.get(key, ()) if standing[1] is not child)
        if left:
            self._alike[key] = left
        else:
            self._alike.pop(key, None)

    def of(self, local: Identity | None, remote: Identity | None, child: ChildSa) -> Iterator[Standing]:
        """The others."""
        what = _what(local, remote, child)
        for session, other in self._alike.get(hash(what), ()):
            if other.sa.id != child.id and _what(session.local_id, session.remote_id, other.sa) == what:
                yield session, other

    def sends(self, local: Identity | None, remote: Identity | None, child: ChildSa) -> bool:
        """Whether one of the others sends, and neither it nor its IKE SA is being deleted."""
        return any(stays(*standing) and standing[1].sends for standing in self.of(local, remote, child))


def stays(session: Session, child: Child) -> bool:
    """Neither it nor its IKE SA is being deleted."""
    return not session.closed and session.state is not IkeSaState.DELETING and child.state is not ChildSaState.DELETING


def _what(local: Identity | None, remote: Identity | None, child: ChildSa) -> Hashable:
    marks = child.marking
    numbers = marks.mark_in, marks.mark_out, marks.if_id_in, marks.if_id_out
    return local, remote, child.name, child.mode, numbers, frozenset(child.local_ts), frozenset(child.remote_ts)

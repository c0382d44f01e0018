"""CHILD_SAs for the same packets between the same identities, of one IKE SA or of several: both sides made one at once, or reauthenticate."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from vpnd.ike.effects import ChildSa
from vpnd.ike.identity import Identity
from vpnd.ike.state import Child, ChildSaState, IkeSaState

if TYPE_CHECKING:
    from vpnd.ike.session import Session

Standing = tuple["Session", Child]

LOOKED_AT: Final = 16  # of those alike, the youngest: a peer may make thousands, and what comes of each looks for the others


class Twins:
    """Every CHILD_SA of the daemon that stands, with its IKE SA, found in one step."""

    def __init__(self) -> None:
        # by the hash of what they are for: almost all are alone, and what it is made of takes ten times the room; of several by id
        self._alike: dict[int, Standing | dict[int, Standing]] = {}

    def enter(self, session: Session, child: Child) -> None:
        key = hash(_what(session.local_id, session.remote_id, child.sa))
        alike = self._alike.get(key)
        if alike is None:
            self._alike[key] = session, child
        elif isinstance(alike, dict):
            alike[child.sa.id] = session, child
        else:
            self._alike[key] = {alike[1].sa.id: alike, child.sa.id: (session, child)}

    def leave(self, session: Session, child: Child) -> None:
        """That it is not there is no error."""
        key = hash(_what(session.local_id, session.remote_id, child.sa))
        alike = self._alike.get(key)
        if isinstance(alike, dict):
            alike.pop(child.sa.id, None)
            if len(alike) == 1:
                (self._alike[key],) = alike.values()
        elif alike is not None and alike[1] is child:
            del self._alike[key]

    def of(self, local: Identity | None, remote: Identity | None, child: ChildSa) -> Iterator[Standing]:
        """The others, `LOOKED_AT` at most."""
        what = _what(local, remote, child)
        alike = self._alike.get(hash(what), {})
        several: Iterable[Standing] = reversed(alike.values()) if isinstance(alike, dict) else (alike,)
        for session, other in islice(several, LOOKED_AT):
            if other.sa.id != child.id and _what(session.local_id, session.remote_id, other.sa) == what:
                yield session, other

    def __len__(self) -> int:
        """How many CHILD_SAs stand."""
        return sum(len(alike) if isinstance(alike, dict) else 1 for alike in self._alike.values())

    def sends(self, local: Identity | None, remote: Identity | None, child: ChildSa) -> bool:
        """Whether one of the others sends, and neither it nor its IKE SA is being deleted."""
        return any(stays(*standing) and standing[1].sends for standing in self.of(local, remote, child))

    def carries(self, local: Identity | None, remote: Identity | None, child: ChildSa) -> bool:
        """Whether one of those sends by the policies of `child`, which have the shape of the youngest: between other addresses none is found by them."""
        way = _way(child)
        return any(stays(*standing) and standing[1].sends and _way(standing[1].sa) == way for standing in self.of(local, remote, child))


def stays(session: Session, child: Child) -> bool:
    """Neither it nor its IKE SA is being deleted."""
    return not session.closed and session.state is not IkeSaState.DELETING and child.state is not ChildSaState.DELETING


def _way(child: ChildSa) -> Hashable:
    return child.reqid, child.outbound.source, child.outbound.destination


def _what(local: Identity | None, remote: Identity | None, child: ChildSa) -> Hashable:
    marks = child.marking
    numbers = marks.mark_in, marks.mark_out, marks.if_id_in, marks.if_id_out
    return local, remote, child.name, child.mode, numbers, frozenset(child.local_ts), frozenset(child.remote_ts)

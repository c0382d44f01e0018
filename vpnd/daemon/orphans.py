"""SAs that an earlier run of the daemon left in a kernel that lived on: they carry packets until a successor of the same selectors stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kernel_shim.model import Direction, SaId, SaState, SaStatus, SecurityAssociation


class Orphans:
    """Pure: what is to be removed is given back."""

    def __init__(self) -> None:
        self._left: dict[SaId, SaStatus] = {}

    @property
    def statuses(self) -> Sequence[SaStatus]:
        return list(self._left.values())

    @property
    def ids(self) -> Collection[SaId]:
        return self._left.keys()

    def adopt(self, actual: Mapping[SaId, SaStatus], known: Collection[SaId]) -> None:
        """Of a kernel just attached to: what nobody here knows. Larval SAs expire by themselves."""
        self._left = {sa: status for sa, status in actual.items() if sa not in known and status.state is not SaState.LARVAL}

    def superseded(self, successor: SecurityAssociation) -> list[SaId]:
        """Both directions of what an outbound SA replaces; they are no orphans any more."""
        pair = (successor.source_selectors, successor.destination_selectors)
        found = []
        for status in self.statuses:
            old = status.sa
            selectors = (old.source_selectors, old.destination_selectors)
            if selectors == (pair if old.direction is Direction.OUT else pair[::-1]):
                del self._left[old.id]
                found.append(old.id)
        return found

    def give_up(self) -> list[SaId]:
        """Those that found no successor in time."""
        left = list(self._left)
        self._left.clear()
        return left

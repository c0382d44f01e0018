"""Which marks and interface ids CHILD_SAs have, and which are free for `%unique`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from weakref import WeakValueDictionary

from kernel_shim.model import Mark, Policy
from vpnd.config.model import ALL_BITS, ChildConfig, ConnectionConfig, SameMark, Unique, UniqueMark
from vpnd.daemon.entry import ChildKey
from vpnd.ike.marking import Marking, NumbersExhausted, SharedIfIds


class _Numbers:
    """From 1 on. One that was given is taken as long as its holder lives."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._holders: WeakValueDictionary[int, object] = WeakValueDictionary()
        self._reserved: set[int] = set()
        self._next = 1

    def reserve(self, numbers: Iterable[int]) -> None:
        self._reserved.update(numbers)

    def fresh(self, last: int = ALL_BITS) -> int:
        """Of 1 to `last`; given to somebody by `hold`. NumbersExhausted when all are taken."""
        for _ in range(min(last, len(self._reserved) + len(self._holders) + 1)):
            number = self._next if self._next <= last else 1
            self._next = number + 1
            if number not in self._reserved and number not in self._holders:
                return number
        raise NumbersExhausted(f"all {self._what} up to {last} are taken")

    def hold(self, holder: object, *numbers: int) -> None:
        for number in numbers:
            self._holders[number] = holder


class Markings:
    """Those of a child's trap are those of its CHILD_SAs, too: a packet that asked for one goes through it."""

    def __init__(self) -> None:
        self._marks: Final = _Numbers("marks")
        self._if_ids: Final = _Numbers("interface ids")
        self._traps: dict[ChildKey, tuple[ChildConfig, Marking]] = {}

    def configured(self, connection: ConnectionConfig) -> None:
        """Numbers that are written in a configuration are never given out."""
        for child in connection.children.values():
            self._marks.reserve(mark.value for mark in (child.mark_in, child.mark_out) if isinstance(mark, Mark))
            self._if_ids.reserve(number for number in (child.if_id_in, child.if_id_out) if isinstance(number, int))

    def standing(self, policies: Iterable[Policy]) -> None:
        """Nor are those that an earlier run left in the kernel."""
        for policy in policies:
            self._marks.reserve((policy.selector.mark.value,))
            self._if_ids.reserve((policy.selector.if_id,))

    def of(self, connection: ConnectionConfig, child: ChildConfig, shared: SharedIfIds) -> Marking:
        """For a CHILD_SA that comes up. NumbersExhausted when there are none left."""
        trapped = self._traps.get((connection.name, child.name))
        return trapped[1] if trapped is not None else self._fresh(child, shared)

    def trapped(self, key: ChildKey, child: ChildConfig) -> Marking:
        """For a trap or shunt that is installed, or once more. NumbersExhausted when there are none left."""
        known = self._traps.get(key)
        if known is None or known[0] != child:
            known = self._traps[key] = (child, self._fresh(child, SharedIfIds()))
        return known[1]

    def untrapped(self, key: ChildKey) -> None:
        self._traps.pop(key, None)

    def _fresh(self, child: ChildConfig, shared: SharedIfIds) -> Marking:
        mark_in, mark_out = self._fresh_marks(child)
        if_id_in, if_id_out, own = self._fresh_if_ids(child, shared)
        marking = Marking(
            mark_in=mark_in,
            mark_out=mark_out,
            set_mark_in=Mark(mark_in.value, child.set_mark_in.mask) if isinstance(child.set_mark_in, SameMark) else child.set_mark_in,
            set_mark_out=Mark(mark_out.value, child.set_mark_out.mask) if isinstance(child.set_mark_out, SameMark) else child.set_mark_out,
            if_id_in=if_id_in,
            if_id_out=if_id_out,
        )
        self._marks.hold(marking, *(mark.value for mark, asked in ((mark_in, child.mark_in), (mark_out, child.mark_out)) if isinstance(asked, UniqueMark)))
        self._if_ids.hold(marking, *own)
        return marking

    def _fresh_marks(self, child: ChildConfig) -> tuple[Mark, Mark]:
        asked = child.mark_in, child.mark_out
        unique = [mark for mark in asked if isinstance(mark, UniqueMark)]
        each_way = any(mark.each_way for mark in unique)
        one = self._marks.fresh(min(mark.mask for mark in unique)) if unique and not each_way else 0

        def give(mark: Mark | UniqueMark) -> Mark:
            if isinstance(mark, Mark):
                return mark
            return Mark(one or self._marks.fresh(mark.mask), mark.mask)

        return give(asked[0]), give(asked[1])

    def _fresh_if_ids(self, child: ChildConfig, shared: SharedIfIds) -> tuple[int, int, list[int]]:
        """In, out, and which of them are the CHILD_SA's own."""
        asked = child.if_id_in, child.if_id_out
        own = [unique for unique in asked if isinstance(unique, Unique) and not unique.of_ike_sa]
        each_way = any(unique.each_way for unique in own)
        one = self._if_ids.fresh() if own and not each_way else 0

        def give(if_id: int | Unique, way: str) -> int:
            if isinstance(if_id, int):
                return if_id
            if not if_id.of_ike_sa:
                return one or self._if_ids.fresh()
            which = way if if_id.each_way else "both"
            if not getattr(shared, which):
                setattr(shared, which, self._if_ids.fresh())
                self._if_ids.hold(shared, getattr(shared, which))
            number: int = getattr(shared, which)
            return number

        inbound, outbound = give(asked[0], "inbound"), give(asked[1], "outbound")
        return inbound, outbound, [number for number, unique in ((inbound, asked[0]), (outbound, asked[1])) if unique in own]

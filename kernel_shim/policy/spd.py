"""The security policy database (RFC 4301 section 4.4.1).

Each direction, address family and interface id has a table of shapes (`shapes.py`); a lookup probes one hash table for
each shape, best possible priority first, and stops when no shape that is left can hold a better policy. So its cost
grows with the number of shapes and not with that of policies.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

from kernel_shim.model import Action, Direction, Flow, KernelError, Policy, PolicyIndex, ReqId, Selector
from kernel_shim.policy.bundle import Generations
from kernel_shim.policy.flowkey import FULL_KEY_V4, FieldMask, FieldUsage, fields_of_policy, key_of_flow
from kernel_shim.policy.shape_table import RANK_SHIFT, Entry, ShapeTable
from kernel_shim.policy.shapes import LAYOUT_V4, LAYOUT_V6, MIX, identity_of
from kernel_shim.reasons import DropReason

# Linux numbers policies in steps of 8 and has the direction in the low three bits (xfrm_gen_index, net/xfrm/xfrm_policy.c).
INDEX_STEP: Final = 8
INDEX_LIMIT: Final = 1 << 32

_WORST_RANK: Final = 1 << 128


def direction_of(index: PolicyIndex) -> Direction:
    """The direction that an index carries in its low three bits. ValueError when it carries none."""
    return Direction((index & 7) + 1)


class SecurityPolicyDatabase:
    """Policies of the three directions. Of those that match, the lowest priority wins, of equal ones the oldest.

    `lookups` and `probes` count how often it was asked, and how many hash tables it looked into for that.
    Every change, and no failed one, bumps the SPD generation of `generations`.
    """

    def __init__(self, generations: Generations | None = None) -> None:
        self.generations = generations if generations is not None else Generations()
        self.probes = 0
        self.lookups = 0
        self._sequence = 0
        self._next_index = INDEX_STEP
        self._by_index: dict[int, Entry] = {}  # in order of age
        # By number of the direction; 0 is none.
        self._by_selector: tuple[dict[bytes, Entry], ...] = ({}, {}, {}, {})
        self._v4: tuple[dict[int, ShapeTable], ...] = ({}, {}, {}, {})  # by interface id
        self._v6: tuple[dict[int, ShapeTable], ...] = ({}, {}, {}, {})
        self._usage = tuple(FieldUsage() for _ in range(4))

    def __len__(self) -> int:
        return len(self._by_index)

    @property
    def generation(self) -> int:
        """Differs after every change."""
        return self.generations.spd

    def fields_read(self, direction: Direction) -> FieldMask:
        """The fields of a packet that any policy of this direction reads to match it or to name its peer."""
        return self._usage[direction].mask

    # Changes

    def add(self, policy: Policy) -> Policy:
        """The policy with its index. KernelError(EEXIST) when its direction has the same selector already, whatever its priority."""
        identity = identity_of(policy.selector)
        if identity in self._by_selector[policy.direction]:
            raise KernelError(errno.EEXIST, f"policy {policy.direction.name} {policy.selector}")
        return self._insert(identity, policy)

    def update(self, policy: Policy) -> Policy:
        """Add, or replace the policy of the same selector; a replaced policy keeps its index and its age."""
        identity = identity_of(policy.selector)
        entry = self._by_selector[policy.direction].get(identity)
        if entry is None:
            return self._insert(identity, policy)
        old = entry.policy
        new = replace(policy, index=old.index)
        usage = self._usage[policy.direction]
        usage.add(fields_of_policy(new))
        usage.remove(fields_of_policy(old))
        if new.priority != old.priority:
            table = self._table(policy.direction, policy.selector)
            table.remove(entry)
            entry.rank += (new.priority - old.priority) << RANK_SHIFT
            entry.policy = new
            table.insert(entry)
        entry.policy = new
        self.generations.bump_spd()
        return new

    def delete(self, direction: Direction, selector: Selector) -> Policy:
        """The policy of exactly this selector, which is gone now. KernelError(ENOENT) when there is none."""
        return self._remove(self._entry(direction, selector))

    def delete_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        """The policy of this index, which is gone now. KernelError(ENOENT) when there is none."""
        return self._remove(self._entry_of_index(direction, index))

    def flush(self) -> int:
        """How many policies went."""
        count = len(self._by_index)
        self._by_index.clear()
        for direction in Direction:
            self._by_selector[direction].clear()
            self._v4[direction].clear()
            self._v6[direction].clear()
            self._usage[direction].clear()
        if count:
            self.generations.bump_spd()
        return count

    # Looking

    def get(self, direction: Direction, index: PolicyIndex) -> Policy:
        """KernelError(ENOENT) when there is none, as in Linux."""
        return self._entry_of_index(direction, index).policy

    def find(self, direction: Direction, selector: Selector) -> Policy:
        """The policy of exactly this selector. KernelError(ENOENT) when there is none."""
        return self._entry(direction, selector).policy

    def snapshot(self) -> list[Policy]:
        """All policies, oldest first; later changes do not show in it."""
        return [entry.policy for entry in self._by_index.values()]

    def shapes(self, direction: Direction) -> int:
        """How many shapes the policies of a direction have: the greatest number of probes a lookup can take."""
        return max((len(table) for tables in (self._v4, self._v6) for table in tables[direction].values()), default=0)

    def lookup(self, direction: Direction, flow: Flow, if_id: int = 0, mark: int = 0) -> Policy | None:
        """The policy for `flow`; None when no selector matches."""
        return self.lookup_key(direction, key_of_flow(flow), if_id, mark)

    def lookup_key(self, direction: Direction, key: bytes, if_id: int = 0, mark: int = 0) -> Policy | None:
        """As `lookup`, by a full flow key."""
        self.lookups += 1
        if len(key) == FULL_KEY_V4:
            table, mark_shift = self._v4[direction].get(if_id), LAYOUT_V4.mark.shift
        else:
            table, mark_shift = self._v6[direction].get(if_id), LAYOUT_V6.mark.shift
        if table is None:
            return None
        number = int.from_bytes(key, "big")
        if mark:
            number |= mark << mark_shift
        best, best_rank, probes, mix = None, _WORST_RANK, 0, MIX
        for floor, mask, get in table.order or table.sort():
            if best_rank < floor:
                break
            probes += 1
            found = get((number & mask) * mix)
            if found is not None:
                entry = found if type(found) is Entry else found.best(number)
                if entry is not None and entry.rank < best_rank:
                    best, best_rank = entry, entry.rank
        self.probes += probes
        return None if best is None else best.policy

    def check_inbound(self, key: bytes, reqid: ReqId | None, direction: Direction = Direction.IN, if_id: int = 0, mark: int = 0) -> DropReason | None:
        """Whether a packet may come in: None, or why not. `reqid` is that of the SA it came through, None when it came in clear.

        RFC 4301 section 5.2: what came through an SA must be what its policy protects, and by that SA; what came in clear
        must not be protected. A template of reqid 0 takes any SA. Through an SA and no policy is refused, as in Linux
        (XfrmInNoPols); in clear and no policy is let in.
        """
        policy = self.lookup_key(direction, key, if_id, mark)
        if policy is None:
            return None if reqid is None else DropReason.POLICY_ABSENT
        if policy.action is Action.DISCARD:
            return DropReason.POLICY_DISCARD
        if policy.action is Action.BYPASS:
            return None if reqid is None else DropReason.POLICY_MISMATCH
        if reqid is None:
            return DropReason.CLEAR_WHERE_PROTECTED
        for template in policy.templates:
            if template.reqid in (reqid, 0):
                return None
        return DropReason.POLICY_MISMATCH

    # Inside

    def _insert(self, identity: bytes, policy: Policy) -> Policy:
        index = self._new_index(policy.direction)
        policy = replace(policy, index=index)
        self._sequence += 1
        entry = Entry(policy, (policy.priority << RANK_SHIFT) + self._sequence)
        self._table(policy.direction, policy.selector).insert(entry)
        self._by_index[index] = entry
        self._by_selector[policy.direction][identity] = entry
        self._usage[policy.direction].add(fields_of_policy(policy))
        self.generations.bump_spd()
        return policy

    def _remove(self, entry: Entry) -> Policy:
        policy = entry.policy
        table = self._table(policy.direction, policy.selector)
        table.remove(entry)
        if not len(table):
            tables = self._v4 if policy.selector.version == 4 else self._v6
            del tables[policy.direction][policy.selector.if_id]
        del self._by_index[policy.index]
        del self._by_selector[policy.direction][identity_of(policy.selector)]
        self._usage[policy.direction].remove(fields_of_policy(policy))
        self.generations.bump_spd()
        return policy

    def _new_index(self, direction: Direction) -> PolicyIndex:
        while True:
            index = self._next_index | direction - 1
            self._next_index += INDEX_STEP
            if self._next_index >= INDEX_LIMIT:
                self._next_index = INDEX_STEP  # index 0 would read as none
            if index not in self._by_index:
                return PolicyIndex(index)

    def _table(self, direction: Direction, selector: Selector) -> ShapeTable:
        tables = (self._v4 if selector.version == 4 else self._v6)[direction]
        table = tables.get(selector.if_id)
        if table is None:
            table = tables[selector.if_id] = ShapeTable()
        return table

    def _entry(self, direction: Direction, selector: Selector) -> Entry:
        entry = self._by_selector[direction].get(identity_of(selector))
        if entry is None:
            raise KernelError(errno.ENOENT, f"no policy {direction.name} {selector}")
        return entry

    def _entry_of_index(self, direction: Direction, index: PolicyIndex) -> Entry:
        entry = self._by_index.get(index)
        if entry is None or entry.policy.direction != direction:
            raise KernelError(errno.ENOENT, f"no policy {direction.name} of index {index}")
        return entry

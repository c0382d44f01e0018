"""Sets of prefix pairs in an nftables table: what both guards compare packets with. Text only.

Prefixes of the same two lengths make one set of masked addresses, so one lookup answers for all of them.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Final, Generic, Protocol, TypeVar

from kernel_shim.io.capture_plan import sides
from kernel_shim.model import IPNetwork, KernelError, Policy
from kernel_shim.nft import ADDRESS_TYPE, FAMILY, prefix_mask


class Shape(Protocol):
    """What the pairs of one set have in common. Hashable."""

    @property
    def version(self) -> int: ...
    @property
    def source_length(self) -> int: ...
    @property
    def destination_length(self) -> int: ...


S = TypeVar("S", bound=Shape)


@dataclass(slots=True)
class _Set:
    number: int
    pairs: Counter[tuple[IPNetwork, IPNetwork]] = field(default_factory=Counter)


class PairSets(Generic[S]):
    """One set for each shape, named by `stem` and a number; each pair is counted by the policies that have it.

    All that it gives is commands. `rules` gives those that write the chain anew which asks the sets: it is asked whenever sets come or go.
    """

    def __init__(self, table: str, stem: str, shape: Callable[[Policy, IPNetwork, IPNetwork], S], most: int, rules: Callable[[], str]) -> None:
        self._table: Final = table
        self._stem: Final = stem
        self._shape: Final = shape
        self._most: Final = most
        self._rules: Final = rules
        self._sets: dict[S, _Set] = {}
        self._numbers = 0

    def __iter__(self) -> Iterator[tuple[S, str]]:
        """Each shape with the expression that matches its packets, the oldest first."""
        for shape, members in self._sets.items():
            family = FAMILY[shape.version]
            source, destination = prefix_mask(shape.version, shape.source_length), prefix_mask(shape.version, shape.destination_length)
            yield shape, f"{family} saddr & {source} . {family} daddr & {destination} @{self._name(members)}"

    def add(self, policy: Policy) -> str:
        """KernelError(ENOSPC) when there would be too many sets; nothing has changed then."""
        shaped = [(self._shape(policy, *pair), pair) for pair in product(*sides(policy))]
        if len(self._sets.keys() | {shape for shape, _ in shaped}) > self._most:
            raise KernelError(errno.ENOSPC, f"policies have more than {self._most} {self._stem} shapes")
        lines: list[str] = []
        new_shape = False
        for shape, pair in shaped:
            members = self._sets.get(shape)
            if members is None:
                self._numbers += 1
                members = self._sets[shape] = _Set(self._numbers)
                lines.append(self._create(shape, members))
                new_shape = True
            members.pairs[pair] += 1
            if members.pairs[pair] == 1:
                lines.append(self._element("add", members, pair))
        return "".join(lines) + (self._rules() if new_shape else "")

    def remove(self, policy: Policy) -> str:
        """Of a policy that `add` took."""
        lines: list[str] = []
        gone: list[str] = []
        for pair in product(*sides(policy)):
            shape = self._shape(policy, *pair)
            members = self._sets[shape]
            members.pairs[pair] -= 1
            if members.pairs[pair]:
                continue
            del members.pairs[pair]
            lines.append(self._element("delete", members, pair))
            if not members.pairs:
                del self._sets[shape]
                gone.append(f"delete set inet {self._table} {self._name(members)}\n")
        return "".join(lines) + (self._rules() if gone else "") + "".join(gone)

    def restore(self) -> str:
        """All sets and the rules anew, in a table that has none of them."""
        lines: list[str] = []
        for shape, members in self._sets.items():
            lines.append(self._create(shape, members))
            lines += [self._element("add", members, pair) for pair in members.pairs]
        return "".join(lines) + self._rules()

    def _name(self, members: _Set) -> str:
        return f"{self._stem}{members.number}"

    def _create(self, shape: S, members: _Set) -> str:
        kind = ADDRESS_TYPE[shape.version]
        return f"add set inet {self._table} {self._name(members)} {{ type {kind} . {kind}; }}\n"

    def _element(self, verb: str, members: _Set, pair: tuple[IPNetwork, IPNetwork]) -> str:
        source, destination = pair
        return f"{verb} element inet {self._table} {self._name(members)} {{ {source.network_address} . {destination.network_address} }}\n"

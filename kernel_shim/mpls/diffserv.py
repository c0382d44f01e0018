"""Between the DSCP of an IP header and the traffic class of a label (RFC 3270, RFC 5462)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

CLASSES: Final = 8
CODE_POINTS: Final = 64


class ClassMap:
    """Both tables of a node. The default keeps the three bits of the class selector (RFC 2474 section 4.2.2)."""

    __slots__ = ("_to_class", "_to_dscp")

    def __init__(self, to_class: tuple[int, ...], to_dscp: tuple[int, ...]) -> None:
        """`to_class` has 64 traffic classes, by DSCP; `to_dscp` 8 code points, by traffic class. Raises ValueError."""
        if len(to_class) != CODE_POINTS or not all(0 <= tc < CLASSES for tc in to_class):
            raise ValueError(f"{CODE_POINTS} traffic classes of 0 to {CLASSES - 1} expected")
        if len(to_dscp) != CLASSES or not all(0 <= dscp < CODE_POINTS for dscp in to_dscp):
            raise ValueError(f"{CLASSES} code points of 0 to {CODE_POINTS - 1} expected")
        self._to_class: Final = to_class
        self._to_dscp: Final = to_dscp

    @classmethod
    def class_selectors(cls) -> Self:
        return cls(tuple(dscp >> 3 for dscp in range(CODE_POINTS)), tuple(tc << 3 for tc in range(CLASSES)))

    def but(self, to_class: Mapping[int, int], to_dscp: Mapping[int, int]) -> Self:
        """This one with other values at some places. Raises ValueError."""
        return type(self)(
            tuple(to_class.get(dscp, tc) for dscp, tc in enumerate(self._to_class)),
            tuple(to_dscp.get(tc, dscp) for tc, dscp in enumerate(self._to_dscp)),
        )

    @property
    def tables(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Traffic classes by DSCP, code points by traffic class."""
        return self._to_class, self._to_dscp

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassMap) and self.tables == other.tables

    def __hash__(self) -> int:
        return hash(self.tables)

    def traffic_class(self, dscp: int) -> int:
        return self._to_class[dscp]

    def dscp(self, traffic_class: int) -> int:
        return self._to_dscp[traffic_class]

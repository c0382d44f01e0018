"""The key exchange methods that are implemented, by their transform id."""

from __future__ import annotations

from typing import Final

from vpnd.ike.crypto.dh import DH_GROUPS
from vpnd.ike.crypto.exchange import Group
from vpnd.ike.crypto.mlkem import KEMS

_GROUPS: Final[dict[int, Group]] = {**DH_GROUPS, **KEMS}


def group(number: int) -> Group:
    """The method with that transform id. Raises KeyError when it is not implemented."""
    return _GROUPS[number]


def implemented_groups() -> frozenset[int]:
    return frozenset(_GROUPS)

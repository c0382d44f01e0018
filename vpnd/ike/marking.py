"""What tells the packets of a CHILD_SA from those of another one with the same selectors: Netfilter marks and interface ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kernel_shim.model import NO_MARK, Mark


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Marking:
    """`mark_in` and `mark_out` are those of policies (and of the SA out), `set_mark_*` what packets get that the SAs let through.

    A rekeyed CHILD_SA passes the very object on to its successor: numbers that were given to it (`%unique`) are free once nobody has it.
    """

    mark_in: Mark = NO_MARK
    mark_out: Mark = NO_MARK
    set_mark_in: Mark = NO_MARK
    set_mark_out: Mark = NO_MARK
    if_id_in: int = 0
    if_id_out: int = 0


NO_MARKING: Final = Marking()


@dataclass(slots=True, weakref_slot=True, eq=False)
class SharedIfIds:
    """The interface ids that an IKE SA, and each that rekeys it, has for its CHILD_SAs (`%unique` in the connection); 0 until the first needs them."""

    both: int = 0
    inbound: int = 0
    outbound: int = 0


class NumbersExhausted(Exception):
    """Every number that the configuration leaves for `%unique` is taken."""

"""The states that an IKE SA and its CHILD_SAs go through, as a listing shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from enum import Enum
from typing import Final

from vpnd.config.model import ChildConfig
from vpnd.ike.effects import ChildSa, Effect
from vpnd.ike.proposal import Proposal


class IkeSaState(Enum):
    """strongSwan's names; the values are those of `vpnd.control.backend.IkeState`."""

    CREATED = "CREATED"
    CONNECTING = "CONNECTING"
    ESTABLISHED = "ESTABLISHED"
    REKEYING = "REKEYING"
    REKEYED = "REKEYED"  # by the peer, which is to delete it
    DELETING = "DELETING"
    DESTROYING = "DESTROYING"


class ChildSaState(Enum):
    """The values are those of `vpnd.control.backend.ChildState`."""

    INSTALLED = "INSTALLED"
    REKEYING = "REKEYING"  # by us
    REKEYED = "REKEYED"  # by the peer, which is to delete it
    DELETING = "DELETING"


@dataclass(slots=True, eq=False)
class Child:
    """A CHILD_SA of an IKE SA and what a listing says of it."""

    sa: ChildSa
    config: ChildConfig
    proposal: Proposal
    installed_at: float
    initiator: bool  # of the exchange that made it
    state: ChildSaState = ChildSaState.INSTALLED
    place: int = 0  # the same for all that came of one CHILD_SA by rekeying: its id
    founded: bool = False  # by us: the first of that place
    founded_at: float = 0.0
    generation: int = 0  # how many rekeyings it is away from that one
    replaces: int = 0  # id of the CHILD_SA that it rekeys
    lowest: bytes = b""  # of the two nonces that it was made with, should its rekeying turn out to be one of two
    taken: bool = False  # the peer surely has its SA in: ours from the start, the peer's once it has our answer
    redundant: bool = False  # of two that a collision made: the peer's, which it has deleted or will
    sends: bool = True  # its SA out is installed; not yet while another one still sends, not any more while another one takes its place
    waited: bool = False  # its SA out came, or is to come, after all else of it
    ceased: bool = False  # its SA out went before it: never again, for the sequence numbers of a second one would repeat those of the first
    at_risk: tuple[Effect, ...] = ()  # what followed its SAs in the same step, and is lost should the kernel refuse one


class Children(Mapping[int, Child]):
    """The CHILD_SAs of an IKE SA by id, in the order in which they came. There may be thousands: whatever else names one finds it without a search."""

    __slots__ = ("_by_id", "_by_place", "_by_spi_out")

    def __init__(self) -> None:
        self._by_id: dict[int, Child] = {}
        self._by_place: dict[int, tuple[Child, ...]] = {}
        self._by_spi_out: dict[int, Child] = {}

    def add(self, child: Child) -> None:
        self._by_id[child.sa.id] = child
        self._by_place[child.place] = (*self._by_place.get(child.place, ()), child)
        self._by_spi_out.setdefault(child.sa.outbound.spi, child)  # no kernel takes a second one of that SPI

    def remove(self, child_id: int) -> Child | None:
        """The one that was there."""
        child = self._by_id.pop(child_id, None)
        if child is None:
            return None
        left = tuple(other for other in self._by_place[child.place] if other is not child)
        if left:
            self._by_place[child.place] = left
        else:
            del self._by_place[child.place]
        if self._by_spi_out.get(child.sa.outbound.spi) is child:
            del self._by_spi_out[child.sa.outbound.spi]
        return child

    def of_place(self, place: int) -> Sequence[Child]:
        return self._by_place.get(place, ())

    def by_spi_out(self, spi: int) -> Child | None:
        """`spi`: of the SA out, which is the peer's inbound one."""
        return self._by_spi_out.get(spi)

    def __getitem__(self, child_id: int) -> Child:
        return self._by_id[child_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def values(self) -> ValuesView[Child]:
        return self._by_id.values()


MAX_CHILDREN: Final = 4096  # CHILD_SAs of one IKE SA; a peer that asks for more gets NO_ADDITIONAL_SAS
MAX_TASKS: Final = 4096  # exchanges of ours that wait for the window of one

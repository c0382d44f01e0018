"""The states that an IKE SA and its CHILD_SAs go through, as a listing shows them."""

from __future__ import annotations

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
    sends: bool = True  # its SA out is installed; not yet while the one that it replaces still sends, not any more while another one takes its place
    ceased: bool = False  # its SA out went before it: never again, for the sequence numbers of a second one would repeat those of the first
    at_risk: tuple[Effect, ...] = ()  # what followed its SAs in the same step, and is lost should the kernel refuse one


MAX_CHILDREN: Final = 4096  # CHILD_SAs of one IKE SA; a peer that asks for more gets NO_ADDITIONAL_SAS
MAX_TASKS: Final = 4096  # exchanges of ours that wait for the window of one

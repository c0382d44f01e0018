"""From one IKE SA to the next by rekeying (RFC 7296 section 2.18): what the new one takes over, and which of two stays."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

from vpnd.ike.effects import IkeHandedOver, Stirred
from vpnd.ike.state import Children, IkeSaState
from vpnd.ike.steps import CONFIRM, Task
from vpnd.schedule import Deadlines

if TYPE_CHECKING:
    from vpnd.ike.session import Session

S = TypeVar("S", bound="Session")

OF_ONE_IKE_SA: Final = frozenset({"IKE_DPD", "IKE_REKEY", "IKE_DELETE"})  # exchanges that are not handed over
# that, if they are under way then, begin anew on the heir: it has what they are for
BEGUN_ANEW: Final = frozenset({"IKE_MOBIKE", "IKE_ROUTE_CHECK", CONFIRM})


def successor(session: S, *, initiator: bool) -> S:
    """The IKE SA that is to replace this one: the same peers, without keys yet. `initiator`: the rekeying is ours."""
    new = type(session)(session.context, session.connection, session.local, session.remote, initiator=initiator, now=session.now)
    new.predecessor = session
    new.candidates = session.candidates
    new.asked_first = session.asked_first
    new.local_id, new.remote_id = session.local_id, session.remote_id
    new.nat_local, new.nat_remote, new.nat_fake, new.nat_supported = session.nat_local, session.nat_remote, session.nat_fake, session.nat_supported
    new.peer_hashes, new.fragmentation, new.ppk = session.peer_hashes, session.fragmentation, session.ppk
    new.redirectable = session.redirectable
    new.authenticated_at, new.proof_ends = session.authenticated_at, session.proof_ends
    new.if_ids = session.if_ids
    new.origin = session.origin
    new.original_initiator, new.mobike, new.mapping_hash = session.original_initiator, session.mobike, b""
    new.peer_addresses, new.told_addresses = session.peer_addresses, session.told_addresses
    return new


def rival_ike(session: Session) -> Session | None:
    """What the peer's rekeying made while ours is on the wire, unless the peer has deleted it again."""
    rival = session.active.rival if session.active is not None else None
    return rival.ike if rival is not None and rival.ike is not None and not rival.ike.closed else None


def end_by(session: Session, other: Session, when: float) -> None:
    """Another IKE SA, which came of the peer's rekeying of this one, is to be deleted by the peer, or by us at that time."""
    other.undecided, other.ends_at = None, when
    session.emit(Stirred(other))


def hand_over(session: Session, heir: Session) -> None:
    """RFC 7296 section 2.18: the new IKE SA has all CHILD_SAs of the old one; exchanges that wait go on there."""
    session.heir = heir
    heir.connection, heir.candidates = session.connection, session.candidates
    session.rekey_at = None
    heir.reauth_at, heir.reauth_end = session.reauth_at, session.reauth_end
    session.reauth_at = None
    heir.departs_at = session.departs_at
    session.forget_followups()
    # RFC 5723 section 6.2: with the keys that are in it a ticket ends
    if session.asked_first:
        session.context.resumption.wallet.drop(session.connection.name)
    session.spend_ticket()
    heir.state, heir.undecided, heir.ends_at = IkeSaState.ESTABLISHED, None, None
    heir.children, session.children = session.children, Children()
    # nobody rekeys an IKE SA whose CHILD_SA exchanges wait for an answer (RFC 7296 section 2.25.2)
    for child in heir.children.values():
        child.taken = True
        session.context.twins.leave(session, child)
        session.context.twins.enter(heir, child)
    heir.later, session.later = session.later, Deadlines()
    heir.tokens = session.tokens
    # either may have moved since the heir was made
    heir.local, heir.remote, heir.proven = session.local, session.remote, session.proven
    heir.nat_local, heir.nat_remote, heir.nat_fake, heir.nat_supported = session.nat_local, session.nat_remote, session.nat_fake, session.nat_supported
    heir.peer_addresses, heir.told_addresses = session.peer_addresses, session.told_addresses
    if session.active is not None and session.active.name in BEGUN_ANEW:
        heir.queue.append(Task(session.active.name, session.active.begin, target=session.active.target))
    for task in (*session.queue, *session.postponed):
        heir.later.set(task, None)
        if task.name not in OF_ONE_IKE_SA:
            heir.queue.append(task)
    session.queue = deque(task for task in session.queue if task.name == "IKE_DELETE")
    session.postponed.clear()
    session.emit(IkeHandedOver(heir))
    if session.state is IkeSaState.DELETING:
        heir.wind_up(session.deleting_for)  # what was to be deleted goes on under the new keys

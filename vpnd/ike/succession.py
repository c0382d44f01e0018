"""The CHILD_SAs that came of one by rekeying (RFC 7296 sections 2.8, 2.8.1 and 2.25): which one stands, which is redundant, and which one sends.

They have one place. Of two that replace the same one, because both sides rekeyed it at once, that with the lowest nonce is redundant; who made it
deletes it, who made the other one deletes what both replace. Everything stays installed until it is deleted, so packets are taken by all of them:

- What we made sends at once, for the peer has its SA in before it answers. What the peer made sends once nothing else of the place does:
  by deleting what it replaced the peer says that it has its SA in.
- Twins (`vpnd.ike.twins`) are no rekeying: the peer reauthenticates, or both sides made one at once. What the peer made waits for its word beside a twin
  that sends the same way, for our answer and its SA in come after packets that leave with the answer; so the peer is asked at once, and may delete the
  twin before.
- REKEYED is what the peer is to delete. It is not rekeyed. If it was replaced it may send; if it is redundant never, for the peer may not even have it in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from vpnd.ike.effects import ChildClosed, ChildEstablished, InstallSa, Reason, RemoveSa, Stirred
from vpnd.ike.state import Child, ChildSaState, IkeSaState
from vpnd.ike.steps import Rival
from vpnd.ike.twins import stays

if TYPE_CHECKING:
    from vpnd.ike.session import Session
    from vpnd.ike.steps import Task

SUCCEEDED: Final = frozenset({Reason.REKEYED, Reason.REPLACED})  # ends after which the peer has, or is about to have, another one in its place
AT_ONCE: Final = frozenset({Reason.EXPIRED, Reason.KERNEL_LOST, Reason.KERNEL_REFUSED, Reason.SHUTDOWN})  # ends after which nothing under way is waited for


def place(session: Session, child: Child) -> Iterator[Child]:
    """The others that stand in its place."""
    return (other for other in session.children.of_place(child.place) if other is not child)


def outlived(session: Session, child: Child) -> bool:
    """Whether a better one stands in its place: what it was rekeyed to, or of two that a collision made the one that stays."""
    return any((other.generation, other.lowest) > (child.generation, child.lowest) for other in place(session, child))


# Our rekeying


def in_vain(session: Session, task: Task, old: Child, lowest: bytes) -> bool:
    """Our rekeying of `old` was answered, with that as the lower one of its nonces: whether what it made goes at once."""
    # RFC 7296 section 2.8.1; and one that nobody wants any more is not replaced
    beaten = task.rival is not None and lowest < task.rival.lowest
    return beaten or (session.children.get(task.target) is old and old.state is ChildSaState.DELETING)


def give_way(session: Session, task: Task, old: Child) -> None:
    """Nothing comes of our rekeying of `old`; if the peer's did, that one stands."""
    if task.rival is not None and session.children.get(task.target) is old and old.state is ChildSaState.REKEYING:
        old.state = ChildSaState.REKEYED
        revise(session, old)


def take_place(session: Session, task: Task, old: Child) -> None:
    """Ours stands in the place of `old` now; who is to delete what."""
    rival = session.children.get(task.rival.child_id) if task.rival is not None else None
    if rival is not None and rival.state is not ChildSaState.DELETING:
        _leave_to_peer(session, rival)
        rival.redundant = True
    if session.children.get(task.target) is old:
        session.retire(old, Reason.REKEYED)
    elif rival is not None:
        # the peer keeps its own until it knows that we have its answer, and there is nothing else to tell it
        session.probe_peer()


# The peer's rekeying


def ours_in_place_of(session: Session, old: Child) -> Child | None:
    """What our own rekeying made, while nothing else has a claim to the place."""
    successors = [child for child in place(session, old) if child.replaces == old.sa.id]
    return successors[0] if len(successors) == 1 and successors[0].initiator and successors[0].state is not ChildSaState.DELETING else None


def replaced_by_peer(session: Session, old: Child, new: Child) -> None:
    """The peer's rekeying of `old` is about to be answered, and `new` to stand."""
    task = session.active
    if old.state is ChildSaState.REKEYING and task is not None and task.asked and task.name == "CHILD_REKEY" and task.target == old.sa.id:
        # RFC 7296 section 2.8.1: ours is on the wire, so which one stays is decided when it is answered
        task.rival = Rival(new.lowest, new.sa.id)
    elif old.state is ChildSaState.DELETING:
        # ours was answered before we saw the peer's
        ours = ours_in_place_of(session, old)
        if ours is not None and ours.lowest < new.lowest:
            # until the peer has our answer it can send and receive by ours alone
            session.retire(ours, Reason.REKEYED, answered=True)
            _put_off_deletion(session, old)
        else:
            _leave_to_peer(session, new)
            new.redundant = True
    else:
        _leave_to_peer(session, old)


def _leave_to_peer(session: Session, child: Child) -> None:
    child.state = ChildSaState.REKEYED
    session.later.set(child.sa.id, None)


# Coming and going


def install(session: Session, child: Child, replaces: Child | None = None) -> None:
    """As initiator of the exchange: both SAs at once."""
    enter(session, child)
    session.emit(InstallSa(child.sa.id, child.sa.inbound))
    session.emit(InstallSa(child.sa.id, child.sa.outbound))
    session.emit(ChildEstablished(child.sa, replaces.sa if replaces else None))


def enter(session: Session, child: Child) -> None:
    """It stands."""
    session.held.discard(child.sa.inbound.id)
    session.children.add(child)
    session.context.twins.enter(session, child)
    child.taken = child.initiator
    carried = any(other.sends for other in place(session, child)) or session.context.twins.carries(session.local_id, session.remote_id, child.sa)
    child.sends = child.initiator or not carried
    child.waited = not child.sends
    soft = child.sa.outbound.soft.seconds
    session.later.set(child.sa.id, child.installed_at + soft if soft and child.state is not ChildSaState.REKEYED else None)


def close(session: Session, child: Child, reason: Reason) -> None:
    """It is over."""
    if not leave(session, child):
        return
    _elect(session, child)
    session.emit(RemoveSa(child.sa.outbound.id))
    # what the peer sent before it heard of the end is under way still
    lingers = reason in SUCCEEDED or (reason not in AT_ONCE and session.has_twin(child))
    session.emit(RemoveSa(child.sa.inbound.id, session.context.settings.rekeyed_delay if lingers else 0.0))
    session.emit(ChildClosed(child.sa, reason))
    revise(session, child)


def leave(session: Session, child: Child) -> bool:
    """It stands no more; whether it did."""
    session.context.twins.leave(session, child)
    session.later.set(child.sa.id, None)
    return session.children.remove(child.sa.id) is not None


def waits_for_peer(session: Session, child: Child) -> bool:
    """Whether it is to send as soon as the peer surely has its SA in."""
    return not (child.sends or child.ceased or child.redundant or any(other.sends for other in place(session, child)))


def taken(session: Session, child: Child) -> None:
    """The peer has our answer."""
    child.taken = True
    if waits_for_peer(session, child):
        _send_by(session, child)


def cease(session: Session, child: Child) -> None:
    """A DELETE of it goes out, or our answer to one: from then on the peer may have it no more, and if another one can send, that one does."""
    _elect(session, child)
    if child.sends and session.has_twin(child):
        child.sends, child.ceased = False, True
        session.emit(RemoveSa(child.sa.outbound.id))


def revise(session: Session, of_place: Child) -> None:
    """What was left to the peer to delete goes on if what was better is gone."""
    if session.closed:
        return
    for child in session.children.of_place(of_place.place):
        if child.state is ChildSaState.REKEYED and not child.redundant and not outlived(session, child):
            child.state = ChildSaState.INSTALLED
            session.rekey_later(child)


def _elect(session: Session, going: Child) -> None:
    """Somebody of the place has to send; if nobody of it is left, or all of it goes with the IKE SA, a twin."""
    whole = session.closed or session.state is IkeSaState.DELETING
    if whole and _elect_twin(session, going):
        return
    others = [] if session.closed else list(place(session, going))
    if any(other.sends for other in others):
        return
    able = [other for other in others if not (other.ceased or other.redundant or other.state is ChildSaState.DELETING)]
    best = max(able, key=lambda other: (other.taken, other.generation, other.lowest), default=None)
    if best is not None:
        _send_by(session, best)
    elif not whole:
        _elect_twin(session, going)


def _elect_twin(session: Session, going: Child) -> bool:
    """Whether one sends now."""
    twins = [standing for standing in session.context.twins.of(session.local_id, session.remote_id, going.sa) if stays(*standing)]
    if any(twin.sends for _, twin in twins):
        return True
    waiting = [(of, twin) for of, twin in twins if waits_for_peer(of, twin)]
    if not waiting:
        return False
    # our answer that made the oldest left first, so the peer has that one if it has any
    of, twin = min(waiting, key=lambda standing: (not standing[1].taken, standing[1].installed_at, standing[1].sa.id))
    _send_by(of, twin)
    if of is not session:
        session.emit(Stirred(of))
    return True


def _send_by(session: Session, child: Child) -> None:
    child.sends = True
    session.emit(InstallSa(child.sa.id, child.sa.outbound))


def refused_by_kernel(session: Session, child: Child) -> None:
    """What it was to replace goes on, if nobody was told otherwise yet. It stands no more."""
    if session.active is not None and session.active.rival is not None and session.active.rival.child_id == child.sa.id:
        session.active.rival = None
    revise(session, child)
    for other in place(session, child):
        if child.replaces and (other.sa.id == child.replaces if child.initiator else other.replaces == child.replaces):
            _call_off_deletion(session, other)


def _put_off_deletion(session: Session, old: Child) -> None:
    """The peer deletes it, once it has our answer. From a delete that came before strongSwan 5.9 would take that ours stays."""
    deletion = _deletion_of(session, old)
    if deletion is not None and deletion in session.queue:
        session.queue.remove(deletion)
        session.retire(old, Reason.REKEYED, answered=True)


def _deletion_of(session: Session, child: Child) -> Task | None:
    """The one that is not on the wire yet."""
    waiting = (*session.queue, *session.postponed)
    return next((task for task in waiting if task.name == "CHILD_DELETE" and task.target == child.sa.id), None)


def _call_off_deletion(session: Session, child: Child) -> None:
    deletion = _deletion_of(session, child)
    if deletion is None:
        return
    if deletion in session.postponed:
        session.call_off(deletion)
    else:
        session.queue.remove(deletion)
    child.state = ChildSaState.INSTALLED
    session.rekey_later(child)

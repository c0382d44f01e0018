"""What an IKE SA does without being asked: its timers, and the exchanges that it begins for them (RFC 7296 sections 2.4, 2.8 and 1.4)."""

from __future__ import annotations

from vpnd.ike import handover
from vpnd.ike.effects import (
    Effect,
    Reason,
    ReauthenticationDue,
    SendKeepalive,
)
from vpnd.ike.exchanges import (
    create_child_sa,
    informational,
    rekey_ike,
)
from vpnd.ike.followup import Followup
from vpnd.ike.iana import Exchange
from vpnd.ike.state import MAX_TASKS, Child, ChildSaState, IkeSaState
from vpnd.ike.steps import Task
from vpnd.ike.transport import ANSWER_ARRIVES, Transport


class Lifecycle(Transport):
    """The part of an IKE SA that keeps time."""

    # Steps of inputs

    def wind_up(self, reason: Reason) -> None:
        if self.closed or self.state is IkeSaState.DELETING:
            return
        if self.established_at is None and not self._drop_authentication(reason):
            self.close(reason, self.describe())
            return
        self.state = IkeSaState.DELETING
        self.deleting_for = reason
        for task in (*self.queue, *self.postponed):
            self.fail_child(task, reason)
        self.queue.clear()
        self.postponed.clear()
        self.queue.append(informational.delete_ike(reason))

    def _drop_authentication(self, reason: Reason) -> bool:
        """Whether our IKE_AUTH is on the wire. Nothing comes of it any more; its answer is for the delete to wait for, as long as for its own."""
        outstanding = self._outstanding
        if outstanding is None or self.active is None or outstanding.exchange != Exchange.IKE_AUTH:
            return False
        outstanding.tries = min(outstanding.tries, outstanding.copies + informational.DELETE_TRIES)
        self.fail_child(self.active, reason)
        self.active = None
        return True

    def retire(self, child: Child, reason: Reason, *, answered: bool = False) -> None:
        child.state = ChildSaState.DELETING
        deletion = informational.delete_child(child.sa.inbound.spi, child.sa.id, reason)
        if answered:
            deletion.answered = True
            self.put_off(deletion, ANSWER_ARRIVES)
        else:
            self.queue.append(deletion)

    def probe_peer(self) -> None:
        if not self.queue:
            self.queue.append(Task("IKE_DPD", informational.probe))

    def _delete(self, reason: Reason) -> None:
        self.wind_up(reason)
        if self.active is not None and self._outstanding is None:
            # it waits for an SPI only: nothing of it is on the wire
            self.fail_child(self.active, reason)
            self.active = None

    def _rekey_child(self, child_id: int) -> None:
        child = self.children.get(child_id)
        if child is None or child.state is not ChildSaState.INSTALLED or self.closed or self.state is IkeSaState.DELETING:
            return
        self.later.set(child_id, None)
        if len(self.queue) + len(self.postponed) >= MAX_TASKS:
            self.rekey_later(child)
            return
        child.state = ChildSaState.REKEYING
        self._enqueue(Task("CHILD_REKEY", create_child_sa.rekey_child, target=child_id))

    def _rekey(self) -> None:
        if self.state is not IkeSaState.ESTABLISHED or any(task.name == "IKE_REKEY" for task in (self.active, *self.queue, *self.postponed) if task):
            return
        self.rekey_at = None
        # before what waits, which then goes on under the new keys
        self.queue.appendleft(Task("IKE_REKEY", rekey_ike.rekey))
        self._start_next()

    # Timers

    def timer(self, now: float) -> list[Effect]:
        """What is due at `now`."""
        self.now = now
        for due in (
            self._check_half_open,
            self._check_spis,
            self._check_fragments,
            self._check_outstanding,
            self._check_lifetime,
            self._check_later,
            self._start_next,
            self._check_peer,
            self._keep_mapping,
        ):
            if not self.closed:
                due()
        return self._done()

    def next_deadline(self) -> float | None:
        """When to call `timer`; may be in the past (call at once). None once closed. Ask again after every input."""
        if self.closed:
            return None
        deadlines = [wait.deadline for wait in self._waits.values()]
        if self._outstanding is not None:
            deadlines.append(self._outstanding.next_at)
        if self.half_open:
            deadlines.append(self._half_open_until)
        if self._may_start():
            deadlines.append(self.now)
        fragments = self._fragments_of_request.deadline, self._fragments_of_response.deadline
        timers = *fragments, self._lifetime_end, self._rekey_due, self._reauth_due, self._probe_at, self._keepalive_at, self.later.next()
        deadlines += [deadline for deadline in timers if deadline is not None]
        return min(deadlines, default=None)

    @property
    def _half_open_until(self) -> float:
        return self.created_at + self.context.settings.half_open_timeout

    @property
    def _lifetime_end(self) -> float | None:
        if self.established_at is None or self.state is IkeSaState.DELETING:
            return None
        if self.ends_at is not None or self.departs_at is not None:
            return min(end for end in (self.ends_at, self.departs_at) if end is not None)
        ends = [] if self.reauth_end is None else [self.reauth_end]
        if self.connection.rekey_time:
            ends.append(self.established_at + self.connection.rekey_time + self.connection.over_time)
        return min(ends, default=None)

    @property
    def _rekey_due(self) -> float | None:
        return self.rekey_at if self.state is IkeSaState.ESTABLISHED else None

    @property
    def _reauth_due(self) -> float | None:
        return self.reauth_at if self.state is IkeSaState.ESTABLISHED else None

    @property
    def _probe_at(self) -> float | None:
        idle = self.state is IkeSaState.ESTABLISHED and self.active is None and not self.queue
        return self._heard_at + self.connection.dpd_delay if idle and self.connection.dpd_delay else None

    @property
    def _keepalive_at(self) -> float | None:
        interval = self.context.settings.keepalive
        return self._sent_at + interval if interval and self.nat_local and self.established_at is not None else None

    def _check_half_open(self) -> None:
        if self.half_open and self.now >= self._half_open_until:
            self.close(Reason.HALF_OPEN_TIMEOUT, self.describe())

    def _check_spis(self) -> None:
        for token, wait in list(self._waits.items()):
            if self.now >= wait.deadline and not self.closed:
                self._waits.pop(token)
                self._resume(wait, None)

    def _check_fragments(self) -> None:
        self._fragments_of_request.expire(self.now)
        self._fragments_of_response.expire(self.now)

    def _check_outstanding(self) -> None:
        outstanding = self._outstanding
        if outstanding is None or self.now < outstanding.next_at:
            return
        theirs = handover.rival_ike(self)
        if self.overtaken and theirs is not None:
            self.active = self._outstanding = None
            rekey_ike.await_deletion(self, theirs)
        elif outstanding.doubt is not None:
            self.close(*outstanding.doubt)
        elif outstanding.copy(self.now, self.random()):
            self._repeat(outstanding)
        elif self.active is not None and self.active.name == "IKE_DELETE":
            self.close(self.deleting_for, f"{self.describe()}: no answer to the delete")
        else:
            self.close(Reason.PEER_SILENT, f"{self.describe()}: no answer to message {outstanding.message_id} after {outstanding.copies} retransmissions")

    def _check_lifetime(self) -> None:
        end = self._lifetime_end
        if end is not None and self.now >= end:
            self._delete(Reason.REKEYED if self.ends_at is not None else Reason.EXPIRED if self.departs_at is None else Reason.REDIRECTED)
        again = self._reauth_due
        if again is not None and self.now >= again:
            self.reauth_at = None
            self.emit(ReauthenticationDue())
        due = self._rekey_due
        if due is not None and self.now >= due:
            self._rekey()

    def _check_later(self) -> None:
        while (key := self.later.due(self.now)) is not None:
            if isinstance(key, Task):
                if key in self.postponed:
                    del self.postponed[key]
                    self.queue.append(key)
            elif isinstance(key, Followup):
                self.forget_followup(key)
            else:
                self._rekey_child(key)

    def _check_peer(self) -> None:
        at = self._probe_at
        if at is not None and self.now >= at:
            self._enqueue(Task("IKE_DPD", informational.probe))

    def _keep_mapping(self) -> None:
        at = self._keepalive_at
        if at is not None and self.now >= at:
            self._sent_at = self.now
            self.emit(SendKeepalive(self.local, self.remote))

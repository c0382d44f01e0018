"""What the effects of IKE SAs do to sockets and kernel.

They are carried out step after step; a step that needs the kernel goes on in a task of its own until its effects are done,
so nothing waits per SA while nothing happens.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import Direction, Endpoint, KernelError, ReqId, SecurityAssociation, SpiRequest
from vpnd.daemon import uniqueness
from vpnd.daemon.background import Background
from vpnd.daemon.entry import Entry, Listener
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.news import News
from vpnd.daemon.registry import Registry
from vpnd.daemon.reqids import ReqIds
from vpnd.ike.effects import (
    AllocateSpi,
    AuthenticationRejected,
    ChildClosed,
    ChildDenied,
    ChildEstablished,
    ChildFailed,
    Effect,
    IkeClosed,
    IkeEstablished,
    IkeHandedOver,
    IkeMoved,
    IkeOpened,
    InitialContact,
    InstallSa,
    MadeIkeSa,
    MigrateSa,
    Reason,
    ReauthenticationDue,
    Redirected,
    RekeyFailed,
    RemoveSa,
    Send,
    SendKeepalive,
    Stirred,
)
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.sa import IkeSa
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.throttle import Throttle
from vpnd.telemetry.wording import abridged

STRANGERS_AT_ONCE: Final = 100  # log lines about responders whose peer never proved who it is; anybody can cause them, at the cost of a key exchange
STRANGERS_A_SECOND: Final = 5.0

KERNEL_ERRORS: Final = (KernelError, TimeoutError, ChannelClosed)

log = structlog.get_logger("ike")


class Sockets(Protocol):
    """Sends IKE messages; `vpnd.io.udp.IkeSockets` behind the application."""

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None: ...
    def send_keepalive(self, local: Endpoint, remote: Endpoint) -> None: ...


class Carrier:
    """`advanced` is called with each IKE SA that may have another deadline now."""

    def __init__(self, kernel: KernelSide, sockets: Sockets, registry: Registry, reqids: ReqIds, news: News, counters: Counters) -> None:
        self._kernel = kernel
        self._sockets = sockets
        self._registry = registry
        self._reqids = reqids
        self._news = news
        self._counters = counters
        self._installing: Counter[int] = Counter()  # half installed CHILD_SAs by reqid
        self._background = Background()
        self._strangers = Throttle(STRANGERS_AT_ONCE, STRANGERS_A_SECOND)
        self.listener: Listener | None = None
        self.redirected: Callable[[Entry, GatewayId], None] = lambda entry, gateway: None
        self.advanced: Callable[[Entry], None] = lambda entry: None

    def installing(self, reqid: int) -> bool:
        """Whether a CHILD_SA of that reqid is half installed: its SA out is about to come."""
        return self._installing[reqid] > 0

    # Steps

    def run(self, entry: Entry, effects: Sequence[Effect]) -> None:
        """Carry out one step, after the steps of this IKE SA that are still under way."""
        if effects:
            entry.steps.append(deque(effects))
        self._relate(entry, effects)
        if entry.task is None and not entry.advancing and entry.awaits is None:
            entry.advancing = True
            try:
                self._advance(entry)
            finally:
                entry.advancing = False
        self.advanced(entry)

    def _relate(self, entry: Entry, effects: Sequence[Effect]) -> None:
        """What is of other IKE SAs happens before any of the step is carried out."""
        for effect in effects:
            if isinstance(effect, IkeOpened):
                self._open(effect.sa)
            elif isinstance(effect, IkeHandedOver):
                self._hand_over(entry, self._required(effect.sa))
            elif isinstance(effect, Stirred):
                other = self._required(effect.sa)
                self.run(other, other.sa.stirred(asyncio.get_running_loop().time()))

    def _advance(self, entry: Entry) -> None:
        while entry.steps:
            step = entry.steps[0]
            while step:
                if isinstance(step[0], AllocateSpi | InstallSa | MigrateSa | RemoveSa):
                    entry.task = asyncio.get_running_loop().create_task(self._continue(entry))
                    return
                self._carry_out(entry, step.popleft())
            entry.steps.popleft()
        if entry.heir is not None and entry.heir.awaits is entry:
            entry.heir.awaits = None
            self.run(entry.heir, ())

    def _open(self, sa: MadeIkeSa) -> None:
        """An IKE SA that a rekeying made."""
        assert isinstance(sa, IkeSa)
        entry = self._registry.enter(sa)
        self._registry.established(entry)
        entry.endpoints = (sa.local, sa.remote)
        self.run(entry, ())

    def _required(self, sa: MadeIkeSa) -> Entry:
        entry = self._registry.by_spi(sa.spi_local)
        assert entry is not None, "an IKE SA hands over to one that was not opened"
        return entry

    def _hand_over(self, old: Entry, new: Entry) -> None:
        old.heir, new.awaits, new.leaving = new, old, old.leaving
        for child_id in new.sa.children:
            if child_id in old.owners:
                old.owners.discard(child_id)
                new.owners.add(child_id)
            if child_id in old.installing:
                new.installing[child_id] = old.installing.pop(child_id)
        self._registry.hand_over(new)
        self._counters.add("ike_rekeyed")
        name = new.sa.connection.name
        self._news.say(f"IKE_SA {name}[{new.sa.unique_id}] rekeyed from {name}[{old.sa.unique_id}]", new)
        if self.listener:
            self.listener.ike_rekeyed(old, new)

    async def _continue(self, entry: Entry) -> None:
        step = entry.steps[0]
        try:
            answer = await self._kernel_effect(entry, step)
        except Exception:  # a fault of ours must cost this IKE SA its life, not its silence
            log.exception("effect failed", connection=entry.sa.connection.name, ike=entry.sa.unique_id)
            step.clear()
            answer = entry.sa.abort(asyncio.get_running_loop().time(), Reason.KERNEL_REFUSED)
        if answer:
            # what follows from the answer belongs before later steps, after the rest of this one
            entry.steps.insert(1, deque(answer))
            self._relate(entry, answer)
        entry.task = None
        self.run(entry, ())
        if entry.heir is not None:
            self.run(entry.heir, ())  # what the kernel said may have given it something to do

    async def _kernel_effect(self, entry: Entry, step: deque[Effect]) -> Sequence[Effect]:
        """Take the first effect of the step and carry it out; what the core says to the outcome is returned."""
        answer: Sequence[Effect] = ()
        match step.popleft():
            case AllocateSpi(token, _child, local, remote, mode, reqid, acquire):
                spi = None
                try:
                    spi = await self._kernel.get_spi(SpiRequest(remote.address, local.address, mode, ReqId(reqid), acquire=acquire))
                except KERNEL_ERRORS as error:
                    self._news.say(f"kernel gave no SPI: {error}", entry, group="KNL", warning=True)
                answer = entry.sa.spi_allocated(token, spi, asyncio.get_running_loop().time())
            case InstallSa(child_id) if not entry.sa.holds(child_id):
                pass  # it ended while its steps waited for the kernel
            case InstallSa(child_id, sa):
                try:
                    await self._install(entry, child_id, sa)
                except KERNEL_ERRORS as error:
                    self._news.say(f"kernel refused the {sa.direction.name.lower()}bound SA {sa.spi:08x}: {error}", entry, group="KNL", warning=True)
                    step.clear()
                    answer = entry.sa.install_failed(child_id, sa.direction, asyncio.get_running_loop().time())
                    # of one that was up, the end decides what becomes of its policies
                    if not any(isinstance(effect, ChildClosed) and effect.child.id == child_id for effect in answer):
                        self._release(entry.current, child_id)
            case MigrateSa(child_id, old, new):
                try:
                    await self._migrate(entry, child_id, old, new)
                except KERNEL_ERRORS as error:
                    self._news.say(f"kernel did not move the {new.direction.name.lower()}bound SA {new.spi:08x}: {error}", entry, group="KNL", warning=True)
                    self._installed(entry.current, child_id)
                    answer = entry.sa.migrate_failed(child_id, asyncio.get_running_loop().time())
            case RemoveSa(sa_id, delay):
                self._registry.disown(sa_id)
                if delay:
                    self._kernel.remove_later(sa_id, delay)
                else:
                    await self._kernel.remove(sa_id)
            case effect:
                raise AssertionError(f"{effect} does not need the kernel")
        return answer

    # SAs of the kernel

    async def _install(self, entry: Entry, child_id: int, sa: SecurityAssociation) -> None:
        """Policies in all directions stand before the first SA: what is sent before the SA out stands waits for it in the kernel, and is not sent in clear."""
        inbound = sa.direction is Direction.IN
        if inbound:
            self._begin_installing(entry.current, child_id, sa)
            await self._claim_policies(entry.current, child_id, sa)
        await self._kernel.install(sa)
        self._registry.own(sa.id, entry.current, child_id)
        if not inbound:
            self._installed(entry.current, child_id)

    async def _migrate(self, entry: Entry, child_id: int, old: SecurityAssociation, new: SecurityAssociation) -> None:
        """The SA in first, so that nothing that arrives is lost; an ACQUIRE between the policies and the SA out is answered by that."""
        inbound = new.direction is Direction.IN
        if inbound:
            self._begin_installing(entry.current, child_id, new)
        await self._kernel.migrate(old, new)
        self._registry.disown(old.id)
        self._registry.own(new.id, entry.current, child_id)
        if inbound:
            await self._claim_policies(entry.current, child_id, new)
        else:
            self._installed(entry.current, child_id)

    async def _claim_policies(self, entry: Entry, child_id: int, inbound: SecurityAssociation) -> None:
        child = entry.sa.children.get(child_id)
        if child is None:
            return  # closed meanwhile: the rest of its steps takes it away
        known = self._reqids.child(inbound.reqid)
        spec = PolicySpec.of_child(known[1] if known else None, inbound.mode, inbound.reqid, inbound.destination, inbound.source, child.sa.marking)
        policies = policies_for(spec, inbound.destination_selectors, inbound.source_selectors)
        await self._kernel.claim(("child", child_id), list(policies))

    def _begin_installing(self, entry: Entry, child_id: int, sa: SecurityAssociation) -> None:
        entry.owners.add(child_id)
        if child_id not in entry.installing:
            entry.installing[child_id] = sa.reqid
            self._installing[sa.reqid] += 1

    def _installed(self, entry: Entry, child_id: int) -> None:
        reqid = entry.installing.pop(child_id, None)
        if reqid is not None:
            self._installing[reqid] -= 1
            if not self._installing[reqid]:
                del self._installing[reqid]

    # Everything else

    def _carry_out(self, entry: Entry, effect: Effect) -> None:
        match effect:
            case Send(local, remote, data):
                self._sockets.send(local, remote, data)
            case SendKeepalive(local, remote):
                self._sockets.send_keepalive(local, remote)
            case IkeEstablished():
                self._authenticated(entry)
            case ReauthenticationDue():
                if self.listener:
                    self.listener.reauthentication_due(entry)
            case IkeClosed():
                self._closed(entry, effect)
            case IkeOpened() | IkeHandedOver() | Stirred():
                pass  # at once, in `_relate`
            case Redirected(gateway):
                self.redirected(entry.current, gateway)
            case IkeMoved(local, remote):
                entry = entry.current
                for child_id in list(entry.installing):  # of one that sends not yet, the SA out did not move
                    self._installed(entry, child_id)
                self._counters.add("ike_moved")
                self._news.say(f"IKE_SA {entry.sa.connection.name}[{entry.sa.unique_id}] is between {local} and {remote} now", entry)
                before, entry.endpoints = entry.endpoints, (local, remote)
                if self.listener and before is not None and before != (local, remote):
                    self.listener.ike_moved(entry, *before)
            case AuthenticationRejected(connection, peer, why):
                self._counters.add("authentication_rejected")
                self._say_of_stranger(
                    f"authentication of peer '{peer or '%any'}' at {entry.sa.remote} for connection '{connection or '?'}' failed: {why}", entry, warning=True
                )
            case InitialContact(local_id, remote_id):
                for other in uniqueness.after_initial_contact(self._registry, entry, (local_id, remote_id)):
                    other.superseded = True
                    self.run(other, other.sa.abort(asyncio.get_running_loop().time(), Reason.REPLACED))
            case ChildEstablished() | ChildClosed() | ChildFailed() | ChildDenied() | RekeyFailed():
                self._tell_of_child(entry, effect)
            case _:
                raise AssertionError(f"{effect} needs the kernel")

    def _tell_of_child(self, entry: Entry, effect: ChildEstablished | ChildClosed | ChildFailed | ChildDenied | RekeyFailed) -> None:
        match effect:
            case ChildEstablished(child, replaces):
                entry = entry.current
                self._installed(entry, child.id)  # of one that the peer rekeys, the SA out comes only when the old one goes
                self._counters.add("child_established" if replaces is None else "child_rekeyed")
                self._news.say(
                    f"CHILD_SA {child.name}{{{child.id}}} established with SPIs {child.inbound.spi:08x}_i {child.outbound.spi:08x}_o and TS "
                    f"{' '.join(map(str, child.local_ts))} === {' '.join(map(str, child.remote_ts))}"
                    + (f", rekeying {replaces.name}{{{replaces.id}}}" if replaces else ""),
                    entry,
                )
                if self.listener:
                    if replaces is None:
                        self.listener.child_established(entry, child)
                    else:
                        self.listener.child_rekeyed(entry, replaces, child)
            case RekeyFailed(child_id, reason, detail):
                entry = entry.current
                self._counters.add("rekey_failed")
                what = f"CHILD_SA {{{child_id}}}" if child_id else f"IKE_SA {entry.sa.connection.name}[{entry.sa.unique_id}]"
                self._news.say(f"rekeying of {what} failed: {reason.value}{f' ({detail})' if detail else ''}; it is tried again", entry, warning=True)
                if self.listener:
                    self.listener.rekey_failed(entry, effect)
            case ChildClosed(child, reason):
                entry = entry.current
                self._counters.add("child_closed")
                self._news.say(f"CHILD_SA {child.name}{{{child.id}}} closed: {reason.value}", entry)
                if self.listener:
                    self.listener.child_closed(entry, child, reason)
                self._release(entry, child.id)
            case ChildFailed():
                entry = entry.current  # who waits for it waits there
                self._counters.add("child_failed")
                detail = f" ({effect.detail})" if effect.detail else ""
                self._news.say(f"CHILD_SA {effect.name} failed: {effect.reason.value}{detail}", entry, warning=True)
                if self.listener:
                    self.listener.child_failed(entry, effect)
            case ChildDenied(reason, detail):
                self._counters.add("child_denied")
                self._news.say(f"peer's request for a CHILD_SA denied: {reason.value}{f' ({detail})' if detail else ''}", entry, warning=True)
                if self.listener:
                    self.listener.child_denied(entry, reason)

    def _authenticated(self, entry: Entry) -> None:
        self._registry.established(entry)
        self._counters.add("ike_established")
        sa = entry.sa
        entry.endpoints = (sa.local, sa.remote)
        self._news.say(
            f"IKE_SA {sa.connection.name}[{sa.unique_id}] established between {sa.local.address}[{sa.local_id}]...{sa.remote.address}[{sa.remote_id}]", entry
        )
        if self.listener:
            self.listener.ike_established(entry)
        uniqueness.replace(self._registry, entry, self._delete_replaced)

    def _delete_replaced(self, entry: Entry) -> None:
        self._news.say(f"deleting IKE_SA {entry.sa.connection.name}[{entry.sa.unique_id}]: its peer has another one, and unique says one", entry)
        self.run(entry, entry.sa.delete(asyncio.get_running_loop().time(), Reason.REPLACED))

    def _say_of_stranger(self, text: str, entry: Entry, *, warning: bool = False) -> None:
        """What a peer can make us say before it proved who it is, and without our asking, is said so often and no more."""
        unsaid: int | None = 0
        if not entry.sa.initiator and entry.sa.established_at is None:
            unsaid = self._strangers.admit(asyncio.get_running_loop().time())
        if unsaid is None:
            self._counters.add("strangers_not_logged")
            return
        self._news.say(abridged(text) + (f" ({unsaid} more lines like it were not logged)" if unsaid else ""), entry, warning=warning)

    def _closed(self, entry: Entry, effect: IkeClosed) -> None:
        sa = entry.sa
        self._registry.closed(entry)
        self.advanced(entry)
        self._counters.add("ike_closed")
        detail = f" ({effect.detail})" if effect.detail else ""
        self._say_of_stranger(f"IKE_SA {sa.connection.name}[{sa.unique_id}] closed: {effect.reason.value}{detail}", entry)
        if self.listener:
            self.listener.ike_closed(entry, effect)
        for child_id in list(entry.owners):
            self._release(entry, child_id)

    def _release(self, entry: Entry, child_id: int) -> None:
        self._installed(entry, child_id)
        entry.owners.discard(child_id)
        owner = ("child", child_id)
        if self._kernel.has_claims(owner):
            self._background.start(self._kernel.release(owner))

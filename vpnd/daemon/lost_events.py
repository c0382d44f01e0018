"""Events that never came, read from the kernel's tables. Pure.

An ACQUIRE is state: a larval SA of SPI 0 and of its number, which stands in the way of the next ACQUIRE of its flow. A soft lifetime that is
over is seen by age and use. A hard one needs nothing here: the SA has vanished.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from kernel_shim.model import (
    NO_LIFETIME,
    Acquire,
    AcquireSequence,
    Direction,
    Expire,
    Flow,
    KernelEvent,
    Policy,
    PolicyIndex,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
)

MAX_HEARD: Final = 65536  # ACQUIREs remembered as heard of; one that is forgotten is told again, which joins the negotiation under way


class LostEvents:
    """`heard` every event that comes; `found` says which of those that the tables tell did not."""

    def __init__(self) -> None:
        self._acquires: OrderedDict[AcquireSequence, None] = OrderedDict()
        self._expired: set[SaId] = set()

    def heard(self, event: KernelEvent) -> None:
        if isinstance(event, Acquire):
            self._heard_of(event.sequence)
        elif isinstance(event, Expire) and not event.hard:
            self._expired.add(event.sa)

    def _heard_of(self, acquire: AcquireSequence) -> None:
        self._acquires[acquire] = None
        if len(self._acquires) > MAX_HEARD:
            self._acquires.popitem(last=False)

    def found(self, actual: Iterable[SaStatus], ours: Mapping[SaId, SecurityAssociation], policies: Iterable[Policy], now: float) -> list[KernelEvent]:
        """`actual` may have several larval SAs of one destination; `now` is in seconds of the Unix epoch.

        A larval SA without a number could not be refused: a kernel that tells none reports it by itself.
        """
        actual = list(actual)
        unheard = [it.sa for it in actual if it.state is SaState.LARVAL and not it.sa.spi and it.sa.acquire and it.sa.acquire not in self._acquires]
        outbound: dict[ReqId, list[Policy]] = {}
        for policy in policies if unheard else ():
            for reqid in {template.reqid for template in policy.templates if policy.direction is Direction.OUT}:
                outbound.setdefault(reqid, []).append(policy)
        for sa in unheard:
            self._heard_of(sa.acquire)
        self._expired &= ours.keys()
        worn = [status.sa for status in actual if status.sa.id in ours and status.sa.id not in self._expired and _worn(status, ours[status.sa.id], now)]
        self._expired.update(sa.id for sa in worn)
        return [*(_acquire_of(sa, outbound.get(sa.reqid, ())) for sa in unheard), *(Expire(sa.id, sa.reqid, hard=False) for sa in worn)]


def _worn(status: SaStatus, asked: SecurityAssociation, now: float) -> bool:
    """Whether its soft lifetime is over. Kernels need not repeat what they were asked for."""
    soft = asked.soft
    if soft == NO_LIFETIME or status.state is SaState.LARVAL:
        return False
    aged = bool(soft.seconds and status.added) and now >= status.added + soft.seconds
    return aged or bool(soft.octets and status.octets >= soft.octets) or bool(soft.packets and status.packets >= soft.packets)


def _acquire_of(sa: SecurityAssociation, outbound: Iterable[Policy]) -> Acquire:
    """`outbound`: the policies that ask for its reqid."""
    flow = _flow_of(sa)
    asking = next((policy for policy in outbound if _covers(policy.selector, flow)), None)
    return Acquire(
        sequence=AcquireSequence(sa.acquire),
        policy=asking.index if asking is not None else PolicyIndex(0),
        reqid=sa.reqid,
        mode=sa.mode,
        source=sa.source,
        destination=sa.destination,
        selector=asking.selector if asking is not None else None,
        flow=flow,
    )


def _flow_of(sa: SecurityAssociation) -> Flow | None:
    """The selectors of a larval SA are the packet that asked, where the kernel tells it."""
    if len(sa.source_selectors) != 1 or len(sa.destination_selectors) != 1:
        return None
    (source,), (destination,) = sa.source_selectors, sa.destination_selectors
    if source.addresses.first != source.addresses.last or destination.addresses.first != destination.addresses.last:
        return None
    return Flow(source.addresses.first, destination.addresses.first, source.protocol, source.ports.low, destination.ports.low)


def _covers(selector: Selector, flow: Flow | None) -> bool:
    return flow is None or (flow.source in selector.source and flow.destination in selector.destination and selector.protocol in (0, flow.protocol))

"""What the control socket shows of IKE and CHILD_SAs, with the kernel's counters where it has them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import KernelError, SaId, SaStatus
from vpnd.control.backend import ChildState, ChildStatus, IkeState, IkeStatus
from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.ike.effects import ChildSa
from vpnd.ike.sa import Child, ChildSaState

SINGLE_LOOKUPS: Final = 16  # up to so many SAs are asked for one by one, beyond that the SAD is dumped once

Usage = Mapping[SaId, SaStatus]
NO_USAGE: Final[Usage] = {}


async def list_sas(
    manager: Manager, *, ike: str | None = None, ike_id: int | None = None, child: str | None = None, child_id: int | None = None
) -> Sequence[IkeStatus]:
    chosen: list[tuple[Entry, list[Child] | None]] = []
    for entry in manager.entries():
        if (ike is not None and entry.sa.connection.name != ike) or (ike_id is not None and entry.sa.unique_id != ike_id):
            continue
        if child is None and child_id is None:
            chosen.append((entry, None))
            continue
        fitting = [one for one in entry.sa.children.values() if child in (None, one.sa.name) and child_id in (None, one.sa.id)]
        if fitting:
            chosen.append((entry, fitting))
    children = [one for entry, some in chosen for one in (entry.sa.children.values() if some is None else some)]
    usage = await usage_of(manager, [sa for one in children for sa in (one.sa.inbound.id, one.sa.outbound.id)])
    now = asyncio.get_running_loop().time()
    return [
        ike_status(entry, usage, children=[child_status(one, usage, now) for one in (list(entry.sa.children.values()) if some is None else some)])
        for entry, some in chosen
    ]


async def usage_of(manager: Manager, ids: Sequence[SaId]) -> Usage:
    try:
        channel = manager.kernel.channel
        if len(ids) > SINGLE_LOOKUPS:
            return {status.sa.id: status for status in await channel.sas()}
        usage = {}
        for sa in ids:
            try:
                usage[sa] = await channel.get_sa(sa)
            except KernelError:
                continue
        return usage
    except (TimeoutError, ChannelClosed, KernelError):
        return NO_USAGE


def ike_status(entry: Entry, usage: Usage, *, children: Sequence[ChildStatus] | None = None) -> IkeStatus:
    sa, now = entry.sa, asyncio.get_running_loop().time()
    return IkeStatus(
        name=sa.connection.name,
        unique_id=sa.unique_id,
        state=IkeState(sa.state.value),
        local=sa.local,
        local_id=sa.local_id,
        remote=sa.remote,
        remote_id=sa.remote_id,
        initiator=sa.initiator,
        spi_initiator=sa.spi_initiator,
        spi_responder=sa.spi_responder,
        proposal=sa.proposal,
        nat_local=sa.nat_local,
        nat_remote=sa.nat_remote,
        nat_fake=sa.nat_fake,
        nat_any=sa.nat_local or sa.nat_remote or sa.nat_fake,
        established=None if sa.established_at is None else now - sa.established_at,
        rekey_in=None if sa.rekey_at is None else sa.rekey_at - now,
        reauth_in=None if sa.reauth_at is None else sa.reauth_at - now,
        ppk=sa.ppk,
        tasks_queued=sa.tasks_queued,
        tasks_active=sa.tasks_active,
        children=[child_status(child, usage, now) for child in sa.children.values()] if children is None else children,
    )


def child_status(child: Child, usage: Usage, now: float) -> ChildStatus:
    sa = child.sa
    inbound, outbound = usage.get(sa.inbound.id), usage.get(sa.outbound.id)
    age = now - child.installed_at
    epoch = time.time()

    def since(status: SaStatus | None) -> float | None:
        return None if status is None or status.used is None else max(0.0, epoch - status.used)

    return ChildStatus(
        name=sa.name,
        unique_id=sa.id,
        reqid=sa.reqid,
        state=ChildState(child.state.value),
        mode=sa.mode,
        encapsulated=sa.encapsulated,
        spi_in=sa.inbound.spi,
        spi_out=sa.outbound.spi,
        proposal=child.proposal,
        local_ts=sa.local_ts,
        remote_ts=sa.remote_ts,
        bytes_in=inbound.octets if inbound else 0,
        packets_in=inbound.packets if inbound else 0,
        used_in=since(inbound),
        bytes_out=outbound.octets if outbound else 0,
        packets_out=outbound.packets if outbound else 0,
        used_out=since(outbound),
        rekey_in=sa.outbound.soft.seconds - age if sa.outbound.soft.seconds and child.state is ChildSaState.INSTALLED else None,
        life_in=sa.outbound.hard.seconds - age if sa.outbound.hard.seconds else None,
        installed=age,
        marking=sa.marking,
    )


def child_event_status(entry: Entry, child: ChildSa) -> ChildStatus:
    known = entry.sa.children.get(child.id)
    if known is not None:
        return child_status(known, NO_USAGE, asyncio.get_running_loop().time())
    return ChildStatus(
        child.name,
        child.id,
        child.reqid,
        ChildState.DELETED,
        child.mode,
        child.encapsulated,
        child.inbound.spi,
        child.outbound.spi,
        None,
        child.local_ts,
        child.remote_ts,
        marking=child.marking,
    )

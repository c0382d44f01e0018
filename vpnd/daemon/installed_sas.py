"""The SAs that this daemon put into the kernel, and those that it wants out of it."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import Direction, IPAddress, KernelError, ReqId, SaId, SaStatus, SecurityAssociation
from vpnd.daemon.background import Background
from vpnd.daemon.repair import Repair
from vpnd.telemetry.counters import Counters

MAX_LINGERING: Final = 64  # SAs of one reqid and peer that outlive their CHILD_SA for packets under way; beyond, they go with it
REMOVED_AT_ONCE: Final = 16  # deletions that are made again, or of what nobody owns; half of what a channel keeps under way

log = structlog.get_logger("kernel")


@dataclass(frozen=True, slots=True)
class Before:
    """The SAs as they were before the kernel's table was read."""

    standing: frozenset[SaId]
    known: frozenset[SaId]
    doomed: frozenset[SaId]


class InstalledSas:
    """Each SA is installed once. One whose installation was not answered is deleted as soon as the kernel answers: its keys are not used again.

    `channel` raises ChannelClosed while the kernel is away.
    """

    def __init__(self, channel: Callable[[], KernelChannel], counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._ours: dict[SaId, SecurityAssociation] = {}
        self._installing: dict[SaId, None] = {}
        self._turns = asyncio.Semaphore(REMOVED_AT_ONCE)
        self._background = Background()
        self._lingering: Counter[tuple[ReqId, IPAddress]] = Counter()
        self._timers: dict[SaId, asyncio.TimerHandle] = {}  # of those that linger
        self._doomed: Repair[SaId] = Repair(self._remove_again)

    @property
    def known(self) -> Collection[SaId]:
        """Those that stand for somebody, come, or go."""
        return {*self._ours, *self._installing, *self._doomed.items}

    @property
    def standing(self) -> Mapping[SaId, SecurityAssociation]:
        return self._ours

    async def install(self, sa: SecurityAssociation) -> None:
        """Give keys to an inbound SPI that the kernel reserved, or add an outbound SA."""
        self._installing[sa.id] = None
        try:
            if sa.direction is Direction.IN:
                await self._channel().update_sa(sa)
            else:
                await self._channel().add_sa(sa)
        except KernelError:
            raise
        except BaseException as error:
            if isinstance(error, TimeoutError):
                self._counters.add("kernel_requests_unanswered")
            self._doomed.failed(sa.id)
            raise
        finally:
            self._installing.pop(sa.id, None)
        self._ours[sa.id] = sa
        self._doomed.done(sa.id)

    async def migrate(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        """Give an SA other addresses or UDP encapsulation. After an error it may be gone: it is deleted under both names, and its owner makes another."""
        self._installing[new.id] = None
        try:
            await self._channel().migrate_sa(old, new)
        except BaseException as error:
            if isinstance(error, TimeoutError):
                self._counters.add("kernel_requests_unanswered")
            self._ours.pop(old.id, None)
            for sa in dict.fromkeys((old.id, new.id)):
                self._doomed.failed(sa)
            raise
        finally:
            self._installing.pop(new.id, None)
        self._ours.pop(old.id, None)
        self._ours[new.id] = new

    async def remove(self, sa: SaId) -> None:
        """That it is gone already is no error. What the kernel does not do now it is asked for again, also when it was away."""
        self._ours.pop(sa, None)
        try:
            await self._channel().delete_sa(sa)
        except (KernelError, TimeoutError, ChannelClosed) as error:
            if not isinstance(error, KernelError) or error.errno != errno.ESRCH:
                log.warning("SA not deleted", spi=f"{sa.spi:08x}", error=str(error))
                if isinstance(error, TimeoutError):
                    self._counters.add("kernel_requests_unanswered")
                self._doomed.failed(sa)
                return
        self._doomed.done(sa)

    def remove_later(self, sa: SaId, delay: float) -> None:
        """In `delay` seconds; one of too many from the same peer goes now."""
        known = self._ours.get(sa)
        key = (known.reqid, known.source) if known is not None else None
        if key is None or self._lingering[key] >= MAX_LINGERING:
            self._background.start(self.remove(sa))
            return
        self._lingering[key] += 1

        def due() -> None:
            self._lingering[key] -= 1
            if not self._lingering[key]:
                del self._lingering[key]
            del self._timers[sa]
            if self._ours.get(sa) is known:
                self._background.start(self.remove(sa))

        self._timers[sa] = asyncio.get_running_loop().call_later(delay, due)

    async def remove_all(self, sas: Sequence[SaId]) -> None:
        """Several at a time; none waits for another's answer for ever."""

        async def one(sa: SaId) -> None:
            async with self._turns:
                await self.remove(sa)

        await asyncio.gather(*(one(sa) for sa in sas))

    def _remove_again(self, sas: Sequence[SaId]) -> None:
        with suppress(ChannelClosed):  # then `repair_at_once`
            self._channel()
            self._background.start(self.remove_all(sas))

    def forget(self, sa: SaId) -> None:
        """The kernel dropped it of its own accord."""
        self._ours.pop(sa, None)

    def before_reading(self) -> Before:
        """What is known before the kernel's table is read: what changes meanwhile need not be in it, or may still be."""
        return Before(frozenset(self._ours), frozenset(self.known), frozenset(self._doomed.items))

    def vanished(self, before: Before, actual: Mapping[SaId, SaStatus]) -> list[SaId]:
        """Which of those that stood before the kernel was read it has no more; they are forgotten. What was doomed and is gone needs no deletion."""
        gone = [sa for sa in before.standing if sa in self._ours and sa not in actual]
        for sa in gone:
            del self._ours[sa]
        for sa in before.doomed - actual.keys():
            self._doomed.done(sa)
        return gone

    def repair_at_once(self) -> None:
        """The kernel is back."""
        self._doomed.at_once()

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._doomed.stop()

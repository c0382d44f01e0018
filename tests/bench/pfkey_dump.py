"""Rows `pfkey-dump`: a large SAD dumped through a small socket buffer while SAs come and go."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dataplane_pair import Gateway
from pfkey_support import SocketEdge
from shim_rig import GCM

from bench.rows import Row
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.model import Direction, Mode, ReqId, SaId, SecurityAssociation, Spi, UdpEncapsulation
from kernel_shim.secret import Secret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SAS: Final = 20_000
CHANGES: Final = 1000  # a second, half of them additions
BUFFER: Final = 32 << 10  # octets as setsockopt has it; the kernel doubles it to 64 KB
AT_ONCE: Final = 16  # additions, and as many deletions, under way together
RUNS: Final = 5
CEILING_GROWTH: Final = 1.5

HERE, THERE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


@dataclass
class Outcome:
    """Of one dump, or the worst of several: `missed` stood throughout, `strange` never stood."""

    missed: int = 0
    doubled: int = 0
    strange: int = 0
    changes: int = 0
    seconds: float = 0.0  # the longest dump
    rate: float = 0.0  # changes a second


def association(number: int) -> SecurityAssociation:
    key = Secret(number.to_bytes(4, "big") * 5)
    return SecurityAssociation(Spi(0x10000 + number), HERE, THERE, Direction.OUT, Mode.TUNNEL, ReqId(1), GCM, key, encapsulation=UdpEncapsulation())


@asynccontextmanager
async def kernel_with(directory: Path, sas: int, buffer: int) -> AsyncIterator[Path]:
    engine = Gateway(1).engine
    for number in range(sas):
        engine.add_sa(association(number), 0.0)
    path = directory / "kernel"
    edge = SocketEdge(path, engine, send_buffer=buffer)
    try:
        yield path
    finally:
        edge.close()
        path.unlink()


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[PfKeyChannel]:
    channel = PfKeyChannel(path)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


class Churn:
    """Adds an SA and deletes another, `rate` changes a second. What it deletes stood from the beginning, by turns with what it added."""

    def __init__(self, channel: PfKeyChannel, sas: int, rate: int) -> None:
        self._channel = channel
        self._rate = rate
        self._next = sas
        self._doomed = 0
        self.added: set[SaId] = set()
        self.deleted: set[SaId] = set()
        self.changes = 0

    async def run(self) -> None:
        began = time.monotonic()
        while True:
            while self.changes < (time.monotonic() - began) * self._rate:
                await asyncio.gather(*(self._change() for _ in range(AT_ONCE)))
                self.changes += 2 * AT_ONCE
            await asyncio.sleep(0.001)

    async def _change(self) -> None:
        new, old = association(self._next), association(self._doomed)
        self._next, self._doomed = self._next + 1, self._doomed + 2
        self.added.add(new.id)
        self.deleted.add(old.id)
        await asyncio.gather(self._channel.add_sa(new), self._channel.delete_sa(old.id))


async def dump_under_churn(directory: Path, *, sas: int, rate: int, dumps: int, buffer: int = BUFFER) -> Outcome:
    outcome = Outcome()
    async with kernel_with(directory, sas, buffer) as path, opened(path) as reader, opened(path) as writer:
        first = {association(number).id for number in range(sas)}
        churn = Churn(writer, sas, rate)
        begun = time.monotonic()
        churning = asyncio.create_task(churn.run())
        try:
            for _ in range(dumps):
                standing = (first | churn.added) - churn.deleted
                began = time.monotonic()
                found = [status.sa.id for status in await reader.sas()]
                outcome.seconds = max(outcome.seconds, time.monotonic() - began)
                outcome.missed = max(outcome.missed, len(standing - churn.deleted - set(found)))
                outcome.doubled = max(outcome.doubled, len(found) - len(set(found)))
                outcome.strange = max(outcome.strange, len(set(found) - first - churn.added))
        finally:
            churning.cancel()
            ended = (await asyncio.gather(churning, return_exceptions=True))[0]
        if not isinstance(ended, asyncio.CancelledError):
            raise RuntimeError(f"the churn ended: {ended!r}")
        outcome.changes, outcome.rate = churn.changes, churn.changes / (time.monotonic() - begun)
    return outcome


async def seconds_an_sa(directory: Path, sas: int, runs: int = RUNS) -> list[float]:
    """Processor time of both ends for an entry of a dump, nothing else going on."""
    figures = []
    async with kernel_with(directory, sas, BUFFER) as path, opened(path) as reader:
        for _ in range(runs):
            began = time.process_time()
            assert len(await reader.sas()) == sas
            figures.append((time.process_time() - began) / sas)
    return figures


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        got = asyncio.run(dump_under_churn(Path(directory), sas=SAS, rate=CHANGES, dumps=RUNS))
        small = asyncio.run(seconds_an_sa(Path(directory), SAS // 10))
        large = asyncio.run(seconds_an_sa(Path(directory), SAS))
    growth = statistics.median(large) / statistics.median(small)
    note = f"{got.changes:,} changes meanwhile, {got.rate:,.0f} a second; a dump took up to {got.seconds:.1f} s"
    return [
        Row("pfkey-dump.missed", "SAs", "low", float(got.missed), floor=0.0, aim=0.0, note=note),
        Row("pfkey-dump.doubled", "SAs", "low", float(got.doubled + got.strange), floor=0.0, aim=0.0),
        Row(
            "pfkey-dump.growth",
            f"cost an SA, {SAS:,} to {SAS // 10:,}",
            "low",
            round(growth, 3),
            floor=CEILING_GROWTH,
            aim=1.1,
            note=f"{statistics.median(large) * 1e6:.0f} us an SA, both ends",
        ),
    ]

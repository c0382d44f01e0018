"""Rows `pfkey-dump`: a large SAD dumped through a small socket buffer while SAs come and go.

Three processes, as in life: the shim's PF_KEY end with its data plane, a key manager that adds and deletes, and the one that dumps.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dataplane_pair import Gateway
from pfkey_support import PipeSockets
from shim_rig import GCM

from bench.rows import Row
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.io import listener as shim_listener
from kernel_shim.model import Direction, Mode, ReqId, SaId, SecurityAssociation, Spi, UdpEncapsulation
from kernel_shim.pfkey.server import ServerSession
from kernel_shim.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.sharedctypes import Synchronized
    from multiprocessing.synchronize import Event

SAS: Final = 20_000
SIZES: Final = (5_000, 20_000, 80_000)
CHANGES: Final = 1000  # a second, half of them additions
BUFFER: Final = 32 << 10  # octets as setsockopt has it; the kernel doubles it to 64 KB
AT_ONCE: Final = 8  # additions, and as many deletions, under way together
RUNS: Final = 3
CEILING_GROWTH: Final = 1.5
START_SECONDS: Final = 120.0

HERE, THERE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
_CONTEXT: Final = multiprocessing.get_context("spawn")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


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


def name_of(number: int) -> SaId:
    return SaId(THERE, Spi(0x10000 + number))


def serve(path: Path, sas: int, buffer: int, ready: Event) -> None:
    """The shim's listener around its data plane, without TUN and UDP."""
    engine = Gateway(1).engine
    for number in range(sas):
        engine.add_sa(association(number), 0.0)
    shim_listener.CLIENT_BUFFER = buffer  # type: ignore[misc]
    poll, watched = select.epoll(), set[int]()

    def watch(descriptor: int, events: int) -> None:
        if not events:
            poll.unregister(descriptor)
            watched.discard(descriptor)
        elif descriptor in watched:
            poll.modify(descriptor, events)
        else:
            poll.register(descriptor, events)
            watched.add(descriptor)

    listener = shim_listener.Listener(path, watch)
    listener.listen(ServerSession(engine, PipeSockets(), inspected=engine))
    ready.set()
    while True:
        for descriptor, events in poll.poll(0 if listener.unfinished else 1):
            if listener.owns(descriptor):
                listener.handle(descriptor, events, time.monotonic())
        listener.send_ready(time.monotonic())


@contextmanager
def kernel_with(directory: Path, sas: int, buffer: int) -> Iterator[tuple[Path, int]]:
    """The socket of a kernel with that many SAs, and its process."""
    path, ready = directory / f"kernel-{sas}-{time.monotonic_ns()}", _CONTEXT.Event()
    process = _CONTEXT.Process(target=serve, args=(path, sas, buffer, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(START_SECONDS):
            raise TimeoutError("the kernel did not start")
        assert process.pid is not None
        yield path, process.pid
    finally:
        process.terminate()
        process.join()


def churn(path: Path, first: int, rate: int, added: Synchronized[int], doomed: Synchronized[int]) -> None:
    """Adds SAs `first`, `first` + 1, ... and deletes 0, 1, ...: the oldest, and in the end what it added.

    `added` is how many stand for certain, `doomed` how many may be gone.
    """

    async def run() -> None:
        channel = PfKeyChannel(path)
        await channel.open()
        began = time.monotonic()
        while True:
            while 2 * added.value < (time.monotonic() - began) * rate:
                begin = added.value
                doomed.value = begin + AT_ONCE
                await asyncio.gather(
                    *(channel.add_sa(association(first + at)) for at in range(begin, begin + AT_ONCE)),
                    *(channel.delete_sa(name_of(at)) for at in range(begin, begin + AT_ONCE)),
                )
                added.value = begin + AT_ONCE
            await asyncio.sleep(0.001)

    asyncio.run(run())


def dump_under_churn(directory: Path, *, sas: int, rate: int, dumps: int, buffer: int = BUFFER) -> Outcome:
    added, doomed = _CONTEXT.Value("q", 0), _CONTEXT.Value("q", 0)
    with kernel_with(directory, sas, buffer) as (path, _):
        process = _CONTEXT.Process(target=churn, args=(path, sas, rate, added, doomed), daemon=True)
        process.start()
        try:
            return asyncio.run(_dumps(path, sas, dumps, added, doomed))
        finally:
            alive = process.is_alive()
            process.terminate()
            process.join()
            if not alive:
                raise RuntimeError("the churn ended")


async def _dumps(path: Path, sas: int, dumps: int, added: Synchronized[int], doomed: Synchronized[int]) -> Outcome:
    outcome = Outcome()
    reader = PfKeyChannel(path)
    await reader.open()
    while not added.value:
        await asyncio.sleep(0.01)
    begun, before = time.monotonic(), added.value
    done = 0
    while done < dumps or added.value == before:
        done += 1
        stands, began = sas + added.value, time.monotonic()
        found = [status.sa.id for status in await reader.sas()]
        outcome.seconds = max(outcome.seconds, time.monotonic() - began)
        gone = {name_of(at) for at in range(doomed.value)}
        throughout = {name_of(number) for number in range(stands)} - gone
        ever = {name_of(number) for number in range(sas + doomed.value)}  # additions begin with the deletions
        outcome.missed = max(outcome.missed, len(throughout - set(found)))
        outcome.doubled = max(outcome.doubled, len(found) - len(set(found)))
        outcome.strange = max(outcome.strange, len(set(found) - ever))
    outcome.changes = 2 * (added.value - before)
    outcome.rate = outcome.changes / (time.monotonic() - begun)
    await reader.close()
    return outcome


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def seconds_an_sa(directory: Path, sas: int, runs: int = RUNS) -> list[float]:
    """Processor time of both ends for an entry of a dump, nothing else going on."""

    async def run(path: Path, kernel: int) -> list[float]:
        figures = []
        reader = PfKeyChannel(path)
        await reader.open()
        for _ in range(runs):
            began = time.process_time() + processor_seconds(kernel)
            assert len(await reader.sas()) == sas
            figures.append((time.process_time() + processor_seconds(kernel) - began) / sas)
        await reader.close()
        return figures

    with kernel_with(directory, sas, BUFFER) as (path, kernel):
        return asyncio.run(run(path, kernel))


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        got = dump_under_churn(directory, sas=SAS, rate=CHANGES, dumps=RUNS)
        cost = {sas: statistics.median(seconds_an_sa(directory, sas)) for sas in SIZES}
    smallest, largest = SIZES[0], SIZES[-1]
    ratios = ", ".join(f"{sas:,}: {seconds * 1e6:.0f} us ({seconds / cost[smallest]:.2f})" for sas, seconds in cost.items())
    note = f"{got.changes:,} changes meanwhile; a dump took up to {got.seconds:.1f} s"
    return [
        Row("pfkey-dump.missed", "SAs", "low", float(got.missed), floor=0.0, aim=0.0, note=note),
        Row("pfkey-dump.doubled", "SAs", "low", float(got.doubled + got.strange), floor=0.0, aim=0.0),
        Row("pfkey-dump.changes", "a second meanwhile", "high", round(got.rate), floor=0.9 * CHANGES, aim=float(CHANGES)),
        Row(
            "pfkey-dump.growth",
            f"cost an SA, {largest:,} to {smallest:,}",
            "low",
            round(cost[largest] / cost[smallest], 3),
            floor=CEILING_GROWTH,
            aim=1.1,
            note=f"processor time an SA, both ends: {ratios}",
        ),
    ]

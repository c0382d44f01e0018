"""Rows `lfib-scale`: what a lookup costs as labels and VRF routes grow from ten to a million.

A label costs one hash probe however many there are; a route one for each prefix length in use, of which there are the same few. What grows is what
is fetched from memory instead of the caches: the number of a label's paths, and paths that no other entry has.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from bench.rows import Row, median_row
from kernel_shim.mpls.labels import FIRST_LABEL, Entry, Label, read_stack, write_stack
from kernel_shim.mpls.lfib import Lfib, Nhlfe, ToPeer, ToVrf

SIZES: Final = (10, 100_000, 1_000_000)
LOOKUPS: Final = 20_000
RUNS: Final = 11
CEILING: Final = 4.0  # times that at 10
AIM: Final = 3.0
VRF_COUNT: Final = 5  # at the smallest size each has one route of each length
LENGTHS: Final = (16, 24)
LABELS: Final = 1_000_003  # a prime below all that there are
PATHS: Final = tuple((Nhlfe(ToPeer(f"pe{number}"), (Label(100 + number),)),) for number in range(64))


def _network(number: int) -> tuple[str, IPv4Network]:
    """VRF and prefix of route `number`, all distinct."""
    length = LENGTHS[number // VRF_COUNT % len(LENGTHS)]
    within = number // (VRF_COUNT * len(LENGTHS))
    # Few networks fit a short prefix: past those the longer length takes over, in blocks of its own.
    if length == 16 and within >= 1 << 14:
        length, within = 24, within + (1 << 20)
    return f"vrf{number % VRF_COUNT}", IPv4Network(((within if length == 24 else within + 0xC000) << 32 - length, length))


def _build(size: int) -> Lfib:
    lfib = Lfib()
    for number in range(size):
        # Half of them are swapped, each for a label of its own, as in a core: what is fetched for them is nobody else's.
        swapped = Nhlfe(ToPeer(f"pe{number % 64}"), (Label(FIRST_LABEL + number * 7 % LABELS),))
        lfib.bind(Label(FIRST_LABEL + number), (swapped,) if number % 2 else (Nhlfe(ToVrf(f"vrf{number % VRF_COUNT}")),))
    for number in range(size):
        vrf, prefix = _network(number)
        lfib.route(vrf, prefix, PATHS[number % 64])
    return lfib


class _Counted(int):
    """A label that counts how often a table asks for its page: once for each probe."""

    asked = 0

    def __rshift__(self, bits: int) -> int:
        type(self).asked += 1
        return super().__rshift__(bits)


def _label_probes(lfib: Lfib, labels: list[Label]) -> float:
    _Counted.asked = 0
    for label in labels:
        assert lfib.incoming(Label(_Counted(label))) is not None
    return _Counted.asked / len(labels)


def _seconds(lookup: Callable[[], None]) -> float:
    started = time.process_time()
    lookup()
    return time.process_time() - started


def _labels(lfib: Lfib, labels: list[Label]) -> Callable[[], None]:
    """As a packet has it: from the octets of its stack."""
    stacks = [write_stack([Entry(label, 0, 64)]) for label in labels]

    def look() -> None:
        incoming = lfib.incoming
        for stack in stacks:
            incoming(read_stack(stack)[0].label)

    return look


def _routes(lfib: Lfib, wanted: list[tuple[str, IPv4Address]]) -> Callable[[], None]:
    def look() -> None:
        outgoing = lfib.outgoing
        for vrf, address in wanted:
            outgoing(vrf, address)

    return look


def run() -> list[Row]:
    """All rows. Takes about a minute and 1.5 GB at its default sizes."""
    draw = random.Random(1)
    tables, labels, addresses = {}, {}, {}
    for size in SIZES:
        tables[size] = _build(size)
        labels[size] = [Label(FIRST_LABEL + draw.randrange(size)) for _ in range(LOOKUPS)]
        picked = [_network(draw.randrange(size)) for _ in range(LOOKUPS)]
        addresses[size] = [(vrf, prefix[1]) for vrf, prefix in picked]
        assert all(tables[size].outgoing(vrf, address) is not None for vrf, address in addresses[size])
    rows = []
    for size in SIZES:
        probes = _label_probes(tables[size], labels[size])
        rows.append(median_row(f"lfib-scale.label-probes-{size}", "probes/lookup", "low", [probes], floor=1.0))
        lengths = max(tables[size].prefix_lengths(f"vrf{vrf}", 4) for vrf in range(VRF_COUNT))
        rows.append(median_row(f"lfib-scale.route-probes-{size}", "probes/lookup", "low", [float(lengths)], floor=float(len(LENGTHS))))
    looks = {"label": {size: _labels(tables[size], labels[size]) for size in SIZES}, "route": {size: _routes(tables[size], addresses[size]) for size in SIZES}}
    gc.collect()
    gc.freeze()
    try:
        for kind, look in looks.items():
            # In turns, so that a busy moment of the machine hits all sizes alike; the median of the runs' own ratios.
            times: dict[int, list[float]] = {size: [] for size in SIZES}
            for _ in range(RUNS):
                for size in SIZES:
                    times[size].append(_seconds(look[size]))
            for size in SIZES[1:]:
                ratios = [large / small for large, small in zip(times[size], times[SIZES[0]], strict=True)]
                each = statistics.median(times[size]) / LOOKUPS * 1e9
                note = f"{each:.0f} ns a lookup"
                rows.append(median_row(f"lfib-scale.{kind}-time-{size}", "times that at 10", "low", ratios, floor=CEILING, aim=AIM, note=note))
    finally:
        gc.unfreeze()
    return rows

"""Rows `spd-scale`: what a lookup and an insertion cost as policies grow from ten to a million, of the same 12 shapes.

Times are of the processor and not of the clock on the wall, for a lookup waits for nothing.
"""

from __future__ import annotations

import gc
import random
import statistics
import struct
import time
from ipaddress import IPv4Address
from typing import Any, Final

from kernel_shim.model import PROTOCOL_TCP, PROTOCOL_UDP, Action, AddressRange, Direction, Mode, Policy, PortRange, ReqId, Selector, Template
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys
from kernel_shim.policy.spd import SecurityPolicyDatabase

SIZES: Final = (10, 100_000, 1_000_000)
LOOKUPS: Final = 10_000
RUNS: Final = 11
CEILING: Final = {100_000: 2.5, 1_000_000: 4.0}
AIM: Final = {100_000: 2.0, 1_000_000: 3.0}

# (source prefix length, destination prefix length, protocol, first port, last port): ten kinds of selector. A range of
# three ports is two prefixes, so that ten policies have twelve shapes, the same ones that a million have.
KINDS: Final = (
    *((source, destination, protocol, 0, 65535) for source, destination in ((0, 32), (24, 32), (32, 32), (16, 24)) for protocol in (0, PROTOCOL_TCP)),
    (0, 32, PROTOCOL_UDP, 5060, 5062),
    (24, 32, PROTOCOL_UDP, 5060, 5062),
)
SHAPES: Final = 12
_TEMPLATE: Final = (Template(Mode.TUNNEL, ReqId(1), IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")),)


def _range(number: int, length: int) -> AddressRange:
    size = 1 << 32 - length
    first = number & -size
    return AddressRange(IPv4Address(first), IPv4Address(first + size - 1))


def _addresses(number: int) -> tuple[int, int]:
    """A source and a destination of policy `number`, scattered over the address space; no two share a /24."""
    return 0x0A000000 | number & 0xFFFFFF, (number * 0x9E3779B1 & 0xFFFFFF) << 8


def _policy(number: int) -> Policy:
    source_length, destination_length, protocol, low, high = KINDS[number % len(KINDS)]
    source, destination = _addresses(number)
    selector = Selector(_range(source, source_length), _range(destination, destination_length), protocol, PortRange(), PortRange(low, high))
    return Policy(selector, Direction.OUT, Action.PROTECT, 1000, _TEMPLATE)


def _flow_key(number: int) -> bytes:
    """The full key of a flow that policy `number` is for."""
    _, _, protocol, low, _ = KINDS[number % len(KINDS)]
    source, destination = _addresses(number)
    return struct.pack("!IIHHB", source, destination, 40000, low or 80, protocol or PROTOCOL_TCP)


def _build(size: int) -> tuple[SecurityPolicyDatabase, float]:
    """A database of `size` policies, and the seconds that one insertion took on average, growing tables included."""
    seconds = 0.0
    spd = SecurityPolicyDatabase()
    step = 50_000
    for begin in range(0, size, step):
        policies = [_policy(number) for number in range(begin, min(begin + step, size))]
        started = time.process_time()
        for policy in policies:
            spd.add(policy)
        seconds += time.process_time() - started
    return spd, seconds / size


def _small_insertion(rounds: int = 300) -> float:
    """Seconds for one insertion beside ten policies: ten more, taken out again, and so on."""
    spd, _ = _build(10)
    seconds = 0.0
    for turn in range(1, rounds + 1):
        policies = [_policy(turn * 10 + number) for number in range(10)]
        started = time.process_time()
        for policy in policies:
            spd.add(policy)
        seconds += time.process_time() - started
        for policy in policies:
            spd.delete(Direction.OUT, policy.selector)
    return seconds / (rounds * 10)


def _lookup(spd: SecurityPolicyDatabase, keys: list[bytes]) -> float:
    """Seconds for one lookup."""
    lookup, out = spd.lookup_key, Direction.OUT
    started = time.process_time()
    for key in keys:
        lookup(out, key)
    return (time.process_time() - started) / len(keys)


def _row(name: str, unit: str, ours: float, ceiling: float, aim: float, runs: list[float]) -> dict[str, Any]:
    """A row where less is better; `ratio` is how far below its floor it is."""
    return {
        "name": f"spd-scale.{name}",
        "unit": unit,
        "better": "low",
        "ours": round(ours, 4),
        "peer": None,
        "ratio": round(ceiling / ours, 3) if ours else None,
        "floor": ceiling,
        "aim": aim,
        "met": ours <= ceiling,
        "runs": [round(run, 4) for run in runs],
    }


def _cache_hits_touch_spd(spd: SecurityPolicyDatabase, hits: int = 10_000) -> int:
    """SPD lookups during `hits` packets of a cached flow: cut the key, probe the cache."""
    keys = FlowKeys(spd.fields_read(Direction.OUT))
    cache: BundleCache[object] = BundleCache(spd.generations, keys.mask)
    packet = bytes((0x45, 0, 0, 40, 0, 0, 0, 0, 64, PROTOCOL_TCP, 0, 0)) + bytes((10, 0, 0, 1, 10, 0, 1, 1, 0, 80, 0, 80)) + bytes(16)
    key = keys.cut(packet, 0)
    assert key is not None
    cache.put(key, object())
    before = spd.lookups
    for _ in range(hits):
        key = keys.cut(packet, 0)
        assert key is not None
        assert cache.get(key) is not None
    assert cache.hits == hits
    return spd.lookups - before


def run() -> list[dict[str, Any]]:
    """All rows. Takes about a minute and 2 GB at its default sizes."""
    rows = []
    small_insertions = [_small_insertion() for _ in range(5)]
    databases, insertions = {}, {}
    for size in SIZES:
        databases[size], insertions[size] = _build(size)
    draw = random.Random(1)
    keys = {size: [_flow_key(draw.randrange(size)) for _ in range(LOOKUPS)] for size in SIZES}

    probes = {}
    for size, spd in databases.items():
        before = spd.probes
        for key in keys[size]:
            found = spd.lookup_key(Direction.OUT, key)
            assert found is not None
        probes[size] = (spd.probes - before) / LOOKUPS
    base = SIZES[0]
    for size in SIZES:
        rows.append(_row(f"probes-{size}", "probes/lookup", probes[size], probes[base], float(SHAPES), [probes[size]]))

    # In turns, so that a busy moment of the machine hits all sizes alike; the median of the runs' own ratios.
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    gc.collect()
    gc.freeze()
    try:
        for _ in range(RUNS):
            for size in SIZES:
                times[size].append(_lookup(databases[size], keys[size]))
    finally:
        gc.unfreeze()
    for size, ceiling in CEILING.items():
        ratios = [large / small for large, small in zip(times[size], times[base], strict=True)]
        rows.append(_row(f"lookup-time-{size}", "times that at 10", statistics.median(ratios), ceiling, AIM[size], ratios))
    for size, ceiling in CEILING.items():
        ratios = [insertions[size] / small for small in small_insertions]
        rows.append(_row(f"insert-time-{size}", "times that at 10", statistics.median(ratios), ceiling, AIM[size], ratios))

    touched = _cache_hits_touch_spd(databases[base])
    row = _row("cache-hit-lookups", "SPD lookups/10000 hits", float(touched), 0.0, 0.0, [float(touched)])
    rows.append({**row, "met": touched == 0, "ratio": None})
    return rows


if __name__ == "__main__":
    for result in run():
        print(result)

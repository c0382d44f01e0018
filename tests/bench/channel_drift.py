"""Rows `channel-drift`: many tunnels over channels that lose a tenth of every message class and are overrun again and again (`lab.drift`).

Three kernels: our shim behind a proxy, the policies of this machine's own kernel, and a Debian kernel under emulation with SAs and policies
over NETLINK_XFRM and over AF_KEY. The emulation is slow: fewer tunnels, as the row says, and its seconds mean nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from lab.drift import Outcome, scenario
from lab.drift_beds import LinuxBed, ShimBed, prepare
from lab.namespaces import Lab

from bench.rows import Row

TUNNELS: Final = 1000
TRAPS: Final = 50
LOSS: Final = 0.1
DISTURBANCES: Final = 20
EMULATED: Final = {"xfrm": (150, 50, DISTURBANCES), "pfkey": (20, 10, 5)}  # tunnels, traps, disturbances
CEILING_SECONDS: Final = 60.0
REPOSITORY: Final = Path(__file__).resolve().parents[2]
BOOT: Final = REPOSITORY / "tests" / "realkernel" / "boot"
BOOT_SECONDS: Final = 1800


async def over_our_shim(directory: Path, *, tunnels: int, disturbances: int, seed: int = 1, pause: float = 0.5) -> Outcome:
    bed = ShimBed(directory, loss=LOSS, seed=seed)
    try:
        return await scenario(bed, tunnels=tunnels, disturbances=disturbances, traps=TRAPS, seed=seed, pause=pause)
    finally:
        await bed.close()


def over_linux(kind: str, *, tunnels: int, disturbances: int, esp: bool, seed: int = 1, pause: float = 0.5, traps: int = TRAPS) -> Outcome:
    """In a namespace of its own; `kind` is `xfrm` or `pfkey`."""

    async def run() -> Outcome:
        bed = LinuxBed(kind, loss=LOSS, seed=seed, esp=esp)
        try:
            return await scenario(bed, tunnels=tunnels, disturbances=disturbances, traps=traps, seed=seed, pause=pause)
        finally:
            await bed.close()

    with Lab() as lab:
        namespace = lab.namespace("drift")
        prepare(namespace)
        return namespace.call(lambda: asyncio.run(run()))


def _rows(name: str, got: Outcome, *, ceiling: float | None, aim: float | None) -> list[Row]:
    told = (
        f"{got.tunnels} tunnels, {got.traps} traps; {got.lost_messages:,} messages lost, {got.disturbances} overruns or cuts; "
        f"built in {got.build_seconds:.0f} s; {got.acquires} ACQUIREs"
    )
    repairs = ", ".join(f"{name.removeprefix('kernel_')} {value}" for name, value in sorted(got.counters.items()))
    rows = [
        Row(f"channel-drift.{name}.drift", "entries", "low", float(got.drift), floor=0.0, aim=0.0, note=told),
        Row(f"channel-drift.{name}.repair", "s", "low", round(got.repair_seconds, 1), floor=ceiling, aim=aim, note=repairs),
    ]
    if got.acquires:
        rows.append(Row(f"channel-drift.{name}.unheard", "ACQUIREs", "low", float(got.unheard), floor=0.0, aim=0.0, note="that nobody was ever told of"))
    return rows


def inside() -> None:
    """What the emulated kernel runs: an outcome a line."""
    for kind, (tunnels, traps, disturbances) in EMULATED.items():
        got = over_linux(kind, tunnels=tunnels, disturbances=disturbances, esp=True, traps=traps)
        print("\noutcome", json.dumps({"kind": kind, **vars(got)}), flush=True)


def _emulated() -> list[Row]:
    environment = [f"PYTHONPATH={REPOSITORY}:{REPOSITORY / 'tests'}"]
    command = [str(BOOT), "env", *environment, sys.executable, "-c", "from bench.channel_drift import inside; inside()"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "REALKERNEL_TIMEOUT": str(BOOT_SECONDS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    rows: list[Row] = []
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word == "outcome":
            told = json.loads(rest)
            rows += _rows(f"emulated-{told.pop('kind')}", Outcome(**told), ceiling=None, aim=None)
    ended = f"the guest ended with status {done.returncode}: {done.stdout[-200:].strip()}"
    for kind in EMULATED:
        if not any(row.name.startswith(f"channel-drift.emulated-{kind}.") for row in rows):
            rows.append(Row(f"channel-drift.emulated-{kind}.drift", "entries", "low", None, note=ended))
    return rows


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        shim = asyncio.run(over_our_shim(Path(directory), tunnels=TUNNELS, disturbances=DISTURBANCES))
    rows = _rows("shim", shim, ceiling=CEILING_SECONDS, aim=20.0)
    if os.geteuid():
        return [*rows, Row("channel-drift.xfrm", "entries", "low", None, note="needs root")]
    policies = over_linux("xfrm", tunnels=TUNNELS, disturbances=DISTURBANCES, esp=False)
    return [*rows, *_rows("xfrm-policies", policies, ceiling=CEILING_SECONDS, aim=20.0), *_emulated()]

"""The bench's own arithmetic: what a ratio and a floor mean."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.__main__ import GROUPS, chosen_groups
from bench.kernel_hold import AS_SHIPPED, KICKED, POLLED, Held, rows
from bench.rows import Row, median_row

PROVIDE = Path(__file__).resolve().parents[2] / ".ci" / "provide"


def test_ratio_above_one_means_ours_is_better() -> None:
    assert Row("r", "Gbit/s", "high", ours=3.0, peer=1.0).ratio == 3.0
    assert Row("r", "ms", "low", ours=10.0, peer=40.0).ratio == 4.0
    assert Row("r", "ms", "low", ours=10.0).ratio is None
    assert Row("r", "packets", "low", ours=0.0, peer=0.0).ratio == 1.0
    assert Row("r", "packets", "low", ours=0.0, peer=5.0).ratio is None


@pytest.mark.parametrize(
    ("better", "ours", "floor", "met"),
    [
        ("high", 3.0, 3.0, True),
        ("high", 2.9, 3.0, False),
        ("low", 5.0, 5.0, True),
        ("low", 5.1, 5.0, False),
        ("low", None, None, False),
        ("low", 9.0, None, True),
    ],
)
def test_floor(better: str, ours: float | None, floor: float | None, met: bool) -> None:
    assert Row("r", "", better, ours, floor=floor).met is met  # type: ignore[arg-type]


def test_json_has_the_agreed_keys() -> None:
    row = median_row("r", "ms", "low", [1.0, 9.0, 2.0], [4.0]).as_json()
    assert {"name", "unit", "better", "ours", "peer", "ratio", "floor", "aim", "met", "runs", "machine"} <= set(row)
    assert (row["ours"], row["peer"], row["ratio"], row["runs"]) == (2.0, 4.0, 2.0, [1.0, 9.0, 2.0])


def test_rows_are_chosen_by_name_or_beginning() -> None:
    assert chosen_groups([]) == list(GROUPS)
    assert chosen_groups(["first-packet.lost-0ms", "spd-scale"]) == ["first-packet", "spd-scale"]
    with pytest.raises(ValueError, match="no such row: speed"):
        chosen_groups(["speed"])


@pytest.mark.parametrize(
    ("tiers", "expression"),
    [
        ("all", ""),
        ("unit", "-m 'not (property or pair or interop or realkernel)'"),
        ("pair,interop", "-m 'pair or interop'"),
        ("soon", "--no-such-tier=soon"),
    ],
)
def test_tiers(tiers: str, expression: str) -> None:
    assert subprocess.run([PROVIDE, "tiers", tiers], capture_output=True, text=True, check=True).stdout == expression


def test_held_packets_are_judged_by_the_worst_run() -> None:
    held = [Held(AS_SHIPPED, 0.05, 0, None, None)]
    for kicked, polled in ((20.0, 60.0), (30.0, 800.0), (25.0, 400.0)):
        held += [Held(KICKED, 0.1, 101, kicked, kicked + 1), Held(POLLED, 0.1, 101, polled, polled + 1)]
    delivered, first, last = rows(held)
    assert (delivered.name, delivered.ours, delivered.peer, delivered.met) == ("kernel-hold.delivered", 101.0, 101.0, True)
    assert (first.ours, first.peer, last.ours, last.ratio) == (25.0, 400.0, 26.0, 401 / 26)
    assert "800 ms" in first.note
    worse = rows([*held, Held(KICKED, 0.1, 99, 1.0, 2.0)])[0]
    assert (worse.ours, worse.met) == (99.0, False)

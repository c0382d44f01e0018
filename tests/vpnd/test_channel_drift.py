"""The daemon's side of its kernel over a channel that loses messages and is cut: nothing is left wrong at the end."""

from __future__ import annotations

from pathlib import Path

from bench.channel_drift import scenario


async def test_no_drift_is_left_after_losses_cuts_and_a_hand_in_the_kernel(tmp_path: Path) -> None:
    outcome = await scenario(tmp_path, tunnels=40, loss=0.1, cuts=4, seed=3, pause=0.25)
    assert outcome.drift == 0, outcome
    assert outcome.cuts == 4
    assert outcome.lost_messages > 0
    assert outcome.counters["kernel_disconnects"] >= 1

"""The daemon's side of its kernel over channels that lose messages and are overrun: nothing is left wrong at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.channel_drift import over_linux, over_our_shim


@pytest.mark.virtual_time
async def test_no_drift_is_left_after_losses_cuts_and_a_hand_in_the_kernel(tmp_path: Path) -> None:
    outcome = await over_our_shim(tmp_path, tunnels=40, disturbances=4, seed=3, pause=0.25)
    assert outcome.drift == 0, outcome
    assert outcome.lost_messages > 0
    assert outcome.counters["kernel_disconnects"] >= 1


@pytest.mark.root
def test_no_drift_is_left_in_the_policies_of_this_machines_kernel() -> None:
    outcome = over_linux("xfrm", tunnels=60, disturbances=4, esp=False, seed=3, pause=0.1)
    assert outcome.drift == 0, outcome
    assert outcome.lost_messages > 0
    assert outcome.counters["kernel_overruns"] >= 1
    assert outcome.acquires > 0
    assert outcome.unheard == 0, outcome

"""SAs and policies of a real kernel over channels that lose messages and are overrun: nothing is left wrong at the end."""

from __future__ import annotations

import pytest
from bench.channel_drift import over_linux

pytestmark = pytest.mark.realkernel


@pytest.mark.parametrize(("kind", "tunnels", "traps", "disturbances"), [("xfrm", 20, 20, 4), ("pfkey", 10, 10, 3)])
def test_no_drift_is_left(kind: str, tunnels: int, traps: int, disturbances: int) -> None:
    outcome = over_linux(kind, tunnels=tunnels, disturbances=disturbances, esp=True, seed=3, traps=traps)
    assert outcome.drift == 0, outcome
    assert outcome.lost_messages > 0
    assert outcome.counters["kernel_overruns"] >= 1
    assert outcome.acquires > 0
    assert outcome.unheard == 0, outcome

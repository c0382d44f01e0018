"""What the bench measures at full size, here as to its correctness only."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.acquire_storm import storm
from bench.pfkey_dump import dump_under_churn

from kernel_shim.pfkey.outbox import MAX_PENDING_ACQUIRES


@pytest.mark.parametrize("buffer", [4096, 32768])
def test_a_dump_through_a_small_buffer_is_whole_while_sas_come_and_go(tmp_path: Path, buffer: int) -> None:
    outcome = dump_under_churn(tmp_path, sas=1500, rate=1000, dumps=2, buffer=buffer)
    assert (outcome.missed, outcome.doubled, outcome.strange) == (0, 0, 0)
    assert outcome.changes > 0


def test_a_key_manager_that_stalls_is_told_of_every_flow_in_the_end() -> None:
    outcome = storm(flows=MAX_PENDING_ACQUIRES + 1000, stall=10.0)
    assert outcome.overruns > 0, "more than its buffers hold"
    assert outcome.never_told == 0
    assert outcome.unresolved == 0

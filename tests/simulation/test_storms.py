"""Both sides rekey everything at the same moment, again and again, while IKE is lost, doubled and reordered: nothing else is lost, doubled or left behind.

SIMULATION_SEEDS=N in the environment tries so many seeds of each.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from dataclasses import replace

import pytest

from simulation.stress import EVERYTHING, REKEYING, Act, Storm, rage
from simulation.wire import Weather

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1"))


def weather(loss: float) -> Weather:
    return Weather(delay=(0.005, 0.105), loss=loss, doubled=0.05, esp_loss=0.0)


@pytest.mark.parametrize("seed", range(1, 1 + SEEDS))
@pytest.mark.parametrize(
    ("acts", "loss"),
    [((Act.REKEY_CHILD,), 0.05), ((Act.REKEY_CHILD,), 0.3), ((Act.REKEY_IKE,), 0.2), (REKEYING, 0.2), ((*REKEYING, Act.REAUTHENTICATE), 0.1)],
    ids=["child", "child, much lost", "IKE", "child and IKE", "with reauthentication"],
)
def test_storms_of_rekeying(acts: tuple[Act, ...], loss: float, seed: int) -> None:
    outcome = rage(Storm(weather(loss), acts, seed=seed))
    assert outcome.faults == []
    assert outcome.missing == 0, outcome.drops
    assert (outcome.repeated, outcome.clear) == (0, 0)
    assert outcome.child_rekeys + outcome.ike_rekeys > 40
    assert outcome.ike_lost > 10


@pytest.mark.parametrize("seed", range(1, 1 + SEEDS))
@pytest.mark.parametrize(("acts", "loss"), [((Act.REKEY_CHILD, Act.DELETE_CHILD), 0.3), (EVERYTHING, 0.2)], ids=["child", "everything"])
def test_storms_of_deletions(acts: tuple[Act, ...], loss: float, seed: int) -> None:
    """What is deleted comes back by the traps on both sides at once; packets under way to it are lost, but no tunnel is doubled."""
    outcome = rage(Storm(weather(loss), acts, seed=seed))
    assert outcome.faults == []
    assert (outcome.repeated, outcome.clear) == (0, 0)


def objects() -> Counter[str]:
    """Of our own types."""
    gc.collect()
    types = (type(one) for one in gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in types if str(kind.__module__).partition(".")[0] in ("vpnd", "kernel_shim"))


def test_nothing_of_gateways_outlasts_them() -> None:
    short = Storm(weather(0.2), EVERYTHING, tunnels=4, storms=1)
    rage(short)  # what is made once and kept
    before = objects()
    rage(replace(short, seed=2))
    assert objects() - before == Counter()

"""Short lives of two gateways: what holds over an hour (`make bench`, row gateway-hour) holds here for a few seeds and weathers."""

from __future__ import annotations

import pytest

from simulation.hour import Life, live
from simulation.wire import CLEAR, Weather

LOSSY = Weather(loss=0.05, doubled=0.01)
REORDERING = Weather(delay=(0.005, 0.205), loss=0.01, doubled=0.01)


@pytest.mark.parametrize(("seed", "weather"), [(1, CLEAR), (2, LOSSY), (3, LOSSY), (4, REORDERING)], ids=["clear", "lossy", "lossy-again", "reordering"])
def test_tunnels_that_are_rekeyed_all_the_time_lose_nothing(seed: int, weather: Weather) -> None:
    life = Life(tunnels=10, seconds=600.0, gap=2.0, weather=weather, child_rekey=90, ike_rekey=300, seed=seed)
    outcome = live(life)
    assert outcome.missing == 0, outcome.drops
    assert outcome.equal
    assert outcome.ike_sas == (life.tunnels, life.tunnels)
    assert (outcome.repeated, outcome.clear, outcome.numbers_repeated) == (0, 0, 0)
    assert outcome.child_rekeys >= 4 * life.tunnels
    assert outcome.ike_rekeys >= life.tunnels

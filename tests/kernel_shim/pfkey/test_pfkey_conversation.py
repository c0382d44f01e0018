"""The scripted PF_KEY conversation with our shim: each answer is Linux', or differs for a reason that stands in the table."""

from __future__ import annotations

import pytest
from pfkey_conversation import STEPS, talk
from pfkey_outcomes import LINUX, OURS, expected_of_ours, without_untold
from shim_party import ShimParty

OUTCOMES = talk(ShimParty(), STEPS)


@pytest.mark.parametrize("step", [step.name for step in STEPS])
def test_the_shim_answers_as_linux_or_as_the_table_of_differences_says(step: str) -> None:
    assert OUTCOMES[step] == expected_of_ours()[step]


def test_every_difference_is_one() -> None:
    assert list(LINUX) == [step.name for step in STEPS]
    assert [step for step, (outcome, _reason) in OURS.items() if outcome == without_untold(LINUX[step])] == []

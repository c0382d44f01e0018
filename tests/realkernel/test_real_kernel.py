"""Each test of `inside/`, which a real Debian kernel ran, is a test here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import pytest
from realkernel.guest import BOOT_SECONDS, LACKS, Guest, Outcome, inner_tests, missing

SHOWN: Final = 6000  # octets of the guest's console in a failure

pytestmark = [pytest.mark.realkernel, pytest.mark.timeout(BOOT_SECONDS + 60)]


@pytest.fixture(scope="session")
def outcome(real_kernel: Guest | None) -> Outcome:
    """What came of all inner tests."""
    if real_kernel is None:
        reason = f"missing: {missing()} (make peers installs them)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    outcome = real_kernel.outcome()
    if outcome.status == LACKS and os.environ.get("CI") != "true":
        pytest.skip(outcome.console.strip()[-SHOWN:])  # no kernel package can be had, as without a network
    return outcome


@pytest.mark.parametrize("inner", inner_tests())
def test_inside(outcome: Outcome, inner: str, record_property: Callable[[str, object], None]) -> None:
    cases = outcome.cases.get(inner, [])
    if not cases:
        pytest.fail(f"did not run; the guest ended with status {outcome.status}\n{outcome.console[-SHOWN:]}", pytrace=False)
    for name, value in (entry for case in cases for entry in case.properties):
        record_property(name, value)
        print(f"{name}: {value}")
    bad = [case for case in cases if case.outcome in ("failed", "error")]
    if bad:
        pytest.fail("\n\n".join(f"{case.name} {case.outcome}: {case.text}" for case in bad), pytrace=False)
    if all(case.outcome == "skipped" for case in cases):
        pytest.skip(cases[0].text.strip())


def test_the_guest_ran_every_inner_test_and_no_other(outcome: Outcome) -> None:
    assert sorted(outcome.cases) == sorted(inner_tests())

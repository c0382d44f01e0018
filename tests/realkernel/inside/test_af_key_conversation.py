"""The scripted PF_KEY conversation with AF_KEY: what is recorded of Linux is what Linux answers."""

from __future__ import annotations

import pytest
from lab.namespaces import Lab
from pfkey_conversation import FAR, HERE, NEAR, PEER, STEPS, talk
from pfkey_outcomes import LINUX
from realkernel.af_key_party import AfKeyParty

pytestmark = pytest.mark.realkernel


def test_linux_answers_as_recorded() -> None:
    with Lab() as lab:
        here, there = lab.namespace("here"), lab.namespace("there")
        lab.veth(here, "wire", there, "wire")
        here.ip(f"addr add {HERE}/24 dev wire", f"addr add {NEAR[1]}/32 dev lo", f"route add {FAR} via {PEER} src {NEAR[1]}")
        there.ip(f"addr add {PEER}/24 dev wire")
        party = AfKeyParty(here)
        try:
            assert talk(party, STEPS) == LINUX
        finally:
            party.close()

"""The memory of our own SAs against a list of what was put and dropped."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.channel.own_sas import OwnSas
from kernel_shim.model import Direction, SaId, Spi

pytestmark = pytest.mark.property

IDS = [SaId(ip_address(address), Spi(spi)) for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1") for spi in (0x100, 0x101, 0x102)]

steps = st.tuples(st.sampled_from(IDS), st.sampled_from((Direction.IN, Direction.OUT, None)))


@given(st.lists(steps, max_size=40))
def test_it_knows_what_was_put_and_not_dropped(taken: list[tuple[SaId, Direction | None]]) -> None:
    own, model = OwnSas(), dict[SaId, Direction]()
    for sa, direction in taken:
        model.pop(sa, None)
        if direction is None:
            own.drop(sa)
        else:
            own.put(sa, direction)
            model[sa] = direction
        assert list(own) == list(model)
        for one in IDS:
            assert own.direction(one) == model.get(one)
            assert (one in own) == (one in model)
            assert own.inbound(one.spi) == next((id for id, way in model.items() if id.spi == one.spi and way is Direction.IN), None)

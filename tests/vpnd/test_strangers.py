"""What strangers can make us write down."""

from __future__ import annotations

import pytest
from vpnd_nodes import A, B, Network, Node, config, until

from vpnd.control.backend import ControlError
from vpnd.daemon import carrier

pytestmark = pytest.mark.virtual_time


async def test_strangers_do_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "STRANGERS_AT_ONCE", 4)
    monkeypatch.setattr(carrier, "STRANGERS_A_SECOND", 0.0)
    network = Network()
    b = Node(network, config("b"), B)
    stranger = Node(network, config("a", secret="guessed"), A)
    for node in (b, stranger):
        await node.start()
    for attempt in range(1, 6):
        with pytest.raises(ControlError):
            await stranger.up()
        await until(lambda attempt=attempt: b.manager.counters.snapshot()["authentication_rejected"] == attempt and not len(b.manager))
    about = [line for line in b.lines if "authentication of peer" in line or "closed" in line]
    assert len(about) == 4
    assert b.manager.counters.snapshot()["strangers_not_logged"] == 6
    # who asked for it hears all of it
    assert len([line for line in stranger.lines if "authentication of peer" in line]) == 5


async def test_a_stranger_of_a_long_name_writes_no_long_line() -> None:
    network = Network()
    b = Node(network, config("b"), B)
    stranger = Node(network, config("a", secret="guessed").replace("a.example", "a" * 8_000), A)
    for node in (b, stranger):
        await node.start()
    with pytest.raises(ControlError):
        await stranger.up()
    await until(lambda: any("authentication of peer 'aaaa" in line for line in b.lines))
    assert max(map(len, b.lines)) < 1000

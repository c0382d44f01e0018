"""Between key managers without MOBIKE: the address of an IKE SA goes away, for good or for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.model import IPAddress
from vpnd.daemon import endpoints
from vpnd.daemon.stranded import GRACE
from vpnd.ike.context import Retransmission

pytestmark = pytest.mark.virtual_time

NEW = type(A)("127.0.0.13")


@dataclass
class Addresses:
    """A host with one address, by which it reaches everything."""

    own: IPAddress | None

    def addresses(self) -> Sequence[IPAddress]:
        return () if self.own is None else (self.own,)

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return self.own

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return 0


class Roaming:
    """A client, reachable at whichever address its host has, and its gateway."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, local: str = "%any", mobike: tuple[str, str] = ("no", "yes"), extra: str = "") -> None:
        self.network, self.host, self.far = Network(), Addresses(A), Addresses(B)
        monkeypatch.setattr(endpoints, "source_towards", lambda remote, mark: self.host.own)
        text = config("a", connection=f"mobike = {mobike[0]}\n{extra}").replace(f"local_addrs = {A}", f"local_addrs = {local}")
        self.client = Node(self.network, text, A, host=self.host, retransmission=Retransmission())
        there = config("b", connection=f"mobike = {mobike[1]}").replace(f"remote_addrs = {A}", "remote_addrs = %any")
        self.gateway = Node(self.network, there, B, host=self.far)

    async def up(self) -> int:
        await self.gateway.start()
        await self.client.start()
        await self.client.up()
        await until(lambda: mirrored(self.client, self.gateway))
        return self.spi

    @property
    def spi(self) -> int:
        (entry,) = self.client.manager.entries()
        return entry.sa.spi_local

    def moves_to(self, address: IPAddress | None) -> None:
        for known in (A, NEW):
            self.network.nodes.pop(known, None)
        if address is not None:
            self.network.nodes[address] = self.client
        self.host.own = address
        self.client.manager.addresses_changed()

    def made_anew(self, before: int) -> bool:
        """By both, and nothing of the old one is left."""
        entries = list(self.client.manager.entries())
        return [entry.sa.local.address for entry in entries] == [NEW] and entries[0].sa.spi_local != before and mirrored(self.client, self.gateway)


@pytest.mark.parametrize("mobike", [("no", "yes"), ("yes", "no")])
async def test_it_is_made_anew_from_another_address(monkeypatch: pytest.MonkeyPatch, mobike: tuple[str, str]) -> None:
    roaming = Roaming(monkeypatch, mobike=mobike)
    before = await roaming.up()
    roaming.moves_to(NEW)
    await until(lambda: roaming.made_anew(before))
    assert any("our address is gone" in line for line in roaming.client.lines)


async def test_there_is_another_address_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    roaming = Roaming(monkeypatch)
    before = await roaming.up()
    roaming.moves_to(None)
    await asyncio.sleep(2 * GRACE)
    assert roaming.spi == before
    roaming.moves_to(NEW)
    await until(lambda: roaming.made_anew(before))


async def test_an_address_that_comes_back_at_once_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    roaming = Roaming(monkeypatch)
    before = await roaming.up()
    roaming.moves_to(NEW)
    await asyncio.sleep(GRACE / 2)
    roaming.moves_to(A)
    await asyncio.sleep(2 * GRACE)
    assert roaming.spi == before
    assert mirrored(roaming.client, roaming.gateway)


async def test_an_address_that_the_configuration_names_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    roaming = Roaming(monkeypatch, local=str(A))
    before = await roaming.up()
    roaming.moves_to(NEW)
    await asyncio.sleep(2 * GRACE)
    assert roaming.spi == before


async def test_who_was_asked_leaves_it_to_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    roaming = Roaming(monkeypatch)
    before = await roaming.up()
    roaming.far.own = NEW
    roaming.gateway.manager.addresses_changed()
    await asyncio.sleep(2 * GRACE)
    assert roaming.spi == before
    assert mirrored(roaming.client, roaming.gateway)


@pytest.mark.parametrize("what", ["child", "ike"])
async def test_who_is_about_to_ask_asks_from_the_address_that_is_there(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    roaming = Roaming(monkeypatch, mobike=("yes", "yes"), extra="childless = allow")
    await roaming.gateway.start()
    await roaming.client.start()
    roaming.network.cut = True

    async def wanted() -> None:
        async for _line in roaming.client.operations.initiate(child="net" if what == "child" else None, ike="site", timeout=4 * GRACE):
            pass

    asking = asyncio.create_task(wanted())
    await until(lambda: roaming.network.sent)
    roaming.network.cut = False
    roaming.moves_to(NEW)
    await asking
    (entry,) = roaming.client.manager.entries()
    assert entry.sa.local.address == NEW
    assert any("our address is gone" in line for line in roaming.client.lines)


async def test_what_is_wanted_of_it_meanwhile_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    roaming = Roaming(monkeypatch, extra="childless = allow")
    await roaming.gateway.start()
    await roaming.client.start()
    async for _line in roaming.client.operations.initiate(child=None, ike="site", timeout=GRACE):
        pass
    roaming.moves_to(NEW)
    before = roaming.spi
    await roaming.client.up()
    await until(lambda: roaming.made_anew(before))

"""What follows when a CHILD_SA goes, between two key managers: close_action, dpd_action, start_action, inactivity, volumes that are used up."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest
from vpnd_nodes import DEFAULTS, A, B, Network, Node, config, mirrored, pair, until

from kernel_shim.model import Action, Direction, Expire, KernelError, SaId, SaState, SaStatus
from vpnd.config.model import DaemonConfig
from vpnd.daemon import ends, inactivity, status
from vpnd.ike.sa import REKEY_SPACING

pytestmark = pytest.mark.virtual_time


async def asymmetric(options_a: str, options_b: str = "", connection_a: str = "", start_a: str = "none") -> tuple[Node, Node, Network]:
    network = Network()
    a = Node(network, config("a", start_a, child=options_a, connection=connection_a), A)
    b = Node(network, config("b", child=options_b), B)
    await b.start()
    await a.start()
    return a, b, network


def protecting(node: Node) -> int:
    return sum(policy.action is Action.PROTECT for policy in node.kernel.policies.values())


# close_action


@pytest.mark.parametrize("what", [{"child": "net"}, {"ike": "site"}], ids=["child", "ike"])
async def test_what_the_peer_deletes_is_made_again(what: dict[str, str]) -> None:
    a, b, _ = await asymmetric("close_action = start")
    await a.up()
    await until(lambda: mirrored(a, b))
    first, fewest = a.spis(Direction.IN), []
    a.manager.news.subscribe(lambda _event: fewest.append(protecting(a)))
    await b.down(**what)
    await until(lambda: mirrored(a, b) and not a.spis(Direction.IN) & first)
    assert min(fewest) == 3, "no clear packet in between"


async def test_a_peer_that_deletes_again_and_again_gives_work_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "RESTART_SPACING", 0.3)
    a, b, _ = await asymmetric("close_action = start")
    begin = asyncio.get_running_loop().time()
    await a.up()
    for _ in range(3):
        await until(lambda: mirrored(a, b))
        await b.down(child="net")
    await until(lambda: mirrored(a, b))
    assert asyncio.get_running_loop().time() - begin >= 0.6


async def test_what_the_peer_deletes_is_trapped() -> None:
    a, b, _ = await asymmetric("close_action = trap")
    await a.up()
    await until(lambda: mirrored(a, b))
    fewest: list[int] = []
    a.manager.news.subscribe(lambda _event: fewest.append(protecting(a)))
    await b.down(child="net")
    await until(lambda: [trap.child for trap in a.operations.list_policies(trap=True, shunt=False)] == ["net"])
    assert (min(fewest), protecting(a), protecting(b)) == (3, 3, 0)
    assert not a.kernel.sas


async def test_what_we_delete_stays_deleted() -> None:
    a, b, _ = await asymmetric("close_action = trap|start\n dpd_action = start")
    await a.up()
    await until(lambda: mirrored(a, b))
    await a.down(child="net")
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    assert protecting(a) == 0


async def test_a_reauthentication_of_the_peer_is_no_end() -> None:
    a, b, _ = await asymmetric("close_action = start")
    await b.up()
    await until(lambda: mirrored(a, b))
    b.operations.rekey(ike="site", reauth=True)
    await until(lambda: mirrored(a, b) and len(list(a.manager.entries())) == 1 and a.manager.counters.snapshot().get("ike_closed") == 1)
    assert a.manager.counters.snapshot()["child_established"] == 2


# dpd_action and start_action


@pytest.mark.parametrize(("action", "traps", "comes_back"), [("clear", 0, False), ("trap", 1, False), ("restart", 0, True), ("trap|start", 1, True)])
async def test_a_dead_peer(action: str, traps: int, comes_back: bool) -> None:
    a, b, network = await asymmetric(f"dpd_action = {action}", connection_a="dpd_delay = 1s\n keyingtries = 0")
    await a.up()
    await until(lambda: mirrored(a, b))
    network.cut = True
    await until(lambda: any("peer does not answer" in line for line in a.lines))
    network.cut = False
    if comes_back:
        await until(lambda: len(a.spis(Direction.OUT)) == 1 and a.manager.counters.snapshot()["child_established"] == 2)
    await until(lambda: len(a.operations.list_policies(trap=True, shunt=False)) == traps)
    if action == "clear":
        await until(lambda: protecting(a) == 0)


async def test_trapped_and_started() -> None:
    a, b, _ = await pair("trap|start")
    await until(lambda: mirrored(a, b))
    assert len(a.operations.list_policies(trap=True, shunt=False)) == 1
    await a.down(child="net")
    assert protecting(a) == 3


# inactivity


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inactivity, "SHORTEST", 0.01)
    monkeypatch.setattr(inactivity, "LOOKS", 20)


def count_packets(node: Node, packets: dict[SaId, int]) -> None:
    async def get_sa(sa: SaId) -> SaStatus:
        if sa not in node.kernel.sas:
            raise KernelError(errno.ESRCH, "no such SA")
        return SaStatus(node.kernel.sas[sa], SaState.MATURE, packets=packets.get(sa, 0))

    node.channels[-1].get_sa = get_sa  # type: ignore[method-assign]


@pytest.mark.parametrize("close_ike", [False, True])
async def test_what_nobody_uses_is_deleted(close_ike: bool, quick_looks: None) -> None:
    settings: DaemonConfig = replace(DEFAULTS, inactivity_close_ike=close_ike)
    network = Network()
    a, b = Node(network, config("a", child="inactivity = 1s"), A, settings=settings), Node(network, config("b"), B)
    await b.start()
    await a.start()
    packets: dict[SaId, int] = {}
    count_packets(a, packets)
    await a.up()
    await until(lambda: mirrored(a, b))
    begin = asyncio.get_running_loop().time()
    outbound = next(sa.id for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    while asyncio.get_running_loop().time() < begin + 1.5:
        packets[outbound] = packets.get(outbound, 0) + 1
        await asyncio.sleep(0.05)
    assert mirrored(a, b), "it was used"
    a.operations.rekey(child="net")  # is no use of it
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    await until(lambda: len(list(a.manager.entries())) == (0 if close_ike else 1))
    assert a.manager.counters.snapshot()["child_inactive"] == 1


async def test_a_look_that_the_kernel_refuses_is_not_the_last(quick_looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SINGLE_LOOKUPS", 0)  # it asks for all of them at once
    a, b, _ = await asymmetric("inactivity = 1s")
    await a.up()
    await until(lambda: mirrored(a, b))
    a.kernel.faults["sas"] = KernelError(errno.ENOBUFS, "no room")
    await until(lambda: "sas" not in a.kernel.faults)
    assert mirrored(a, b), "it said nothing, which is not that there was nothing"
    await until(lambda: not a.kernel.sas and not b.kernel.sas)


# Volumes


async def test_a_volume_that_is_used_up_at_once_is_not_rekeyed_at_line_rate() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    begin = asyncio.get_running_loop().time()
    for _ in range(2):
        old = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
        for _ in range(100):
            a.channels[-1].event(Expire(old.id, old.reqid, hard=False))
        await until(lambda old=old: mirrored(a, b) and old.spi not in a.spis(Direction.OUT))
    assert asyncio.get_running_loop().time() - begin >= 1.9 * REKEY_SPACING
    assert a.manager.counters.snapshot()["child_rekeyed"] == 2


# Late refusals


async def test_an_sa_out_that_the_kernel_refuses_late_is_made_anew_without_a_clear_packet() -> None:
    """Of a rekeying of the peer's, the SA out comes only when the old CHILD_SA goes."""
    a, b, _ = await pair("start")
    await until(lambda: mirrored(a, b))
    first, fewest = a.spis(Direction.OUT), []
    a.manager.news.subscribe(lambda _event: fewest.append(protecting(a)))
    a.kernel.faults["add_sa"] = KernelError(12, "no memory")
    b.operations.rekey(child="net")
    await until(lambda: "add_sa" not in a.kernel.faults)
    await until(lambda: mirrored(a, b) and not a.spis(Direction.OUT) & first)
    assert min(fewest) == 3
    assert any("kernel refused the outbound SA" in line for line in a.lines)

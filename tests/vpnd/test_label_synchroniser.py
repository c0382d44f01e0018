"""The label node as it should be, against a kernel that forgets, drifts, refuses and goes away."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address, ip_network

import pytest

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import KernelError
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Key, Nhlfe, ToInterface, ToPeer
from kernel_shim.mpls.node import LabelBinding, LabelNode, NodeEntry, Tunnel, Vrf, VrfRoute
from vpnd.daemon import repair
from vpnd.daemon.label_synchroniser import FPM, SLICE, STATIC, TRIED_TOGETHER, LabelSynchroniser
from vpnd.telemetry.counters import Counters


class FakeNode:
    """A kernel's label node, and every request that was made of it."""

    def __init__(self) -> None:
        self.node = LabelNode(lambda _: None)
        self.requests: list[tuple[str, list[Key]]] = []
        self.refuses: set[Key] = set()
        self.gone = False

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        self._asked("put", entries)
        for entry in entries:
            if entry.key in self.refuses:
                raise KernelError(errno.EINVAL, "not that one")
            try:
                self.node.put(entry)
            except ValueError as error:
                raise KernelError(errno.EINVAL, str(error)) from error

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        self._asked("delete", entries)
        for entry in entries:
            self.node.remove(entry.key)

    async def labels(self) -> Sequence[NodeEntry]:
        self._asked("dump", [])
        return list(self.node.entries())

    def _asked(self, what: str, entries: Sequence[NodeEntry]) -> None:
        if self.gone:
            raise ChannelClosed("gone")
        self.requests.append((what, [entry.key for entry in entries]))

    def changes(self) -> list[tuple[str, list[Key]]]:
        found, self.requests = [request for request in self.requests if request[0] != "dump"], []
        return found


RED, BLUE = Vrf("red", "vpn-red", 101), Vrf("blue", "vpn-blue", 102)
TUNNEL = Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2"))
LABEL = LabelBinding(Label(100), (Nhlfe(ToInterface("red")),))
PREFIX = ip_network("10.0.0.0/24")


def route(label: int, vrf: str = "red") -> VrfRoute:
    return VrfRoute(vrf, PREFIX, (Nhlfe(ToPeer("pe"), (Label(label),)),))


ALL: list[NodeEntry] = [route(200), LABEL, TUNNEL, RED]


@pytest.fixture
async def labels() -> AsyncIterator[LabelSynchroniser]:
    found = LabelSynchroniser(Counters())
    yield found
    await found.stop()


def there(kernel: FakeNode) -> dict[Key, NodeEntry]:
    return {entry.key: entry for entry in kernel.node.entries()}


async def test_what_should_be_there_goes_in_after_what_it_rests_upon(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    assert kernel.changes() == [("put", [RED.key, TUNNEL.key, LABEL.key, route(200).key])]


async def test_only_what_differs_is_touched(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    for entry in [*ALL, BLUE]:
        kernel.node.put(entry)
    labels.replace(STATIC, [*ALL[1:], route(201)])
    await labels.attach(kernel)
    assert kernel.changes() == [("delete", [BLUE.key]), ("put", [route(201).key])]
    labels.replace(STATIC, ALL)
    await labels.settled()
    assert kernel.changes() == [("put", [route(200).key])]
    labels.replace(STATIC, ALL)
    await labels.examine()
    assert kernel.changes() == []


async def test_others_have_their_turns_in_an_examination_and_what_changes_then_is_not_lost(labels: LabelSynchroniser) -> None:
    """Of many entries, at every boundary between two slices."""
    kernel = FakeNode()
    many = [LabelBinding(Label(1000 + number), LABEL.paths) for number in range(3 * SLICE)]
    labels.replace(STATIC, [*ALL, *many])
    await labels.attach(kernel)
    gone = False
    for boundary in range(1, 30):
        label = many[boundary * 100]
        kernel.node.remove(label.key)  # which the examination is to put right
        examination = asyncio.create_task(labels.examine())
        for _ in range(boundary):
            await asyncio.sleep(0)
        gone = gone or not examination.done()
        labels.withdraw(STATIC, [TUNNEL.key]) if boundary % 2 else labels.put(STATIC, [TUNNEL])
        await examination
        await labels.settled()
        wanted = {entry.key: entry for entry in [*ALL, *many] if boundary % 2 == 0 or entry is not TUNNEL}
        assert there(kernel) == wanted
        assert labels.standing == wanted
    assert gone


async def test_what_drifted_is_put_right(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    kernel.node.remove(LABEL.key)
    kernel.node.put(route(999))
    kernel.node.put(BLUE)
    await labels.examine()
    assert there(kernel) == {entry.key: entry for entry in ALL}
    assert labels.standing == there(kernel)


async def test_another_kernel_gets_everything(labels: LabelSynchroniser) -> None:
    first, second = FakeNode(), FakeNode()
    labels.replace(STATIC, ALL)
    await labels.attach(first)
    first.gone = True
    labels.put(FPM, [route(300, "blue"), BLUE])
    await labels.settled()
    labels.detach()
    labels.withdraw(STATIC, [LABEL.key])
    await labels.attach(second)
    assert set(there(second)) == {RED.key, TUNNEL.key, BLUE.key, route(200).key, route(300, "blue").key}


async def test_what_an_operator_wrote_is_not_overruled(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    await labels.attach(kernel)
    labels.replace(STATIC, ALL)
    labels.put(FPM, [route(300)])
    await labels.settled()
    assert there(kernel)[route(0x10).key] == route(200)
    labels.withdraw(STATIC, [route(200).key])
    await labels.settled()
    assert there(kernel)[route(0x10).key] == route(300)
    assert labels.origin(route(300).key) == (FPM, "ok")
    labels.withdraw(FPM, [route(300).key])
    await labels.settled()
    assert route(300).key not in there(kernel)


async def test_what_is_refused_holds_up_nothing_else_and_is_tried_again(labels: LabelSynchroniser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    kernel = FakeNode()
    kernel.refuses = {TUNNEL.key}
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    assert set(there(kernel)) == {RED.key, LABEL.key, route(200).key}
    assert labels.origin(TUNNEL.key) == (STATIC, "refused: not that one")
    kernel.refuses = set()
    await labels.examine()
    assert there(kernel)[TUNNEL.key] == TUNNEL
    assert labels.refused == {}


async def test_what_is_refused_is_forgotten_once_nobody_wants_it(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    kernel.refuses = {TUNNEL.key}
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    assert labels.refused
    labels.withdraw(STATIC, [TUNNEL.key])
    await labels.settled()
    assert labels.refused == {}


async def test_what_is_not_removed_is_tried_again(labels: LabelSynchroniser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    kernel = FakeNode()
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    remove, tries = kernel.delete_labels, 0

    async def busy(entries: Sequence[NodeEntry]) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KernelError(errno.EBUSY, "not now")
        await remove(entries)

    monkeypatch.setattr(kernel, "delete_labels", busy)
    labels.withdraw(STATIC, [LABEL.key])
    async with asyncio.timeout(60):
        while LABEL.key in there(kernel):
            await asyncio.sleep(0.01)


async def test_one_that_is_refused_does_not_send_all_others_one_by_one(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    entries: list[NodeEntry] = [LabelBinding(Label(1000 + number), LABEL.paths) for number in range(8 * TRIED_TOGETHER)]
    kernel.refuses = {entries[300].key}
    labels.replace(STATIC, [RED, *entries])
    await labels.attach(kernel)
    assert there(kernel).keys() == {RED.key, *(entry.key for entry in entries)} - kernel.refuses
    assert len(kernel.changes()) < 2 * TRIED_TOGETHER


async def test_two_that_change_places_do(labels: LabelSynchroniser) -> None:
    """Each of them is refused while the other one stands."""
    kernel = FakeNode()
    labels.replace(STATIC, [RED, BLUE])
    await labels.attach(kernel)
    swapped = [Vrf("red", "vpn-red", 102), Vrf("blue", "vpn-blue", 101)]
    labels.replace(STATIC, swapped)
    await labels.settled()
    assert there(kernel) == {entry.key: entry for entry in swapped}


async def test_the_orderly_end_leaves_nothing(labels: LabelSynchroniser) -> None:
    kernel = FakeNode()
    labels.replace(STATIC, ALL)
    await labels.attach(kernel)
    await labels.remove_all()
    assert there(kernel) == {}


async def test_an_orderly_end_in_the_midst_of_a_change_leaves_nothing(labels: LabelSynchroniser, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeNode()
    labels.replace(STATIC, [TUNNEL])
    await labels.attach(kernel)
    put, under_way = kernel.put_labels, asyncio.Event()

    async def put_and_wait(entries: Sequence[NodeEntry]) -> None:
        await put(entries)
        under_way.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(kernel, "put_labels", put_and_wait)
    labels.replace(STATIC, ALL)
    await under_way.wait()
    await labels.stop()
    await labels.remove_all()
    assert there(kernel) == {}

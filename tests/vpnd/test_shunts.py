"""Shunts, marks and interface ids: what a child's policies and SAs are in the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vpnd_fakes import FakeChannel, FakeKernel
from vpnd_nodes import A, Network, Node, config, mirrored, pair, until

from kernel_shim.model import NO_MARK, Action, Capabilities, Direction, Mark
from vpnd.control.backend import ControlError

pytestmark = pytest.mark.virtual_time


def with_shunt(mode: str, start: str, version: int = 4) -> Node:
    local, remote = ("10.1.9.0/24", "0.0.0.0/0") if version == 4 else ("fd01:9::/64", "::/0")
    shunt = f"}}\n exempt {{\n mode = {mode}\n local_ts = {local}\n remote_ts = {remote}\n start_action = {start}"
    return Node(Network(), config("a", "trap", child=shunt), A)


def shunts(node: Node) -> dict[Direction, Action]:
    return {policy.direction: policy.action for policy in node.kernel.policies.values() if policy.action is not Action.PROTECT}


@pytest.mark.parametrize(("mode", "action"), [("pass", Action.BYPASS), ("drop", Action.DISCARD)])
@pytest.mark.parametrize("version", [4, 6])
async def test_a_shunt_stands_before_the_trap_around_it(mode: str, action: Action, version: int) -> None:
    node = with_shunt(mode, "trap", version)
    await node.start()
    assert shunts(node) == {Direction.IN: action, Direction.OUT: action, Direction.FORWARD: action}
    assert {policy.mode for policy in node.operations.list_policies(trap=False, shunt=True)} == {mode.upper()}
    priorities = {policy.action: policy.priority for policy in node.kernel.policies.values() if policy.direction is Direction.OUT}
    assert priorities[action] < priorities[Action.PROTECT]


async def test_shunts_and_traps_come_and_go_by_the_operator() -> None:
    node = with_shunt("pass", "none")
    await node.start()
    assert shunts(node) == {}
    await node.operations.install("exempt", None)
    await node.operations.install("exempt", "site")  # again
    assert len(shunts(node)) == 3
    await node.operations.uninstall("exempt", "site")
    assert shunts(node) == {}
    with pytest.raises(ControlError, match="policy 'exempt' not found"):
        await node.operations.uninstall("exempt", None)
    with pytest.raises(ControlError, match="'nothing' not found"):
        await node.operations.install("nothing", None)
    await node.operations.uninstall("net", None)
    assert not node.kernel.policies
    with pytest.raises(ControlError, match="'exempt' is a shunt"):
        async for _line in node.operations.initiate(child="exempt", ike=None, timeout=1.0):
            pass


# Marks and interface ids

MARKED = "mark_in = 7\n mark_out = 8/0xff\n set_mark_in = 9\n set_mark_out = 16/0xf0\n if_id_in = 11\n if_id_out = 12"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities: Capabilities = replace(FakeKernel().capabilities, marks=True, if_ids=True)
    monkeypatch.setattr(FakeChannel, "capabilities", lambda self: capabilities)


@pytest.mark.parametrize("in_sa", [False, True])
@pytest.mark.parametrize("start", ["none", "trap"])
async def test_marks_and_interface_ids_of_policies_and_sas(start: str, in_sa: bool, able: None) -> None:
    a, b, _ = await pair(start, child=f"{MARKED}\n mark_in_sa = {'yes' if in_sa else 'no'}")
    await a.up()
    await until(lambda: mirrored(a, b))
    policies = {policy.direction: (policy.selector.mark, policy.selector.if_id) for policy in a.kernel.policies.values()}
    inward, outward = (Mark(7, 0xFFFFFFFF), 11), (Mark(8, 0xFF), 12)
    assert policies == {Direction.IN: inward, Direction.FORWARD: inward, Direction.OUT: outward}
    sas = {sa.direction: (sa.mark, sa.set_mark, sa.if_id) for sa in a.kernel.sas.values()}
    assert sas[Direction.IN] == (Mark(7, 0xFFFFFFFF) if in_sa else NO_MARK, Mark(9, 0xFFFFFFFF), 11)
    assert sas[Direction.OUT] == (Mark(8, 0xFF), Mark(16, 0xF0), 12)


@pytest.mark.parametrize("option", ["mark_in = 7", "mark_out = 7", "set_mark_in = 7", "set_mark_out = 7", "if_id_in = 7", "if_id_out = 7"])
async def test_a_kernel_that_cannot_do_it_refuses_the_child(option: str) -> None:
    node = Node(Network(), config("a", child=option), A)
    with pytest.raises(ControlError, match=f"child 'net': {option.split()[0]}: the kernel 'fake' has no"):
        await node.start()

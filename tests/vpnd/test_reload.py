"""The configuration file is read again: what changed is touched, nothing else is, and a bad file changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.model import Action, Direction, KernelError
from vpnd.config import load, load_text
from vpnd.config.errors import ConfigErrors
from vpnd.config.model import ConnectionConfig, SharedSecret
from vpnd.control.backend import ControlError

pytestmark = pytest.mark.virtual_time

OTHER = """}}
      other {{
        local_ts = 10.1.8.0/24
        remote_ts = 10.2.8.0/24
        start_action = {start}
"""


class File:
    """What node `a` reads."""

    def __init__(self, path: Path) -> None:
        self.path = path / "vpnd.conf"
        self.network = Network()

    def write(self, text: str) -> None:
        self.path.write_text(text)

    async def start(self, text: str, peer: str | None = None) -> tuple[Node, Node]:
        self.write(text)
        b = Node(self.network, peer or config("b", child=OTHER.format(start="none").replace("10.1", "10.9").replace("10.2", "10.1").replace("10.9", "10.2")), B)
        a = Node(self.network, text, A)

        async def read() -> object:
            return load(self.path)

        a.operations.reload_from(read, load(self.path))  # type: ignore[arg-type]
        await b.start()
        await a.start()
        return a, b


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


def networks(node: Node) -> set[str]:
    return {
        str(policy.selector.destination) for policy in node.kernel.policies.values() if (policy.direction, policy.action) == (Direction.OUT, Action.PROTECT)
    }


async def test_what_is_as_it_was_is_not_touched(file: File) -> None:
    a, b = await file.start(config("a", "trap"))
    await a.up()
    await until(lambda: mirrored(a, b))
    requests = list(a.kernel.requests)
    assert await a.operations.reload() == ["1 connection unchanged"]
    assert a.kernel.requests == requests
    assert mirrored(a, b)


async def test_a_child_that_comes_changes_and_goes(file: File) -> None:
    a, b = await file.start(config("a", "trap"))
    await a.up()
    await until(lambda: mirrored(a, b))
    sas = dict(a.kernel.sas)

    file.write(config("a", "trap", child=OTHER.format(start="trap")))
    assert await a.operations.reload() == ["changed site", "0 connections unchanged"]
    assert networks(a) == {"10.2.0.0/16", "10.2.8.0/24"}

    fewest: list[int] = []
    update = a.channels[-1].update_policy

    async def watched(policy: object) -> object:
        fewest.append(len(networks(a)))
        return await update(policy)  # type: ignore[arg-type]

    a.channels[-1].update_policy = watched  # type: ignore[method-assign,assignment]
    file.write(config("a", "trap", child=OTHER.format(start="trap") + " priority = 7\n"))
    await a.operations.reload()
    assert networks(a) == {"10.2.0.0/16", "10.2.8.0/24"}
    assert min(fewest) == 2, "a changed trap is replaced, not removed and put back"

    file.write(config("a", "trap"))
    await a.operations.reload()
    assert networks(a) == {"10.2.0.0/16"}
    assert a.kernel.sas == sas
    assert mirrored(a, b)


async def test_an_ike_sa_of_before_negotiates_by_the_children_of_now(file: File) -> None:
    """On both sides: a child that came, and one whose network is wider."""
    a, b = await file.start(config("a"), config("b"))
    await a.up()
    await until(lambda: mirrored(a, b))
    ike = [entry.sa.unique_id for entry in a.manager.entries()]
    more = OTHER.format(start="none")
    theirs = more.replace("10.1", "10.9").replace("10.2", "10.1").replace("10.9", "10.2")
    (new,) = load_text(config("b", child=theirs).replace("10.1.0.0/16", "10.0.0.0/15"), file.path.parent).configuration.connections.values()
    await b.operations.load_connection(new)
    file.write(config("a", child=more).replace("10.1.0.0/16", "10.0.0.0/15"))
    await a.operations.reload()
    for number, child in enumerate(("other", "net"), 2):
        async for _line in a.operations.initiate(child=child, ike=None, timeout=5.0):
            pass
        await until(lambda number=number: mirrored(a, b, number))
    assert networks(b) == {"10.1.0.0/16", "10.1.8.0/24", "10.0.0.0/15"}
    assert [entry.sa.unique_id for entry in a.manager.entries()] == ike


async def test_connections_come_and_go(file: File) -> None:
    one = config("a", "start")
    a, b = await file.start(one)
    await until(lambda: mirrored(a, b))
    unused = "unused {\n remote_addrs = 192.0.2.77\n children { c {\n remote_ts = 10.77.0.0/16\n start_action = trap\n } }\n }\n"
    two = one.replace("  site {", f"  {unused}  site {{", 1)
    file.write(two)
    assert await a.operations.reload() == ["added unused", "1 connection unchanged"]
    assert "10.77.0.0/16" in networks(a)
    start, end = two.index("  site {"), two.index("secrets {")
    file.write(two[:start] + "}\n" + two[end:])
    assert await a.operations.reload() == ["removed site", "1 connection unchanged"]
    # it was started, so it is deleted
    await until(lambda: not a.kernel.sas and not b.kernel.sas and not list(a.manager.entries()))
    assert networks(a) == {"10.77.0.0/16"}


async def test_what_was_trapped_or_asked_for_goes_on_without_its_connection(file: File) -> None:
    a, b = await file.start(config("a", "trap"))
    await a.up()
    await until(lambda: mirrored(a, b))
    text = config("a")
    file.write("connections { }\n" + text[text.index("secrets {") :])
    await a.operations.reload()
    assert mirrored(a, b)
    assert len(networks(a)) == 1


async def test_a_started_child_that_changed_stands_anew_before_the_old_one_goes(file: File) -> None:
    a, b = await file.start(config("a", "start"))
    await until(lambda: mirrored(a, b))
    first, fewest = a.spis(Direction.OUT), []
    a.manager.news.subscribe(lambda _event: fewest.append(len(a.spis(Direction.OUT))))
    file.write(config("a", "start", child="rekey_time = 2h"))
    await a.operations.reload()
    await until(lambda: mirrored(a, b) and not a.spis(Direction.OUT) & first)
    assert min(fewest) >= 1


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("rekey_time = soon", r"vpnd.conf:\d+:\d+: connections.site.children.net.rekey_time: 'soon' is not a time"),
        ("if_id_in = 7", r"vpnd.conf:\d+:\d+: connections.site.children.net.if_id_in: the kernel 'fake' has no interface ids"),
    ],
)
async def test_a_bad_file_changes_nothing(file: File, bad: str, complaint: str) -> None:
    a, b = await file.start(config("a", "trap"))
    await a.up()
    await until(lambda: mirrored(a, b))
    requests, known = list(a.kernel.requests), dict(a.manager.connections)
    file.write(config("a", "trap", "another secret", child=bad))
    with pytest.raises(ConfigErrors, match=complaint):
        await a.operations.reload()
    assert (a.kernel.requests, dict(a.manager.connections)) == (requests, known)
    file.write(config("a", "trap", child="reqid = 5\n" + OTHER.format(start="trap") + "reqid = 5"))
    with pytest.raises(ControlError, match="reqid 5 is that of"):
        await a.operations.reload()
    assert (a.kernel.requests, dict(a.manager.connections)) == (requests, known)


async def test_credentials_follow_the_file_and_others_stay(file: File) -> None:
    a, b = await file.start(config("a"))
    a.operations.load_shared(SharedSecret("over-vici", b"kept"))
    file.write(config("a", secret="a new secret"))
    assert await a.operations.reload() == ["1 credential changed", "1 connection unchanged"]
    assert set(a.operations.shared_names()) == {"ike-1", "over-vici"}
    with pytest.raises(ControlError):
        await a.up()
    file.write(config("a"))
    await a.operations.reload()
    await a.up()
    await until(lambda: mirrored(a, b))


async def test_a_connection_of_the_control_socket_is_not_the_files(file: File) -> None:
    a, _b = await file.start(config("a"))
    other = load_other(file)
    await a.operations.load_connection(other)
    assert await a.operations.reload() == ["1 connection unchanged"]
    assert set(a.operations.connections()) == {"site", "elsewhere"}


def load_other(file: File) -> ConnectionConfig:
    path = file.path.with_name("other.conf")
    path.write_text("connections { elsewhere {\n remote_addrs = 192.0.2.9\n children { x { } }\n } }\n")
    return load(path).configuration.connections["elsewhere"]


async def test_options_of_the_daemon_wait_for_a_restart_and_that_is_said(file: File) -> None:
    a, _b = await file.start(config("a"))
    file.write("vpnd {\n log_level = debug\n}\n" + config("a"))
    assert await a.operations.reload() == ["after a restart: vpnd.log_level", "1 connection unchanged"]
    assert "configuration reloaded: after a restart: vpnd.log_level" in a.lines


async def test_what_the_kernel_refuses_is_said_and_the_rest_is_done(file: File) -> None:
    a, _b = await file.start(config("a"))
    a.kernel.faults["update_policy"] = KernelError(22, "no")
    file.write(config("a", "trap"))
    lines = await a.operations.reload()
    assert any(line.startswith("failed: site (kernel refused") for line in lines)

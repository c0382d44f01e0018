"""No key, no shared secret and no PPK is seen from outside: every secret of two daemons' life, looked for in all that they say."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.logs import configure_logs
from kernel_shim.secret import Secret
from vpnd.config.model import DaemonConfig
from vpnd.control.backend import ControlError
from vpnd.control.client import ViciClient
from vpnd.control.server import ControlServer
from vpnd.ike.effects import Reason
from vpnd.ike.session import Session

SHORTEST = 8  # octets of a secret that nothing else looks like by chance
PSK = "a secret between us"
PPK = "a post-quantum secret between us"
PPKS = f'secrets {{ ppk-1 {{\n id = ppk.example\n secret = "{PPK}"\n }} }}\n'
PROPOSALS = "proposals = aes128-sha256-x25519-ke1_mlkem768"
ASKED = ("get-conns", "get-shared", "get-keys", "stats")
STREAMED = (("list-sas", "list-sa"), ("list-conns", "list-conn"), ("list-policies", "list-policy"))


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bytes]]:
    """Every secret that is made while the test runs."""
    made: set[bytes] = set()
    original: Callable[[Secret, bytes], None] = Secret.__init__

    def noted(secret: Secret, value: bytes) -> None:
        if len(value) >= SHORTEST:
            made.add(bytes(value))
        original(secret, value)

    monkeypatch.setattr(Secret, "__init__", noted)
    yield made
    structlog.reset_defaults()


def forms(secret: bytes) -> list[str]:
    """As which text it would show. Of a long one its beginning is enough, as something may cut it."""
    head = secret[:16]
    encoded = base64.b64encode(secret).decode().rstrip("=")
    return [head.hex(), head.hex().upper(), head.hex(":"), head.hex(" "), repr(head)[2:-1], head.decode("latin-1"), encoded[:20], str(list(head))[1:-1]]


def pattern(secrets: set[bytes]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(form) for secret in secrets for form in forms(secret)))


def everything_shown() -> Iterator[str]:
    """What every object of ours looks like to a debugger, a traceback with values, or a log line that names it."""
    for thing in gc.get_objects():
        module = type(thing).__module__
        # some types of C extensions have a descriptor there
        if isinstance(module, str) and module.startswith(("vpnd.", "kernel_shim.")) and not isinstance(thing, type):
            with contextlib.suppress(ReferenceError):
                yield f"{type(thing).__name__}: {thing!r}"


def ask_everything(path: Path) -> str:
    """What a client of the control socket may see."""
    with ViciClient(path, timeout=60.0) as client:
        shown = [repr(client.request(command).plain()) for command in ASKED]
        for command, event in STREAMED:
            shown += [repr(message) for message in client.streamed(command, event, {"trap": "yes", "drop": "yes", "pass": "yes"})]
    return "\n".join(shown)


async def life(a: Node, b: Node, network: Network, look: Callable[[], None]) -> None:
    """Everything that makes keys: both kinds of key exchange, PPK, rekeyings, a ticket."""
    now = asyncio.get_running_loop().time
    await a.up()
    await until(lambda: mirrored(a, b))
    look()
    entry = next(a.manager.entries())
    a.manager.run(entry, entry.sa.rekey_child(next(iter(entry.sa.children)), now()))
    await until(lambda: not any(session.tasks_active for session in sessions(a, b)) and mirrored(a, b))
    look()
    entry = next(b.manager.entries())
    b.manager.run(entry, entry.sa.rekey(now()))
    await until(lambda: len(a.manager) == len(b.manager) == 1 and not any(session.tasks_active for session in sessions(a, b)))
    look()
    network.cut = True
    for node in (a, b):
        for entry in node.manager.entries():
            node.manager.run(entry, entry.sa.abort(now(), Reason.PEER_SILENT))
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    network.cut = False
    await a.up()
    await until(lambda: mirrored(a, b))
    look()


def sessions(*nodes: Node) -> list[Session]:
    return [entry.sa for node in nodes for entry in node.manager.entries()]


async def test_in_no_log_line_no_listing_and_no_object(
    secrets: set[bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configure_logs("debug")
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    network = Network()
    options = "resumption = yes\nppk_id = ppk.example\nppk_required = yes"
    nodes = []
    for side, address in (("a", A), ("b", B)):
        text = config(side, secret=PSK, connection=options, child="close_action = trap").replace("proposals = aes128gcm16-prfsha256-x25519", PROPOSALS)
        nodes.append(Node(network, text.replace("esp_proposals = aes128gcm16", "esp_proposals = aes128gcm16-x25519-ke1_mlkem768") + PPKS, address))
    a, b = nodes
    for node in (b, a):
        await node.start()
    server = ControlServer(a.operations, DaemonConfig(control_socket=tmp_path / "vici.sock"))
    await server.start()
    told: list[str] = []
    a.operations.subscribe(lambda event: told.append(repr(event)))
    shown: set[str] = set()
    await life(a, b, network, lambda: shown.update(everything_shown()))
    shown.add(await asyncio.to_thread(ask_everything, tmp_path / "vici.sock"))
    # what goes wrong is said as well
    stranger = Node(network, config("a", secret="quite another secret", connection="ppk_id = ppk.example") + PPKS, A)
    await stranger.start()
    with pytest.raises(ControlError) as refused:
        await stranger.up()
    shown.update((str(refused.value), *stranger.lines, *a.lines, *b.lines, *told, *everything_shown()))
    await server.stop()
    output = capfd.readouterr()

    assert len(secrets) > 40  # both sides have the same
    assert {PSK.encode(), PPK.encode()} <= secrets
    for node in (a, b):
        assert {sa.encryption_key.reveal() for sa in node.kernel.sas.values()} <= secrets
    assert "established" in output.err
    found = pattern(secrets)
    assert all(found.search(f"key {form} of") for secret in secrets for form in forms(secret))
    assert not found.search(output.err + output.out + caplog.text)
    assert [text.split(":")[0] for text in shown if found.search(text)] == []

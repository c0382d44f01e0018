"""Whatever a client asks, every command answers, and none with a fault of ours."""

from __future__ import annotations

import asyncio

import pytest
from control_fakes import FakeBackend, ike_status
from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.config.tree import Section
from vpnd.control.server.commands import INTERRUPTIBLE, NOT_IMPLEMENTED, Commands

COMMANDS = (
    *("version", "stats", "list-sas", "list-policies", "list-conns", "list-authorities", "get-conns", "get-pools", "get-authorities", "get-keys"),
    *("get-shared", "load-conn", "unload-conn", "load-cert", "load-key", "unload-key", "load-shared", "unload-shared", "clear-creds", "flush-certs"),
    *("initiate", "terminate", "install", "uninstall", "x-wait", "x-stats", "x-mpls", "x-mpls-trace"),
    *("list-certs", "get-algorithms", "get-counters", "reset-counters", "reload-settings"),
)
KEYS = (
    *("child", "ike", "child-id", "ike-id", "timeout", "loglevel", "name", "id", "type", "flag", "data", "owners", "trap", "pass", "drop", "noblock"),
    *("force", "gw", "subject", "all"),
)

values = st.sampled_from(["net", "gw", "yes", "no", "0", "-1", "5", "ike", "x509", "any", "", "%any"]) | st.binary(max_size=12)
messages = st.dictionaries(
    st.sampled_from(KEYS),
    values | st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(KEYS), values, max_size=2),
    max_size=5,
)


async def ask(command: str, message: Section) -> tuple[Section, list[str]]:
    backend = FakeBackend()
    backend.sas.append(ike_status())
    commands = Commands(backend)
    events: list[str] = []

    async def stream(name: str, body: Section) -> None:
        events.append(name)

    try:
        return await commands.handle(command, message, stream), events
    finally:
        await commands.close()


@pytest.mark.property
@settings(max_examples=300)
@given(st.sampled_from(COMMANDS), messages)
def test_every_message_gets_an_answer(command: str, message: dict[str, object]) -> None:
    answer, _ = asyncio.run(ask(command, Section.of(message)))  # type: ignore[arg-type]
    assert answer.text("success") in (None, "yes", "no")
    assert "internal error" not in (answer.text("errmsg") or "")
    assert (answer.text("success") == "no") == (answer.text("errmsg") is not None)


@pytest.mark.parametrize("command", [*COMMANDS, *NOT_IMPLEMENTED])
def test_every_command_is_known(command: str) -> None:
    assert Commands(FakeBackend()).known(command)
    assert set(COMMANDS) >= INTERRUPTIBLE


@pytest.mark.parametrize("command", NOT_IMPLEMENTED)
async def test_what_does_not_exist_yet_says_so(command: str) -> None:
    answer, events = await ask(command, Section())
    assert answer.plain() == {"success": "no", "errmsg": f"'{command}' is not implemented yet"}
    assert events == []

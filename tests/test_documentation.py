"""The documents name what the code has: options, commands, counters; and options that it does not have, they do not name."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kernel_shim.io import main as shim_cli
from kernel_shim.pfkey.constants import MAX_MESSAGE, ExtensionType, MessageType
from kernel_shim.pfkey.outbox import MAX_PENDING_ACQUIRES, MAX_QUEUED_NOTICES, MAX_QUEUED_REPLIES
from kernel_shim.pfkey.server import MAX_REMEMBERED_REPLIES
from kernel_shim.pfkey.watch import MAX_WATCHED_MESSAGES
from kernel_shim.reasons import DropReason
from vpnd.cli import control as vpnctl_cli
from vpnd.cli import daemon as vpnd_cli
from vpnd.config import ConfigErrors, load_text, options
from vpnd.config.model import DaemonConfig
from vpnd.config.reader import Reader
from vpnd.control.server.commands import EVENTS, NOT_IMPLEMENTED

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
CODE = re.compile(r"`([^`\n]+)`")
ROW = re.compile(r"^\| (`.*?) \| (.*?) ?\|", re.MULTILINE)
FIRST_PRIVATE_MESSAGE = 200
FIRST_PRIVATE_EXTENSION = 0x8000
NAME = re.compile(r"[a-z][a-z_0-9]*")

EVERY_SECTION = """
connections { c { local { id = a }
                  remote { id = b }
                  children { k { } } } }
secrets { ike1 { secret = x
                 id = a }
          private1 { file = f
                     secret = x } }
mpls { vrfs { v { } }
       peers { p { vrfs { v { } } } }
       lsps { l { } } }
vpnd { }
"""
INTERNAL = ("type", "owners", "data")  # of the control protocol's load-shared, which has the section's name, too
CHAPTERS = {
    "connections.c": "Connections",
    "connections.c.local": "Authentication",
    "connections.c.remote": "Authentication",
    "connections.c.children.k": "Children",
    "secrets.ike1": "Secrets",
    "secrets.private1": "Secrets",
    "mpls": "MPLS",
    "mpls.vrfs.v": "MPLS",
    "mpls.peers.p": "MPLS",
    "mpls.peers.p.vrfs.v": "MPLS",
    "mpls.lsps.l": "MPLS",
    "vpnd": "The daemon",
}


def chapter(title: str) -> str:
    """Of docs/configuration.md, from its heading to the next one."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", DOCUMENTS["configuration.md"], re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def words(text: str) -> set[str]:
    """Everything in code spans, and its parts."""
    spans = set(CODE.findall(text))
    return spans | {part for span in spans for part in re.split(r"[ *=.{},|\[\]]+", span)}


def rows(text: str) -> Iterator[tuple[str, str]]:
    """Names in the first column of tables, and the second column beside them."""
    for first, second in ROW.findall(text):
        for name in CODE.findall(first):
            yield name, second


@pytest.fixture
def read_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, set[str]]:
    """What the validators read, by section."""
    read: defaultdict[str, set[str]] = defaultdict(set)

    def recorded(name: str) -> None:
        original = getattr(Reader, name)

        def record(self: Reader, option: str, *arguments: object) -> object:
            read[self.path].add(option)
            return original(self, option, *arguments)

        monkeypatch.setattr(Reader, name, record)

    for name in ("convert", "items", "blob", "children", "mark_read"):
        recorded(name)
    with contextlib.suppress(ConfigErrors):
        load_text(EVERY_SECTION, tmp_path)
    return read


def test_every_option_is_named_in_its_chapter(read_options: Mapping[str, set[str]]) -> None:
    for section, title in CHAPTERS.items():
        assert read_options[section], section
        beside = {"local", "remote", "children", "vrfs", "peers", "lsps", *INTERNAL}
        assert read_options[section] - beside <= words(chapter(title)), section


def test_no_option_is_named_that_does_not_exist(read_options: Mapping[str, set[str]]) -> None:
    for title in set(CHAPTERS.values()) - {"Secrets"}:
        exist = set().union(*(read_options[section] for section, its in CHAPTERS.items() if its == title))
        named = {name for name, _ in rows(chapter(title)) if NAME.fullmatch(name)}
        assert named <= exist | {"option"}, title


def test_the_daemons_options_and_defaults(tmp_path: Path) -> None:
    found = list(rows(chapter("The daemon")))
    assert [name for name, _ in found] == [field.name for field in dataclasses.fields(DaemonConfig)]
    written = "".join(f"{name} = {value.strip('`')}\n" for name, value in found if value)
    assert load_text(f"vpnd {{\n{written}}}", tmp_path).daemon == DaemonConfig()


def test_options_that_are_refused() -> None:
    refused = chapter("Known, and not implemented")
    tables = (options.CONNECTION, options.LOCAL, options.REMOTE, options.CERTIFICATE, options.CHILD, options.DAEMON)
    assert {*(name for table in tables for name in table), *options.SECRETS} <= words(refused)


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """Subcommands and long options, those of subcommands of subcommands included."""
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield (name,)
                for path in commands(below):
                    yield (name, *path)
        else:
            yield from ((option,) for option in action.option_strings if option.startswith("--") and option not in ("--help", "--version"))


@pytest.mark.parametrize(
    ("parser", "document"),
    [
        (vpnd_cli.parser(), "operations.md"),
        (vpnctl_cli.parser(), "operations.md"),
        (shim_cli.parser(), "kernel-shim.md"),
    ],
    ids=["vpnd", "vpnctl", "kernel-shim"],
)
def test_commands_and_their_options(parser: argparse.ArgumentParser, document: str) -> None:
    missing = {path[-1] for path in commands(parser)} - words(DOCUMENTS[document])
    assert not missing


def test_commands_and_events_of_the_control_socket() -> None:
    source = (ROOT / "vpnd" / "control" / "server" / "commands.py").read_text()
    handled = set(re.findall(r'^ {12}"([a-z-]+)": ', source, re.MULTILINE))
    assert len(handled) > 20
    assert handled | set(NOT_IMPLEMENTED) | EVENTS <= words(chapter("Control"))


def test_reasons_of_drops() -> None:
    named = {name.removeprefix("drop_") for name, _ in rows(DOCUMENTS["counters.md"]) if name.startswith("drop_")}
    assert named == {reason.value for reason in DropReason}


def test_counters() -> None:
    """Those with a name of their own in the source, where they are added to."""
    added = re.compile(r'counters\.add\(\s*"([a-z][a-z0-9_.-]+)"(?: if .*? else "([a-z][a-z0-9_.-]+)")?')
    found = (pair for package in ("vpnd", "kernel_shim") for path in (ROOT / package).rglob("*.py") for pair in added.findall(path.read_text()))
    names = {name for pair in found for name in pair if name}
    assert len(names) > 30
    documented = {name for name, _ in rows(DOCUMENTS["counters.md"])}
    assert not names - documented


def test_documents_lead_to_documents_that_exist() -> None:
    for text in (*DOCUMENTS.values(), (ROOT / "README.md").read_text()):
        for target in (*re.findall(r"docs/([a-z-]+\.md)", text), *re.findall(r"\]\(([a-z-]+\.md)\)", text)):
            assert target in DOCUMENTS


def test_the_example_of_the_readme_is_accepted(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```\n(connections \{\n.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert load_text(example, tmp_path).configuration.connections


@pytest.mark.parametrize("folder", ["kernel_shim", "kernel_shim/channel", "vpnd", "vpnd/daemon"])
def test_rooms(folder: str) -> None:
    found = re.search(r"^## Rooms\n(.*?)(?=^##)", DOCUMENTS["architecture.md"], re.MULTILINE | re.DOTALL)
    assert found
    named = set(re.findall(r"[a-z_]+", found[1]))
    there = {path.stem for path in (ROOT / folder).iterdir() if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())}
    assert not there - named


def test_private_messages_and_extensions_of_pf_key() -> None:
    numbered = {message.name: str(message.value) for message in MessageType if message.value >= FIRST_PRIVATE_MESSAGE}
    numbered |= {extension.name: f"0x{extension.value:04X}" for extension in ExtensionType if extension.value >= FIRST_PRIVATE_EXTENSION}
    assert len(numbered) > 20
    for name, number in numbered.items():
        assert re.search(rf"\b{name} \({number}\)", DOCUMENTS["pfkey-extensions.md"]), name


def test_bounds_of_pf_key() -> None:
    bounds = (MAX_MESSAGE, MAX_QUEUED_REPLIES, MAX_PENDING_ACQUIRES, MAX_QUEUED_NOTICES, MAX_WATCHED_MESSAGES, MAX_REMEMBERED_REPLIES)
    numbers = set(re.findall(r"\b[0-9][0-9,]*\b", DOCUMENTS["pfkey-extensions.md"]))
    assert {f"{bound:,}" for bound in bounds} <= numbers

"""Kernel settings that are ours for a while: put back by who changed them, and by the next one after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.namespaces import Lab, Namespace

from kernel_shim.channel.sysctl import Sysctls

pytestmark = pytest.mark.root

NAME = "core/xfrm_acq_expires"
SETTING = Path("/proc/sys/net", NAME)


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.namespace("settings")


def test_what_a_killed_process_changed_its_successor_puts_back(host: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "run" / "settings"

    def body() -> None:
        assert Sysctls(file).set(NAME, "165")  # and is killed
        assert file.stat().st_mode & 0o777 == 0o600
        second = Sysctls(file)
        assert second.set(NAME, "200")  # the second wants another value
        assert SETTING.read_text() == "200\n"
        third = Sysctls(file)
        assert third.set(NAME, "200")
        third.restore()
        assert SETTING.read_text() == "30\n"
        assert not file.exists()

    host.call(body)


def test_what_was_left_is_put_back_without_being_set_again(host: Namespace, tmp_path: Path) -> None:
    def body() -> None:
        Sysctls(tmp_path / "settings").set(NAME, "165")
        Sysctls(tmp_path / "settings").restore()
        assert SETTING.read_text() == "30\n"

    host.call(body)


def test_what_somebody_else_set_meanwhile_stays(host: Namespace, tmp_path: Path) -> None:
    def body() -> None:
        Sysctls(tmp_path / "settings").set(NAME, "165")
        SETTING.write_text("99")
        settings = Sysctls(tmp_path / "settings")
        settings.set(NAME, "200")
        settings.restore()
        assert SETTING.read_text() == "99\n"

    host.call(body)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"namespace": 3}',
        json.dumps({"namespace": "another boot 4026531840", "settings": {NAME: ["1", "165"]}}).encode(),
        b"\xff\xfe" * 40_000,
    ],
)
def test_a_file_that_tells_nothing_of_this_namespace_is_passed_over(host: Namespace, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings").write_bytes(content)

    def body() -> None:
        settings = Sysctls(tmp_path / "settings")
        assert settings.set(NAME, "165")
        settings.restore()
        assert SETTING.read_text() == "30\n"

    host.call(body)


def test_a_file_leads_nowhere_else(host: Namespace, tmp_path: Path) -> None:
    def body() -> None:
        Sysctls(tmp_path / "settings").set(NAME, "165")
        told = json.loads((tmp_path / "settings").read_text())
        outside = tmp_path / "outside"
        outside.write_text("ours")
        told["settings"] = {f"../../../..{outside}": ["before", "ours"], str(outside): ["before", "ours"]}
        (tmp_path / "settings").write_text(json.dumps(told))
        Sysctls(tmp_path / "settings").restore()
        assert outside.read_text() == "ours"

    host.call(body)


def test_a_setting_that_the_kernel_does_not_have(host: Namespace) -> None:
    def body() -> None:
        assert Sysctls().get("core/no_such_setting") is None
        assert not Sysctls().set("core/no_such_setting", "1")

    host.call(body)

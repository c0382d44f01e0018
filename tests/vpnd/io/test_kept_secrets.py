"""Secrets that outlive the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vpnd.io.state import kept_secret


def test_it_is_made_once_and_only_for_us(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    first = kept_secret(directory, "crash-tokens", 32, os.urandom)
    assert kept_secret(directory, "crash-tokens", 32, os.urandom) == first
    assert (directory / "crash-tokens").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in directory.iterdir()] == ["crash-tokens"]


def test_one_that_others_could_read_or_is_cut_is_replaced(tmp_path: Path) -> None:
    first = kept_secret(tmp_path, "crash-tokens", 32, os.urandom)
    (tmp_path / "crash-tokens").chmod(0o644)
    second = kept_secret(tmp_path, "crash-tokens", 32, os.urandom)
    assert second != first
    (tmp_path / "crash-tokens").write_bytes(second[:5])
    assert kept_secret(tmp_path, "crash-tokens", 32, os.urandom) not in (first, second)
    assert (tmp_path / "crash-tokens").stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(bytes(32))
    (tmp_path / "crash-tokens").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        kept_secret(tmp_path, "crash-tokens", 32, os.urandom)

"""The userspace kernel that cannot be started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vpnd.io.shim import ShimStartError, start_shim


async def test_no_folder_for_its_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ShimStartError, match=r"socket: .*file: (Not a directory|File exists)"):
        await start_shim(tmp_path / "file" / "shim.sock", [])


async def test_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ShimStartError, match="python: No such file or directory"):
        await start_shim(tmp_path / "shim.sock", [])

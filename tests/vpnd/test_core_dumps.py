"""A process that holds keys leaves no core dump."""

from __future__ import annotations

import subprocess
import sys

import pytest

GET_DUMPABLE = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"


@pytest.mark.parametrize(("first", "dumpable"), [("", "1"), ("from pathlib import Path; from vpnd.app import run; run(Path('/nonexistent'))", "0")])
def test_the_daemon_cannot_be_dumped(first: str, dumpable: str) -> None:
    ran = subprocess.run([sys.executable, "-c", f"{first}\n{GET_DUMPABLE}"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == dumpable

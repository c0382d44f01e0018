"""What deploy/ offers: examples that the daemon accepts, units that agree with its defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab.certs import Authority

from vpnd.cli.daemon import main
from vpnd.config import load
from vpnd.config.model import DaemonConfig

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


@pytest.mark.parametrize("example", sorted((DEPLOY / "examples").glob("*.conf")), ids=lambda path: path.stem)
def test_examples_are_accepted(example: Path, tmp_path: Path) -> None:
    authority = Authority.make()
    own = authority.issue("headquarters.example")
    for folder, name, data in (
        ("x509", "gateway.pem", own.certificate_pem),
        ("x509ca", "ca.pem", authority.credential.certificate_pem),
        ("private", "gateway.pem", own.key_pem),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(data)
    copied = Path(shutil.copy(example, tmp_path))
    assert main(["check", str(copied)]) == 0
    loaded = load(copied)
    assert loaded.configuration.connections
    assert loaded.warnings == ()


UNITS = sorted(path.name for path in (DEPLOY / "systemd").glob("*.service"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is missing")
def test_units_are_understood_by_systemd(tmp_path: Path) -> None:
    """With their drop-ins; programs stand elsewhere on this machine."""
    shutil.copytree(DEPLOY / "systemd", tmp_path / "units")
    for unit in UNITS:
        path = tmp_path / "units" / unit
        path.write_text(re.sub(r"/opt/vpnd/bin/\S+", "/bin/true", path.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(f"./{unit}" for unit in UNITS)], cwd=tmp_path / "units", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_units_use_the_default_paths(unit: str) -> None:
    text = (DEPLOY / "systemd" / unit).read_text()
    assert "Type=notify" in text
    for path in re.findall(r"--socket (\S+)", text):
        assert Path(path) == DaemonConfig().shim_socket

"""docs/configuration.md and the code name the same options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vpnd.config import load_text
from vpnd.config.model import DaemonConfig

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text()
ROW = re.compile(r"^\| `([a-z_]+)` \| (?:`([^`]*)`)? ?\|", re.MULTILINE)


def test_the_daemons_options_and_defaults(tmp_path: Path) -> None:
    rows = ROW.findall(DOCUMENT)
    assert [name for name, _ in rows] == [field.name for field in dataclasses.fields(DaemonConfig)]
    written = "".join(f"{name} = {value}\n" for name, value in rows if value)
    assert load_text(f"vpnd {{\n{written}}}", tmp_path).daemon == DaemonConfig()

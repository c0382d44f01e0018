"""Debian's swanctl on a file that has an `mpls` section, which VICI cannot say: it loads the rest, and labels wait for a reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab.provider_edges import provider_edges
from lab.strongswan import StrongSwan

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]


def test_load_all_leaves_the_labels_alone(tmp_path: Path) -> None:
    with provider_edges(tmp_path, capture=False) as edges:
        edges.reaches("red")

        def vrfs() -> dict[str, str]:
            return {row["name"]: row["state"] for row in json.loads(edges.a.vpnctl("--json", "mpls", "vrfs"))}

        edges.write(("red", "blue"))
        tool = StrongSwan(edges.lab.a.gateway, tmp_path / "swanctl" / "swanctl.conf")
        tool.prepare()
        tool.config.write_text(edges.a.config.read_text())
        assert "loaded connection 'pe'" in tool.load(edges.a.vici_path)
        assert vrfs() == {"red": "ok", "blue": "ok", "green": "ok"}
        assert edges.lost("red") == edges.lost("green") == 0
        edges.a.vpnctl("reload")
        assert vrfs() == {"red": "ok", "blue": "ok"}
        assert edges.lost("red") == 0

"""Options about the headers of ESP packets: what is copied between inner and outer ones, and TFC padding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernel_shim.channel.linux import XFRM
from kernel_shim.model import TFC_TO_MTU, HeaderCopies
from vpnd.config.capabilities import impossible
from vpnd.config.errors import ConfigErrors
from vpnd.config.model import ChildConfig
from vpnd.config.tree import Section
from vpnd.config.validate import validate_connection


def child(**options: str) -> ChildConfig:
    return validate_connection(Section.of({"gw": {"children": {"net": options}}})).children["net"]


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, HeaderCopies()),
        ({"copy_dscp": "out"}, HeaderCopies(dscp_out=True, dscp_in=False)),
        ({"copy_dscp": "in"}, HeaderCopies(dscp_out=False, dscp_in=True)),
        ({"copy_dscp": "yes"}, HeaderCopies(dscp_out=True, dscp_in=True)),
        ({"copy_dscp": "no"}, HeaderCopies(dscp_out=False, dscp_in=False)),
        ({"copy_ecn": "no", "copy_df": "no"}, HeaderCopies(ecn=False, df=False)),
    ],
)
def test_what_is_copied(options: dict[str, str], copies: HeaderCopies) -> None:
    assert child(**options).copies == copies


@pytest.mark.parametrize(("text", "padding"), [("0", 0), ("1200", 1200), ("mtu", TFC_TO_MTU)])
def test_tfc_padding(text: str, padding: int) -> None:
    assert child(tfc_padding=text).tfc_padding == padding


@pytest.mark.parametrize("options", [{"copy_dscp": "sometimes"}, {"copy_ecn": "both"}, {"tfc_padding": "-1"}, {"tfc_padding": "70000"}, {"tfc_padding": "max"}])
def test_other_values_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigErrors):
        child(**options)


def test_a_kernel_without_padding_is_named() -> None:
    padded = child(tfc_padding="mtu")
    assert [option for option, _ in impossible(padded, XFRM)] == []
    assert [option for option, _ in impossible(padded, replace(XFRM, tfc_padding=False))] == ["tfc_padding"]

"""Options about the life of SAs: lifetimes and their bounds, what follows an end, unique policies; and marks and interface ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_shim.model import NO_MARK, Mark
from vpnd.config import load_text
from vpnd.config.errors import ConfigErrors
from vpnd.config.model import ChildConfig, ConnectionConfig, SameMark, StartAction, Unique, UniqueMark, UniquePolicy
from vpnd.config.tree import Plain, Section
from vpnd.config.validate import validate_connection

NONE, TRAP, START = StartAction.NONE, StartAction.TRAP, StartAction.START


def connection(**options: str | Plain) -> ConnectionConfig:
    return validate_connection(Section.of({"gw": {"remote_addrs": "192.0.2.2", **options}}))


def child(**options: str) -> ChildConfig:
    return connection(children={"net": options}).children["net"]


def complaints(options: Plain) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        connection(**options)  # type: ignore[arg-type]
    return [f"{error.path.rsplit('.', 1)[-1]}: {error.message}" for error in caught.value.errors]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (14400, 0, 1440, 1440)),
        ({"reauth_time": "1h"}, (0, 3600, 360, 360)),
        ({"rekey_time": "1h", "reauth_time": "10h"}, (3600, 36000, 3600, 3600)),
        ({"rekey_time": "0"}, (0, 0, 0, 0)),
        ({"rekey_time": "4s"}, (4, 0, 1, 1)),
        ({"rekey_time": "1h", "over_time": "10m", "rand_time": "1m"}, (3600, 0, 600, 60)),
    ],
)
def test_missing_lifetimes_of_an_ike_sa_follow_from_the_others(options: Plain, expected: tuple[int, ...]) -> None:
    found = connection(**options)  # type: ignore[arg-type]
    assert (found.rekey_time, found.reauth_time, found.over_time, found.rand_time) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"over_time": "0"}, "over_time: without over_time the IKE SA would be deleted just when it is to be replaced"),
        ({"rekey_time": "1m", "rand_time": "2m"}, "rand_time: rand_time is more than rekey_time: the IKE SA could be due as soon as it stands"),
        ({"reauth_time": "1m", "rand_time": "2m"}, "rand_time: rand_time is more than reauth_time: the IKE SA could be due as soon as it stands"),
        ({"unique": "maybe"}, "unique: 'maybe' is not one of never, no, keep, replace"),
        ({"children": {"net": {"rand_time": "2h"}}}, "rand_time: rand_time is more than rekey_time: the SA could be due as soon as it stands"),
        ({"children": {"net": {"rekey_bytes": "1K"}}}, "rekey_bytes: an SA of fewer than 65536 bytes would be rekeyed without end"),
        ({"children": {"net": {"life_packets": "9"}}}, "life_packets: an SA of fewer than 64 packets would be rekeyed without end"),
        ({"children": {"net": {"life_packets": "1"}}}, "life_packets: an SA of fewer than 64 packets would be rekeyed without end"),
        ({"children": {"net": {"rekey_bytes": "0", "life_bytes": "9"}}}, "life_bytes: an SA of fewer than 65536 bytes would be rekeyed without end"),
        (
            {"children": {"net": {"rekey_time": "1h", "life_time": "1h"}}},
            "life_time: life_time is not more than rekey_time: the SA would go before its successor comes",
        ),
    ],
)
def test_absurd_lifetimes_are_refused(options: Plain, complaint: str) -> None:
    assert complaints(options) == [complaint]


@pytest.mark.parametrize(
    "value",
    ["-1", "1.5", "1e9", "nan", "inf", "1y", "0x", "1_000", "\u0663", "9223372036854775808", "18446744073709551616", "99999999999d", "99999999999G"],
)
@pytest.mark.parametrize("option", ["rekey_time", "life_time", "rand_time", "rekey_bytes", "life_bytes", "rand_bytes", "rekey_packets", "life_packets"])
def test_what_is_no_lifetime_is_refused_with_its_place(option: str, value: str) -> None:
    text = f"connections {{\n gw {{\n  remote_addrs = 192.0.2.2\n  children {{\n   net {{\n    {option} = {value}\n   }}\n  }}\n }}\n}}\n"
    with pytest.raises(ConfigErrors) as caught:
        load_text(text, Path("/nonexistent"))
    (error,) = caught.value.errors
    assert str(error).startswith(f"<text>:6:{len(option) + 8}: connections.gw.children.net.{option}: ")


def test_the_greatest_lifetimes_fit_what_kernels_count_with() -> None:
    for unit in ("bytes", "packets"):
        for greatest in (child(**{f"rekey_{unit}": str(2**63 - 1)}), child(**{f"life_{unit}": str(2**63 - 1)})):
            found = [getattr(greatest, f"{which}_{unit}") for which in ("rekey", "life", "rand")]
            assert max(found) < 2**63
    assert child(rekey_time=str(2**31 - 1)).life_time < 2**32


@pytest.mark.parametrize("seconds", range(1, 12))
def test_a_successor_has_time_to_come_however_short_the_life(seconds: int) -> None:
    found = child(rekey_time=f"{seconds}s")
    assert found.life_time >= found.rekey_time + 1
    assert found.rand_time <= found.rekey_time / 2


def test_the_random_part_that_follows_from_a_long_life_leaves_half_of_the_time() -> None:
    found = child(rekey_time="1h", life_time="24h")
    assert (found.rekey_time, found.life_time, found.rand_time) == (3600, 86400, 1800)


@pytest.mark.parametrize(
    ("text", "action"),
    [("none", NONE), ("clear", NONE), ("trap", TRAP), ("start", START), ("restart", START), ("trap|start", TRAP | START), ("start | trap", TRAP | START)],
)
def test_what_follows_an_end(text: str, action: StartAction) -> None:
    found = child(close_action=text, dpd_action=text)
    assert found.close_action == found.dpd_action == action


def test_several_start_actions() -> None:
    found = child(start_action="trap|start")
    assert found.start_action == TRAP | START
    assert [action.text for action in (NONE, TRAP, START, TRAP | START)] == ["none", "trap", "start", "trap|start"]


def test_unique_policies() -> None:
    assert connection().unique is UniquePolicy.NO
    assert [connection(unique=policy.value).unique for policy in UniquePolicy] == list(UniquePolicy)


def test_marks_and_interface_ids() -> None:
    assert child().mark_in == NO_MARK
    found = child(mark_in="0x2a", mark_out="1/0xff", mark_in_sa="yes", set_mark_out="0x10/0xf0", if_id_in="7", inactivity="5m")
    assert (found.mark_in, found.mark_out, found.mark_in_sa) == (Mark(42, 0xFFFFFFFF), Mark(1, 255), True)
    assert (found.set_mark_in, found.set_mark_out) == (NO_MARK, Mark(0x10, 0xF0))
    assert (found.if_id_in, found.if_id_out, found.inactivity) == (7, 0, 300)


def test_marks_and_interface_ids_that_are_given() -> None:
    found = child(mark_in="%unique", mark_out="%unique-dir/0xff", set_mark_in="%same", set_mark_out="%same/0xf", if_id_in="%unique", if_id_out="%UNIQUE-dir")
    assert (found.mark_in, found.mark_out) == (UniqueMark(), UniqueMark(each_way=True, mask=0xFF))
    assert (found.set_mark_in, found.set_mark_out) == (SameMark(), SameMark(0xF))
    assert (found.if_id_in, found.if_id_out) == (Unique(each_way=True), Unique(each_way=True))
    of_connection = connection(if_id_in="%unique", if_id_out="%unique", children={"net": {"if_id_in": "9"}}).children["net"]
    assert (of_connection.if_id_in, of_connection.if_id_out) == (9, Unique(of_ike_sa=True))
    assert any("one number" in text for text in complaints({"children": {"net": {"if_id_in": "%unique", "if_id_out": "%unique", "xfrm_interface": "ipsec0"}}}))
    trapped = {"if_id_in": "%unique", "remote_addrs": "192.0.2.1", "children": {"net": {"start_action": "trap"}}}
    assert any("without an IKE SA" in text for text in complaints(trapped))


def test_a_child_has_the_interface_ids_of_its_connection_unless_it_has_its_own() -> None:
    both = connection(if_id_in="7", if_id_out="8", children={"net": {"if_id_in": "9"}}).children["net"]
    assert (both.if_id_in, both.if_id_out) == (9, 8)


def test_an_interface_of_ours_has_the_number_of_its_child() -> None:
    found = child(if_id_in="42", if_id_out="42", xfrm_interface="ipsec0", xfrm_routes="no")
    assert (found.xfrm_interface, found.xfrm_routes) == ("ipsec0", False)
    assert connection(if_id_in="42", if_id_out="42", children={"net": {"xfrm_interface": "ipsec0"}}).children["net"].if_id_out == 42
    for wrong in ({}, {"if_id_out": "42"}, {"if_id_in": "41", "if_id_out": "42"}):
        assert any("if_id_in and if_id_out" in text for text in complaints({"children": {"net": {"xfrm_interface": "ipsec0", **wrong}}}))
    for name in ("a" * 16, "..", "a/b", "eth0:1", "a%d", "\u00e4", 'a"', "eth*", "a\\"):
        assert any("not the name of an interface" in text for text in complaints({"children": {"net": {"xfrm_interface": name}}}))

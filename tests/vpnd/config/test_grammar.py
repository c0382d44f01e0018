"""The grammar of swanctl.conf: what it means, where each value stands, and what is said about what it is not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpnd.config.errors import ConfigError
from vpnd.config.grammar import MAX_INCLUDE_DEPTH, MAX_NESTING, parse_file, parse_text
from vpnd.config.tree import Scalar, Section


def plain(text: str) -> dict[str, object]:
    return parse_text(text).root.plain()


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_text(text, "f")
    return str(caught.value)


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.conf").write_text(text)
    return directory / f"{next(iter(files))}.conf"


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", {}),
        ("# nothing\n\n  # at all", {}),
        ("a = b", {"a": "b"}),
        ("a=b", {"a": "b"}),
        ("a = b c   d # comment", {"a": "b c d"}),
        ("a = 10.0.0.0/8[tcp/80], fec0::1 ", {"a": "10.0.0.0/8[tcp/80], fec0::1"}),
        ("a = x=y:z{", {"a": "x=y:z{"}),
        ("a\n=\nb = c\n", {"b": "c"}),
        ('a = "b  # c } d"', {"a": "b  # c } d"}),
        ('a = "b" c "d"', {"a": "b c d"}),
        (r'a = "\"\\\n\t\r\x"', {"a": '"\\\n\t\rx'}),
        ('a = "one \\\n two"', {"a": "one  two"}),
        ('a = "one\n two"', {"a": "one\n two"}),
        ('a = ""', {"a": ""}),
        ("s { a = b }", {"s": {"a": "b"}}),
        ("s{a=b\nt{c=d}}", {"s": {"a": "b", "t": {"c": "d"}}}),
        ("s # comment\n{\n}", {"s": {}}),
        ("s { a = 1\nb = 2 }\ns { b = 3\nc = 4 }", {"s": {"a": "1", "b": "3", "c": "4"}}),
        ("a = 1\na = 2", {"a": "2"}),
        ("a = 1\na =", {}),
        ("include = x", {"include": "x"}),
        ("includes = x", {"includes": "x"}),
        ("a = b\r\ns {\r\n c = d\r\n}\r\n", {"a": "b", "s": {"c": "d"}}),
        ("ä = ö", {"ä": "ö"}),
    ],
)
def test_what_it_means(text: str, tree: dict[str, object]) -> None:
    assert plain(text) == tree


def test_references_inherit_values_and_sections() -> None:
    assert plain("""
        conn { dpd = 30
               local { auth = psk
                       id = moon } }
        more { dpd = 60
               version = 2 }
        connections {
          a : conn, more { local { id = sun } }
          b : connections.a { dpd = }
          c { children { net : child { mode = transport } } }
        }
        child { mode = tunnel
                ts = dynamic }
        """)["connections"] == {
        "a": {"dpd": "30", "version": "2", "local": {"id": "sun", "auth": "psk"}},
        "b": {"version": "2", "local": {"id": "sun", "auth": "psk"}},
        "c": {"children": {"net": {"mode": "transport", "ts": "dynamic"}}},
    }


def test_inherited_sections_follow_a_sections_own() -> None:
    root = parse_text("t { one {}\n two {} }\nu { zero {}\n one {} }\ns : t, u { three {}\n two {} }").root
    section = root.section("s")
    assert section
    assert list(section.entries) == ["three", "two", "one", "zero"]


def test_what_references_lead_to_is_known() -> None:
    assert parse_text("a { x {} }\nb : a.x {}\nc {}").referenced == {"a"}


def test_every_key_and_value_knows_its_place() -> None:
    root = parse_text('one {\n  two =   "x"\n\tthree { four = a b }\n}\n', "f").root
    one = root.entries["one"]
    assert isinstance(one, Section)
    assert one.key_position == ("f", 1, 1)
    two = one.entries["two"]
    assert isinstance(two, Scalar)
    assert (two.key_position, two.position) == (("f", 2, 3), ("f", 2, 11))
    three = one.entries["three"]
    assert isinstance(three, Section)
    assert three.key_position == ("f", 3, 2)
    four = three.entries["four"]
    assert (four.key_position, four.position) == (("f", 3, 10), ("f", 3, 17))


def test_places_after_strings_of_several_lines() -> None:
    root = parse_text('a = "x\ny \\\n z"\nb = c', "f").root
    assert root.entries["b"].position == ("f", 4, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "f:1:2: '=', ':' or '{' expected after 'a', not the end of the file"),
        ("a b", "f:1:3: '=', ':' or '{' expected after 'a', not 'b'"),
        ("}", "f:1:1: '}' without a section"),
        ("s {\n a = b\n", "f:1:1: section 's' is not closed"),
        ("s {\n t {\n}", "f:1:1: section 's' is not closed"),
        ("= b", "f:1:1: unexpected '=', a name was expected"),
        ('"a" = b', "f:1:1: unexpected '\"', a name was expected"),
        ("a.b = c", "f:1:2: a name cannot contain '.'"),
        ('a =\n\nb = "c\n', "f:3:5: string without its closing quote"),
        ('a = "b\\', "f:1:5: string without its closing quote"),
        ("a : {}", "f:1:5: the name of a section was expected"),
        ("a : b. {}", "f:1:5: the name of a section was expected"),
        ("a : b c {}", "f:1:7: ',' or '{' expected after the reference 'b'"),
        ("\n a : b, c {}\nb {}", "f:2:9: there is no section 'c' to refer to"),
        ("a : b {}\nb : a {}", "f:1:5: the reference to 'b' leads back to its own section"),
        ("a : a {}", "f:1:5: the reference to 'a' leads back to its own section"),
        ("a { b : a.b.c {} }", "f:1:9: the reference to 'a.b.c' leads back to its own section"),
        ("a { b : a {} }", f"f:1:5: references make sections more than {MAX_NESTING} deep"),
        ("a = b\na { }", "f:2:1: 'a' is both a value and a section"),
        ("a = b\0c", "f:1:6: NUL character"),
        ("include", "f:1:8: '=', ':' or '{' expected after 'include', not the end of the file"),
        ("include ", "f:1:9: include without a file"),
        ("include no-such-file", "f:1:9: cannot read no-such-file: No such file or directory"),
        ('include "a\0b"', "f:1:11: NUL character"),
        ("s {" * (MAX_NESTING + 1), f"f:1:{3 * MAX_NESTING + 1}: sections are more than {MAX_NESTING} deep"),
    ],
)
def test_what_it_is_not(text: str, message: str) -> None:
    assert complaint(text) == message


def test_includes_are_relative_to_their_file_and_may_stand_in_sections(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    main = write(tmp_path, main="s {\n a = before\n include conf.d/one.conf\n}\ninclude conf.d/*.inc")
    write(tmp_path / "conf.d", one='a = after\ninclude "two.conf" # comment\n', two="t { b = c }")
    (tmp_path / "conf.d" / "2.inc").write_text("x = 2")
    (tmp_path / "conf.d" / "1.inc").write_text("x = 1\ny = 1")
    root = parse_file(main).root
    assert root.plain() == {"s": {"a": "after", "t": {"b": "c"}}, "x": "2", "y": "1"}
    assert root.entries["y"].position == (str(tmp_path / "conf.d" / "1.inc"), 2, 5)


def test_a_pattern_that_matches_nothing_is_no_error_and_escapes_work(tmp_path: Path) -> None:
    (tmp_path / "a b#.conf").write_text("x = 1")
    assert parse_file(write(tmp_path, main="include none/*.conf\ninclude a\\ b\\#.conf")).root.plain() == {"x": "1"}


def test_includes_that_go_in_a_circle_end(tmp_path: Path) -> None:
    main = write(tmp_path, main="include main.conf")
    with pytest.raises(ConfigError, match=f"include each other more than {MAX_INCLUDE_DEPTH} deep"):
        parse_file(main)
    with pytest.raises(ConfigError, match="more than"):
        parse_file(write(tmp_path, many="include m*.conf\ninclude m*.conf\ninclude m*.conf"))


def test_errors_in_an_included_file_name_it(tmp_path: Path) -> None:
    main = write(tmp_path, main="include other.conf", other="a = b\n}")
    with pytest.raises(ConfigError) as caught:
        parse_file(main)
    assert (caught.value.file, caught.value.line, caught.value.column) == (str(tmp_path / "other.conf"), 2, 1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        parse_file(tmp_path / "none.conf")
    with pytest.raises(ConfigError, match="Is a directory"):
        parse_file(tmp_path)
    (tmp_path / "latin.conf").write_bytes("a = b\nc = \xe4".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        parse_file(tmp_path / "latin.conf")
    assert (caught.value.line, caught.value.column, caught.value.message) == (2, 5, "not UTF-8")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_bytes(b"\xef\xbb\xbfa = b")
    assert parse_file(tmp_path / "a.conf").root.plain() == {"a": "b"}


names = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Z"], blacklist_characters='#{}:.,="'), min_size=1, max_size=8).filter(
    lambda name: name != "include" and not name.isspace()
)
values = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), min_size=1, max_size=20)
sections = st.recursive(st.dictionaries(names, values, max_size=4), lambda below: st.dictionaries(names, values | below, max_size=4), max_leaves=15)


def render(section: dict[str, object]) -> str:
    lines = []
    for name, value in section.items():
        if isinstance(value, dict):
            lines.append(f"{name} {{\n{render(value)}\n}}")
        else:
            quoted = str(value).replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{name} = "{quoted}"')
    return "\n".join(lines)


@pytest.mark.property
@given(sections)
def test_what_is_written_is_read(section: dict[str, object]) -> None:
    assert plain(render(section)) == section


@pytest.mark.property
@settings(max_examples=200)
@given(st.text(st.sampled_from('ab{}:.,="\\# \t\r\n\0é'), max_size=60))
@example("a : b { : }")
@example('a = "\\\r')
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_text(text)

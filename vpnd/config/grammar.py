"""The grammar of strongswan.conf(5), which swanctl.conf shares.

    statement  := name = [value]  |  name [: reference, ...] { statement* }  |  include pattern
    value      := words and "quoted strings" to the end of the line, joined by one blank
    reference  := absolute.name.of.a.section

Sections of one name extend each other, the last value of a key wins, an empty value clears an inherited one. A section's own
entries come before those of the sections that it refers to, which follow from left to right.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vpnd.config.errors import ConfigError, Position
from vpnd.config.tree import Scalar, Section

MAX_INCLUDE_DEPTH: Final = 10  # strongSwan's
MAX_FILES: Final = 4096  # over all includes: a glob that matches itself ends
MAX_FILE_SIZE: Final = 16 * 1024 * 1024
MAX_NESTING: Final = 32  # sections in sections; the deepest option of swanctl.conf is at 6
MAX_ENTRIES: Final = 2_000_000  # after references are resolved: they can multiply

_NAME_ENDS: Final = frozenset('#{}:.,="\r\n\t ')
_NAME: Final = re.compile(r'[^#{}:.,="\r\n\t \0]*')
_REFERENCE: Final = re.compile(r'[^#{}:,="\r\n\t \0]*')
_WORD: Final = re.compile(r'[^#}"\r\n\t \0]*')
_PATTERN_ENDS: Final = frozenset("#}\r\n\t ")
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A configuration with its references resolved; `referenced` names the top-level sections that a reference leads to."""

    root: Section
    referenced: frozenset[str]


def parse_file(path: Path) -> Parsed:
    """Parse a file with its includes and resolve its references. Raises ConfigError."""
    parser = _Parser()
    parser.file(path, parser.root, 0, None)
    return _Resolver(parser.root).resolve()


def parse_text(text: str, name: str = "<text>") -> Parsed:
    """Parse `text` as if it were the file `name`: includes are relative to its directory. Raises ConfigError."""
    parser = _Parser()
    parser.text(text, name, parser.root, 0)
    return _Resolver(parser.root).resolve()


@dataclass(slots=True)
class _Raw:
    """A section as written: values (None: cleared), sections, and references that are not resolved yet."""

    position: Position | None = None
    values: dict[str, Scalar | None] = field(default_factory=dict)
    sections: dict[str, _Raw] = field(default_factory=dict)
    references: list[tuple[str, Position]] = field(default_factory=list)


class _Parser:
    """All files of one configuration."""

    def __init__(self) -> None:
        self.root = _Raw()
        self._files = 0

    def file(self, path: Path, section: _Raw, depth: int, included_at: Position | None) -> None:
        self._files += 1
        if self._files > MAX_FILES:
            raise ConfigError(f"more than {MAX_FILES} files included", position=included_at)
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_FILE_SIZE + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"cannot read {path}: {reason}", position=included_at) from error
        if len(data) > MAX_FILE_SIZE:
            raise ConfigError(f"{path} is larger than {MAX_FILE_SIZE} bytes", position=included_at)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = data[: error.start]
            column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
            raise ConfigError("not UTF-8", position=Position(str(path), before.count(b"\n") + 1, column)) from error
        self.text(text, str(path), section, depth)

    def text(self, text: str, name: str, section: _Raw, depth: int) -> None:
        _FileParser(self, text, name, depth).statements(section, None, 0)

    def include(self, pattern: str, section: _Raw, depth: int, position: Position) -> None:
        if not pattern:
            raise ConfigError("include without a file", position=position)
        if "\0" in pattern:
            raise ConfigError("file name with a NUL", position=position)
        if depth >= MAX_INCLUDE_DEPTH:
            raise ConfigError(f"files include each other more than {MAX_INCLUDE_DEPTH} deep", position=position)
        path = Path(position.file).parent / pattern
        if glob.has_magic(pattern):
            for match in sorted(glob.glob(str(path))):
                self.file(Path(match), section, depth + 1, position)
        else:
            self.file(path, section, depth + 1, position)


class _FileParser:
    """One file, left to right; `_at` is the next character."""

    def __init__(self, parser: _Parser, text: str, name: str, depth: int) -> None:
        self._parser = parser
        self._text = text
        self._name = name
        self._depth = depth
        self._at = 0
        self._line = 1
        self._line_start = 0

    def statements(self, section: _Raw, name: str | None, nesting: int) -> None:
        """Up to the end of the file, or of the section `name`."""
        while True:
            self._skip_blank_lines()
            character = self._peek()
            if not character:
                if name is not None:
                    raise ConfigError(f"section '{name}' is not closed", position=section.position)
                return
            if character == "}":
                if name is None:
                    raise self._error("'}' without a section")
                self._at += 1
                return
            if character in _NAME_ENDS:
                raise self._error(f"unexpected {character!r}, a name was expected")
            self._statement(section, nesting)

    def _statement(self, section: _Raw, nesting: int) -> None:
        position = self._position()
        name = self._take(_NAME)
        if name == "include" and self._peek() in ("\t", " "):
            self._skip_blanks()
            if self._peek() != "=":
                place = self._position()
                self._parser.include(self._pattern(), section, self._depth, place)
                return
        self._skip_blank_lines()
        character = self._peek()
        if character == "=":
            self._at += 1
            section.values[name] = self._value(position)
        elif character in ("{", ":"):
            self._section(section, name, position, nesting)
        elif character == ".":
            raise self._error("a name cannot contain '.'")
        else:
            found = repr(character) if character else "the end of the file"
            raise self._error(f"'=', ':' or '{{' expected after '{name}', not {found}")

    def _section(self, parent: _Raw, name: str, position: Position, nesting: int) -> None:
        if nesting >= MAX_NESTING:
            raise ConfigError(f"sections are more than {MAX_NESTING} deep", position=position)
        references: list[tuple[str, Position]] = []
        if self._peek() == ":":
            self._at += 1
            references = self._references()
        self._at += 1  # the brace
        section = parent.sections.setdefault(name, _Raw(position))
        section.references += references
        self.statements(section, name, nesting + 1)

    def _references(self) -> list[tuple[str, Position]]:
        references = []
        while True:
            self._skip_blank_lines()
            position = self._position()
            name = self._take(_REFERENCE)
            if not all(name.split(".")):
                raise ConfigError("the name of a section was expected", position=position)
            references.append((name, position))
            self._skip_blank_lines()
            character = self._peek()
            if character == "{":
                return references
            if character != ",":
                raise self._error(f"',' or '{{' expected after the reference '{name}'")
            self._at += 1

    def _value(self, key: Position) -> Scalar | None:
        parts = []
        self._skip_blanks()
        position = self._position()
        while (character := self._peek()) and character not in "\n#}":
            parts.append(self._string() if character == '"' else self._take(_WORD))
            self._skip_blanks()
        return Scalar(" ".join(parts).encode(), position, key) if parts else None

    def _string(self) -> str:
        start = self._position()
        self._at += 1
        parts: list[str] = []
        while True:
            character = self._peek()
            if not character:
                raise ConfigError("string without its closing quote", position=start)
            if character == '"':
                self._at += 1
                return "".join(parts)
            if character == "\\":
                self._at += 1
                if self._text.startswith("\r\n", self._at):
                    self._at += 1
                escaped = self._peek()
                if not escaped:
                    raise ConfigError("string without its closing quote", position=start)
                if escaped != "\n":  # else the line goes on
                    parts.append(_ESCAPES.get(escaped, escaped))
            elif character != "\r":
                parts.append(character)
            self._advance()

    def _pattern(self) -> str:
        if self._peek() == '"':
            return self._string()
        parts: list[str] = []
        while (character := self._peek()) and character not in _PATTERN_ENDS:
            self._at += 1
            if character == "\\" and self._peek() in ('"', "#", "}", " "):
                character = self._peek()
                self._at += 1
            parts.append(character)
        return "".join(parts)

    def _peek(self) -> str:
        character = self._text[self._at : self._at + 1]
        if character == "\0":
            raise self._error("NUL character")
        return character

    def _advance(self) -> None:
        if self._text[self._at] == "\n":
            self._line += 1
            self._line_start = self._at + 1
        self._at += 1

    def _take(self, pattern: re.Pattern[str]) -> str:
        start = self._at
        if match := pattern.match(self._text, start):
            self._at = match.end()
        return self._text[start : self._at]

    def _skip_blanks(self) -> None:
        while self._peek() in ("\t", " ", "\r"):
            self._at += 1

    def _skip_blank_lines(self) -> None:
        while character := self._peek():
            if character == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif character in "\t\r \n":
                self._advance()
            else:
                return

    def _position(self) -> Position:
        return Position(self._name, self._line, self._at - self._line_start + 1)

    def _error(self, message: str) -> ConfigError:
        # Not through _peek: it may be the character there that is wrong.
        return ConfigError(message, position=self._position())


class _Resolver:
    """Replaces references by what they refer to. A section is then a stack of raw sections, the first that has an entry wins."""

    def __init__(self, root: _Raw) -> None:
        self._root = root
        self._entries = 0
        self._referenced: set[str] = set()

    def resolve(self) -> Parsed:
        root = self._merge([self._root], 0)
        return Parsed(root, frozenset(self._referenced))

    def _merge(self, layers: list[_Raw], nesting: int) -> Section:
        if nesting > MAX_NESTING:
            raise ConfigError(f"references make sections more than {MAX_NESTING} deep", position=layers[0].position)
        merged = Section(key_position=layers[0].position)
        cleared: set[str] = set()
        for layer in layers:
            for name, value in layer.values.items():
                if name in merged.entries or name in cleared:
                    continue
                self._count(layer.position)
                if value is None:
                    cleared.add(name)
                else:
                    merged.entries[name] = value
        names = dict.fromkeys(name for layer in layers for name in layer.sections)
        for name in names:
            below = self._below(layers, name, [])
            if name in merged.entries:
                raise ConfigError(f"'{name}' is both a value and a section", position=below[0].position)
            self._count(below[0].position)
            merged.entries[name] = self._merge(below, nesting + 1)
        return merged

    def _below(self, layers: list[_Raw], name: str, visiting: list[_Raw]) -> list[_Raw]:
        found: list[_Raw] = []
        for layer in layers:
            if name in layer.sections:
                found += [raw for raw in self._layers(layer.sections[name], visiting) if all(raw is not other for other in found)]
        return found

    def _layers(self, section: _Raw, visiting: list[_Raw]) -> list[_Raw]:
        """The section and, left to right, those that it refers to, with those that they refer to."""
        layers = [section]
        for name, position in section.references:
            if any(section is other for other in visiting) or len(visiting) > MAX_NESTING:
                raise ConfigError(f"the reference to '{name}' leads back to its own section", position=position)
            self._referenced.add(name.split(".")[0])
            found = [self._root]
            for part in name.split("."):
                found = self._below(found, part, [*visiting, section])
            if not found:
                raise ConfigError(f"there is no section '{name}' to refer to", position=position)
            self._count(position, len(found))
            layers += found
        return layers

    def _count(self, position: Position | None, by: int = 1) -> None:
        self._entries += by
        if self._entries > MAX_ENTRIES:
            raise ConfigError(f"more than {MAX_ENTRIES} entries after references are resolved", position=position)

"""Reads the options of one section: value by value, typed, with a complaint instead of an exception, and none left unread."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from vpnd.config.errors import ConfigError, Position
from vpnd.config.tree import Items, Node, Scalar, Section

MAX_SECONDS: Final = 2**31 - 1
MAX_OCTETS: Final = 2**63 - 1  # and packets; more than any SA carries, and a random part of it still fits the 64 bits that kernels have
MAX_SHOWN: Final = 80  # characters of a bad value that a complaint repeats

_INTEGER: Final = re.compile(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})")
_SECONDS: Final = re.compile(_INTEGER.pattern + r" *([sSmMhHdD]?)")
_OCTETS: Final = re.compile(_INTEGER.pattern + r" *([kKmMgG]?)")
_ACCOUNT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?|[0-9]{1,10}")
_SECONDS_OF: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_OCTETS_OF: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_BOOLEANS: Final = {"yes": True, "true": True, "enabled": True, "1": True, "no": False, "false": False, "disabled": False, "0": False}

T = TypeVar("T")
Harmless = Callable[[str], bool]
"""Whether a value of an option that is not implemented asks for just what happens anyway."""


class Reader:
    """A section under its dotted `path`. Complaints go to `errors`, which the readers of one configuration share."""

    def __init__(self, section: Section, path: str, errors: list[ConfigError]) -> None:
        self.section = section
        self.path = path
        self.errors = errors
        self._read: set[str] = set()

    def complain(self, message: str, option: str = "", node: Node | None = None, *, at_key: bool = False) -> None:
        node = node or self.section.entries.get(option)
        position = node.key_position if node and at_key else node.position if node else self.section.position
        self.errors.append(ConfigError(message, path=f"{self.path}.{option}" if option else self.path, position=position))

    def position(self, option: str) -> Position | None:
        node = self.section.entries.get(option)
        return node.position if node else self.section.position

    def convert(self, option: str, default: T, parse: Callable[[str], T]) -> T:
        """A plain value through `parse`, whose ValueError becomes the complaint."""
        self._read.add(option)
        node = self.section.entries.get(option)
        if node is None:
            return default
        if not isinstance(node, Scalar):
            self.complain("one value was expected", option, at_key=True)
            return default
        try:
            return parse(node.text)
        except ValueError as error:
            self.complain(str(error), option)
            return default

    def convert_all(self, option: str, parse: Callable[[str], T]) -> tuple[T, ...]:
        """A list, or a comma-separated value, through `parse`. Empty when the option is not there."""
        result = []
        for item in self.items(option):
            try:
                result.append(parse(item.text))
            except ValueError as error:
                self.complain(str(error), option, item)
        return tuple(result)

    def items(self, option: str) -> Sequence[Scalar]:
        """A list's values; a plain value is split at its commas."""
        self._read.add(option)
        node = self.section.entries.get(option)
        if isinstance(node, Items):
            return node.items
        if isinstance(node, Scalar):
            return split(node)
        if node is not None:
            self.complain("a list was expected", option, at_key=True)
        return ()

    def blob(self, option: str) -> bytes | None:
        self._read.add(option)
        node = self.section.entries.get(option)
        if node is not None and not isinstance(node, Scalar):
            self.complain("one value was expected", option, at_key=True)
            return None
        return node.value if node else None

    def text(self, option: str, default: str) -> str:
        return self.convert(option, default, printable)

    def boolean(self, option: str, default: bool) -> bool:
        return self.convert(option, default, boolean)

    def integer(self, option: str, default: int, *, minimum: int = 0, maximum: int = 2**32 - 1) -> int:
        return self.convert(option, default, lambda text: integer(text, minimum, maximum))

    def seconds(self, option: str, default: float | None) -> float | None:
        return self.convert(option, default, seconds)

    def octets(self, option: str, default: int | None) -> int | None:
        return self.convert(option, default, octets)

    def choice(self, option: str, default: T, choices: Mapping[str, T]) -> T:
        return self.convert(option, default, lambda text: choice(text, choices))

    def children(self, option: str) -> Section | None:
        self._read.add(option)
        node = self.section.entries.get(option)
        if node is not None and not isinstance(node, Section):
            self.complain("a section was expected", option, at_key=True)
            return None
        return node

    def mark_read(self, option: str) -> None:
        self._read.add(option)

    def not_implemented(self, options: Mapping[str, Harmless]) -> None:
        """Complain of each of these options unless its value is harmless."""
        for name, node in self.section.entries.items():
            # Suffixed names, cert1 and the like, stand in the table without their suffix.
            harmless = options.get(name)
            if harmless is None:
                continue
            self._read.add(name)
            text = node.text.strip().lower() if isinstance(node, Scalar) else None
            if text is None or not harmless(text):
                value = f" ({shown(text)})" if text else ""
                self.complain(f"the option '{name}'{value} is not implemented yet", name, at_key=True)

    def finish(self, known: Sequence[str] = ()) -> None:
        """Complain of everything that was not read; `known` are further names for "did you mean"."""
        names = [*self._read, *known]
        for name, node in self.section.entries.items():
            if name not in self._read:
                what = "section" if isinstance(node, Section) else "option"
                self.complain(f"unknown {what} '{shown(name)}'{suggestion(name, names)}", name, at_key=True)


def split(value: Scalar) -> list[Scalar]:
    """At commas, blanks around them dropped, empty parts too: as swanctl does."""
    return [Scalar(part.strip(b" "), value.position, value.key_position) for part in value.value.split(b",") if part.strip(b" ")]


def suggestion(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [other for other in names if other != name], n=1, cutoff=0.7)
    return f", did you mean '{close[0]}'?" if close else ""


def shown(text: str) -> str:
    """Text from outside, fit for a line of a log."""
    text = visible(text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def visible(text: str) -> str:
    """Without control characters and their like."""
    return "".join(character if character.isprintable() else "?" for character in text)


def printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("characters that cannot be printed")
    return text


def boolean(text: str) -> bool:
    if (value := _BOOLEANS.get(text.lower())) is None:
        raise ValueError(f"'{shown(text)}' is neither yes nor no")
    return value


def integer(text: str, minimum: int = 0, maximum: int = 2**32 - 1) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"'{shown(text)}' is not a number")
    value = int(text, 16 if text[:2].lower() == "0x" else 10)
    if not minimum <= value <= maximum:
        raise ValueError(f"{value} is not within {minimum} to {maximum}")
    return value


def account(text: str) -> str:
    """A user or a group."""
    if not _ACCOUNT.fullmatch(text):
        raise ValueError(f"'{shown(text)}' is neither a user's or group's name nor a number")
    return text


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `4h` or `1d`."""
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise ValueError(f"'{shown(text)}' is not a time, such as 90s, 15m, 4h or 1d")
    value = integer(match[1], 0, 2**64) * _SECONDS_OF[match[2].lower()]
    if value > MAX_SECONDS:
        raise ValueError(f"'{shown(text)}' is longer than {MAX_SECONDS} seconds")
    return float(value)


def octets(text: str) -> int:
    """`1000`, `500K`, `20M` or `1G`, powers of 1024."""
    match = _OCTETS.fullmatch(text)
    if match is None:
        raise ValueError(f"'{shown(text)}' is not a volume, such as 1000, 500K, 20M or 1G")
    value = integer(match[1], 0, 2**70) * _OCTETS_OF[match[2].lower()]
    if value > MAX_OCTETS:
        raise ValueError(f"'{shown(text)}' is 2^63 bytes or more")
    return value


def choice(text: str, choices: Mapping[str, T]) -> T:
    if (key := text.lower()) not in choices:
        raise ValueError(f"'{shown(text)}' is not one of {', '.join(choices)}{suggestion(key, list(choices))}")
    return choices[key]


def never(_text: str) -> bool:
    return False


def is_no(text: str) -> bool:
    return _BOOLEANS.get(text) is False


def is_yes(text: str) -> bool:
    return _BOOLEANS.get(text) is True


def is_zero(text: str) -> bool:
    """A number, time, mark or DSCP of zero."""
    return bool(re.fullmatch(r"(0x)?0+ *[smhd]?(/0x0+)?", text))


def one_of(*texts: str) -> Harmless:
    return lambda text: text in texts

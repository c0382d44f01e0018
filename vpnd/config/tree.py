"""Message trees: what VICI carries and what a configuration file becomes. Sections of values, lists and sections, in order.

Keys and values remember their place when they came from a file; over the control socket they have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vpnd.config.errors import Position

Plain = Mapping[str, "str | bytes | int | list[str] | list[bytes] | Plain"]
"""A tree as literals: what handlers and tests write."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value. VICI values are blobs; text is UTF-8. May be a secret, hence no repr of it."""

    value: bytes = field(repr=False)
    position: Position | None = None
    key_position: Position | None = None

    @property
    def text(self) -> str:
        """Bytes that are no UTF-8 become U+FFFD, which no option accepts."""
        return self.value.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Items:
    """A list of values."""

    items: tuple[Scalar, ...]
    key_position: Position | None = None

    @property
    def position(self) -> Position | None:
        return self.items[0].position if self.items else self.key_position


@dataclass(slots=True)
class Section:
    """Named entries in their order; a name is there once."""

    entries: dict[str, Node] = field(default_factory=dict)
    key_position: Position | None = None

    @property
    def position(self) -> Position | None:
        return self.key_position

    def sections(self) -> Iterator[tuple[str, Section]]:
        return ((name, node) for name, node in self.entries.items() if isinstance(node, Section))

    def section(self, name: str) -> Section | None:
        node = self.entries.get(name)
        return node if isinstance(node, Section) else None

    def text(self, name: str) -> str | None:
        """The value as text; None when there is none or it is not a plain value."""
        node = self.entries.get(name)
        return node.text if isinstance(node, Scalar) else None

    def blob(self, name: str) -> bytes | None:
        node = self.entries.get(name)
        return node.value if isinstance(node, Scalar) else None

    @classmethod
    def of(cls, plain: Plain) -> Section:
        section = cls()
        for key, value in plain.items():
            if isinstance(value, Mapping):
                section.entries[key] = cls.of(value)
            elif isinstance(value, list):
                section.entries[key] = Items(tuple(_scalar(item) for item in value))
            else:
                section.entries[key] = _scalar(value)
        return section

    def plain(self) -> dict[str, object]:
        """Text, lists of text and dictionaries; for output, so never for a tree with secrets."""
        result: dict[str, object] = {}
        for key, node in self.entries.items():
            if isinstance(node, Section):
                result[key] = node.plain()
            elif isinstance(node, Items):
                result[key] = [item.text for item in node.items]
            else:
                result[key] = node.text
        return result


Node = Scalar | Items | Section


def _scalar(value: str | bytes | int) -> Scalar:
    return Scalar(value if isinstance(value, bytes) else str(value).encode())

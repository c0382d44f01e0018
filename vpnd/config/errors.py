"""What is wrong with a configuration, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Position(NamedTuple):
    """A place in a file; line and column count from 1, columns in characters."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class ConfigError(Exception):
    """One complaint. `path` is the dotted option, `position` its place where it came from a file. Never holds a secret."""

    def __init__(self, message: str, *, path: str = "", position: Position | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.position = position

    @property
    def file(self) -> str | None:
        return self.position.file if self.position else None

    @property
    def line(self) -> int | None:
        return self.position.line if self.position else None

    @property
    def column(self) -> int | None:
        return self.position.column if self.position else None

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.position) if self.position else "", self.path, self.message) if part)


class ConfigErrors(ConfigError):
    """All complaints about one configuration, in the order of the file; at least one."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)

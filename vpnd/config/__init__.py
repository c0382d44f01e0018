"""Configuration: the grammar of swanctl.conf to the typed model, with file, line, column and dotted path in every complaint."""

from __future__ import annotations

from pathlib import Path

from vpnd.config.errors import ConfigError, ConfigErrors, Position
from vpnd.config.model import LoadedConfiguration

__all__ = ["ConfigError", "ConfigErrors", "LoadedConfiguration", "Position", "load"]


def load(path: Path) -> LoadedConfiguration:
    """Read a file, what it includes, and the credentials beside it. Raises ConfigErrors with everything that is wrong."""
    raise NotImplementedError
